"""Bytes of a model's buffers, exactly: of what is kept from step to step and is no parameter, gradient or moment."""

from __future__ import annotations

from planner.activations import layers_of
from planner.job import Job
from planner.shapes import parameters_of

FP32 = 4
TENSORS = 3
"""That a layer in fp8 has scales of: input, weight, gradient."""


def buffer_bytes(job: Job, pp_rank: int) -> int:
    """Of a rank with these stages: biases of sigmoid routers, and the past magnitudes and scales of delayed scaling in
    fp8, which every rank has of all layers."""
    model, precision = job.model, job.precision
    biases = 0
    if model.moe.router == "sigmoid":
        layers = [layer for stage in job.stages_of(pp_rank) for layer in layers_of(job, stage)]
        biases = FP32 * model.moe.num_experts * sum(model.moe.in_layer(layer) for layer in layers)
    if not (precision.fp8 and precision.fp8_recipe == "tensorwise_delayed"):
        return biases
    linears = sum(count for p, count in parameters_of(model, None, tp=1).items() if p.multiplies_in_fp8(precision))
    return biases + FP32 * TENSORS * linears * (precision.fp8_amax_history + 1)
