"""Which model the weights of a checkpoint belong to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.registry import RUN_TIME_FIELDS
from trainer.checkpoint import read_extra
from trainer.config import ConfigError, TrainConfig


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """The fields of a resolved model that say what its weights mean; others may change between runs."""
    return {name: value for name, value in asdict(config).items() if name not in (*RUN_TIME_FIELDS, "init_std")}


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """What every process of a run must have been told alike: all but where files lie on its node."""

    def without_places(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_places(item) for key, item in value.items() if key not in ("path", "cache_dir")}
        return [without_places(item) for item in value] if isinstance(value, list) else value

    return without_places(asdict(config))


def check_same_model(path: Path, config: ModelConfig) -> None:
    """Raise ConfigError if the checkpoint is of a model of another shape, naming each field that differs."""
    theirs, ours = read_extra(path)["model"], model_identity(config)
    different = [
        f"model.{name}={ours.get(name)} (checkpoint: {theirs.get(name)})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        raise ConfigError(
            [f"checkpoint {path} is of another model: {', '.join(different)}; use its model, or another run.dir"]
        )
