"""The executor on its own: any schedule, micro-batches of different lengths, gradients of plain autograd."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.pipeline import executor
from parallel.pipeline.actions import Action, Exchange, Kind, Message
from parallel.pipeline.executor import PipelineExecutor
from parallel.pipeline.program import make_programs
from parallel.pipeline.schedules import SCHEDULES, SPLIT_BACKWARD, make_schedule
from parallel.pipeline.weight_gradients import Deliver, defer_weight_gradients
from tests.pool import RankPool

WIDTH = 5
LENGTHS = (3, 1, 7, 2, 4)  # of the micro-batches


def _layers(num_stages: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(num_stages)
    ).double()


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64) for n in LENGTHS]


class _Work:
    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers, self.num_stages, self.inputs = layers, len(layers), _inputs()
        self.gathered: list[Action] = []
        self.done: list[int] = []

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        x = self.layers[stage](self.inputs[microbatch] if hidden is None else hidden).tanh()
        return x.square().sum() if stage == self.num_stages - 1 else x

    def hidden_shape(self, microbatch: int) -> torch.Size:
        return self.inputs[microbatch].shape

    def unshard(self, use: Action) -> None:
        self.gathered.append(use)

    def reduce(self, stage: int) -> None:
        self.done.append(stage)


def _adding_to(layers: nn.Module) -> Deliver:
    def add(name: str, grad: Tensor) -> None:
        parameter = layers.get_parameter(name.removeprefix("blocks."))
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    return add


def run_schedule(name: str) -> None:
    """Compare this rank's stages with the whole model in one process."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    schedule = make_schedule(name, num_ranks=world_size, num_microbatches=len(LENGTHS), chosen=2, unshards=True)
    layers, reference = _layers(schedule.num_stages), _layers(schedule.num_stages)
    store = None
    if name in SPLIT_BACKWARD:
        store = defer_weight_gradients(layers)
        store.deliver = _adding_to(layers)
    executor = PipelineExecutor(
        dist.group.WORLD, device=torch.device("cpu"), dtype=torch.float64, weight_gradients=store
    )
    work = _Work(layers)
    seed = torch.tensor(0.5, dtype=torch.float64)
    results = executor.run(make_programs(schedule)[rank], work, seed=seed)

    expected = {}
    for microbatch, x in enumerate(_inputs()):
        for layer in reference:
            x = layer(x).tanh()
        expected[microbatch] = x.square().sum()
        (expected[microbatch] * seed).backward()
    assert results.keys() == (expected.keys() if schedule.owner[-1] == rank else set())
    for microbatch, result in results.items():
        torch.testing.assert_close(result, expected[microbatch].detach())
    assert sorted(work.done) == [stage for stage, owner in enumerate(schedule.owner) if owner == rank]
    assert work.gathered == [a for a in schedule.ranks[rank] if isinstance(a, Action) and a.kind is not Kind.WEIGHT]
    for stage, owner in enumerate(schedule.owner):
        for parameter, whole in zip(layers[stage].parameters(), reference[stage].parameters(), strict=True):
            if owner == rank:
                torch.testing.assert_close(parameter.grad, whole.grad)
            else:
                assert parameter.grad is None


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_micro_batches_of_different_lengths_give_the_gradients_of_one_process(
    ranks: RankPool, name: str, world_size: int
) -> None:
    """A buffer of another micro-batch's shape, messages that overtake each other, a weight gradient left out."""
    ranks.run(world_size, run_schedule, name)


def run_recorded(name: str, lazy: bool) -> None:
    """Compare when this rank starts to receive with its program. lazy: an executor that does so when it has to."""
    rank, log = dist.get_rank(), []
    schedule = make_schedule(name, num_ranks=dist.get_world_size(), num_microbatches=len(LENGTHS), chosen=2)
    program = make_programs(schedule)[rank]
    layers = _layers(schedule.num_stages)
    pipeline = PipelineExecutor(dist.group.WORLD, device=torch.device("cpu"), dtype=torch.float64)
    batch, exchange, compute = dist.batch_isend_irecv, executor._Run.exchange, executor._Run._compute
    held: list[Message] = []

    def recording_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        log.extend("receive" for operation in operations if operation.op is dist.irecv)
        return batch(operations)

    def recording_compute(run: Any, action: Action) -> None:
        key = (action.kind is not Kind.FORWARD, action.stage, action.microbatch)
        while key in map(executor._address, held):
            exchange(run, Exchange((held.pop(0),)))
        log.append(str(action))
        compute(run, action)

    def holding_exchange(run: Any, step: Exchange) -> None:
        held.extend(m for m in step.messages if lazy and m.target == rank)
        if now := tuple(m for m in step.messages if m not in held):
            exchange(run, Exchange(now))

    with (
        patch.object(dist, "batch_isend_irecv", recording_batch),
        patch.object(executor._Run, "_compute", recording_compute),
        patch.object(executor._Run, "exchange", holding_exchange),
    ):
        pipeline.run(program, _Work(layers), seed=torch.tensor(0.5, dtype=torch.float64))
    planned: list[str] = []
    for step in program:
        if isinstance(step, Exchange):
            planned += ["receive" for message in step.messages if message.target == rank]
        elif isinstance(step, Action):
            planned.append(str(step))
    assert (log == planned) != lazy


@pytest.mark.parametrize(("name", "lazy"), [("gpipe", False), ("1f1b", False), ("gpipe", True)])
def test_receives_are_started_before_what_hides_them(ranks: RankPool, name: str, lazy: bool) -> None:
    """An executor that starts to receive what it is about to compute with. Negative control: one that does.

    That its program is early enough is what make_programs proves.
    """
    ranks.run(2, run_recorded, name, lazy)


def test_a_layer_that_cannot_put_its_gradient_off_is_refused() -> None:
    """A weight matrix whose gradient would be computed in the input pass, on the critical path, unnoticed."""
    with pytest.raises(TypeError, match=r"blocks\.1 \(Conv1d\)"):
        defer_weight_gradients(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1)))
