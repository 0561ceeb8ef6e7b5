"""Small tensors of numbers computed on the host, brought to a device again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_KEPT: dict[Hashable, Tensor] = {}


def from_host(key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` returns on the CPU, on `device`; `key` names it among all constants of the process.

    For CUDA it is made once and kept in page-locked memory: a copy from there waits for nothing, may be part of a CUDA
    graph, and is ordered with the stream that wants it, as a copy kept on the device would not be.
    """
    among_fake_ones = type(torch.empty(0)) is not Tensor  # costs are measured without memory: no real one may mix in
    if device.type != "cuda" or among_fake_ones or not torch.cuda.is_available():
        return make().to(device)
    kept = _KEPT.get(key)
    if kept is None:
        kept = _KEPT[key] = make().pin_memory()
    return kept.to(device, non_blocking=True)
