"""What tests of fp8 run on pool ranks."""

from __future__ import annotations

from unittest import mock

import torch

import models.fp8
from parallel.collectives import Axis
from parallel.precision import DTYPES
from parallel.tensor import SEQUENCE_DIM, whole_input
from tests.parity.harness import Outcome, run_here
from trainer.config import TrainConfig


def run_with_fp32_activations(config: TrainConfig) -> Outcome | None:
    """Train with nothing in bf16: what is left of rounding is fp8's."""
    with mock.patch.dict(DTYPES, fp8=torch.float32):
        return run_here(config)


def run_with_scales_of_each_rank(config: TrainConfig) -> Outcome | None:
    """The same, with tensor-parallel ranks that agree on no scale."""

    def alone(x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return x

    with mock.patch.object(models.fp8, "maximum", alone):
        return run_with_fp32_activations(config)


def run_with_the_slices_of_a_sequence_permuted(config: TrainConfig) -> Outcome | None:
    """Train with sequence-parallel ranks whose tokens come out of the beginning of a branch in another order."""

    def permuted(x: torch.Tensor, axis: Axis, *, sequence_parallel: bool) -> torch.Tensor:
        whole = whole_input(x, axis, sequence_parallel=sequence_parallel)
        return whole.roll(x.shape[SEQUENCE_DIM], dims=SEQUENCE_DIM)

    with mock.patch.object(models.fp8, "whole_input", permuted):
        return run_here(config)
