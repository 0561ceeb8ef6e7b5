"""ZeRO stages 0, 1 and 2: the model holds whole parameters, and gradients are summed while backward still runs.

Parameters are packed into buckets (parallel/buckets.py), each slot of which is contiguous, so nothing is reordered for
a collective, and what rows divide evenly is not copied either:

    gradients   0, 1: added into a buffer of all of them the moment autograd has them; in the last micro-batch each
                      bucket that is complete is all-reduced, or reduce-scattered in place.
                2:    in every micro-batch, when those of a bucket have arrived, they are cast to the dtype of the
                      reduction and reduce-scattered, into the sharded sum or to be added to it. A bucket holds what one
                      unit (a block) has, and those of two units at most are whole at a time.
    parameters  1, 2: the optimizer updates this rank's rows, and `publish` gathers the others beside them in the model,
                      a bucket at a time in forward order. A unit waits for its own just before it runs.

On CUDA all this is a side stream's work, in the order in which it is started here, which is the same on all ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from parallel.buckets import BucketLayout, Slot, plan_buckets
from parallel.collectives import all_gather_together, all_reduce_together, reduce_scatter_together
from parallel.data import DataParallel, Holders, is_spread_over_ep
from parallel.mesh import Meshes
from parallel.regions import local_tensor


class _Bucket:
    """What becomes of the gradients of one bucket in a step."""

    def __init__(self, layout: BucketLayout, holders: Holders, *, scatters: bool) -> None:
        """scatters: gradients leave in every micro-batch; else they are summed here until the last."""
        self.layout = layout
        self.holders = holders
        self.scatters = scatters
        self.whole: torch.Tensor | None = None  # [N * S], sums of whole gradients; None where they are scattered
        self.shard: torch.Tensor | None = None  # [S], sums of this rank's parts of scattered ones; None before them
        self.arrived: dict[str, torch.Tensor] = {}  # whole gradients that are still to be scattered
        self.filled: set[str] = set()  # parameters of which a sum of this step has begun
        self.missing: set[str] = set()  # parameters without which the bucket is not complete
        self.published: torch.cuda.Event | None = None  # new values are in the model

    @property
    def sums(self) -> list[torch.Tensor]:
        """What this rank holds of the sums [length], by slot."""
        if self.shard is not None:
            return [slot.of_shard(self.shard) for slot in self.layout.slots]
        assert self.whole is not None
        return [slot.of_whole(self.whole)[self.holders.shard_rank] for slot in self.layout.slots]

    def add(self, slot: Slot, grad: torch.Tensor) -> None:
        """Into the sums of whole gradients."""
        assert self.whole is not None
        target, source = slot.pair(slot.of_whole(self.whole), grad)
        if slot.name in self.filled:
            target.add_(source)
        else:
            target.copy_(source)
        self.filled.add(slot.name)


class WholeParameters(DataParallel):
    """Stages 0, 1 and 2.

    Reductions start in bucket order on every rank, whatever order gradients arrive in; in a pipeline, whose ranks run
    one program, at stage 2 in the order in which a bucket is followed by another.

    units: modules in forward order with the names of the parameters they need; their forward waits for those.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mesh: Meshes,
        zero_stage: int,
        units: list[tuple[nn.Module, list[str]]],
        master_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        bucket_mb: float,
    ) -> None:
        """bucket_mb: size of buckets at stages 0 and 1."""
        self.model = model
        # Those that are trained. Others stay as they were loaded, whole on every rank.
        self.params: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # What this rank computes with: a parameter itself, or its shard over the axes inside layers. Same memory.
        self._values = {name: local_tensor(p.detach()) for name, p in self.params.items()}
        self.device = next(iter(self.params.values())).device
        self.reduce_dtype = reduce_dtype
        self.comm_stream = torch.cuda.Stream(priority=-1) if self.device.type == "cuda" else None
        self.buckets = self._make_buckets(mesh, zero_stage, units, int(bucket_mb * 2**20 / reduce_dtype.itemsize))
        self._bucket_of = {slot.name: (b, slot) for b in self.buckets for slot in b.layout.slots}
        self._next = 0  # bucket to be launched
        self._last = self._in_pipeline = False
        self._apart: dict[str, torch.Tensor] | None = None  # gradients, while somebody wants them for himself
        self._changed: set[str] = set()  # masters whose new values are to be gathered with those of their bucket
        self._filling: _Bucket | None = None  # in a pipeline: the one whose gradients are arriving
        self._leaving: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()  # whole gradients on their way
        self._make_masters(master_dtype)
        for name, parameter in self.params.items():
            parameter.register_post_accumulate_grad_hook(self._gradient_hook(name))
        for number, (module, names) in enumerate(units):
            needed = [b for b in self.buckets if any(slot.name in names for slot in b.layout.slots)]
            module.register_forward_pre_hook(lambda _module, _args, needed=needed: self._receive(needed))
            if number == len(units) - 1:
                module.register_forward_pre_hook(lambda _module, _args: self._let_last_leave())
            if number < 2:  # nothing hides the gathers of the embedding and the first block but the update of others
                gathered = [b for b in needed if b.holders.num_shards > 1]
                self.needed_first |= {slot.name for b in gathered for slot in b.layout.slots}

    def _make_buckets(
        self, mesh: Meshes, zero_stage: int, units: list[tuple[nn.Module, list[str]]], max_elements: int
    ) -> list[_Bucket]:
        """In the order in which they are complete."""
        # Backward order, roughly: the last parameters get their gradients first.
        order = list(reversed(self.params))
        together = [set(names) for _, names in units] if zero_stage == 2 else [set(order)]
        limit = math.inf if zero_stage == 2 else max_elements
        buckets = []
        for experts in (False, True):
            kind = [name for name in order if is_spread_over_ep(self.params[name]) == experts]
            if not kind:
                continue
            holders = Holders.of(mesh, sharded=zero_stage > 0, experts=experts)
            scatters = zero_stage == 2 and holders.num_shards > 1
            for unit in together:
                shapes = {name: self._values[name].shape for name in kind if name in unit}
                layouts = plan_buckets(shapes, num_ranks=holders.num_shards, max_elements=limit)
                buckets += [_Bucket(layout, holders, scatters=scatters) for layout in layouts]
        for bucket in buckets:
            if not bucket.scatters:
                size = bucket.layout.num_ranks * bucket.layout.shard_length
                bucket.whole = torch.zeros(size, dtype=self.reduce_dtype, device=self.device)
        return sorted(buckets, key=lambda bucket: order.index(bucket.layout.slots[-1].name))

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
        """Allocate masters, in parameter order.

        In the model's own dtype a master is a view of the model's rows and costs nothing, unless they are parts of the
        matrices of a stack; else it is a copy to be.
        """
        self.masters = {}
        self.copies = {}
        self._local: dict[str, torch.Tensor] = {}
        self._narrow_gradients: dict[str, torch.Tensor] = {}  # summed in another dtype than the master's
        for name, parameter in self.params.items():
            bucket, slot = self._bucket_of[name]
            rows = slot.local_part(self._values[name], bucket.holders.shard_rank)
            is_view = master_dtype == parameter.dtype and rows.is_contiguous()  # the optimizer walks memory
            self._local[name] = rows if is_view else torch.empty(rows.shape, dtype=master_dtype, device=self.device)
            if not is_view and slot.is_parameter:
                self.copies[name] = rows
            self.masters[name] = self._as_state(name, self._local[name])
        for bucket in self.buckets:
            if not bucket.scatters:
                self._bind_gradients(bucket)

    def _bind_gradients(self, bucket: _Bucket) -> None:
        """Make what will hold the sums the gradients of masters."""
        for slot, part in zip(bucket.layout.slots, bucket.sums, strict=True):
            grad = slot.local_view(part, bucket.holders.shard_rank)
            if grad.dtype == self._local[slot.name].dtype:
                self.masters[slot.name].grad = self._as_state(slot.name, grad)
            else:
                self._narrow_gradients[slot.name] = grad

    def storage(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sums = [sums for b in self.buckets if (sums := b.shard if b.scatters else b.whole) is not None]
        widened = [master.grad for master in self.masters.values() if master.grad is not None]
        return list(self.model.parameters()), sums + widened

    # ---- backward

    def start_microbatch(self, *, last: bool) -> None:
        self._check_arrived()
        self._next, self._last, self._in_pipeline = 0, last, False
        for bucket in self.buckets:
            if last or bucket.scatters:
                bucket.missing = {slot.name for slot in bucket.layout.slots}

    def start_pipeline(self) -> None:
        self.start_microbatch(last=True)  # everything is missing
        self._in_pipeline = True  # and nothing complete by arriving once

    def gradients_complete(self, names: Iterable[str]) -> None:
        for name in names:
            bucket, _ = self._bucket_of[name]
            if name in bucket.filled or name in bucket.arrived:  # finish_backward names what never arrived
                bucket.missing.discard(name)
        self._launch_ready()

    @torch.no_grad()
    def add_gradient(self, name: str, grad: torch.Tensor) -> None:
        bucket, slot = self._bucket_of[name]
        if bucket.scatters:
            if self._in_pipeline:
                # Those of a bucket come one after the other, but not always all of it: a split backward has those of
                # norms long before those of matrices.
                if self._filling is not None and (self._filling is not bucket or name in bucket.arrived):
                    self._scatter(self._filling)
                self._filling = bucket
            bucket.arrived[name] = grad
        else:
            bucket.add(slot, grad)
        if not self._in_pipeline:
            bucket.missing.discard(name)
            self._launch_ready()

    def add_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """`add_gradient` for all that a backward has found, in few launches. Stages 0 and 1."""
        targets: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = {True: ([], []), False: ([], [])}
        for name, grad in gradients.items():
            bucket, slot = self._bucket_of[name]
            assert bucket.whole is not None
            pair = slot.pair(slot.of_whole(bucket.whole), grad)
            for side, tensor in zip(targets[name in bucket.filled], pair, strict=True):
                side.append(tensor)
            bucket.filled.add(name)
            bucket.missing.discard(name)
        for more, (sums, found) in targets.items():
            if sums:
                (torch._foreach_add_ if more else torch._foreach_copy_)(sums, found)
        self._launch_ready()

    @contextmanager
    def gradients_apart(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, what autograd delivers is put here, by name as it arrives, and summed by nobody."""
        self._apart = {}
        try:
            yield self._apart
        finally:
            self._apart = None

    def _gradient_hook(self, name: str):  # type: ignore[no-untyped-def]
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            grad = local_tensor(parameter.grad)
            parameter.grad = None
            if self._apart is not None:
                self._apart[name] = grad
            else:
                self.add_gradient(name, grad)

        return hook

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            bucket = self.buckets[self._next]
            self._scatter(bucket)
            if self._last:
                self._reduce(bucket)
            self._next += 1

    @contextmanager
    def _on_comm_stream(self) -> Iterator[None]:
        """On CUDA: a side stream that has seen all work so far, so that chained collectives do not stall compute."""
        if self.comm_stream is None:
            yield
            return
        self.comm_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.comm_stream):
            yield

    @torch.no_grad()
    def _scatter(self, bucket: _Bucket) -> None:
        """Start the sum over ranks of the gradients that have arrived, and free them when it is done."""
        if not bucket.arrived:
            return
        self._let_leave(at_most=1)
        if bucket.shard is None:
            # Filled slot by slot. Allocated for the stream that the optimizer runs on.
            bucket.shard = torch.empty(bucket.layout.shard_length, dtype=self.reduce_dtype, device=self.device)
            self._bind_gradients(bucket)
        slots = [slot for slot in bucket.layout.slots if slot.name in bucket.arrived]
        wholes, casts = [], []
        for slot in slots:
            grad = bucket.arrived[slot.name]
            if slot.is_parameter and grad.dtype == self.reduce_dtype and grad.is_contiguous():
                wholes.append(grad.view(slot.num_ranks, -1))
            else:
                # What fills up the last parts is never read where it ends.
                wholes.append(grad.new_empty(slot.num_ranks, slot.length, dtype=self.reduce_dtype))
                casts.append(slot.pair(wholes[-1], grad))
        with self._on_comm_stream():
            if casts:
                torch._foreach_copy_([target for target, _ in casts], [source for _, source in casts])
            sums = [slot.of_shard(bucket.shard) for slot in slots]
            further = [slot.name in bucket.filled for slot in slots]
            shards = [torch.empty_like(s) if more else s for s, more in zip(sums, further, strict=True)]
            reduce_scatter_together(shards, wholes, group=bucket.holders.shard.get_group())
            if any(further):
                added = [(s, x) for s, x, more in zip(sums, shards, further, strict=True) if more]
                torch._foreach_add_([s for s, _ in added], [x for _, x in added])
            if self.comm_stream is not None:
                self._leaving.append((self.comm_stream.record_event(), [*wholes, *bucket.arrived.values()]))
        bucket.filled.update(bucket.arrived)
        bucket.arrived = {}

    def _let_leave(self, *, at_most: int) -> None:
        """Let compute wait until at most so many buckets of whole gradients are on their way; the others are freed.

        Their memory is that of the stream that computes, which so does not write to it again too early.
        """
        while len(self._leaving) > at_most:
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)

    def _let_last_leave(self) -> None:
        """At the end of a forward, before memory is at its peak: free whole gradients of the micro-batch before, whose
        reduction ended long ago. In a pipeline another micro-batch's may have begun just now."""
        if not self._in_pipeline:
            self._let_leave(at_most=0)

    @torch.no_grad()
    def _reduce(self, bucket: _Bucket) -> None:
        """Start what sums over ranks have to wait for the last micro-batch."""
        holders = bucket.holders
        with self._on_comm_stream():
            if bucket.whole is not None and holders.num_shards > 1:
                wholes = [slot.of_whole(bucket.whole) for slot in bucket.layout.slots]
                reduce_scatter_together(bucket.sums, wholes, group=holders.shard.get_group())
            if holders.num_replicas > 1:
                flat = bucket.shard if bucket.scatters else bucket.whole if holders.num_shards == 1 else None
                all_reduce_together(bucket.sums if flat is None else [flat], group=holders.replicas.get_group())

    def _check_arrived(self) -> None:
        unused = [name for bucket in self.buckets for name in sorted(bucket.missing)]
        if unused:
            raise RuntimeError(f"parameters {unused} received no gradient: they take no part in the forward")

    def finish_backward(self) -> None:
        self._check_arrived()
        if self.comm_stream is not None:
            torch.cuda.current_stream().wait_stream(self.comm_stream)
        self._leaving.clear()
        self._filling = None
        for bucket in self.buckets:
            bucket.filled.clear()
        for name, grad in self._narrow_gradients.items():
            # Widened only for the update; `publish` frees it again.
            self.masters[name].grad = self._as_state(name, grad.to(self._local[name].dtype))

    # ---- new values

    @torch.no_grad()
    def publish(self, names: Collection[str] | None = None, *, written: Collection[str] = ()) -> None:
        names = self.masters if names is None else names
        stale = [name for name in names if name in self.copies and name not in written]
        if stale:
            torch._foreach_copy_([self.copies[name] for name in stale], [self._local[name] for name in stale])
        self._changed.update(names)
        with self._on_comm_stream():
            for bucket in reversed(self.buckets):
                of_bucket = {slot.name for slot in bucket.layout.slots}
                if of_bucket <= self._changed:
                    self._changed -= of_bucket
                    self._release_gradients(bucket)
                    if bucket.holders.num_shards > 1:
                        self._gather(bucket)
                        bucket.published = None if self.comm_stream is None else self.comm_stream.record_event()

    def _release_gradients(self, bucket: _Bucket) -> None:
        """Free what is of no use after an update."""
        bucket.shard = None
        for slot in bucket.layout.slots:
            if bucket.scatters or slot.name in self._narrow_gradients:
                self.masters[slot.name].grad = None
            if bucket.scatters:
                self._narrow_gradients.pop(slot.name, None)

    def _gather(self, bucket: _Bucket) -> None:
        """Bring the new values of all ranks into the model: in place where slots are parameters."""
        rank = bucket.holders.shard_rank
        wholes, apart = [], []
        for slot in bucket.layout.slots:
            values = self._values[slot.name]
            if slot.is_parameter:
                wholes.append(values.view(slot.num_ranks, -1))
            else:
                wholes.append(values.new_empty(slot.num_ranks, slot.length))
                slot.local_view(wholes[-1][rank], rank).copy_(self._local[slot.name])
                apart.append(slot.pair(wholes[-1], values))
        all_gather_together(wholes, rank=rank, group=bucket.holders.shard.get_group())
        for whole, values in apart:
            values.copy_(whole)

    def receive(self) -> None:
        """Let compute wait for all new values, as forwards of units do for theirs."""
        self._receive(self.buckets)

    def _receive(self, buckets: list[_Bucket]) -> None:
        """Let compute wait for the new values of these buckets."""
        for bucket in buckets:
            if bucket.published is not None:
                torch.cuda.current_stream().wait_event(bucket.published)
                bucket.published = None
