"""Rows on their way to experts and back, and the collectives of a mixture of experts."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from models.layers.moe import MoE
from models.moe_config import MoEConfig, RoutingConfig
from parallel.collectives import Axis
from parallel.expert import plan_buffers, plan_routes, rows_per_pair
from parallel.groups import ModelParallel
from tests.models.small import tiny
from tests.pool import RankPool

FEATURES = 3
LEFT_OUT = 2
"""Rows at the end of every rank that are for no expert."""


def _rows(rank: int, counts: list[int]) -> Tensor:
    """[sum(counts) + LEFT_OUT, FEATURES], each number once over all ranks."""
    numbers = torch.arange((sum(counts) + LEFT_OUT) * FEATURES, dtype=torch.float32)
    return (1000 * rank + numbers).view(-1, FEATURES)


def _travel(counts_of_ranks: list[list[int]], per_pair: int | None) -> tuple[list[list[float]], bool, bool]:
    """On each rank: first features of the rows of each expert here, whether they came back, and their gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    axis = Axis.of(mesh)
    counts = counts_of_ranks[axis.rank]
    rows = _rows(axis.rank, counts).requires_grad_()
    if per_pair is None:
        routes: Any = plan_routes(torch.tensor(counts), axis)
    else:
        routes = plan_buffers(torch.tensor(counts), axis, per_pair=per_pair, num_rows=rows.shape[0])
        assert routes.left_over == 0
    arrived = routes.to_experts(rows)
    bounds = [0, *routes.ends.tolist()]
    here = [[row[0] for row in arrived[first:last].tolist()] for first, last in pairwise(bounds)]
    back = routes.from_experts(2 * arrived, num_rows=rows.shape[0])
    weight = _rows(axis.rank, counts)  # any gradient that tells rows apart
    (back * weight).sum().backward()
    stayed = torch.arange(rows.shape[0])[:, None] >= sum(counts)
    expected = torch.where(stayed, 0.0, 2 * rows.detach())
    assert rows.grad is not None
    return here, torch.equal(back, expected), torch.equal(rows.grad, torch.where(stayed, 0.0, 2 * weight))


@pytest.mark.parametrize("per_pair", [None, 6, 9])
@pytest.mark.parametrize(
    "counts",
    [
        [[2, 0, 1, 3], [1, 1, 0, 2]],
        [[0, 0, 5, 1], [0, 0, 0, 2]],  # rank 0 receives nothing
        [[0, 0, 0, 0], [1, 0, 2, 0]],  # rank 0 sends nothing
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 2], [0, 0, 0, 0], [3, 1, 0, 0], [0, 2, 0, 1]],
    ],
)
def test_rows_reach_their_expert_and_come_back(ranks: RankPool, counts: list[list[int]], per_pair: int | None) -> None:
    """Rows in the order they arrived instead of that of experts, or an exchange that fails where there is nothing."""
    world = len(counts)
    replies = ranks.run(world, _travel, counts, per_pair)
    per_rank = len(counts[0]) // world
    for rank, (here, came_back, gradients) in enumerate(replies):
        for local, found in enumerate(here):
            expert = rank * per_rank + local
            expected: list[float] = []
            for source in range(world):
                first = sum(counts[source][:expert])
                expected += _rows(source, counts[source])[first : first + counts[source][expert], 0].tolist()
            assert found == expected
        assert came_back
        assert gradients


def _travel_without_room(counts_of_ranks: list[list[int]], per_pair: int) -> tuple[list[float], list[float], float]:
    """On each rank: first features of what came back and of its gradient, and how many rows were left over."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    counts = counts_of_ranks[mesh.get_local_rank()]
    rows = (1 + _rows(mesh.get_local_rank(), counts)).requires_grad_()
    buffers = plan_buffers(torch.tensor(counts), Axis.of(mesh), per_pair=per_pair, num_rows=rows.shape[0])
    back = buffers.from_experts(buffers.to_experts(rows), num_rows=rows.shape[0])
    back.sum().backward()
    assert rows.grad is not None
    travelled = torch.where(rows.grad[:, :1] == 1, rows, 0)
    assert torch.equal(back, travelled)
    return back[:, 0].tolist(), rows.grad[:, 0].tolist(), buffers.left_over.item()


def test_rows_without_room_are_counted_and_no_other_is_lost(ranks: RankPool) -> None:
    """A row that overwrites another, or that is gone without a trace."""
    counts = [[2, 1, 0, 4], [0, 1, 1, 0]]
    found = ranks.run(2, _travel_without_room, counts, 2)
    assert found[0][1] == [1, 1, 0, 1, 1, 0, 0, 0, 0]  # 3 rows for rank 0, 4 for rank 1, then LEFT_OUT
    assert found[1][1] == [1, 1, 0, 0]
    assert [left_over for *_, left_over in found] == [3, 0]


def _reads_of_the_host(ep_buffer: float) -> bool:
    """Whether the host asks for a number that only the device has, in training or outside of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    config = tiny(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8))
    groups = ModelParallel(experts=mesh if mesh.size() > 1 else None, ep_buffer=ep_buffer)
    with FakeTensorMode(allow_non_fake_inputs=True):  # has shapes, and no numbers
        moe = MoE(config, 0, 0, groups)
        x = torch.empty(2, 6, config.hidden_size, requires_grad=True)
        try:
            for training in (True, False):
                y, _ = moe.train(training)(x, samples=None, aux_scale=torch.empty(()))
                y.sum().backward()
        except DataDependentOutputException:
            return True
    return False


@pytest.mark.parametrize(("world_size", "ep_buffer", "reads"), [(1, 0.0, False), (2, 1.5, False), (2, 0.0, True)])
def test_the_host_waits_for_exact_sizes_alone(ranks: RankPool, world_size: int, ep_buffer: float, reads: bool) -> None:
    """A synchronisation in every layer where none is needed. Negative control: exact sizes over ep need one."""
    assert ranks.run(world_size, _reads_of_the_host, ep_buffer) == [reads] * world_size


@pytest.mark.parametrize(
    ("expected", "buffer", "limit", "top_k", "num_experts"),
    [
        (None, 0.0, None, 2, 8),
        (24, 4.0, None, 2, 8),  # 12 tokens, whose two experts may be on one rank
        (12, 4.0, None, 2, 4),  # one expert per rank: no token goes there twice
        (9, 1.5, None, 2, 8),
        (10, 0.0, 5, 2, 8),  # two experts per rank, each chosen five times
        (9, 1.5, 5, 2, 8),
    ],
)
def test_room_is_never_more_than_can_be_needed(
    expected: int | None, buffer: float, limit: int | None, top_k: int, num_experts: int
) -> None:
    """Buffers of all rows from each rank to each, where no rank can get so many."""
    found = rows_per_pair(24, size=4, num_experts=num_experts, top_k=top_k, buffer=buffer, limit=limit)
    assert found == expected


def _collectives(axis: str, sequence_parallel: bool, capacity_factor: float) -> list[Counter[str]]:
    """On each rank: collectives by name in the forward and in the backward of a mixture of experts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
    options: dict[str, Any] = {"ep": {"experts": mesh}, "tp": {"tp": mesh, "sequence_parallel": sequence_parallel}}
    options |= {"cp": {"cp": mesh, "cp_ring": mesh}}
    config = tiny(
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8, num_shared=1),
        routing=RoutingConfig(aux_weight=0.1, capacity_factor=capacity_factor),
    )
    moe = MoE(config, 0, 0, ModelParallel(**options[axis]))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.fill_(0.1)
    x = torch.randn(2, 6, config.hidden_size, requires_grad=True)
    indices = torch.arange(6) if axis == "cp" else None
    with CommDebugMode() as forward:
        y, _ = moe(x, samples=None, indices=indices, aux_scale=torch.tensor(1.0))
    with CommDebugMode() as backward:
        y.sum().backward()
    return [
        Counter({str(op).split(".")[-1]: n for op, n in comm.get_comm_counts().items()}) for comm in (forward, backward)
    ]


@pytest.mark.parametrize(
    ("axis", "sequence_parallel", "capacity_factor", "forward", "backward"),
    [
        ("ep", False, 0.0, {"all_to_all_single": 3}, {"all_to_all_single": 2}),  # numbers of rows, rows, results
        ("ep", False, 1.0, {"all_to_all_single": 3}, {"all_to_all_single": 2}),
        ("tp", False, 1.0, {"all_reduce": 1}, {"all_reduce": 2}),  # the second is of the router's weight
        ("tp", True, 1.0, {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1},
         {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 1}),
        ("cp", False, 0.0, {"all_reduce": 1}, {}),  # loads
        ("cp", False, 1.0, {"all_reduce": 1, "all_gather_into_tensor": 1}, {}),  # and choices
    ],
)  # fmt: skip
def test_router_experts_and_shared_experts_share_their_collectives(
    ranks: RankPool,
    axis: str,
    sequence_parallel: bool,
    capacity_factor: float,
    forward: dict[str, int],
    backward: dict[str, int],
) -> None:
    """An input gathered once for each of them, or a collective that a layout does not need."""
    for found in ranks.run(2, _collectives, axis, sequence_parallel, capacity_factor):
        assert found == [forward, backward]
