"""train.deterministic: kernels whose sums have one order."""

from __future__ import annotations

import os

import torch


def make_deterministic(wanted: bool, device: torch.device) -> None:
    """Choose, for this process, kernels that give the same bits in every run, or any. Call it before the first product.

    On CUDA cuBLAS then keeps one workspace per stream, and attention's backward does not add with atomics. The CPU's
    kernels have one order anyway. An operation without such a kernel raises RuntimeError, which names it.
    """
    if device.type != "cuda":
        return
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when a handle is made
    torch.use_deterministic_algorithms(wanted)
    # No kernel here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
