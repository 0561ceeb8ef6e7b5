"""train.cuda_graphs: forward and backward of a micro-batch as one launch, for models whose kernels are shorter than
their launches.

The first micro-batches of a shape run as they always do, and compile what is to be compiled. Then one is captured: from
tensors that every further micro-batch is copied into, to gradients, which lie where the graph left them and are summed
by data parallelism outside of it. So a graph holds no collective, and knows nothing of steps. Weights are updated in
place. Validation and samples run without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from inference.graphs import nothing_collected
from parallel.zero import WholeParameters
from trainer.config import ConfigError
from trainer.passes import PlainPasses, forward_loss_sum
from trainer.step import TrainState

FIRST = 2
"""Micro-batches of a shape that run before it is captured: compiled blocks run differently the second time."""

Found = tuple[Tensor, dict[str, Tensor]]
"""The objective's sums, and gradients by parameter in the order in which autograd has them."""
Capture = Callable[[Callable[[], Found]], tuple[Found, Callable[[], None]]]
"""From what a micro-batch computes to what it finds, and what computes it again, into the same memory."""


@dataclass(frozen=True)
class _Captured:
    """What one shape's micro-batches are copied into and computed by. Filled by `GraphedPasses`."""

    batch: Batch
    scales: Tensor
    found: Found
    replay: Callable[[], None]


class GraphedPasses(PlainPasses):
    """Of a model that lies whole on this rank (ZeRO stages 0 and 1)."""

    def __init__(self, capture: Capture | None = None) -> None:
        """capture: None: as a CUDA graph."""
        self._capture: Capture = CudaGraphs() if capture is None else capture
        self._captured: dict[Hashable, _Captured] = {}
        self._seen: Counter[Hashable] = Counter()

    def backward(self, state: TrainState, microbatches: list[Batch], scales: Tensor) -> Tensor:
        data_parallel = state.data_parallel
        assert isinstance(data_parallel, WholeParameters)
        total = torch.zeros_like(scales, dtype=torch.float64)
        for i, batch in enumerate(microbatches):
            data_parallel.start_microbatch(last=i == len(microbatches) - 1)
            key = (batch.shapes, None if state.fp8 is None else state.fp8.started)
            self._seen[key] += 1
            if self._seen[key] <= FIRST:
                sums = forward_loss_sum(state, batch)
                sums.backward(scales)
            else:
                # What the graph reads must be there: nothing in it waits for other streams.
                data_parallel.receive()
                sums, gradients = self._run(state, batch, scales, key)
                data_parallel.add_gradients(gradients)
            total += sums.detach()
        data_parallel.finish_backward()
        return total

    def _run(self, state: TrainState, batch: Batch, scales: Tensor, key: Hashable) -> Found:
        """The next call overwrites what is found."""
        if key not in self._captured:
            self._captured[key] = self._record(state, batch, scales)
        captured = self._captured[key]
        captured.batch.copy_(batch)
        captured.scales.copy_(scales)
        captured.replay()
        return captured.found

    def _record(self, state: TrainState, batch: Batch, scales: Tensor) -> _Captured:
        data_parallel = state.data_parallel
        assert isinstance(data_parallel, WholeParameters)
        own, own_scales = batch.clone(), scales.clone()

        def compute() -> Found:
            with data_parallel.gradients_apart() as gradients:
                sums = forward_loss_sum(state, own)
                sums.backward(own_scales)
            return sums.detach(), gradients

        try:
            found, replay = self._capture(compute)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                [f"train.cuda_graphs=true: a step of this model is no graph ({first}); use train.cuda_graphs=false"]
            ) from error
        return _Captured(own, own_scales, found, replay)


def leave_default_stream(device: torch.device) -> None:
    """Let this thread's work go to a stream of its own, before there are parameters.

    Autograd hands a parameter's gradient over on the stream of the time when somebody first asked for it. A graph may
    be captured on that stream too, unless it is the default one: no capture may depend on that.
    """
    torch.cuda.set_stream(torch.cuda.Stream(device))


class CudaGraphs:
    """Captures of one process, whose graphs share their memory: one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        assert stream != torch.cuda.default_stream(), "leave_default_stream was not called before there were parameters"
        # What other threads do meanwhile is no part of it: NCCL's watchdog asks for events, batches are pinned.
        captures = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        with nothing_collected(before=self._pool is None), captures:
            found = compute()
        self._pool = graph.pool()
        return found, graph.replay
