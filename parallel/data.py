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

With expert parallelism the experts of a rank have seen the tokens of all ranks of ep: their gradients are summed, and
their state is sharded, over the ranks that hold the same experts (parallel/mesh.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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


def is_spread_over_ep(parameter: torch.Tensor) -> bool:
    """Whether the ranks of ep hold different parts of a parameter, which then is one of experts."""
    return isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())


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

    def gather(self, names: Iterable[str]) -> None:  # noqa: B027  (whole parameters leave nothing to do)
        """The model is about to compute with these parameters: start to make them whole, if they are not."""

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


@dataclass(frozen=True)
class _Holders:
    """The ranks that hold the same parameters, and how their state is divided among them."""

    view: DeviceMesh  # of all ranks, with the axes below
    shard: DeviceMesh  # state is sharded over these ranks, if at all
    num_shards: int  # 1: it is not
    replicas: DeviceMesh  # ranks with the same state: what is reduced is summed over them too
    axes: tuple[str, ...]  # of `view` that the state's DTensors lie on, before those inside layers

    @classmethod
    def of(cls, mesh: Meshes, *, sharded: bool, experts: bool) -> _Holders:
        """The holders of experts, where those are spread over ep, or of all else."""
        view = mesh.experts if experts else mesh.state
        everyone = mesh.expert_tokens if experts else mesh.tokens
        assert view is not None
        assert everyone is not None
        axis = "expert_shard" if experts else "shard"
        num_shards = view[axis].size() if sharded else 1
        replicas = view["dp_replicate"] if sharded else everyone
        # DTensor state lives on the shard axis alone unless there are replicas, as fully_shard's does.
        axes = ("dp_replicate", axis) if replicas.size() > 1 else (axis,)
        return cls(view, view[axis], num_shards, replicas, axes if num_shards > 1 else ())

    @property
    def shard_rank(self) -> int:
        return self.shard.get_local_rank() if self.num_shards > 1 else 0

    @property
    def num_replicas(self) -> int:
        return self.replicas.size()


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
        mesh: Meshes,
        replicas: DeviceMesh | None,
        reduce_dtype: torch.dtype,
    ) -> None:
        """replicas: those that fully_shard does not know of; experts have the same."""
        assert isinstance(model, nn.Module)
        self.model = model
        self.keep_gathered = zero_stage == 2
        self.replicas = replicas
        self.reduce_dtype = reduce_dtype
        self.masters = dict(model.named_parameters())
        kinds = set(map(is_spread_over_ep, self.masters.values()))
        self._holders = {kind: _Holders.of(mesh, sharded=True, experts=kind) for kind in kinds}
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
        if self.keep_gathered:
            self.model.set_reshard_after_backward(last)

    def start_pipeline(self) -> None:
        if self.keep_gathered:
            self.model.set_reshard_after_backward(False)

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
    names = master.device_mesh.mesh_dim_names or ()
    placement = master.placements[names.index("expert_shard" if is_spread_over_ep(master) else "shard")]
    assert isinstance(placement, (Shard, _StridedShard))
    return placement.dim


class _Bucket:
    """Buffers and pending work of one bucket."""

    def __init__(
        self, layout: BucketLayout, holders: _Holders, *, device: torch.device, reduce_dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.holders = holders
        self.gradients = torch.zeros(layout.num_ranks, layout.row_length, dtype=reduce_dtype, device=device)  # [N, S]
        self.reduced = self.gradients[
            holders.shard_rank
        ]  # [S]: after the reduction, the summed gradient of this rank's rows
        self.filled: set[str] = set()  # parameters whose gradient of this step has arrived at least once
        self.missing: set[str] = set()  # parameters still to come in the last micro-batch
        self.reduction: dist.Work | None = None
        self.gathered: torch.Tensor | None = None  # [N, S] while new values are on their way
        self.gather: dist.Work | None = None


class BucketedDataParallel(DataParallel):
    """Stages 0 and 1: whole parameters in the model, gradients reduced in flat buckets while backward still runs.

    Each parameter's gradient is moved into its bucket the moment autograd has it (and freed); when a bucket of the last
    micro-batch is complete, its reduction starts. Reductions start in bucket order on every rank, whatever order
    gradients arrive in. At stage 1 the optimizer updates a shard of fp32 masters, and
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
        self.comm_stream = torch.cuda.Stream() if self.device.type == "cuda" else None

        # Backward order, roughly: the last parameters get their gradients first.
        order = list(reversed(self.params))
        max_elements = int(bucket_mb * 2**20 / reduce_dtype.itemsize)
        self.buckets: list[_Bucket] = []
        for experts in (False, True):
            shapes = {n: self._values[n].shape for n in order if is_spread_over_ep(self.params[n]) == experts}
            if not shapes:
                continue
            holders = _Holders.of(mesh, sharded=sharded, experts=experts)
            for layout in plan_buckets(shapes, num_ranks=holders.num_shards, max_elements=max_elements):
                self.buckets.append(_Bucket(layout, holders, device=self.device, reduce_dtype=reduce_dtype))
        self.buckets.sort(key=lambda bucket: order.index(bucket.layout.slots[-1].name))  # by when each is complete
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

        The shard axis cuts one dim (the slot says which) of what the axes inside layers have left of a parameter.
        """
        parameter = self.params[name]
        bucket, slot = self._bucket_of[name]
        holders, dim = bucket.holders, slot.dim
        axes = holders.axes
        placements: list[Placement] = [Replicate()] * (len(axes) - 1) + [Shard(dim)] * bool(axes)
        if isinstance(parameter, DTensor):
            inner, sizes = parameter.placements, parameter.device_mesh.shape
            pieces = math.prod(size for size, cut in zip(sizes, inner, strict=True) if cut == Shard(dim))
            if axes and pieces > 1:
                placements[-1] = _StridedShard(dim, split_factor=pieces)
            axes, placements = (*axes, *(parameter.device_mesh.mesh_dim_names or ())), [*placements, *inner]
        if not axes:
            return local
        shape, stride = parameter.shape, torch.empty(parameter.shape, device="meta").stride()
        return DTensor.from_local(local, holders.view[axes], placements, run_check=False, shape=shape, stride=stride)

    def _make_masters(self, master_dtype: torch.dtype) -> None:
        """Allocate masters and bind their gradients to the buckets, in parameter order.

        In the model's own dtype a master is a view of the model's rows and costs nothing, unless they are parts of the
        matrices of a stack; else it is a copy to be.
        """
        self.masters = {}
        self._local: dict[str, torch.Tensor] = {}
        self._narrow_gradients: dict[str, torch.Tensor] = {}  # summed in another dtype than the master's
        for name, parameter in self.params.items():
            bucket, slot = self._bucket_of[name]
            rows = slot.local_part(self._values[name], bucket.holders.shard_rank)
            is_view = master_dtype == parameter.dtype and rows.is_contiguous()  # the optimizer walks memory
            local = rows if is_view else torch.empty(rows.shape, dtype=master_dtype, device=self.device)
            grad = slot.local_view(bucket.reduced, bucket.holders.shard_rank)
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
        on_host, holders = self.comm_stream is None, bucket.holders
        with self._on_comm_stream():
            if holders.num_shards > 1:
                bucket.reduction = reduce_scatter_rows(
                    bucket.gradients, rank=holders.shard_rank, group=holders.shard.get_group(), async_op=on_host
                )
            if holders.num_replicas > 1 and not (on_host and holders.num_shards > 1):
                bucket.reduction = dist.all_reduce(bucket.reduced, group=holders.replicas.get_group(), async_op=on_host)

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
                if bucket.holders.num_shards > 1 and bucket.holders.num_replicas > 1:
                    dist.all_reduce(bucket.reduced, group=bucket.holders.replicas.get_group())
            bucket.filled.clear()
        for name, grad in self._narrow_gradients.items():
            # Widened only for the update; `publish` frees it again.
            self.masters[name].grad = self._as_state(name, grad.to(self._local[name].dtype))

    # ---- new values

    @torch.no_grad()
    def publish(self) -> None:
        for name in self._narrow_gradients:
            self.masters[name].grad = None
        whole = [slot.name for b in self.buckets if b.holders.num_shards == 1 for slot in b.layout.slots]
        pairs = [(self._values[n], self._local[n]) for n in whole if self._local[n].dtype != self._values[n].dtype]
        if pairs:
            targets, sources = zip(*pairs, strict=True)
            torch._foreach_copy_(list(targets), list(sources))
        self._receive(self.buckets)  # a publish without a forward in between
        for bucket in reversed(self.buckets):
            if bucket.holders.num_shards == 1:
                continue
            layout, holders = bucket.layout, bucket.holders
            dtype = self.params[layout.slots[0].name].dtype
            mine = torch.zeros(layout.row_length, dtype=dtype, device=self.device)
            for slot in layout.slots:
                slot.local_view(mine, holders.shard_rank).copy_(self._local[slot.name])
            bucket.gathered = torch.empty(layout.num_ranks, layout.row_length, dtype=dtype, device=self.device)
            bucket.gather = all_gather_rows(bucket.gathered, mine, group=holders.shard.get_group(), async_op=True)

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
