"""From a command line to typed configurations. Hydra composes, then everything is a dataclass and nothing is a dict."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import ConfigError, TrainConfig

CONFIG_DIR = str(Path(__file__).resolve().parent.parent / "configs")

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def run_jobs(arguments: list[str], job: Callable[[TrainConfig], None]) -> None:
    """Call `job` with each configuration the command line asks for: one, or every point of a `--multirun` sweep.

    Plain overrides are composed here, so that every wrong one is named at once. Hydra's own flags (--multirun, --cfg,
    --help, ...) go to Hydra's own main; under --multirun each job runs in a folder of its own below run.dir, named by
    its overrides, so a sweep that is started again continues. Raises ConfigError.
    """
    if not any(a.startswith("-") for a in arguments):
        job(compose_one(arguments))
        return

    def task(config: DictConfig) -> None:
        typed = _to_object(config)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            typed.run.dir = HydraConfig.get().runtime.output_dir
            typed.run.name = f"{typed.run.name}-{HydraConfig.get().job.num}"
        job(typed)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own reporting
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(config_path=CONFIG_DIR, config_name="train", version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_first_line(error)]) from None


def compose_one(overrides: list[str]) -> TrainConfig:
    """One configuration. Raises ConfigError naming each override that is wrong, and why."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        try:
            return _to_object(compose("train", overrides=overrides))
        except (HydraException, OmegaConfBaseException) as error:
            found = [line for override in overrides if (line := _problem_of(override)) is not None]
            raise ConfigError(found or [_first_line(error)]) from None


def _to_object(config: DictConfig) -> TrainConfig:
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, TrainConfig)
    return typed


def _problem_of(override: str) -> str | None:
    """What is wrong with one override on its own, in one line: the override, the cause, the fix. None: nothing."""
    try:
        _to_object(compose("train", overrides=[override]))
        return None
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error)
        first_line = _first_line(error)
    key = override.partition("=")[0].lstrip("+~")
    options = re.search(r"Could not find '([^']*)'.*?Available options in '[^']*':\s*(.*?)(?:\n\S|\Z)", text, re.S)
    if options:
        return (
            f"{override}: there is no configs/{options.group(1)}.yaml; use one of {', '.join(options.group(2).split())}"
        )
    if key not in known_keys() and ("not in struct" in text or "Could not override" in text):
        close = difflib.get_close_matches(key, known_keys(), n=1)
        return f"{override}: there is no key {key}" + (f"; did you mean {close[0]}?" if close else "")
    return f"{override}: {first_line}"


def known_keys(node: Any = None, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    node = OmegaConf.structured(TrainConfig) if node is None else node
    keys = []
    for key in node:
        keys.append(f"{prefix}{key}")
        if isinstance(node[key], DictConfig):
            keys += known_keys(node[key], f"{prefix}{key}.")
    return keys


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
