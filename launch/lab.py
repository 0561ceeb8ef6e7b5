"""The inference lab: `python launch/lab.py mode=generate model.path=DIR prompts=IN.jsonl out=OUT.jsonl`.

A mode is a file in launch/modes. With `torchrun --nproc-per-node N launch/lab.py parallel.tp=N ...` the model lies over
N ranks. Exit codes: 0 done; 2 configuration error; 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from inference.config import SamplingConfig
from launch.compose import Program, run_program
from launch.errors import exit_code_of
from launch.lab_config import LabConfig, common_problems, run_mode
from launch.modes import bench, chat, compare, eval, generate, parity, serve
from trainer.config import ConfigError


class Mode(NamedTuple):
    """What can be done with a model."""

    run: Callable[[LabConfig], None]
    problems: Callable[[LabConfig], list[str]]  # what is wrong with its own settings, before a model is read
    over_ranks: bool = True  # whether the model may lie over several processes
    reads_sampling: tuple[str, ...] | None = None  # fields of `sampling` that it reads; None: all


MODES = {
    "generate": Mode(generate.generate, generate.problems),
    "chat": Mode(chat.chat, chat.problems),
    "serve": Mode(serve.serve, serve.problems),
    "bench": Mode(bench.bench, bench.problems),
    "eval": Mode(eval.evaluate, eval.problems, reads_sampling=()),
    "compare": Mode(compare.compare, compare.problems, over_ranks=False),
    "parity": Mode(parity.parity, parity.problems, reads_sampling=("add_special_tokens",)),
}


def _no_sweeps(config: LabConfig, name: str) -> None:
    raise ConfigError(["--multirun is for training; run launch/lab.py once for each point"])


LAB = Program("lab", LabConfig, _no_sweeps)


def lab(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    run_program(LAB, arguments, _run)


def problems(config: LabConfig) -> list[str]:
    """Every reason why this cannot be done that needs no model to be seen; one line each."""
    if config.mode not in MODES:
        return [f"mode={config.mode} is unknown; use {', '.join(MODES)}", *common_problems(config)]
    found = MODES[config.mode].problems(config) + common_problems(config) + _unread_sampling(config)
    if config.parallel.tp > 1 and not MODES[config.mode].over_ranks:
        found.append(f"mode={config.mode} runs in one process; use parallel.tp=1, and start it with python")
    return found


def _unread_sampling(config: LabConfig) -> list[str]:
    """Fields of `sampling` that are set and have no effect."""
    read, default = MODES[config.mode].reads_sampling, SamplingConfig()
    if read is None:
        return []
    changed = {field.name for field in fields(default)} - set(read)
    return [
        f"sampling.{name} is set and has no effect with mode={config.mode}; leave it out"
        for name in sorted(changed)
        if getattr(config.sampling, name) != getattr(default, name)
    ]


def _run(config: LabConfig) -> None:
    if found := problems(config):
        raise ConfigError(found)
    run_mode(MODES[config.mode].run, config)


if __name__ == "__main__":
    sys.exit(exit_code_of(lab, sys.argv[1:]))
