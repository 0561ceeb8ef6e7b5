"""ZeRO stage 3: every rank stores its shards alone, and fully_shard (FSDP2) moves the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from parallel.collectives import reduce_scatter_rows
from parallel.data import DataParallel, Holders, is_spread_over_ep
from parallel.mesh import Meshes
from parallel.regions import local_tensor


class FullyShardedDataParallel(DataParallel):
    """Stage 3: the model's own parameters are the sharded masters; fully_shard gathers each block when it runs.

    Gradients are reduce-scattered after every micro-batch, so no rank ever holds whole ones, and are summed over
    replicas after the last.

    fully_shard reduces what autograd delivers; what `add_gradient` brings is cut and reduced here in the same way. In a
    pipeline the sum over replicas is taken here too: fully_shard would take it in one backward for all, and until then
    keep sums of the parameters that every backward reaches, while two stages on one rank reach different ones.
    """

    def __init__(
        self,
        model: FSDPModule,
        *,
        mesh: Meshes,
        replicas: DeviceMesh | None,
        reduce_dtype: torch.dtype,
    ) -> None:
        """replicas: those that fully_shard does not know of; experts have the same."""
        assert isinstance(model, nn.Module)
        self.model = model
        self.replicas = replicas
        self.reduce_dtype = reduce_dtype
        self.masters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kinds = set(map(is_spread_over_ep, self.masters.values()))
        self._holders = {kind: Holders.of(mesh, sharded=True, experts=kind) for kind in kinds}
        units = [(prefix, unit) for prefix, unit in model.named_modules() if isinstance(unit, FSDPModule)]
        # The innermost one that holds a parameter gathers it; named_modules goes from the outside in.
        self._unit_of = {
            name: [unit for prefix, unit in units if not prefix or name.startswith(f"{prefix}.")][-1]
            for name in self.masters
        }
        self._has_run = False
        self._arriving: deque[_ScatteredGradient] = deque()
        self._summing: list[tuple[list[torch.Tensor], torch.Tensor, dist.Work]] = []  # shards, their copy on its way

    def start_microbatch(self, *, last: bool) -> None:
        # Between replicas (HSDP: between nodes) gradients travel once per step; fully_shard keeps the sums till then.
        self.model.set_requires_all_reduce(last)

    def start_pipeline(self) -> None:
        pass  # every backward reduces its gradients

    def gather(self, names: Iterable[str]) -> None:
        # The forward or backward of these modules then waits for them, and frees them as always. fully_shard throws
        # away what is on its way when a backward ends: call this behind the last one.
        if self._has_run:  # before its first forward fully_shard does not know its root, nor the root its streams
            for module in dict.fromkeys(self._unit_of[name] for name in names):
                module.unshard(async_op=True)

    def gradients_complete(self, names: Iterable[str]) -> None:
        if self.replicas is None:
            return
        self._receive()
        for _, unit in groupby(names, key=lambda name: name.split(".")[:2]):  # the weights of a block travel together
            self._sum_over_replicas(list(unit))

    @torch.no_grad()
    def add_gradient(self, name: str, grad: torch.Tensor) -> None:
        rows = grad.movedim(_cut_dim(self.masters[name]), 0)
        holders = self._holders[is_spread_over_ep(self.masters[name])]
        num_ranks = holders.num_shards
        buffer = rows.new_empty(-(-len(rows) // num_ranks) * num_ranks, *rows.shape[1:], dtype=self.reduce_dtype)
        buffer[: len(rows)] = rows
        buffer[len(rows) :] = 0  # what makes the cut even
        buffer = buffer.view(num_ranks, -1)
        rank, group = holders.shard_rank, holders.shard.get_group()
        work = reduce_scatter_rows(buffer, rank=rank, group=group, async_op=True)
        # It travels while the next one is computed; waiting before that one leaves keeps two whole gradients at most.
        self._receive()
        self._arriving.append(_ScatteredGradient(name, buffer[rank], work))

    @torch.no_grad()
    def _receive(self) -> None:
        """Add what was reduced to the masters' gradients."""
        while self._arriving:
            name, row, work = self._arriving.popleft()
            assert work is not None
            work.wait()
            master = self.masters[name]
            local, dim = local_tensor(master), _cut_dim(master)
            grad = row[: local.numel()].view(local.movedim(dim, 0).shape).movedim(0, dim)
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            local_tensor(master.grad).add_(grad.to(local.device))  # offloaded: in host memory

    @torch.no_grad()
    def _sum_over_replicas(self, names: list[str]) -> None:
        """Start it; `finish_backward` ends it."""
        assert self.replicas is not None
        # What never arrived is named by finish_backward.
        grads = [local_tensor(grad) for name in names if (grad := self.masters[name].grad) is not None]
        if not sum(grad.numel() for grad in grads):
            return
        together = torch.cat([grad.flatten() for grad in grads]).to(self.replicas.device_type, self.reduce_dtype)
        work = dist.all_reduce(together, group=self.replicas.get_group(), async_op=True)
        assert work is not None
        self._summing.append((grads, together, work))

    @torch.no_grad()
    def finish_backward(self) -> None:
        self._has_run = True
        self._receive()
        for grads, together, work in self._summing:
            work.wait()
            for grad, total in zip(grads, together.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        self._summing.clear()
        for name, master in self.masters.items():
            if master.grad is None:
                raise RuntimeError(f"parameter {name} received no gradient: it takes no part in the forward")

    def publish(self, names: Collection[str] | None = None, *, written: Collection[str] = ()) -> None:
        for name in self.masters if names is None else names:
            self.masters[name].grad = None  # the next backward would add to it
        # Weights that an evaluation gathered (and no backward has released) would be stale now.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def storage(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        masters = list(self.masters.values())
        return list(self.model.parameters()), [master.grad for master in masters if master.grad is not None]


class _ScatteredGradient(NamedTuple):
    """A gradient on its way to the ranks that hold its shards."""

    name: str
    row: torch.Tensor  # of this rank, when it has come; then maybe padding
    work: dist.Work | None


def _cut_dim(master: torch.Tensor) -> int:
    """The dim that fully_shard cuts, into pieces as torch.chunk does (of what tensor parallelism has left)."""
    assert isinstance(master, DTensor)
    names = master.device_mesh.mesh_dim_names or ()
    placement = master.placements[names.index("expert_shard" if is_spread_over_ep(master) else "shard")]
    assert isinstance(placement, (Shard, _StridedShard))
    return placement.dim
