"""Layers cut over tp: collectives per block, statements about gradients, where shards lie."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from models.init import initialize
from models.layers.attention import build_context
from models.registry import build_model
from parallel import sequence_chunks
from parallel.collectives import (
    Axis,
    all_gather,
    all_gather_alike,
    all_reduce,
    reduce_scatter,
    sum_of_gradients,
)
from parallel.groups import ModelParallel
from parallel.regions import local_region
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, empty_parameter, local_shard, project
from tests.models.small import tiny
from tests.pool import RankPool

# ---- collectives of a block


def _collectives_of_a_block(sequence_parallel: bool, sp_chunks: int = 1) -> tuple[Counter[str], Counter[str]]:
    """On each rank: collectives by name in the forward and in the backward of one block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    groups = ModelParallel(tp=mesh, sequence_parallel=sequence_parallel, sp_chunks=sp_chunks)
    config = tiny(intermediate_size=38)
    model = build_model(config, groups=groups)
    initialize(model.state_dict(), model.initializers(), seed=0)
    T = 8
    context = build_context(
        config,
        seq_len=T,
        device=torch.device("cpu"),
        dtype=torch.float32,
        positions=None,
        documents=None,
        samples=None,
        groups=groups,
    )
    x = torch.randn(2, T // mesh.size() if sequence_parallel else T, config.hidden_size, requires_grad=True)
    with CommDebugMode() as forward:
        y = model.blocks[0](x, context=context)
    with CommDebugMode() as backward:
        y.sum().backward()
    counts = [
        Counter({str(op).split(".")[-1]: n for op, n in comm.get_comm_counts().items()}) for comm in (forward, backward)
    ]
    return counts[0], counts[1]


def test_a_block_takes_two_all_reduces_forward_and_two_backward(ranks: RankPool) -> None:
    """A collective per projection instead of one per branch, or one too many for a gradient that is whole already."""
    for forward, backward in ranks.run(2, _collectives_of_a_block, False):
        assert forward == {"all_reduce": 2}
        assert backward == {"all_reduce": 2}


def test_with_sequence_parallelism_it_takes_two_gathers_and_two_scatters_each_way(ranks: RankPool) -> None:
    """A second gather of one input, or a gather where a scatter would do. The two norms add a sum of [D] each."""
    for forward, backward in ranks.run(2, _collectives_of_a_block, True):
        assert forward == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
        assert backward == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2, "all_reduce": 2}


def test_in_chunks_what_is_not_hidden_yet_is_cut(ranks: RankPool) -> None:
    """A collective per chunk and layer. The scatters of backward travel during the weight gradients, as they did."""
    for forward, backward in ranks.run(2, _collectives_of_a_block, True, 4):
        assert forward == {"all_gather_into_tensor": 8, "reduce_scatter_tensor": 8}
        assert backward == {"all_gather_into_tensor": 8, "reduce_scatter_tensor": 2, "all_reduce": 2}


class _Names(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def _operators_of_backward(sequence_parallel: bool) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    groups = ModelParallel(tp=mesh, sequence_parallel=sequence_parallel)
    layers = [ColumnParallelLinear(6, 8, bias=True, groups=groups) for _ in range(2)]
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    first, second = project(torch.randn(1, 4, 6, requires_grad=True), layers)
    with _Names() as operators:
        (first + second).sum().backward()
    return operators.names


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_input_gradients_travel_while_weight_gradients_are_computed(ranks: RankPool, sequence_parallel: bool) -> None:
    """A wait right after the start: the transfer would stand alone."""
    for names in ranks.run(2, _operators_of_backward, sequence_parallel):
        start = names.index("reduce_scatter_tensor" if sequence_parallel else "all_reduce")
        between = names[start : names.index("wait_tensor")]
        assert between.count("mm") == 2  # one per weight


# ---- sequence parallelism in chunks


def _branch(sp_chunks: int, out_of_order: bool = False) -> tuple[list[Tensor], list[list[str]]]:
    """A branch on this rank: output and gradients of input, weights and bias; operators of forward and of backward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    groups = ModelParallel(tp=mesh, sequence_parallel=True, sp_chunks=sp_chunks)
    layers = [ColumnParallelLinear(6, 8, bias=bias, groups=groups).double() for bias in (True, False)]
    row = RowParallelLinear(8, 5, bias=True, groups=groups).double()
    generator = torch.Generator().manual_seed(mesh.get_local_rank())
    parameters = [parameter for layer in (*layers, row) for parameter in layer.parameters()]
    for parameter in parameters:
        local = parameter.to_local()
        local.data.copy_(torch.randn(local.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 12, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    true = sequence_chunks._in_order
    broken = mock.patch.object(sequence_chunks, "_in_order", lambda parts, ranks: true(parts[::-1], ranks))
    with broken if out_of_order else nullcontext():
        with _Names() as forward:
            first, second = project(x, layers)
            y = row(torch.tanh(first) * second)
        with _Names() as backward:
            grads = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y).cumsum(1))
    found = [y.detach(), *(g.to_local() if isinstance(g, DTensor) else g for g in grads)]
    return found, [forward.names, backward.names]


@pytest.mark.parametrize("sp_chunks", [2, 3, 12])
def test_chunks_change_nothing(ranks: RankPool, sp_chunks: int) -> None:
    """Tokens of one chunk or rank put where those of another belong. Control: chunks in the reverse order."""
    runs = [ranks.run(2, _branch, *of) for of in ((1,), (sp_chunks,), (sp_chunks, True))]
    for whole, cut, wrong in zip(*runs, strict=True):
        for one, other in zip(whole[0], cut[0], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        assert not all(torch.allclose(one, other) for one, other in zip(whole[0], wrong[0], strict=True))


def _steps(names: list[str]) -> list[str]:
    """Collectives and products in order."""
    kinds = {
        "all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter", "wait_tensor": "wait",
        "mm": "product", "addmm": "product", "all_reduce": "sum",
    }  # fmt: skip
    return [kinds[name] for name in names if name in kinds]


def test_a_chunk_travels_while_another_is_multiplied(ranks: RankPool) -> None:
    """Gathers that wait for products, products that wait for what they do not need, a scatter awaited at once."""
    for _, (forward, backward) in ranks.run(2, _branch, 3):
        assert _steps(forward) == (
            ["gather"] * 3 + ["wait", "product", "product"] * 3 + ["product", "scatter"] * 3 + ["wait"] * 3
        )
        bias = ["sum", "wait"]
        row = ["gather"] * 3 + ["wait", "product"] * 3 + ["product"]  # the last: of its weight
        columns = ["product"] * 2 + ["scatter"] + ["product"] * 2 + ["wait"]
        assert _steps(backward) == bias + row + columns
    for _, (forward, _) in ranks.run(2, _branch, 1):  # control: nothing travels meanwhile
        assert _steps(forward) == ["gather", "wait", "product", "product", "product", "scatter", "wait"]


# ---- differentiable collectives


def _gradients_of_collectives() -> list[str]:
    """On each rank: what differs from the sum over ranks of every rank's loss, differentiated by hand."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    axis = Axis.of(mesh)
    R, r = axis.size, axis.rank
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(R, 3, 2 * R, 5, generator=generator, dtype=torch.float64)  # one input per rank
    weights = torch.randn(R, 3, 2 * R * R, 5, generator=generator, dtype=torch.float64)  # of the loss of each rank
    differing = []

    def check(name: str, y: Tensor, expected: Tensor, weight: Tensor, x: Tensor, gradient: Tensor) -> None:
        (grad,) = torch.autograd.grad((y * weight).sum(), x)
        if not torch.allclose(y, expected) or not torch.allclose(grad, gradient):
            differing.append(name)

    x = xs[r].clone().requires_grad_()
    slices = slice(2 * r, 2 * r + 2)
    own, same = weights[:, :, : 2 * R], weights[0, :, : 2 * R]
    check("sum_of_gradients", sum_of_gradients(x, axis), x, own[r], x, own.sum(0))
    check("all_reduce", all_reduce(x, axis), xs.sum(0), same, x, same)
    parts = [weight[:, 2 * R * r : 2 * R * (r + 1)] for weight in weights]
    check("all_gather", all_gather(x, axis, dim=1), torch.cat(list(xs), 1), weights[r], x, torch.stack(parts).sum(0))
    mine = own[:, :, :2]
    check(
        "reduce_scatter",
        reduce_scatter(x, axis, dim=1),
        xs.sum(0)[:, slices],
        mine[r],
        x,
        torch.cat(list(mine), 1),
    )
    whole = weights[0]
    check("all_gather_alike", all_gather_alike(x, axis, dim=1), torch.cat(list(xs), 1), whole, x, whole.chunk(R, 1)[r])
    return differing


@pytest.mark.parametrize("world_size", [2, 4])
def test_backward_is_the_transpose_of_forward(ranks: RankPool, world_size: int) -> None:
    """A scatter that averages, a gather along the wrong dim or in the wrong order."""
    assert ranks.run(world_size, _gradients_of_collectives) == [[]] * world_size


# ---- local_shard


def _gradients_of_a_parameter() -> tuple[float, float, list[str]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parameter = empty_parameter(3, mesh=mesh, placement=Replicate())
    with torch.no_grad():
        parameter.to_local().fill_(1.0)
    gradients = []
    for grad in ("replicated", "partial"):
        (local_shard(parameter, grad=grad).sum() * (dist.get_rank() + 1)).backward()  # type: ignore[arg-type]
        assert isinstance(parameter.grad, DTensor)
        gradients.append(parameter.grad.to_local()[0].item())
        parameter.grad = None
    errors = []
    sharded = empty_parameter(4, mesh=mesh, placement=Shard(0))
    for wrong, grad in ((parameter, "sharded"), (sharded, "replicated"), (sharded, "partial")):
        try:
            local_shard(wrong, grad=grad)  # type: ignore[arg-type]
        except ValueError as error:
            errors.append(str(error))
    return gradients[0], gradients[1], errors


def test_a_partial_gradient_is_summed_and_a_replicated_one_is_not(ranks: RankPool) -> None:
    """The mistake that trains: a summand taken for the whole. And a statement that contradicts the placement."""
    for rank, (replicated, partial, errors) in enumerate(ranks.run(2, _gradients_of_a_parameter)):
        assert replicated == rank + 1
        assert partial == 3
        assert len(errors) == 3
        assert all("cannot have a gradient that is" in error for error in errors)


# ---- where shards lie


def _coverage(shape: tuple[int, ...], placements: list[Placement]) -> tuple[list[tuple[int, int]], bool]:
    """On each rank of a (shard, tp) mesh: its region, and whether that is the slice of the tp slice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    local = whole
    for axis, placement in reversed(list(enumerate(placements))):  # tp first, as fully_shard finds it
        if not placement.is_replicate():
            pieces = local.tensor_split([-(-local.shape[placement.dim] // 2)], dim=placement.dim)  # type: ignore[attr-defined]
            local = pieces[mesh.get_local_rank(axis)]
    tensor = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=whole.stride()
    )
    region = local_region(tensor)
    return [(part.start, part.stop) for part in region], torch.equal(whole[region], local)


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((7, 4), [_StridedShard(0, split_factor=2), Shard(0)]),  # torch's own arithmetic is wrong here
        ((13,), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((7, 5), [Shard(0), Shard(1)]),
        ((7, 4), [Shard(1), Shard(0)]),
        ((7, 5), [Shard(0), Replicate()]),
    ],
)
def test_a_region_is_where_the_local_shard_lies(
    ranks: RankPool, shape: tuple[int, ...], placements: list[Placement]
) -> None:
    """Uneven shards of shards initialised, loaded or saved a few rows off."""
    found = ranks.run(4, _coverage, shape, placements)
    assert all(right for _, right in found)


def _region_of_a_partial_sum() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with pytest.raises(ValueError, match="partial sum") as caught:
        local_region(DTensor.from_local(torch.zeros(3), mesh, [Partial()]))
    return str(caught.value)


def test_a_partial_sum_lies_nowhere(ranks: RankPool) -> None:
    """Its value exists on no rank: saving it would save a summand."""
    assert ranks.run(2, _region_of_a_partial_sum)
