"""What the planner says of a run, from the trainer's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from models.adapter_config import AdapterConfig
from parallel.dims import ParallelDims
from planner.hardware import Hardware
from planner.hardware_files import hardware_of, read_hardware
from planner.job import Job
from planner.limits import limits
from planner.memory import memory_of_ranks
from planner.steptime import step_time
from trainer.config import TrainConfig
from trainer.frozen import Beside, layout_beside
from trainer.loss import choose_loss_kernel
from trainer.pipelined import pipeline_layout


def job_of(config: TrainConfig, *, world_size: int, beside: Beside | None = None) -> Job:
    """config: validated, with the model resolved (trainer.validate.finalize). beside: as its recipe says
    (trainer.recipes.recipe.Recipe.frozen_beside)."""
    job = Job(
        model=config.model,
        parallel=config.parallel,
        dims=ParallelDims.resolve(config.parallel, world_size),
        precision=config.precision,
        pipeline=pipeline_layout(config.parallel, config.model, seq_len=config.train.seq_len),
        seq_len=config.train.seq_len,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        compiled=config.train.compiles_loss,
        loss_kernel=choose_loss_kernel(config, "cuda" if config.train.device == "auto" else config.train.device),
        optimizer=config.optim.name,
        state_dtype=config.optim.state_dtype,
        adapter=config.adapter,
    )
    if beside is None:
        return job
    parallel, precision = layout_beside(config, offload=beside.offload)
    pipeline = pipeline_layout(parallel, beside.model, seq_len=config.train.seq_len)
    frozen = replace(job, model=beside.model, parallel=parallel, precision=precision, pipeline=pipeline)
    frozen = replace(frozen, adapter=AdapterConfig(), trained=False)
    return replace(job, beside=frozen, beside_on_host=beside.offload)


KNOWN_RECIPES = ("pretrain", "sft")
"""Of one model and one pass forward and back."""
KNOWN_STATE = (*KNOWN_RECIPES, "dpo", "kto", "reward", "distill")
"""Of which all that a rank keeps from step to step is known."""
WARM_UP = 3
"""Steps of a start that are not compared: they compile, and fill caches."""
FEWEST = 3
"""Steps that a median is taken of."""


def not_planned(config: TrainConfig) -> list[str]:
    """What of a configuration the planner does not know, one line each with the field and its value."""
    return without_state(config) + only_state(config)


def without_state(config: TrainConfig) -> list[str]:
    """That of which it does not know what a rank holds either."""
    found = []
    if (recipe := config.recipe.name) not in KNOWN_STATE:
        found.append(
            f"recipe.name={recipe} is not planned for: what it samples and keeps depends on its rollouts; "
            f"use {', '.join(KNOWN_STATE[:-1])} or {KNOWN_STATE[-1]}"
        )
    if config.adapter.init == "pissa":
        found.append(
            "adapter.init=pissa is not planned for: what adapters began with is kept as well, one more copy of them as "
            "they are trained; use adapter.init=lora, and add that"
        )
    if share := config.recipe.on_policy:
        found.append(f"recipe.on_policy={share} is not planned for: an engine's cache lies beside the model; use 0")
    if prompts := config.recipe.answers.prompts:
        found.append(
            f"recipe.answers.prompts={prompts} is not planned for: an engine's cache lies beside the model; use 0"
        )
    if (kind := config.model.speculator.kind) != "none":
        found.append(f"model.speculator.kind={kind} is not planned for: heads are trained beside a model; use none")
    return found


def only_state(config: TrainConfig) -> list[str]:
    """That of which it knows nothing but what a rank holds: neither activations nor time."""
    found = []
    if (recipe := config.recipe.name) in KNOWN_STATE and recipe not in KNOWN_RECIPES:
        found.append(
            f"activations and time with recipe.name={recipe}: it has passes beside those of the model's training; "
            f"{' and '.join(KNOWN_RECIPES)} have a whole plan"
        )
    if recipe == "distill" and config.recipe.teacher_cache is None:
        found.append(
            "bytes of the teacher's output layer, of which ranks that compute the loss keep a copy of their own"
        )
    if (adapter := config.adapter.name) != "none":
        found.append(
            f"activations and time with adapter.name={adapter}: weights that stay as they are cost less than trained "
            "ones, and those in 4 bits are made again in every pass; adapter=none has a whole plan"
        )
    return found


def predict(job: Job, hardware: Hardware) -> dict[str, float]:
    """step_seconds, and peak_memory_gib of rank 0, which is of the first stage: no other of it holds more."""
    peak = memory_of_ranks(job, largest=True)[0].peak
    return {"step_seconds": step_time(job, hardware).step, "peak_memory_gib": peak / 2**30}


def compare(
    config: TrainConfig, *, world_size: int, device_name: str, seconds: Sequence[float], peak_gib: float | None
) -> tuple[str, dict[str, Any]]:
    """A run beside its prediction, as a sentence and as fields of run.json, which are empty where there is none.

    seconds: of this start's steps. peak_gib: allocated on rank 0's GPU; None: not measured. The rates are those of
    logging.hardware, or of the file whose name is the device's.
    """
    if config.logging.hardware is not None:
        hardware, wrong = read_hardware(config.logging.hardware)
        if wrong:
            return f"no prediction: logging.hardware={wrong[0]}", {}
    else:
        known = hardware_of(device_name)
        if known is None:
            how = "measure one with launch/calibrate.py and name it as logging.hardware"
            return f"no prediction of memory and time: no file of configs/hardware is of {device_name!r}; {how}", {}
        hardware = known
    if unknown := not_planned(config):
        return f"no prediction of memory and time: {unknown[0]}", {}
    job = job_of(config, world_size=world_size)
    fields: dict[str, Any] = {"hardware": hardware.name, **predict(job, hardware)}
    time = fields["step_seconds"]
    said = []
    timed = seconds[WARM_UP:]
    if len(timed) >= FEWEST:
        fields["measured_step_seconds"] = measured = median(timed)
        said.append(f"step {time:.4g} s predicted, {measured:.4g} s measured ({time / measured - 1:+.1%})")
    else:
        said.append(f"step {time:.4g} s predicted, too few steps to measure")
    if peak_gib is not None:
        fields["measured_peak_memory_gib"] = peak_gib
        predicted = fields["peak_memory_gib"]
        said.append(
            f"peak of rank 0 {predicted:.1f} GiB predicted, {peak_gib:.1f} measured ({predicted / peak_gib - 1:+.1%})"
        )
    fields["not_modelled"] = limits(job, hardware)
    return "; ".join(said), fields
