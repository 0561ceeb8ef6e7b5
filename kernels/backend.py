"""What all kernels share: where they run, what they refuse, and how a configuration is chosen.

An op runs its Triton kernel on CUDA tensors and its reference on all others. Tests run kernels on the CPU as well, in
Triton's interpreter: they set TRITON_INTERPRET=1 before a kernel's module is imported and call ops inside
`interpreted()`. Kernel modules import triton, which not every platform has, so ops import them when they need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Config = TypeVar("Config")

_interpreting = False


def runs_triton(tensor: Tensor) -> bool:
    """Whether an op on this tensor runs its kernel (True) or its reference."""
    return tensor.is_cuda or _interpreting


def interpreting() -> bool:
    """Whether ops on CPU tensors run their kernels now."""
    return _interpreting


@contextmanager
def interpreted() -> Iterator[None]:
    """Ops on CPU tensors run their kernels while this lasts. TRITON_INTERPRET=1 must have been set before."""
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def refuse_dtensors(**tensors: Tensor | None) -> None:
    """Raise TypeError for a DTensor, by the name of the argument."""
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(f"{name} is a DTensor; kernels work on plain tensors, so pass its local shard")


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 for the interpreter, so that it sees several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def launches_overlap(x: Tensor) -> bool:
    """Whether a launch may begin while the one before ends, and wait inside (programmatic dependent launch: Hopper)."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def reference_gradients(
    reference: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor | None], wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """Gradients of reference(*inputs) by the inputs numbered in `wanted`, for those of its outputs: backward on the
    CPU."""
    leaves = [x.detach().requires_grad_(i in wanted) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
    with _recording():
        outputs = reference(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    known = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None]
    return torch.autograd.grad([y for y, _ in known], [leaves[i] for i in wanted], [grad for _, grad in known])


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd records, which the dispatcher keeps it from doing inside a custom op, whatever the grad mode."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


class Tuned(Generic[Config]):
    """The configurations a kernel may run with, and the one for a problem.

    The choice is a pure function of the problem's sizes, found by measurement (benchmarks/kernels.py) and written down:
    nothing is timed while training, so that all ranks and all runs choose alike. Every configuration is tested.
    """

    def __init__(self, configs: Sequence[Config], choose: Callable[..., Config]) -> None:
        self.configs = tuple(configs)
        self._choose = choose
        self._forced: Config | None = None

    def __call__(self, *sizes: Any) -> Config:
        return self._choose(*sizes) if self._forced is None else self._forced

    @contextmanager
    def forced(self, config: Config) -> Iterator[None]:
        """Every problem runs with this one: for tests and measurements."""
        self._forced = config
        try:
            yield
        finally:
            self._forced = None
