"""The trainer's weights under an engine: never copied, whatever the layout. Compiled blocks run eagerly there, because
each step of an engine has a shape of its own.

    in_place   the engine computes with the parameters as they lie: whole (ZeRO 0 to 2), or shards of tp
    gather     ZeRO-3: fully_shard gathers all blocks once before rollouts and frees them after: the memory of the whole
               model in the compute dtype, for as long as rollouts take
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
from trainer.heads import in_evaluation
from trainer.rl.overlap import on_stream


class Lockstep:
    """Ranks that take the steps of their engines together, or (group None) each for itself."""

    def __init__(self, model: Decoder, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._model, self._group, self._device = model, group, device

    def any_busy(self, busy: bool) -> bool:
        """Whether this rank has work or, in a group, any of its ranks. Collective then."""
        if self._group is None:
            return busy
        found = torch.tensor(int(busy), device=self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return bool(found)

    @torch.no_grad()
    def idle(self) -> list[Any]:
        """A pass over one token, for its gathers; no deltas."""
        with in_evaluation(self._model), eager_blocks(self._model):
            self._model(torch.zeros(1, 1, dtype=torch.int64, device=self._device))
        return []


class ServedWeights:
    """What an engine on a trainer's model needs done around its rollouts."""

    def __init__(
        self, model: Decoder, *, mode: str, group: dist.ProcessGroup, device: torch.device, stream: Any = None
    ) -> None:
        """mode: one of trainer.rl.config.WEIGHTS but auto. group: the ranks that hold shards of it. stream: the CUDA
        stream that the engine works on; None: the current one. Collective."""
        self.mode = mode
        self.stream = stream
        self._model = model
        self.lockstep = Lockstep(model, group if mode == "stream" else None, device)
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.gather_seconds = 0.0  # of the last `serving`
        if self._sharded:
            self.lockstep.idle()  # fully_shard knows its root, and the root its streams, after the first forward

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, a ZeRO-3 model's parameters are plain whole tensors, which no forward frees, and an engine may be
        made. Collective."""
        begin = time.perf_counter()
        for module in self._sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self.gather_seconds = time.perf_counter() - begin if self._sharded else 0.0
        try:
            with eager_blocks(self._model):
                yield
        finally:
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
        self.gather_seconds = 0.0
        try:
            with on_stream(self.stream), eager_blocks(self._model):
                yield
        finally:
            for module in self._sharded:
                module.reshard()
