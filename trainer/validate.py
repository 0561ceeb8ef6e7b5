"""Everything that can be wrong with a configuration, found at once, before any process group or device exists."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from data.config import problems as data_problems
from models.config import problems as model_problems
from models.registry import resolve_model
from parallel.activation_checkpoint import ActivationCheckpoint
from parallel.activation_checkpoint import problems as activation_checkpoint_problems
from parallel.dims import ParallelDims
from parallel.dims import problems as dims_problems
from parallel.pipeline.layout import problems as pipeline_problems
from parallel.pipeline.schedules import SPLIT_BACKWARD
from parallel.precision import problems as precision_problems
from trainer.config import NONFINITE, CheckpointConfig, ConfigError, LoopConfig, TrainConfig
from trainer.resilience import launcher_problems
from trainer.schedule import problems as schedule_problems


def finalize(config: TrainConfig, *, world_size: int) -> TrainConfig:
    """Derive what is left open (the shape of a Hugging Face folder) and check everything at once.

    Needs no process group and no device. Raises ConfigError with every problem found.
    """
    model = config.model
    found = model_problems(model, seq_len=config.train.seq_len)
    if not found:
        try:
            model = resolve_model(model)
        except ValueError as error:
            found.append(str(error))
        else:
            found += model_problems(model, seq_len=config.train.seq_len)
    found += activation_checkpoint_problems(
        ActivationCheckpoint(mode=model.activation_checkpoint, save=model.activation_checkpoint_save)
    )
    found += data_problems(config.data)
    found += dims_problems(config.parallel, world_size)
    found += precision_problems(config.precision)
    found += schedule_problems(config.schedule, config.optim, config.train.steps)
    found += _loop_problems(config.train)
    found += _checkpoint_problems(config.checkpoint)
    found += _cross_problems(config, world_size)
    found += pipeline_problems(config.parallel, model.num_layers)
    found += launcher_problems(os.environ)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return replace(config, model=model)


def _at_least(prefix: str, config: object, minimums: dict[str, int]) -> list[str]:
    return [
        f"{prefix}.{name}={getattr(config, name)} must be at least {minimum}"
        for name, minimum in minimums.items()
        if getattr(config, name) < minimum
    ]


def _one_of(field_name: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [f"{field_name}={value} is unknown; use {', '.join(choices)}"]


def _loop_problems(train: LoopConfig) -> list[str]:
    minimums = {"steps": 1, "seq_len": 1, "global_batch_size": 1, "micro_batch_size": 1, "seed": 0, "grad_clip": 0}
    minimums |= {"max_skipped_steps": 1, "eval_interval": 0, "eval_batches": 1, "sample_tokens": 0}
    found = _at_least("train", train, minimums)
    if train.timeout_seconds <= 0:
        found.append(f"train.timeout_seconds={train.timeout_seconds} must be positive; 600 is usual")
    found += _one_of("train.device", train.device, ("auto", "cpu", "cuda"))
    found += _one_of("train.nonfinite", train.nonfinite, NONFINITE)
    if train.compile and train.compile_backend not in torch._dynamo.list_backends(exclude_tags=()):
        found.append(f"train.compile_backend={train.compile_backend} is not a torch.compile backend; use inductor")
    return found


def _checkpoint_problems(checkpoint: CheckpointConfig) -> list[str]:
    return _at_least("checkpoint", checkpoint, {"interval": 0, "keep_last": 0, "keep_every": 0})


def _cross_problems(config: TrainConfig, world_size: int) -> list[str]:
    """What only shows when two groups are looked at together."""
    found: list[str] = []
    train = config.train
    if dims_problems(config.parallel, world_size) or train.micro_batch_size < 1 or train.global_batch_size < 1:
        return found  # the layout is unknown; its own problem has been named
    dp = ParallelDims.resolve(config.parallel, world_size).dp
    together = dp * train.micro_batch_size
    if train.global_batch_size % together:
        nearest = max(together, round(train.global_batch_size / together) * together)
        found.append(
            f"train.global_batch_size={train.global_batch_size} does not divide into {dp} data-parallel ranks x "
            f"train.micro_batch_size={train.micro_batch_size}; use a multiple of {together}, such as {nearest}"
        )
    if train.compile and config.parallel.pp > 1 and config.parallel.pp_schedule in SPLIT_BACKWARD:
        found.append(
            f"train.compile=true does not work with parallel.pp_schedule={config.parallel.pp_schedule}, which puts "
            "weight gradients off by a side effect that a compiled block cannot have; use gpipe, 1f1b or "
            "interleaved_1f1b, or train.compile=false"
        )
    if config.logging.wandb_mode not in ("online", "offline"):
        found.append(f"logging.wandb_mode={config.logging.wandb_mode} is unknown; use offline or online")
    return found
