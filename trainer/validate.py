"""Everything that can be wrong with a configuration, found at once, before any process group or device exists."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from data.config import DataConfig, parts
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
from trainer.config import NONFINITE, CheckpointConfig, ConfigError, LoggingConfig, LoopConfig, TrainConfig
from trainer.resilience import launcher_problems
from trainer.schedule import problems as schedule_problems
from trainer.sequence import problems as sequence_problems
from trainer.sinks import WANDB_MODES
from trainer.validate_chunks import chunk_problems
from trainer.validate_experts import expert_problems
from trainer.validate_fp8 import fp8_problems
from trainer.validate_optim import optimizer_problems
from trainer.validate_tensor import tensor_parallel_problems


def finalize(config: TrainConfig, *, world_size: int) -> TrainConfig:
    """Derive what is left open (shape and tokenizer of a Hugging Face folder) and check everything at once.

    Needs no process group and no device. Raises ConfigError with every problem found.
    """
    model = config.model
    if model.path is not None:
        model = replace(model, path=str(Path(model.path).expanduser()))
        config = replace(config, model=model)
    found = model_problems(model, seq_len=config.train.seq_len)
    if not found:
        try:
            model = resolve_model(model)
        except ValueError as error:
            found.append(str(error))
        else:
            found += model_problems(model, seq_len=config.train.seq_len)
    found += expert_problems(config, model, world_size)
    found += activation_checkpoint_problems(
        ActivationCheckpoint(mode=model.activation_checkpoint, save=model.activation_checkpoint_save)
    )
    data, missing = _with_models_tokenizer(config)
    found += missing or data_problems(data)
    found += dims_problems(config.parallel, world_size)
    found += precision_problems(config.precision)
    found += optimizer_problems(config, model, world_size)
    found += schedule_problems(config.schedule, config.optim, config.train.steps)
    found += _loop_problems(config.train)
    found += _checkpoint_problems(config.checkpoint)
    found += _logging_problems(config.logging)
    found += _cross_problems(config, world_size)
    if config.parallel.cp > 1 and not dims_problems(config.parallel, world_size):
        found += sequence_problems(config, model)
    found += tensor_parallel_problems(config, model, world_size)
    found += chunk_problems(config)
    if not (model_problems(model, seq_len=config.train.seq_len) or dims_problems(config.parallel, world_size)):
        found += fp8_problems(config, model)
    found += pipeline_problems(config.parallel, model.num_layers)
    found += launcher_problems(os.environ)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return replace(config, model=model, data=data)


def _with_models_tokenizer(config: TrainConfig) -> tuple[DataConfig, list[str]]:
    """The data with the tokenizer the weights were made for, where they come from a folder and none is named.

    One trained on the text would number its tokens differently, and its ids would all fit the model: the run would go
    on from weights that mean something else, and nothing would look wrong but the loss.
    """
    data, folder = config.data, config.model.path
    only_arrays = all(part.source == "tokens" for part in parts(data))
    if folder is None or data.tokenizer.path is not None or only_arrays:
        return data, []
    if (Path(folder).expanduser() / "tokenizer.json").is_file():
        return replace(data, tokenizer=replace(data.tokenizer, path=folder)), []
    if not Path(folder).expanduser().is_dir():
        return data, []  # has been named
    return data, [
        f"data.tokenizer.path is missing: the weights in model.path={folder} belong to a tokenizer, and the folder has "
        "no tokenizer.json; give the one they were trained with"
    ]


def _at_least(prefix: str, config: object, minimums: dict[str, int]) -> list[str]:
    return [
        f"{prefix}.{name}={getattr(config, name)} must be at least {minimum}"
        for name, minimum in minimums.items()
        if not minimum <= getattr(config, name) < math.inf
    ]


def _one_of(field_name: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [f"{field_name}={value} is unknown; use {', '.join(choices)}"]


def _loop_problems(train: LoopConfig) -> list[str]:
    minimums = {"steps": 1, "seq_len": 1, "global_batch_size": 1, "micro_batch_size": 1, "seed": 0, "grad_clip": 0}
    minimums |= {"max_skipped_steps": 1, "eval_interval": 0, "eval_batches": 1, "sample_tokens": 0}
    found = _at_least("train", train, minimums)
    if not 0 < train.timeout_seconds < math.inf:
        found.append(f"train.timeout_seconds={train.timeout_seconds} must be positive and finite; 600 is usual")
    found += _one_of("train.device", train.device, ("auto", "cpu", "cuda"))
    found += _one_of("train.nonfinite", train.nonfinite, NONFINITE)
    if train.compile and train.compile_backend not in torch._dynamo.list_backends(exclude_tags=()):
        found.append(f"train.compile_backend={train.compile_backend} is not a torch.compile backend; use inductor")
    return found


def _checkpoint_problems(checkpoint: CheckpointConfig) -> list[str]:
    found = _at_least("checkpoint", checkpoint, {"interval": 0, "keep_last": 0, "keep_every": 0})
    if checkpoint.resume not in ("auto", "never") and not Path(checkpoint.resume).expanduser().exists():
        found.append(
            f"checkpoint.resume={checkpoint.resume} does not exist; use auto, never, or the path of a checkpoint or run"
        )
    return found


def _logging_problems(logging: LoggingConfig) -> list[str]:
    found = _one_of("logging.wandb_mode", logging.wandb_mode, WANDB_MODES)
    found += _at_least("logging", logging, {"profile_steps": 0, "profile_after": 0})
    if logging.interval < 1:
        found.append(
            f"logging.interval={logging.interval} must be at least 1; to silence the console use logging.console=false"
        )
    if logging.peak_tflops is not None and not 0 < logging.peak_tflops < math.inf:
        found.append(f"logging.peak_tflops={logging.peak_tflops} must be positive, or null to look it up")
    return found


def _cross_problems(config: TrainConfig, world_size: int) -> list[str]:
    """What only shows when two groups are looked at together."""
    found: list[str] = []
    train, data = config.train, config.data
    if train.eval_interval > 0 and data.validation_fraction == 0:
        found.append(
            f"train.eval_interval={train.eval_interval} with data.validation_fraction=0 has nothing to validate on; "
            "raise the fraction, or use train.eval_interval=0"
        )
    if train.sample_tokens > 0 and data.tokenizer.path is None and all(p.source == "tokens" for p in parts(data)):
        found.append(
            f"train.sample_tokens={train.sample_tokens} needs data.tokenizer.path: a token array does not say which "
            "text its ids stand for; or use train.sample_tokens=0"
        )
    if dims_problems(config.parallel, world_size) or train.micro_batch_size < 1 or train.global_batch_size < 1:
        return found  # the layout is unknown; its own problem has been named
    dp = ParallelDims.resolve(config.parallel, world_size).dp
    if train.global_batch_size % dp:
        below = train.global_batch_size // dp * dp
        nearest = f"{below} or {below + dp}" if below else f"{dp}"
        found.append(
            f"train.global_batch_size={train.global_batch_size} does not divide into {dp} data-parallel ranks; use a "
            f"multiple of {dp}, such as {nearest}"
        )
    chosen = config.model.activation_checkpoint
    split = config.parallel.pp > 1 and config.parallel.pp_schedule in SPLIT_BACKWARD
    if train.compile and split and chosen in ("selective", "budget"):
        found.append(
            f"model.activation_checkpoint={chosen} with train.compile=true picks operations of one graph, which "
            f"parallel.pp_schedule={config.parallel.pp_schedule} parts at every linear layer; use none, full or "
            "offload, pp_schedule=gpipe, 1f1b or interleaved_1f1b, or train.compile=false"
        )
    return found
