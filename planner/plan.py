"""The whole plan of a job, as one object that JSON can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from models.flops import flops_per_token
from planner.failure import FailureCost, failure_cost
from planner.flops import flops_by_operator
from planner.hardware import Hardware
from planner.job import Job
from planner.limits import limits
from planner.memory import RankMemory, memory_of_ranks
from planner.operators import operators_of_stage
from planner.shapes import parameters_of
from planner.state import count_parameters
from planner.steptime import StepTime, step_time
from planner.traffic import plain_ddp_bytes, traffic
from planner.traffic_in_layers import Transfer

RESERVED_GIB = 2.0
"""Of a GPU's memory, for its context, libraries and what the allocator cannot use."""


def room(hardware: Hardware) -> float:
    """Bytes of a GPU that a run can fill."""
    return (hardware.memory_gib - RESERVED_GIB) * 2**30


def make_plan(job: Job, hardware: Hardware, *, tokens: float, asynchronous: bool) -> dict[str, Any]:
    """Everything the planner says. tokens: of the whole run, for its days and cost. asynchronous: checkpoints are
    written while training goes on.

    `ranks`, `traffic_bytes_per_step`, `flops_per_token`, `step_seconds`, `tokens_per_second_per_gpu`, `mfu` and
    `bubble` are an interface (docs/PLANNER.md); bytes are of one rank, times in seconds.
    """
    time = step_time(job, hardware)
    memory = memory_of_ranks(job)
    flops = flops_per_token(job.model, job.seq_len)
    rate = job.tokens_per_step / time.step / job.dims.world_size
    transfers = max((traffic(job, rank) for rank in range(job.dims.pp)), key=lambda sent: sum(t.bytes for t in sent))
    seconds = tokens / (rate * job.dims.world_size)
    failure = _failure(job, hardware, memory, asynchronous=asynchronous)
    most = max(m.peak for m in memory)
    return {
        "hardware": hardware.name,
        "world_size": job.dims.world_size,
        "layout": layout_of(job),
        "num_parameters": count_parameters(parameters_of(job.model, None, tp=1)),
        "ranks": [_rank(job, m) for m in memory],
        "fits": most <= room(hardware),
        "memory_bytes": hardware.memory_gib * 2**30,
        "traffic_bytes_per_step": _by_axis(transfers),
        "plain_ddp_bytes_per_step": plain_ddp_bytes(job),
        "flops_per_token": flops,
        "flops_per_token_by_operator": flops_by_operator(job.model, job.seq_len),
        "operators": [
            {"stage": stage.index} | asdict(operator) | {"intensity": operator.intensity}
            for stage in job.stages
            for operator in operators_of_stage(job, hardware, stage)
        ],
        "tokens_per_step": job.tokens_per_step,
        "step_seconds": time.step,
        "step_parts": _parts(time),
        "step_terms": dict(time.terms),
        "tokens_per_second_per_gpu": rate,
        "mfu": flops * rate / (hardware.peak_tflops * 1e12),
        "bubble": time.bubble,
        "tokens": tokens,
        "days": seconds / 86400,
        "dollars": seconds / 3600 * job.dims.world_size * hardware.dollars_per_gpu_hour,
        "failure": asdict(failure),
        "not_modelled": limits(job, hardware),
    }


def _failure(job: Job, hardware: Hardware, memory: Sequence[RankMemory], *, asynchronous: bool) -> FailureCost:
    size = job.precision.master_dtype.itemsize
    weights = count_parameters(parameters_of(job.model, None, tp=1)) * size
    moments = sum(m.state.bytes.optimizer * m.state.count for m in memory)
    copies = job.dims.dp_replicate * (1 if job.parallel.zero_stage else job.dims.dp_shard * job.dims.cp)
    of_rank = max(m.state.bytes.num_owned * size + m.state.bytes.optimizer for m in memory)
    return failure_cost(
        hardware,
        num_gpus=job.dims.world_size,
        checkpoint_bytes=weights + moments / copies,
        rank_bytes=of_rank,
        asynchronous=asynchronous,
    )


def layout_of(job: Job) -> dict[str, Any]:
    """Degrees and choices, for `planner.report.head`."""
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    layout: dict[str, Any] = {axis: getattr(job.dims, axis) for axis in axes}
    layout |= {"zero_stage": job.parallel.zero_stage, "sequence_parallel": job.parallel.sequence_parallel}
    layout |= {"activation_checkpoint": job.model.activation_checkpoint, "micro_batches": len(job.sequences)}
    return layout | ({} if job.pipeline is None else {"pipeline": job.pipeline.summary})


def _rank(job: Job, memory: RankMemory) -> dict[str, Any]:
    held, at = memory.state.bytes, memory.at
    return {
        "pp": at.pp,
        "tp": at.tp,
        "shard": at.shard,
        "count": memory.state.count,
        "layers": [[stage.start, stage.stop] for stage in job.stages_of(at.pp)],
        "parameters_bytes": held.parameters,
        "gradients_bytes": held.gradients,
        "master_bytes": held.master,
        "optimizer_bytes": held.optimizer,
        "buffers_bytes": memory.buffers,
        "activations_bytes": round(memory.activations),
        "loss_bytes": round(memory.loss),
        "communication_bytes": round(memory.communication),
        "recomputation_bytes": round(memory.recomputation),
        "peak_bytes": round(memory.peak),
    }


def _by_axis(transfers: list[Transfer]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for transfer in transfers:
        of_axis = found.setdefault(transfer.axis, {})
        of_axis[transfer.collective] = of_axis.get(transfer.collective, 0.0) + transfer.bytes
    return found


def _parts(time: StepTime) -> dict[str, float]:
    names = ("compute", "recompute", "communication", "hidden_communication", "optimizer")
    return {name: getattr(time, name) for name in names}
