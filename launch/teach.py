"""Teach: `torchrun --nproc-per-node 8 launch/teach.py recipe.teacher_path=HF_DIR recipe.teacher_cache=DIR data=...`.

Writes a teacher's likeliest words after every token of the data, once, for `launch/train.py recipe=distill` with the
same arguments (recipe.teacher_offload apart, which is of the teacher that is loaded here). Started again, it goes on
where it stopped. Exit codes: 0 done; 2 configuration error; 1 anything else.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from launch.compose import Program, run_program
from launch.errors import exit_code_of
from parallel.mesh import rank_from_env, world_size_from_env
from trainer.config import ConfigError, TrainConfig
from trainer.teach import write_teacher_cache
from trainer.validate import finalize


@dataclass
class TeachOptions:
    """`teach`."""

    top_k: int = 64  # likeliest words that are kept after each token; the others together are one more outcome
    block_tokens: int = 2**18  # about how many tokens are computed between two files


@dataclass
class TeachConfig(TrainConfig):
    """A run that will learn from what is written, and how much of it is kept."""

    teach: TeachOptions = field(default_factory=TeachOptions)


def _no_sweeps(config: TeachConfig, name: str) -> None:
    raise ConfigError(["--multirun is for training; run launch/teach.py once for each teacher"])


TEACH = Program("teach", TeachConfig, _no_sweeps)


def teach(arguments: list[str]) -> None:
    """Write what the command line asks for."""
    run_program(TEACH, arguments, teach_one)


def teach_one(config: TeachConfig) -> None:
    """Validate, write, report."""
    found = problems(config)
    if found:
        raise ConfigError(found)
    # A run that learns from the folder loads no teacher, and validation is that run's; here one is loaded.
    learning = replace(config, recipe=replace(config.recipe, teacher_offload=False))
    resolved = finalize(learning, world_size=world_size_from_env())
    resolved.recipe.teacher_offload = config.recipe.teacher_offload
    options, folder = config.teach, config.recipe.teacher_cache
    written = write_teacher_cache(resolved, k=options.top_k, block_tokens=options.block_tokens, say=say)
    say(f"{folder}: {written.rows:,} rows in {written.blocks} blocks, {written.new} of them new")


def problems(config: TeachConfig) -> list[str]:
    """What is asked of a run that only learns, and is wrong here."""
    recipe, found = config.recipe, list[str]()
    if recipe.name != "distill":
        found.append(f"recipe.name={recipe.name} learns from no teacher; use recipe=distill")
    if recipe.teacher_path is None:
        found.append("recipe.teacher_path is missing: give the Hugging Face folder of the teacher")
    if recipe.teacher_cache is None:
        found.append("recipe.teacher_cache is missing: give the folder to write")
    for name in ("top_k", "block_tokens"):
        if (value := getattr(config.teach, name)) < 1:
            found.append(f"teach.{name}={value} must be at least 1; {getattr(TeachOptions(), name)} is usual")
    return found


def say(text: str) -> None:
    if rank_from_env() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(teach, sys.argv[1:]))
