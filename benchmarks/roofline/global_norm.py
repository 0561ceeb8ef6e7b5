"""The global norm of a model's gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline.adamw import tensors
from benchmarks.roofline.problem import NAMES, Problem
from kernels.global_norm import global_norm


def eager(gradients: list[Tensor]) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_ does it."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for name, flat, dtype in (
        ("flat", True, torch.float32),
        ("many", False, torch.float32),
        ("many", False, torch.bfloat16),
    ):
        gradients = tensors(flat, device, dtype)
        size = sum(gradient.numel() for gradient in gradients)
        candidates: dict[str, Callable[[], Any]] = {
            "lattice": partial(global_norm, gradients),
            "eager": partial(eager, gradients),
        }
        bytes = size * dtype.itemsize
        yield Problem("global_norm", "forward", f"{size} {name}", NAMES[dtype], bytes, candidates)
