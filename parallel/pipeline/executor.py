"""One executor for every schedule: computes, sends and receives what a rank's program says, in its order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.pipeline.actions import Action, Collective, Exchange, Kind, Message, Step, Unshard
from parallel.pipeline.weight_gradients import WeightGradients

Key = tuple[int, int]
"""Stage and micro-batch."""


class Work(Protocol):
    """What the executor runs: the model, by stage."""

    num_stages: int

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        """Output of a stage: hidden states for the next one, of the last stage its result. hidden None: first stage."""
        ...

    def hidden_shape(self, microbatch: int) -> Sequence[int]:
        """Shape of what passes between stages, the same between any two; known before anything runs."""
        ...

    def unshard(self, use: Action) -> None:
        """Start to gather the parameters that a computation begins with. It waits for them itself."""
        ...

    def reduce(self, stage: int) -> None:
        """Start to sum the gradients of a stage over ranks: they have had their last contribution of this run."""
        ...


@dataclass(frozen=True)
class Executed:
    """An action as it happened, in seconds of time.perf_counter. Of a collective: the time until it was started."""

    action: Action | Collective
    start: float
    end: float


class PipelineExecutor:
    """Runs programs on one rank of a pipeline. Peers in `group` run theirs, made from the same schedule.

    device, dtype: of the hidden states. weight_gradients: of the model's layers, for schedules with split backward.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        device: torch.device,
        dtype: torch.dtype,
        weight_gradients: WeightGradients | None = None,
        trace: bool = False,
    ) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.device = device
        self.dtype = dtype
        self.weight_gradients = weight_gradients
        self.trace = trace
        self.executed: list[Executed] = []  # of the newest run with backward, when tracing
        _connect(group, device)

    def run(self, program: Sequence[Step], work: Work, *, seed: Tensor | None) -> dict[int, Tensor]:
        """Results of the last stage by micro-batch, detached; empty on ranks that do not hold it.

        seed: the gradient of every result of the last stage, of their shape; None: forward only, and nothing is kept
        for backward.
        """
        run = _Run(self, work, seed)
        trace = self.trace and seed is not None
        if trace:
            self.executed = []
        with torch.set_grad_enabled(seed is not None):
            for step in program:
                if isinstance(step, Exchange):
                    run.exchange(step)
                elif trace:
                    self._traced(run, step)
                else:
                    run.do(step)
        run.finish()
        return run.results

    def _traced(self, run: _Run, action: Action | Collective) -> None:
        """Do it and note the time, without that of waiting for the input. On CUDA this waits for the device."""
        if not isinstance(action, Action):  # started, and not waited for: it goes on beside what is computed
            start = time.perf_counter()
            run.do(action)
            self.executed.append(Executed(action, start, time.perf_counter()))
            return
        run.await_input(action)
        self._synchronize()
        start = time.perf_counter()
        run.do(action)
        self._synchronize()
        self.executed.append(Executed(action, start, time.perf_counter()))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """Make the connections that programs use, before any of them runs.

    NCCL makes a communicator in its first collective, which all ranks have to join, and the connection between two
    ranks in the first group of messages that needs it: the host waits there until the other rank's comes to its own.
    Inside a program the other host may be held up, by the loading of a kernel, behind a receive from the same group.
    """
    size, rank = group.size(), group.rank()
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    for pair in sorted({tuple(sorted((r, (r + 1) % size))) for r in range(size)}):  # stages lie in a line, or a ring
        if size > 1 and rank in pair:
            peer = dist.get_global_rank(group, sum(pair) - rank)
            tensors = torch.zeros(2, 1, device=device)
            messages = zip((dist.isend, dist.irecv), tensors, strict=True)
            for work in dist.batch_isend_irecv([dist.P2POp(op, t, peer, group=group) for op, t in messages]):
                work.wait()


class _Run:
    """The tensors of one pass over a program."""

    def __init__(self, pipeline: PipelineExecutor, work: Work, seed: Tensor | None) -> None:
        self.pipeline = pipeline
        self.work = work
        self.seed = seed
        self.results: dict[int, Tensor] = {}
        self.inputs: dict[Key, Tensor | None] = {}  # leaves that collect the gradient to hand on
        self.outputs: dict[Key, Tensor] = {}
        self.arriving: dict[tuple[bool, int, int], tuple[Tensor, list[dist.Work]]] = {}  # (is_gradient, stage, mb)
        self.leaving: list[tuple[Tensor, list[dist.Work]]] = []  # tensors must live until they are sent
        self.produced: dict[tuple[bool, int, int], Tensor] = {}  # addressed to other stages

    # ---- messages

    def exchange(self, step: Exchange) -> None:
        """Start all messages of the step; wait for none."""
        self.leaving = [(t, works) for t, works in self.leaving if not all(w.is_completed() for w in works)]
        operations, tensors = [], []
        for message in step.messages:
            sending = message.source == self.pipeline.rank
            tensor = self.produced.pop(_address(message)) if sending else self._buffer(message)
            peer = dist.get_global_rank(self.pipeline.group, message.target if sending else message.source)
            operation = dist.isend if sending else dist.irecv
            operations.append(dist.P2POp(operation, tensor, peer, group=self.pipeline.group))
            tensors.append(tensor)
        works = dist.batch_isend_irecv(operations)
        # gloo answers with one handle per message, NCCL with one for all.
        each = [[work] for work in works] if len(works) == len(operations) else [works] * len(operations)
        for message, tensor, handles in zip(step.messages, tensors, each, strict=True):
            if message.source == self.pipeline.rank:
                self.leaving.append((tensor, handles))
            else:
                self.arriving[_address(message)] = (tensor, handles)

    def _buffer(self, message: Message) -> Tensor:
        shape = self.work.hidden_shape(message.microbatch)
        return torch.empty(tuple(shape), dtype=self.pipeline.dtype, device=self.pipeline.device)

    def await_input(self, action: Action) -> None:
        """Wait for the message an action computes with, if it comes from another rank."""
        key = (action.kind is not Kind.FORWARD, action.stage, action.microbatch)
        if action.kind is not Kind.WEIGHT and key in self.arriving:
            tensor, works = self.arriving.pop(key)
            for work in works:
                work.wait()
            self.produced[key] = tensor

    def finish(self) -> None:
        """Wait until everything was sent."""
        for _, works in self.leaving:
            for work in works:
                work.wait()
        left = [*self.arriving, *self.produced, *self.outputs]
        if left:
            raise RuntimeError(f"a pipeline program ended with tensors nobody used: {left}")

    # ---- actions

    def do(self, action: Action | Collective) -> None:
        if isinstance(action, Action):
            self._compute(action)
        elif isinstance(action, Unshard):
            self.work.unshard(action.use)
        else:
            self.work.reduce(action.stage)

    def _compute(self, action: Action) -> None:
        self.await_input(action)
        if action.kind is Kind.FORWARD:
            self._forward(action.stage, action.microbatch)
        elif action.kind is Kind.WEIGHT:
            assert self.pipeline.weight_gradients is not None
            self.pipeline.weight_gradients.run((action.stage, action.microbatch))
        else:
            self._backward(action)

    def _forward(self, stage: int, microbatch: int) -> None:
        hidden = self.produced.pop((False, stage, microbatch), None)
        if hidden is not None and self.seed is not None:
            hidden.requires_grad_()
        output = self.work.forward(stage, microbatch, hidden)
        if self.seed is not None:
            self.inputs[stage, microbatch], self.outputs[stage, microbatch] = hidden, output
        if stage == self.work.num_stages - 1:
            self.results[microbatch] = output.detach()
        else:
            self.produced[False, stage + 1, microbatch] = output.detach().contiguous()

    def _backward(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        hidden, output = self.inputs.pop(key), self.outputs.pop(key)
        grad = self.seed if action.stage == self.work.num_stages - 1 else self.produced.pop((True, *key))
        if action.kind is Kind.INPUT:
            assert self.pipeline.weight_gradients is not None
            with self.pipeline.weight_gradients.collect(key):
                torch.autograd.backward(output, grad)
        else:
            torch.autograd.backward(output, grad)
        if hidden is not None:
            assert hidden.grad is not None
            self.produced[True, action.stage - 1, action.microbatch] = hidden.grad.contiguous()


def _address(message: Message) -> tuple[bool, int, int]:
    return message.is_gradient, message.stage, message.microbatch
