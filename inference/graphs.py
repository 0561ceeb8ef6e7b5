"""CUDA graphs of small steps: a whole forward pass as one launch.

A graph is captured for some numbers of sequences and tokens, when a step first needs it or before there are any
(`StepGraphs.capture`); a step takes the next larger one and pads. What it reads is written into the same tensor every
time. Weights and pages stay where they are, so weights that are changed in place
need no new graph.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.batch import padding

Forward = Callable[[Tensor, int], Any]
"""From a packed batch (inference/batch.py) for some number of sequences, on the device, to logits by sequence, or
whatever else a pass is to find out."""

MAX_TOKENS = 1024
"""Of a step with prompts: from here on the device takes longer than the host needs to launch everything."""


class GraphKey(NamedTuple):
    """What is captured."""

    decodes: bool  # one token of each sequence; false: any number of each
    sequences: int
    tokens: int


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    outputs: Any


def sizes_up_to(most: int) -> list[int]:
    """Numbers of sequences that graphs are captured for: 1, 2, 4, 8, then so close that at most an eighth pads."""
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size = size * 2 if size < 8 else size + max(8, 1 << (size.bit_length() - 4))
    return [*sizes, most]


class GraphSizes:
    """Numbers of sequences and tokens that passes are captured for."""

    def __init__(self, max_sequences: int, max_tokens: int, listed: Seq[int] = ()) -> None:
        """max_tokens: of a step, whatever it computes. listed: numbers of sequences of steps that only decode; larger
        ones get no graph. Empty: `sizes_up_to`."""
        self.sizes = sorted(set(listed)) or sizes_up_to(max_sequences)
        self.mixed_sizes = sorted({min(8, max_sequences), min(64, max_sequences), max_sequences})
        most = min(max_tokens, MAX_TOKENS)
        self.token_sizes = [size for size in (16, 64, 128, 256, 384, 512, 768) if size < most] + [most]

    def size_of(self, num_sequences: int, num_tokens: int, *, decodes: bool) -> tuple[int, int] | None:
        """(sequences, tokens) that a step is padded to; None: it is too large for a graph."""
        if decodes:
            size = next((size for size in self.sizes if size >= num_sequences), None)
            return None if size is None else (size, size)
        if num_tokens > self.token_sizes[-1]:
            return None
        tokens = next(size for size in self.token_sizes if size >= num_tokens)
        return next(size for size in self.mixed_sizes if size >= num_sequences), tokens

    def every_key(self) -> list[GraphKey]:
        """All that `size_of` may ask for."""
        decoding = [GraphKey(True, size, size) for size in self.sizes]
        return decoding + [GraphKey(False, size, tokens) for size in self.mixed_sizes for tokens in self.token_sizes]


class StepGraphs(GraphSizes):
    """Captures a forward pass when its size is first asked for, or before."""

    def __init__(
        self, decode: Forward, mixed: Forward, max_sequences: int, max_tokens: int, listed: Seq[int] = ()
    ) -> None:
        """decode: of one token of each sequence; mixed: of any. The rest: of GraphSizes."""
        super().__init__(max_sequences, max_tokens, listed)
        self._forwards = {True: decode, False: mixed}
        self._captured: dict[GraphKey, _Captured] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # of first passes: one, as cuBLAS keeps a workspace for each

    def run(self, inputs: Tensor, size: tuple[int, int], *, decodes: bool) -> Any:
        """The outputs for a packed batch of that size, on the host or the device. The next call overwrites them."""
        key = GraphKey(decodes, *size)
        inputs = inputs if inputs.is_cuda else inputs.pin_memory()
        if key not in self._captured:
            self._capture(key, inputs)
        captured = self._captured[key]
        captured.inputs.copy_(inputs, non_blocking=True)
        captured.graph.replay()
        return captured.outputs

    def capture(self, keys: Iterable[GraphKey], nobody: int) -> None:
        """Capture passes before a step needs them: of tokens that only pad. nobody: row of the block tables.

        The largest first: what lies between its outputs is room enough for the others.
        """
        for key in sorted(set(keys) - set(self._captured), key=lambda key: -key.tokens):
            self._capture(key, padding(nobody, key.sequences, key.tokens).pin_memory())

    def _capture(self, key: GraphKey, inputs: Tensor) -> None:
        """inputs: of a step that was just asked for, which is computed here as well, to no effect but its own."""
        here = inputs.to("cuda", non_blocking=True)
        stream = self._stream = self._stream or torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with nothing_collected(before=self._pool is None):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._forwards[key.decodes](here, key.sequences)  # what is compiled, loaded or allocated at first use
            torch.cuda.current_stream().wait_stream(stream)
            # What other threads do meanwhile is no part of it: NCCL's watchdog asks for events, requests are pinned.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._forwards[key.decodes](here, key.sequences)
        self._pool = graph.pool()
        self._captured[key] = _Captured(graph, here, outputs)


@contextmanager
def nothing_collected(*, before: bool) -> Iterator[None]:
    """No garbage is collected while this lasts; before: what there is, is first.

    An engine that is no longer used may be garbage with graphs of its own. When one goes that had collectives in it,
    NCCL frees what it kept for it in the next collective, and a capture in which memory is freed is invalid.
    """
    if before:
        gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
