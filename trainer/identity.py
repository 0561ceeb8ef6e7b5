"""Which model the weights of a checkpoint belong to."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.config import DataConfig, parts
from models.config import ModelConfig
from models.registry import shape_of
from parallel.precision import PrecisionConfig
from trainer.checkpoint import read_extra
from trainer.config import ConfigError, TrainConfig
from trainer.masking import mask_secrets


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """The fields of a resolved model that say what its weights mean; others may change between runs."""
    shape = shape_of(config)
    whole = asdict(replace(config, **shape))
    # Heads for a model are not the model.
    heads = {name: getattr(config.speculator, name) for name in ("kind", "num_heads", "num_layers")}
    return {name: whole[name] for name in shape if name != "init_std"} | {"speculator": heads}


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """What every process of a run must have been told alike: all but where files lie on its node."""

    def without_places(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_places(item) for key, item in value.items() if key not in ("path", "cache_dir")}
        return [without_places(item) for item in value] if isinstance(value, list) else value

    return without_places(asdict(config))


def check_same_model(path: Path, config: ModelConfig) -> None:
    """Raise ConfigError if the checkpoint is of a model of another shape, naming each field that differs."""
    ours = model_identity(config)
    # A checkpoint from before a field was there is of a model without what the field adds: of its default.
    theirs = model_identity(ModelConfig()) | read_extra(path)["model"]
    different = [
        f"model.{name}={ours.get(name)} (checkpoint: {theirs.get(name)})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        raise ConfigError(
            [f"checkpoint {path} is of another model: {', '.join(different)}; use its model, or another run.dir"]
        )


def check_same_moments(path: Path, config: TrainConfig) -> None:
    """Raise ConfigError if the moments in a checkpoint are kept in another form than this run's."""
    extra = read_extra(path)
    if extra.get("weights_only", False):
        return
    saved = extra["config"]["optim"]
    # Before the field was there, moments had the dtype of the master weights.
    theirs = saved.get("state_dtype", extra["config"]["precision"]["master"])
    if config.optim.name == saved["name"] == "adamw" and theirs != config.optim.state_dtype:
        raise ConfigError(
            [
                f"optim.state_dtype={config.optim.state_dtype}, and the moments in {path} are {theirs}; use "
                f"optim.state_dtype={theirs}, or another run.dir"
            ]
        )


def check_same_scaling(path: Path, precision: PrecisionConfig, *, fused_projections: bool) -> None:
    """Raise ConfigError if the checkpoint holds other scales of fp8 than this run goes on from: a state of its own for
    delayed scaling, with a row per layer and step."""
    extra = read_extra(path)
    if extra.get("weights_only", False):
        return

    layers = "model.fused_projections"

    def settings(values: dict[str, Any], fused: bool) -> dict[str, Any]:
        names = ("compute", "fp8_recipe", "fp8_amax_history", "fp8_skip")
        return {f"precision.{name}": values.get(name) for name in names} | {layers: fused}

    def state(values: dict[str, Any]) -> dict[str, Any] | None:
        if (values["precision.compute"], values["precision.fp8_recipe"]) != ("fp8", "tensorwise_delayed"):
            return None
        return {name: values[name] for name in ("precision.fp8_amax_history", "precision.fp8_skip", layers)}

    # Before the field was there, layers were separate.
    were_fused = extra["config"].get("model", {}).get("fused_projections", False)
    theirs, ours = settings(extra["config"]["precision"], were_fused), settings(asdict(precision), fused_projections)
    if state(theirs) != state(ours):
        relevant = [name for name in ours if theirs[name] != ours[name]]
        found = ", ".join(f"{name}={ours[name]} (checkpoint: {theirs[name]})" for name in relevant)
        raise ConfigError(
            [
                f"checkpoint {path} and this run differ in the state of fp8_recipe=tensorwise_delayed: {found}; use "
                "what the checkpoint was made with, or begin a new run from its weights (launch/convert.py)"
            ]
        )


def check_tokenizer_is_known(path: Path, data: DataConfig) -> None:
    """Raise ConfigError if weights from elsewhere (launch/convert.py import) would meet a tokenizer trained here.

    Its ids would fit the model and mean something else: nothing would look wrong but the loss.
    """
    from_text = any(part.source != "tokens" for part in parts(data))
    if read_extra(path).get("weights_only", False) and from_text and data.tokenizer.path is None:
        raise ConfigError(
            [
                f"data.tokenizer.path is missing: {path} has weights from elsewhere, which belong to a tokenizer; give "
                "its tokenizer.json, or the folder the weights were imported from"
            ]
        )


def changed_settings(before: dict[str, Any], config: TrainConfig) -> list[str]:
    """The settings that differ from those a checkpoint was made with, as `group.field=new (was old)`."""
    old, new = _flat(before), _flat(asdict(config))
    return [
        f"{name}={mask_secrets(new.get(name), name)} (was {mask_secrets(old.get(name), name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(("run.", "checkpoint.resume"))
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
