"""Everything that can be wrong with a configuration, found at once, before any process group or device exists."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig, parts
from models.config import problems as model_problems
from models.registry import resolve_model
from parallel.activation_checkpoint import ActivationCheckpoint
from parallel.activation_checkpoint import problems as activation_checkpoint_problems
from parallel.dims import ParallelDims
from parallel.dims import problems as dims_problems
from parallel.pipeline.layout import problems as pipeline_problems
from parallel.pipeline.schedules import SCHEDULES, SPLIT_BACKWARD
from parallel.precision import problems as precision_problems
from parallel.problem import Problem, kind_of, multiples, values, without_advice
from planner.hardware_files import read_hardware
from trainer.activations import problems as activation_problems
from trainer.config import (
    LOSS_KERNELS,
    NONFINITE,
    CheckpointConfig,
    ConfigError,
    LoggingConfig,
    LoopConfig,
    ResilienceConfig,
    TrainConfig,
)
from trainer.recipes import problems as recipe_problems
from trainer.resilience import launcher_problems
from trainer.schedule import problems as schedule_problems
from trainer.sequence import problems as sequence_problems
from trainer.sinks import WANDB_MODES
from trainer.validate_adapter import adapter_run_problems
from trainer.validate_chunks import chunk_problems
from trainer.validate_data import data_problems
from trainer.validate_experts import expert_problems
from trainer.validate_fp8 import fp8_problems
from trainer.validate_graphs import graph_problems
from trainer.validate_invariant import invariant_problems
from trainer.validate_optim import block_problems, optimizer_problems
from trainer.validate_speculator import speculator_run_problems
from trainer.validate_tensor import tensor_parallel_problems
from trainer.validate_unused import unused_problems


def finalize(config: TrainConfig, *, world_size: int) -> TrainConfig:
    """Derive what is left open (shape and tokenizer of a Hugging Face folder) and check everything at once.

    Needs no process group and no device. Raises ConfigError with every problem found, each with the nearest values that
    are legal beside the other settings.
    """
    resolved, found = resolve(config, world_size)
    if found:
        raise ConfigError([with_legal_advice(problem, found, config, world_size) for problem in found])
    return resolved


def find_problems(config: TrainConfig, *, world_size: int) -> list[str]:
    """Every problem of `finalize`, with advice that nobody has tried."""
    return resolve(config, world_size)[1]


def with_legal_advice(problem: str, found: list[str], config: TrainConfig, world_size: int) -> str:
    """The problem with those of the changes it proposes that validation agrees with.

    These mend it, leave no problem that names a field they set, and bring in none that is not among the `found` ones,
    unless all do: a problem may hide others.
    """
    if not isinstance(problem, Problem):
        return problem
    kind, before = kind_of(problem), {kind_of(other) for other in found}
    layout_before = dims_problems(config.parallel, world_size)
    tried: dict[str, list[str]] = {}

    def problems_with(change: Mapping[str, Any]) -> list[str]:
        if (key := repr(change)) not in tried:
            tried[key] = find_problems(with_changes(config, change), world_size=world_size)
        return tried[key]

    def mends(change: Mapping[str, Any]) -> bool:
        left = problems_with(change)
        named = any(f"{field}=" in without_advice(other) for other in left for field in change)
        no_layout = not layout_before and dims_problems(with_changes(config, change).parallel, world_size)
        return not (named or no_layout) and kind not in map(kind_of, left)

    def brings_none(change: Mapping[str, Any]) -> bool:
        return mends(change) and before.issuperset(map(kind_of, problems_with(change)))

    with_advice = problem.with_legal_advice(brings_none)
    return with_advice if with_advice.advice else problem.with_legal_advice(mends)


def with_changes(config: TrainConfig, change: Mapping[str, Any]) -> TrainConfig:
    """A copy with other values, by dotted field."""
    changed = copy.deepcopy(config)
    for field, value in change.items():
        *path, name = field.split(".")
        setattr(reduce(getattr, path, changed), name, list(value) if isinstance(value, tuple) else value)
    return changed


def resolve(config: TrainConfig, world_size: int) -> tuple[TrainConfig, list[str]]:
    """What `finalize` returns, and every problem, with advice that nobody has tried."""
    model = config.model
    if model.path is not None:
        model = replace(model, path=str(Path(model.path).expanduser()))
        config = replace(config, model=model)
    found: list[str] = [*model_problems(model, seq_len=config.train.seq_len)]
    known = model.path is None  # the shape; a folder's is once it was read, and until then the fields hold defaults
    if not found:
        try:
            model = resolve_model(model)
        except ValueError as error:
            found.append(str(error))
        else:
            known = True
            found += model_problems(model, seq_len=config.train.seq_len)
    found += expert_problems(config, model, world_size) if known else []
    found += activation_checkpoint_problems(
        ActivationCheckpoint(mode=model.activation_checkpoint, save=model.activation_checkpoint_save)
    )
    data, missing = _with_models_tokenizer(config)
    found += missing or data_problems(data)
    found += dims_problems(config.parallel, world_size)
    found += precision_problems(config.precision)
    found += optimizer_problems(config)
    found += block_problems(config, model, world_size) if known else []
    found += schedule_problems(config.schedule, config.optim, config.train.steps)
    found += _loop_problems(config.train, world_size)
    found += _checkpoint_problems(config.checkpoint)
    found += _resilience_problems(config)
    found += _logging_problems(config.logging)
    found += _cross_problems(config, world_size)
    found += recipe_problems(config)
    if config.parallel.cp > 1 and not dims_problems(config.parallel, world_size):
        found += sequence_problems(config, model)
    found += tensor_parallel_problems(config, model, world_size)
    found += chunk_problems(config)
    if not (model_problems(model, seq_len=config.train.seq_len) or dims_problems(config.parallel, world_size)):
        found += fp8_problems(config, model, world_size)
    found += invariant_problems(config, model)
    found += graph_problems(config)
    found += speculator_run_problems(config, model)
    if known and not model_problems(model, seq_len=config.train.seq_len):
        found += adapter_run_problems(config, model)
    found += pipeline_problems(config.parallel, model.num_layers if known else None)
    # A value that is wrong in itself has been named.
    wrong = {problem.partition("=")[0] for problem in found}
    found += [problem for problem in unused_problems(config) if problem.partition("=")[0] not in wrong]
    found += launcher_problems(os.environ)
    if not found:
        found += activation_problems(config, model, world_size)
    parallel = config.parallel
    if parallel.ep > 1 and parallel.ep_buffer is None:
        parallel = replace(parallel, ep_buffer=float(parallel.ep) if config.train.compile else 0.0)
    return replace(config, model=model, data=data, parallel=parallel), list(dict.fromkeys(found))


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
    found: list[str] = []
    for name, minimum in minimums.items():
        if not minimum <= (value := getattr(config, name)) < math.inf:
            why = f"{prefix}.{name}={value} must be at least {minimum}"
            found.append(Problem(why, values(f"{prefix}.{name}", [minimum])))
    return found


def _one_of(field_name: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [Problem(f"{field_name}={value} is unknown", values(field_name, choices))]


def _loop_problems(train: LoopConfig, world_size: int) -> list[str]:
    minimums = {"steps": 1, "seq_len": 1, "global_batch_size": 1, "micro_batch_size": 1, "seed": 0, "grad_clip": 0}
    minimums |= {"max_skipped_steps": 1, "eval_interval": 0, "eval_batches": 1, "sample_tokens": 0}
    found = _at_least("train", train, minimums)
    if not 0 < train.timeout_seconds < math.inf:
        found.append(f"train.timeout_seconds={train.timeout_seconds} must be positive and finite; 600 is usual")
    found += _one_of("train.device", train.device, ("auto", "cpu", "cuda"))
    found += _one_of("train.loss_kernel", train.loss_kernel, LOSS_KERNELS)
    found += _one_of("train.nonfinite", train.nonfinite, NONFINITE)
    if wrong := [step for step in train.profile.steps if step < 1]:
        found.append(f"train.profile.steps holds {wrong[0]}; steps are numbered from 1")
    if wrong := [rank for rank in train.profile.ranks if not 0 <= rank < world_size]:
        found.append(f"train.profile.ranks holds {wrong[0]}; this run has ranks 0 to {world_size - 1}")
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
    if logging.hardware is not None:
        found += [f"logging.hardware={line}" for line in read_hardware(logging.hardware)[1]]
    if logging.interval < 1:
        found.append(
            f"logging.interval={logging.interval} must be at least 1; to silence the console use logging.console=false"
        )
    if logging.peak_tflops is not None and not 0 < logging.peak_tflops < math.inf:
        found.append(f"logging.peak_tflops={logging.peak_tflops} must be positive, or null to look it up")
    return found


def _resilience_problems(config: TrainConfig) -> list[str]:
    resilience = config.resilience
    minimums = {"check_interval": 0, "rerun_interval": 0, "straggler_interval": 0, "peer_interval": 0}
    found = _at_least("resilience", resilience, minimums)
    for name in ("first_step_seconds", "loading_seconds", "checkpoint_seconds", "straggler_share"):
        if not 0 < (value := getattr(resilience, name)) < math.inf:
            default = getattr(ResilienceConfig, name)
            found.append(f"resilience.{name}={value} must be positive and finite; {default:g} is usual")
    if resilience.peer_interval > 0 and not Path(resilience.peer_dir).is_dir():
        found.append(
            f"resilience.peer_dir={resilience.peer_dir} is no folder of this host; use /dev/shm, or another in memory"
        )
    if resilience.peer_interval > 0 and config.adapter.init == "pissa":
        why = (
            f"resilience.peer_interval={resilience.peer_interval} with adapter.init=pissa: after a crash, weights "
            "would lose another decomposition than the one in the copies"
        )
        found.append(Problem(why, values("resilience.peer_interval", [0]), values("adapter.init", ["lora"])))
    return found


def _cross_problems(config: TrainConfig, world_size: int) -> list[str]:
    """What only shows when two groups are looked at together."""
    found: list[str] = []
    train, data = config.train, config.data
    if train.eval_interval > 0 and data.validation_fraction == 0:
        found.append(
            Problem(
                f"train.eval_interval={train.eval_interval} with data.validation_fraction=0 has nothing to validate on",
                values("train.eval_interval", [0]),
                words="raise the fraction",
            )
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
        found.append(
            Problem(
                f"train.global_batch_size={train.global_batch_size} does not divide into {dp} data-parallel ranks",
                values("train.global_batch_size", multiples(dp, train.global_batch_size), near=train.global_batch_size),
            )
        )
    chosen = config.model.activation_checkpoint
    split = config.parallel.pp > 1 and config.parallel.pp_schedule in SPLIT_BACKWARD
    if train.compile and split and chosen in ("selective", "budget"):
        found.append(
            Problem(
                f"model.activation_checkpoint={chosen} with train.compile=true picks operations of one graph, which "
                f"parallel.pp_schedule={config.parallel.pp_schedule} parts at every linear layer",
                values("model.activation_checkpoint", ["none", "full", "offload"]),
                values("parallel.pp_schedule", [name for name in SCHEDULES if name not in SPLIT_BACKWARD]),
                values("train.compile", [False]),
            )
        )
    return found
