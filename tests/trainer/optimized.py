"""The same optimizer steps in one process and on ranks, for test_optim and test_muon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parity.harness import largest
from trainer.config import OptimConfig
from trainer.optim import Optimizer, build_optimizer, clip_coefficient, global_grad_norm

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (11, 6),
    "blocks.0.attention.qkv.weight": (9, 6),  # odd rows
    "blocks.0.attention.out.weight": (6, 6),
    "blocks.0.norm.weight": (6,),
    "blocks.0.mlp.up.weight": (13, 6),
    "blocks.0.mlp.up.bias": (13,),
    "blocks.0.mlp.down.weight": (6, 13),
    "blocks.1.attention.qkv.weight": (9, 6),
    "blocks.1.tiny.weight": (1, 5),  # fewer rows than ranks: empty shards
    "blocks.1.short.weight": (3, 7),
    "norm.weight": (6,),
    "scale.weight": (1,),
    "head.weight": (11, 6),
}
"""Names and shapes of a small model's parameters."""


@dataclass
class Case:
    """Steps to make: gradients are random, and NaN where the step is skipped."""

    config: OptimConfig
    num_steps: int = 6
    skipped: Sequence[int] = ()  # these steps are skipped and their gradients are NaN
    max_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))

    def weights(self) -> dict[str, Tensor]:
        """Whole initial parameters."""
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(shape, generator=generator, dtype=self.dtype) for name, shape in self.shapes.items()}

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Whole gradients of a step, 1 and on."""
        if step in self.skipped:
            return {name: torch.full(shape, torch.nan, dtype=self.dtype) for name, shape in self.shapes.items()}
        generator = torch.Generator().manual_seed(1000 + step)
        return {name: torch.randn(shape, generator=generator, dtype=self.dtype) for name, shape in self.shapes.items()}

    def lr(self, step: int) -> float:
        return 0.02 / step


@dataclass
class Outcome:
    """What is left after the steps, whole tensors."""

    parameters: dict[str, Tensor]
    state: dict[str, Tensor]
    norms: list[float]
    local_rows: dict[str, int]  # rows this rank held


def whole(t: Tensor) -> Tensor:
    """A copy of all of t."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The bytes of tensors: equal also where they hold NaN or -0."""
    return {name: whole(t).flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def place(t: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """t as a master parameter: plain without a mesh, else rows split over the last axis, copied over the others."""
    if mesh is None:
        return t.clone()
    return distribute_tensor(t.clone(), mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])


def take_steps(optimizer: Optimizer, case: Case, steps: Sequence[int], mesh: DeviceMesh | None) -> list[float]:
    """The case's steps with clipping; the gradient norms."""
    norms = []
    for step in steps:
        for name, gradient in case.gradients(step).items():
            optimizer.parameters[name].grad = place(gradient, mesh)
        norm = global_grad_norm(optimizer.parameters.values())
        skip = torch.tensor(float(step in case.skipped))
        optimizer.step(lr=case.lr(step), grad_scale=clip_coefficient(norm, case.max_norm), skip=skip)
        optimizer.zero_grad()
        norms.append(norm.item())
    return norms


def outcome_of(case: Case, mesh_shape: tuple[int, ...] | None = None) -> Outcome:
    """The case in this process, or on a mesh of mesh_shape: every rank calls this."""
    mesh = None
    if mesh_shape is not None:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp_replicate", "dp_shard")[-len(mesh_shape) :])
    parameters = {name: place(t, mesh) for name, t in case.weights().items()}
    optimizer = build_optimizer(parameters, case.config)
    norms = take_steps(optimizer, case, range(1, case.num_steps + 1), mesh)
    return Outcome(
        parameters={name: whole(t) for name, t in optimizer.parameters.items()},
        state={name: whole(t) for name, t in optimizer.state_tensors().items()},
        norms=norms,
        local_rows={
            name: (t.to_local() if isinstance(t, DTensor) else t).size(0) for name, t in optimizer.parameters.items()
        },
    )


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest difference of an element, as a fraction of the largest element of its tensor in b. Same names."""
    assert a.keys() == b.keys()
    return largest(
        ((a[name].double() - b[name].double()).abs().max() / b[name].double().abs().max().clamp(min=1e-30)).item()
        for name in a
    )


class NoHostSync(TorchDispatchMode):
    """Fails when a tensor's value is read by the host, which would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a tensor's value was read by the host")
        return func(*args, **(kwargs or {}))
