"""Data parallelism: the ZeRO stages (Rajbhandari et al., 1910.02054) behind one interface.

A training step sees master parameters: what the optimizer updates and a checkpoint stores, by name, whole tensors at
stage 0 and DTensors sharded on dim 0 above it, with their summed gradient in `.grad`. How gradients get there and how
updated values get back into the model is the stage's business (with tensor parallelism, "whole" is a rank's tp shard):

    stage  model computes with   gradients are summed by              masters, moments
    0      whole parameters      bucketed all-reduce                  whole
    1      whole parameters      bucketed reduce-scatter              sharded over the shard axis
    2, 3   fully_shard (FSDP2)   reduce-scatter of each micro-batch   sharded over the shard axis

Gradients are summed over ranks, never averaged: the loss is already divided by the number of valid tokens of the
global batch (trainer/loss.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from parallel.buckets import BucketLayout, plan_buckets
from parallel.collectives import all_gather_rows, reduce_scatter_rows
from parallel.mesh import Meshes
from parallel.regions import local_tensor


class DataParallel(ABC):
    """What a ZeRO stage promises to the training step."""

    masters: dict[str, torch.Tensor]
    """Parameters the optimizer updates, by name; DTensors where sharded. `.grad` is set after `finish_backward`."""

    @abstractmethod
    def start_microbatch(self, *, last: bool) -> None:
        """Call before the forward of each micro-batch; `last`: gradients are complete after its backward."""

    @abstractmethod
    def start_pipeline(self) -> None:
        """Instead of `start_microbatch`, once before micro-batches whose backwards come in any order."""

    @abstractmethod
    def gradients_complete(self, names: Iterable[str]) -> None:
        """After `start_pipeline`: these parameters have had their last contribution, and may be reduced."""

    @abstractmethod
    def add_gradient(self, name: str, grad: torch.Tensor) -> None:
        """Take this rank's gradient of what it computes with of a parameter, where autograd does not deliver it.

        Every rank that shares the parameter's state adds the same ones in the same order.
        """

    @abstractmethod
    def finish_backward(self) -> None:
        """After the last backward: wait until every master's `.grad` holds the sum over ranks and micro-batches."""

    @abstractmethod
    def publish(self) -> None:
        """After masters changed (update, load): make the model compute with the new values."""


class FullyShardedDataParallel(DataParallel):
    """Stages 2 and 3: the model's own parameters are the sharded masters; fully_shard moves the data.

    Stage 2 keeps parameters gathered from the first forward to the last backward of a step, stage 3 gathers each
    block anew. Gradients are reduce-scattered after every micro-batch, so no rank ever holds whole ones, and are
    summed over replicas after the last.

    fully_shard reduces what autograd delivers; what `add_gradient` brings is cut and reduced here in the same way. In a
    pipeline the sum over replicas is taken here too: fully_shard would take it in one backward for all, and until then
    keep sums of the parameters that every backward reaches, while two stages on one rank reach different ones.
    """

    def __init__(
        self,
        model: FSDPModule,
        *,
        zero_stage: int,
        shards: DeviceMesh,
        replicas: DeviceMesh | None,
        reduce_dtype: torch.dtype,
    ) -> None:
        """replicas: those that fully_shard does not know of."""
        assert isinstance(model, nn.Module)
        self.model = model
        self.keep_gathered = zero_stage == 2
        self.shards, self.replicas = shards, replicas
        self.reduce_dtype = reduce_dtype
        self.masters = dict(model.named_parameters())
        self._arriving: deque[_ScatteredGradient] = deque()
        self._summing: list[tuple[list[torch.Tensor], torch.Tensor, dist.Work]] = []  # shards, their copy on its way

    def start_microbatch(self, *, last: bool) -> None:
        # Between replicas (HSDP: between nodes) gradients travel once per step; fully_shard keeps the sums till then.
        self.model.set_requires_all_reduce(last)
        if self.keep_gathered:
            self.model.set_reshard_after_backward(last)

    def start_pipeline(self) -> None:
        if self.keep_gathered:
            self.model.set_reshard_after_backward(False)

    def gradients_complete(self, names: Iterable[str]) -> None:
        if self.replicas is None:
            return
        self._receive()
        for _, unit in groupby(names, key=lambda name: name.split(".")[:2]):  # the weights of a block travel together
            self._sum_over_replicas(list(unit))

    @torch.no_grad()
    def add_gradient(self, name: str, grad: torch.Tensor) -> None:
        rows = grad.movedim(_cut_dim(self.masters[name]), 0)
        num_ranks = self.shards.size()
        buffer = rows.new_empty(-(-len(rows) // num_ranks) * num_ranks, *rows.shape[1:], dtype=self.reduce_dtype)
        buffer[: len(rows)] = rows
        buffer[len(rows) :] = 0  # what makes the cut even
        buffer = buffer.view(num_ranks, -1)
        rank, group = self.shards.get_local_rank(), self.shards.get_group()
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
        self._receive()
        for grads, together, work in self._summing:
            work.wait()
            for grad, total in zip(grads, together.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        self._summing.clear()
        for name, master in self.masters.items():
            if master.grad is None:
                raise RuntimeError(f"parameter {name} received no gradient: it takes no part in the forward")

    def publish(self) -> None:
        for master in self.masters.values():
            master.grad = None  # the next backward would add to it
        # Weights that an evaluation gathered (and no backward has released) would be stale now.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class _ScatteredGradient(NamedTuple):
    """A gradient on its way to the ranks that hold its shards."""

    name: str
    row: torch.Tensor  # of this rank, when it has come; then maybe padding
    work: dist.Work | None


def _cut_dim(master: torch.Tensor) -> int:
    """The dim that fully_shard cuts, into pieces as torch.chunk does (of what tensor parallelism has left)."""
    assert isinstance(master, DTensor)
    placement = master.placements[(master.device_mesh.mesh_dim_names or ()).index("shard")]
    assert isinstance(placement, (Shard, _StridedShard))
    return placement.dim


class _Bucket:
    """Buffers and pending work of one bucket."""

    def __init__(
        self, layout: BucketLayout, *, shard_rank: int, device: torch.device, reduce_dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.gradients = torch.zeros(layout.num_ranks, layout.row_length, dtype=reduce_dtype, device=device)  # [N, S]
        self.reduced = self.gradients[shard_rank]  # [S]: after the reduction, the summed gradient of this rank's rows
        self.filled: set[str] = set()  # parameters whose gradient of this step has arrived at least once
        self.missing: set[str] = set()  # parameters still to come in the last micro-batch
        self.reduction: dist.Work | None = None
        self.gathered: torch.Tensor | None = None  # [N, S] while new values are on their way
        self.gather: dist.Work | None = None


class BucketedDataParallel(DataParallel):
    """Stages 0 and 1: whole parameters in the model, gradients reduced in flat buckets while backward still runs.

    Each parameter's gradient is moved into its bucket the moment autograd has it (and freed); when a bucket of the last
    micro-batch is complete, its reduction starts. Reductions start in bucket order on every rank, whatever order
    gradients arrive in. At stage 1 (`shard_mesh` larger than one) the optimizer updates a shard of fp32 masters, and
    `publish` starts one all-gather per bucket, in forward order; a unit waits for its own buckets just before it runs.

    units: modules in forward order with the names of the parameters they need; their forward waits for those.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mesh: Meshes,
        sharded: bool,
        units: list[tuple[nn.Module, list[str]]],
        master_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        bucket_mb: float,
    ) -> None:
        self.model = model
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        # What this rank computes with: a parameter itself, or its shard over the axes inside layers. Same memory.
        self._values = {name: local_tensor(p.detach()) for name, p in self.params.items()}
        self.device = next(iter(self.params.values())).device
        shard_mesh = mesh.state["shard"]
        self.num_shards = shard_mesh.size() if sharded else 1
        self.shard_rank = shard_mesh.get_local_rank() if sharded else 0
        self.shard_group = shard_mesh.get_group()
        replicas = mesh.state["dp_replicate"] if sharded else mesh.tokens
        self.num_replicas = replicas.size()
        self.replica_group = replicas.get_group()
        # DTensor state lives on the shard axis alone unless there are replicas, as fully_shard's does.
        self.state_axes: tuple[str, ...] = ("shard",) if self.num_shards > 1 else ()
        if self.num_shards > 1 and self.num_replicas > 1:
            self.state_axes = ("dp_replicate", "shard")
        self.state_mesh = mesh.state
        self.comm_stream = torch.cuda.Stream() if self.device.type == "cuda" else None

        # Backward order, roughly: the last parameters get their gradients first.
        shapes = {name: value.shape for name, value in reversed(self._values.items())}
        max_elements = int(bucket_mb * 2**20 / reduce_dtype.itemsize)
        layouts = plan_buckets(shapes, num_ranks=self.num_shards, max_elements=max_elements)
        self.buckets = [
            _Bucket(layout, shard_rank=self.shard_rank, device=self.device, reduce_dtype=reduce_dtype)
            for layout in layouts
        ]
        self._bucket_of = {slot.name: (b, slot) for b in self.buckets for slot in b.layout.slots}
        self._next_launch = 0
        self._last_microbatch = False
        self._make_masters(master_dtype)
        for name, parameter in self.params.items():
            parameter.register_post_accumulate_grad_hook(self._gradient_hook(name))
        for module, names in units:
            needed = [b for b in self.buckets if any(slot.name in names for slot in b.layout.slots)]
            module.register_forward_pre_hook(lambda _module, _args, needed=needed: self._receive(needed))

    # ---- state

    def _as_state(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """A local tensor as global state: itself where nothing is sharded, else a DTensor.

        The shard axis cuts dim 0 of what the axes inside layers have left of a parameter.
        """
        parameter = self.params[name]
        axes = self.state_axes
        placements: list[Placement] = [Replicate()] * (len(axes) - 1) + [Shard(0)] * bool(axes)
        if isinstance(parameter, DTensor):
            (inner,) = parameter.placements
            if axes and inner == Shard(0):
                placements[-1] = _StridedShard(0, split_factor=parameter.device_mesh.size())
            axes, placements = (*axes, *(parameter.device_mesh.mesh_dim_names or ())), [*placements, inner]
        if not axes:
            return local
        shape, stride = parameter.shape, torch.empty(parameter.shape, device="meta").stride()
        return DTensor.from_local(local, self.state_mesh[axes], placements, run_check=False, shape=shape, stride=stride)

    def _make_masters(self, master_dtype: torch.dtype) -> None:
        """Allocate masters and bind their gradients to the buckets, in parameter order.

        In the model's own dtype a master is a view of the model's rows and costs nothing; else it is a copy to be.
        """
        self.masters = {}
        self._local: dict[str, torch.Tensor] = {}
        self._narrow_gradients: dict[str, torch.Tensor] = {}  # summed in a narrower dtype than the master's
        for name, parameter in self.params.items():
            bucket, slot = self._bucket_of[name]
            first, last = slot.local_rows(self.shard_rank)
            rows = self._values[name][first:last]
            local = rows if master_dtype == parameter.dtype else torch.empty_like(rows, dtype=master_dtype)
            grad = slot.local_view(bucket.reduced, self.shard_rank)
            self._local[name] = local
            self.masters[name] = self._as_state(name, local)
            if grad.dtype == master_dtype:
                self.masters[name].grad = self._as_state(name, grad)
            else:
                self._narrow_gradients[name] = grad

    # ---- backward

    def start_microbatch(self, *, last: bool) -> None:
        self._last_microbatch = last
        if last:
            self._next_launch = 0
            for bucket in self.buckets:
                bucket.missing = {slot.name for slot in bucket.layout.slots}

    def start_pipeline(self) -> None:
        self.start_microbatch(last=True)  # everything is missing
        self._last_microbatch = False  # and nothing complete by arriving once

    def gradients_complete(self, names: Iterable[str]) -> None:
        for name in names:
            bucket, _ = self._bucket_of[name]
            if name in bucket.filled:  # what never arrived stays missing, and finish_backward says so
                bucket.missing.discard(name)
        self._launch_ready()

    def add_gradient(self, name: str, grad: torch.Tensor) -> None:
        bucket, slot = self._bucket_of[name]
        slot.copy_in(bucket.gradients, grad, accumulate=name in bucket.filled)
        bucket.filled.add(name)
        if self._last_microbatch:
            bucket.missing.discard(name)
            self._launch_ready()

    def _gradient_hook(self, name: str):  # type: ignore[no-untyped-def]
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self.add_gradient(name, local_tensor(parameter.grad))
            parameter.grad = None

        return hook

    def _launch_ready(self) -> None:
        while self._next_launch < len(self.buckets) and not self.buckets[self._next_launch].missing:
            self._reduce(self.buckets[self._next_launch])
            self._next_launch += 1

    @contextmanager
    def _on_comm_stream(self) -> Iterator[None]:
        """On CUDA: a side stream that has seen all work so far, so that chained collectives do not stall compute."""
        if self.comm_stream is None:
            yield
            return
        self.comm_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.comm_stream):
            yield

    def _reduce(self, bucket: _Bucket) -> None:
        """Start the sum over ranks. On CUDA the whole chain is enqueued; on gloo its first collective."""
        on_host = self.comm_stream is None
        with self._on_comm_stream():
            if self.num_shards > 1:
                bucket.reduction = reduce_scatter_rows(
                    bucket.gradients, rank=self.shard_rank, group=self.shard_group, async_op=on_host
                )
            if self.num_replicas > 1 and not (on_host and self.num_shards > 1):
                bucket.reduction = dist.all_reduce(bucket.reduced, group=self.replica_group, async_op=on_host)

    def finish_backward(self) -> None:
        unused = [name for b in self.buckets for name in b.missing]
        if unused:
            raise RuntimeError(f"parameters {unused} received no gradient: they take no part in the forward")
        if self.comm_stream is not None:
            torch.cuda.current_stream().wait_stream(self.comm_stream)
        for bucket in self.buckets:
            if bucket.reduction is not None:
                bucket.reduction.wait()
                bucket.reduction = None
                if self.num_shards > 1 and self.num_replicas > 1:
                    dist.all_reduce(bucket.reduced, group=self.replica_group)
            bucket.filled.clear()
        for name, grad in self._narrow_gradients.items():
            # Widened only for the update; `publish` frees it again.
            self.masters[name].grad = self._as_state(name, grad.to(self._local[name].dtype))

    # ---- new values

    @torch.no_grad()
    def publish(self) -> None:
        for name in self._narrow_gradients:
            self.masters[name].grad = None
        if self.num_shards == 1:
            pairs = [(v, self._local[n]) for n, v in self._values.items() if self._local[n].dtype != v.dtype]
            if pairs:
                targets, sources = zip(*pairs, strict=True)
                torch._foreach_copy_(list(targets), list(sources))
            return
        self._receive(self.buckets)  # a publish without a forward in between
        for bucket in reversed(self.buckets):
            layout = bucket.layout
            dtype = self.params[layout.slots[0].name].dtype
            mine = torch.zeros(layout.row_length, dtype=dtype, device=self.device)
            for slot in layout.slots:
                slot.local_view(mine, self.shard_rank).copy_(self._local[slot.name])
            bucket.gathered = torch.empty(layout.num_ranks, layout.row_length, dtype=dtype, device=self.device)
            bucket.gather = all_gather_rows(bucket.gathered, mine, group=self.shard_group, async_op=True)

    @torch.no_grad()
    def _receive(self, buckets: list[_Bucket]) -> None:
        """Wait for the all-gathers of these buckets and write the values into the model."""
        for bucket in buckets:
            if bucket.gather is None:
                continue
            bucket.gather.wait()
            assert bucket.gathered is not None
            for slot in bucket.layout.slots:
                slot.copy_out(bucket.gathered, self._values[slot.name])
            bucket.gather = bucket.gathered = None


def state_bytes(data_parallel: DataParallel, optimizer_state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of training state this rank holds now, by kind. Shared storage counts once.

    parameters: what the model computes with; gradients: what holds them between backward and update; master: fp32
    copies of parameters, 0 where a master is the parameter itself; optimizer: moments.
    """
    seen: set[int] = set()

    def size(tensors: list[torch.Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    masters = list(data_parallel.masters.values())
    if isinstance(data_parallel, BucketedDataParallel):
        parameters = size(list(data_parallel.params.values()))
        gradients = size([b.gradients for b in data_parallel.buckets])
        gradients += size([m.grad for m in masters if m.grad is not None])
    else:
        parameters = size(masters)
        gradients = size([m.grad for m in masters if m.grad is not None])
    return {
        "parameters": parameters,
        "gradients": gradients,
        "master": size(masters),
        "optimizer": size(list(optimizer_state.values())),
    }
