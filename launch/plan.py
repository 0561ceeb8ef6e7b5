"""What a run will cost: `python launch/plan.py +exp=zero3_13b plan.gpus=8`, the command line of launch/train.py.

`--search` (or plan.search=true) asks for the best layout instead: what the command line sets of it stays as it is.

Of adapters, and of recipes with passes beside those of training, bytes of state are all that is planned (planner/
state_plan.py). No GPU and no memory are needed. Exit codes: 0 done; 2 configuration error; 1 anything else.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from data.config import DataConfig
from launch.compose import Program, run_program
from launch.errors import exit_code_of
from launch.plan_search import Found, held_by, search
from models.registry import resolve_model
from parallel.mesh import world_size_from_env
from planner.hardware import Hardware, world_problems
from planner.hardware_files import read_hardware
from planner.job import Job
from planner.picture import problems as picture_problems
from planner.plan import make_plan
from planner.report import as_text
from planner.search_report import as_object, as_page
from planner.state_plan import make_state_plan, state_as_text
from planner.steptime import step_time
from trainer.config import ConfigError, RecipeConfig, TrainConfig, configuration_errors
from trainer.frozen import problems_beside
from trainer.predicted import job_of, only_state, without_state
from trainer.recipes import RECIPES
from trainer.recipes.dpo import needs_reference
from trainer.reference import reference_problems
from trainer.validate import finalize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("text", "json")


@dataclass
class PlanOptions:
    """`plan`."""

    gpus: int | None = None  # None: WORLD_SIZE, else the product of the degrees that parallel sets
    hardware: str = "h200"  # a file of configs/hardware, or a path of one
    tokens: float | None = None  # of the whole run, for days and cost; None: train.steps times those of a step
    mtbf_hours: float | None = None  # between failures of one GPU; None: mtbf_gpu_hours of the hardware's file
    search: bool = False  # for the fastest layout that fits
    picture: str | None = None  # file to draw into: roofline, memory and the step


@dataclass
class PlanConfig(TrainConfig):
    """A run, and what is asked about it."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    format: str = "text"  # one of FORMATS


def _no_sweeps(config: PlanConfig, name: str) -> None:
    raise ConfigError(["--multirun is for training; run launch/plan.py once for each point"])


PLAN = Program("plan", PlanConfig, _no_sweeps)


def plan(arguments: list[str]) -> None:
    """Print the plan of what the command line asks for."""
    arguments = ["plan.search=true" if argument == "--search" else argument for argument in arguments]
    run_program(PLAN, arguments, partial(_print_plan, arguments=arguments))


def plan_of(config: PlanConfig) -> dict[str, Any]:
    """The plan as planner.plan.make_plan gives it. Raises ConfigError for what the trainer would not accept either.

    Data need not be there: they are not looked at, and attention is taken to be causal, without document masks.
    """
    hardware, world_size = _asked(config)
    return _plan_of(config, _job(config, world_size), hardware)


def draw_plan(config: PlanConfig) -> Figure:
    """The picture of the plan."""
    from planner.picture import draw

    hardware, world_size = _asked(config)
    job = _job(config, world_size)
    return draw(_plan_of(config, job, hardware), job, step_time(job, hardware), hardware)


def _job(config: PlanConfig, world_size: int) -> Job:
    """Raises ConfigError."""
    train = finalize(_train_config(config), world_size=world_size)
    with configuration_errors():
        if config.model.score:
            train.model = resolve_model(replace(train.model, score=True))
        beside = RECIPES[config.recipe.name]().frozen_beside(replace(train, recipe=config.recipe))
    return job_of(train, world_size=world_size, beside=beside)


def _plan_of(config: PlanConfig, job: Job, hardware: Hardware) -> dict[str, Any]:
    if because := only_state(config):
        return make_state_plan(job, hardware, because=because)
    tokens = config.plan.tokens or float(config.train.steps * job.tokens_per_step)
    return make_plan(job, hardware, tokens=tokens, asynchronous=config.checkpoint.asynchronous)


def search_of(config: PlanConfig, arguments: Sequence[str]) -> tuple[Found, Hardware]:
    """The best layouts for the command line `arguments`, of which config was composed. Raises ConfigError."""
    hardware, world_size = _asked(config)
    held = held_by(arguments)
    train = _train_config(config)
    return search(train, hardware, world_size=world_size, held=held, arguments=arguments), hardware


def _asked(config: PlanConfig) -> tuple[Hardware, int]:
    if problems := _problems(config):
        raise ConfigError(problems)
    hardware = load_hardware(config.plan.hardware)
    if config.plan.mtbf_hours is not None:
        hardware = replace(hardware, mtbf_gpu_hours=config.plan.mtbf_hours)
    world_size = num_gpus(config)
    if problems := world_problems(world_size, hardware):
        raise ConfigError([f"plan.gpus={world_size}: {line}" for line in problems])
    return hardware, world_size


def _train_config(config: PlanConfig) -> TrainConfig:
    train = TrainConfig(**{f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(TrainConfig)})
    # What recipes and heads add is known without their data, which would have to be there.
    train.data, train.recipe = DataConfig(source="stdlib"), RecipeConfig()
    train.model.score = False
    return train


def num_gpus(config: PlanConfig) -> int:
    """plan.gpus, or WORLD_SIZE, or the product of the degrees, with dp_shard=-1 as 1."""
    parallel = config.parallel
    product = math.prod((parallel.pp, parallel.dp_replicate, max(parallel.dp_shard, 1), parallel.cp, parallel.tp))
    return config.plan.gpus or max(world_size_from_env(), product)


def load_hardware(name: str) -> Hardware:
    """configs/hardware/NAME.yaml, or the file of that path. Raises ConfigError."""
    hardware, wrong = read_hardware(name)
    if wrong:
        raise ConfigError([f"plan.hardware={line}" for line in wrong])
    return hardware


def _problems(config: PlanConfig) -> list[str]:
    found = without_state(config) + _recipe_problems(config)
    asked = {"search": "plan.search=true", "picture": f"plan.picture={config.plan.picture}"}
    for what, said in asked.items():
        if getattr(config.plan, what) and (unknown := only_state(config)):
            found.append(f"{said} needs more than bytes of state; not planned: {unknown[0]}")
    if config.format not in FORMATS:
        found.append(f"format={config.format} is unknown; use {' or '.join(FORMATS)}")
    if config.plan.picture is not None:
        found += picture_problems(config.plan.picture)
        if config.plan.search:
            found.append("plan.picture draws one layout; run the one that plan.search=true finds")
    if config.plan.gpus is not None and config.plan.gpus < 1:
        found.append(f"plan.gpus={config.plan.gpus} must be at least 1")
    if config.plan.search and config.plan.gpus is None and world_size_from_env() == 1:
        found.append("plan.search=true looks for a layout of so many GPUs; set plan.gpus, e.g. plan.gpus=8")
    if config.plan.tokens is not None and not 0 < config.plan.tokens < math.inf:
        found.append(f"plan.tokens={config.plan.tokens} must be positive and finite")
    if config.plan.mtbf_hours is not None and not 0 < config.plan.mtbf_hours < math.inf:
        found.append(f"plan.mtbf_hours={config.plan.mtbf_hours} must be positive and finite")
    return found


def _recipe_problems(config: PlanConfig) -> list[str]:
    """What is wrong with a recipe as far as it is planned for: the models beside the one that is trained."""
    recipe, found = config.recipe, []
    if config.model.score != (recipe.name == "reward"):
        score = str(config.model.score).lower()
        found.append(
            f"model.score={score} with recipe.name={recipe.name}: reward models, and no others, have that head"
        )
    if recipe.name == "distill" and recipe.teacher_path is None and recipe.teacher_cache is None:
        found.append("recipe.teacher_path is missing: give the Hugging Face folder of the model to learn from")
    if config.model.score and config.adapter.name != "none":
        found.append(
            f"adapter.name={config.adapter.name} with model.score=true: its head is trained as a whole; use none"
        )
    if recipe.name == "kto" or (recipe.name == "dpo" and needs_reference(recipe) and recipe.reference != "precomputed"):
        found += reference_problems(config)
    if recipe.name == "distill":
        found += problems_beside("recipe.teacher_path", recipe.teacher_path, config)
    return found


def _print_plan(config: PlanConfig, *, arguments: Sequence[str]) -> None:
    if config.plan.search:
        found, hardware = search_of(config, arguments)
        parts = (found.ranking, found.others, found.command, hardware)
        print(json.dumps(as_object(*parts), indent=2) if config.format == "json" else as_page(*parts))
        return
    if config.plan.picture is not None:
        path = Path(config.plan.picture).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_plan(config).savefig(path, dpi=110)
    made = plan_of(config)
    page = state_as_text if only_state(config) else as_text
    print(json.dumps(made, indent=2) if config.format == "json" else page(made), end="\n" * (config.format == "json"))


if __name__ == "__main__":
    sys.exit(exit_code_of(plan, sys.argv[1:]))
