"""From a command line to typed configurations. Hydra composes, then everything is a dataclass and nothing is a dict."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.explain import explain, known_keys, mappings, no_such_key
from trainer.config import ConfigError, TrainConfig
from trainer.trainer import TrainingDiverged

CONFIG_DIR = str(Path(__file__).resolve().parent.parent / "configs")
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError)
"""What Hydra raises for wrong overrides and files; the last two for a group that is set to what is no name."""

# Where Hydra finds hydra/launcher=slurm: it looks through the path for modules of the package hydra_plugins.
sys.path.append(str(Path(__file__).resolve().parent / "slurm" / "plugin"))

Config = TypeVar("Config")


@dataclass(frozen=True)
class Program(Generic[Config]):
    """What an entry point is configured by: configs/NAME.yaml over a dataclass."""

    name: str
    schema: type[Config]
    of_sweep: Callable[[Config, str], None]  # gives a job of --multirun places of its own, by its name

    def __post_init__(self) -> None:
        ConfigStore.instance().store(name=f"{self.name}_schema", node=self.schema)


def _own_run_dir(config: TrainConfig, name: str) -> None:
    config.run.dir = str(Path(config.run.dir) / name)
    config.run.name = f"{config.run.name}-{name}"


TRAIN = Program("train", TrainConfig, _own_run_dir)


def run_jobs(arguments: list[str], job: Callable[[TrainConfig], None]) -> None:
    """`run_program` of launch/train.py."""
    run_program(TRAIN, arguments, job)


def run_program(program: Program[Config], arguments: list[str], job: Callable[[Config], None]) -> None:
    """Call `job` with each configuration the command line asks for: one, or every point of a `--multirun` sweep.

    Plain overrides are composed here, so that every wrong one is named at once. Hydra's own flags (--multirun, --cfg,
    --help, ...) go to Hydra's own main; under --multirun each job runs in a folder of its own below run.dir, named by
    the values that were swept over, so a sweep that is started again continues. A point that cannot be run, or
    diverges, does not keep the others from running; any other failure ends the sweep. Raises ConfigError, and what
    `job` raises.
    """
    if not any(a.startswith("-") for a in arguments):
        job(compose_for(program, arguments))
        return
    failed: dict[str, Exception] = {}  # name of a job to its failure

    def task(config: DictConfig) -> None:
        if failed and not isinstance(list(failed.values())[-1], (ConfigError, TrainingDiverged)):
            return
        name = name_of_point(arguments, HydraConfig.get().overrides.task)
        try:
            typed = _to_object(program, config)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                program.of_sweep(typed, name)
            job(typed)
        except Exception as error:  # Hydra would go on with the next job, preempted or not
            failed[name] = error

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own reporting
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(config_path=CONFIG_DIR, config_name=program.name, version_base="1.3")(task)()
    except COMPOSITION_ERRORS as error:
        raise ConfigError([explain(error, schema=program.schema)]) from None
    _raise(failed)


def name_of_point(arguments: Iterable[str], overrides: Iterable[str]) -> str:
    """What sets one point of a sweep apart from the others, as the name of a folder.

    arguments: of the sweep, with all values. overrides: of the point.
    """
    sweep = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and not a.startswith("-")])
    swept = [override.key_or_group for override in sweep if override.is_sweep_override()]
    now = [o for o in overrides if o.partition("=")[0].lstrip("+") in swept]
    return ",".join(now).replace("/", "_") or "0"


def _raise(failed: Mapping[str, Exception]) -> None:
    """Raise what says most about a sweep's failures: the one that ended it, or all of them."""
    if not failed:
        return
    last = list(failed.values())[-1]
    if len(failed) == 1 or not isinstance(last, (ConfigError, TrainingDiverged)):
        raise last
    lines = [f"{name}: {error}" for name, error in failed.items()]
    if all(isinstance(error, ConfigError) for error in failed.values()):
        raise ConfigError(lines)
    raise TrainingDiverged("\n".join(lines))


def compose_one(overrides: list[str]) -> TrainConfig:
    """`compose_for` of launch/train.py."""
    return compose_for(TRAIN, overrides)


def compose_for(program: Program[Config], overrides: list[str]) -> Config:
    """One configuration. Raises ConfigError naming each override that is wrong, and why."""
    # Hydra adds keys only where it is told to, and in a dictionary every key is one to add.
    open_keys = tuple(mappings(OmegaConf.structured(program.schema)))
    overrides = [f"++{one}" if one.startswith(_inside(open_keys)) else one for one in overrides]
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        try:
            return _to_object(program, compose(program.name, overrides=overrides))
        except ConfigError:
            raise
        except COMPOSITION_ERRORS as error:
            found = [line for override in overrides if (line := _problem_of(program, override)) is not None]
            raise ConfigError(found or [explain(error, schema=program.schema)]) from None


def _inside(open_keys: Iterable[str]) -> tuple[str, ...]:
    """How overrides of dictionaries, and of what is in them, begin."""
    return tuple(f"{key}{end}" for key in open_keys for end in ("=", "."))


def _problem_of(program: Program[Config], override: str) -> str | None:
    """What is wrong with one override on its own, in one line; None: nothing."""
    try:
        _to_object(program, compose(program.name, overrides=[override]))
        return None
    except ConfigError as error:
        return error.problems[0]
    except COMPOSITION_ERRORS as error:
        return explain(error, override, schema=program.schema)


def _to_object(program: Program[Config], config: DictConfig) -> Config:
    """Raises ConfigError for keys that `+` added and that nothing reads."""
    schema = OmegaConf.structured(program.schema)
    known, free = set(known_keys(schema)), _inside(mappings(schema))
    unknown = [key for key in known_keys(config) if key not in known and not key.startswith(free)]
    if unknown:
        raise ConfigError([no_such_key(key, program.schema) for key in unknown])
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, program.schema)
    return typed
