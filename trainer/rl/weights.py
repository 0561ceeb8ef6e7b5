"""The trainer's weights under an engine: never copied where they are on this rank, whatever the layout. Compiled blocks
run eagerly there, because each step of an engine has a shape of its own.

    in_place   the engine computes with the parameters as they lie: whole (ZeRO 0 to 2), or shards of tp
    gather     what other ranks hold is there for as long as rollouts take, which is the memory of the whole model in
               the compute dtype: fully_shard gathers all blocks once (ZeRO-3), the ranks of ep their experts, and the
               stages of a pipeline send each other their layers (trainer/rl/twin.py)
    stream     ZeRO-3: fully_shard gathers each block when it runs, in every step of the engine, and frees it: the
               memory of a block. All ranks take their steps together; one that has nothing left to do computes a token

With tp as well, what is gathered is a rank's shard of tp.

`rollout_seconds` and `rollout_gather_seconds` of a run's metrics say what they cost. With recipe.rl.overlap alone the
engine has a copy (trainer/rl/overlap.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from models.decoder import Decoder
from parallel.parallelize import eager_blocks
from parallel.pipeline.stages import Stage
from trainer.heads import in_evaluation
from trainer.rl.overlap import on_stream
from trainer.rl.twin import Twin


class Lockstep:
    """Ranks that take the steps of their engines together, or (group None) each for itself."""

    def __init__(
        self,
        model: Decoder,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        stage: Stage | None,
        dtype: torch.dtype,
    ) -> None:
        """stage: what of a pipeline is run here; None: all layers. dtype: of its hidden states."""
        self._model, self._group, self._device = model, group, device
        self._stage, self._dtype = stage, dtype

    def any_busy(self, busy: bool) -> bool:
        """Whether this rank has work or, in a group, any of its ranks. Collective then."""
        if self._group is None:
            return busy
        found = torch.tensor(int(busy), device=self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return bool(found)

    @torch.no_grad()
    def idle(self) -> list[Any]:
        """A pass over a token (with sequence parallelism one for each chunk of each rank), for its gathers; no
        deltas."""
        groups = self._model.groups
        slices = groups.tp if groups.sequence_parallel else None
        here = 1 if slices is None else groups.sp_chunks
        num_tokens = here * (1 if slices is None else slices.size())
        tokens, hidden = torch.zeros(1, num_tokens, dtype=torch.int64, device=self._device), None
        if self._stage is not None and not self._stage.is_first:
            shape = (1, here, self._model.config.hidden_size)
            hidden = torch.zeros(shape, dtype=self._dtype, device=self._device)
        with in_evaluation(self._model), eager_blocks(self._model):
            self._model(tokens, stage=self._stage, hidden=hidden)
        return []


class ServedWeights:
    """What an engine on a trainer's model needs done around its rollouts."""

    def __init__(
        self,
        model: Decoder,
        *,
        mode: str,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        stream: Any = None,
        twin: Twin | None = None,
        stage: Stage | None = None,
    ) -> None:
        """mode: one of trainer.rl.config.WEIGHTS but auto. group: the ranks that hold shards of it. dtype: of hidden
        states. stream: the CUDA stream that the engine works on; None: the current one. twin: what the engine computes
        with instead of the model itself. stage: of a pipeline, one that this rank has. Collective."""
        self.mode = mode
        self.stream = stream
        self._model, self._twin = model, twin
        self.served = model if twin is None else twin.model
        self.lockstep = Lockstep(model, group if mode == "stream" else None, device, stage=stage, dtype=dtype)
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.gather_seconds = 0.0  # of the last `serving`
        if self._sharded:
            self.lockstep.idle()  # fully_shard knows its root, and the root its streams, after the first forward

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the parameters of `served` are plain whole tensors, or tp's part of them, which no forward frees, and
        an engine may be made. Collective."""
        begin = time.perf_counter()
        for module in self._sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        if self._twin is not None:
            self._twin.fill()
        self.gather_seconds = time.perf_counter() - begin if self.mode == "gather" else 0.0
        try:
            with eager_blocks(self._model):
                yield
        finally:
            if self._twin is not None and self.mode == "gather":
                self._twin.drop()
            for module in self._sharded:
                module.reshard()
                # fully_shard's own default: the root stays whole from its forward to its backward.
                module.set_reshard_after_forward(module is not self._model, recurse=False)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, the engine may take steps. Collective."""
        if self.mode == "gather":
            with self.whole():
                yield
            return
        if self._twin is not None:
            self._twin.fill()
        self.gather_seconds = 0.0
        try:
            with on_stream(self.stream), eager_blocks(self._model):
                yield
        finally:
            for module in self._sharded:
                module.reshard()
