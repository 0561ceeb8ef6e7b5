"""Initial weights: the same bits for every layout, and the right distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import models.init
from models.init import initialize
from models.initializers import Constant, Normal
from tests.pool import RankPool

SHAPE = (13, 7, 5)  # odd in every dim; over 4 ranks dim 2 leaves the last shards of 5 at 2, 2, 1, 0


def one_process(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    weight = torch.full(shape, math.nan, dtype=dtype)
    initialize({"weight": weight}, {"weight": Normal(0.02)}, seed=seed)
    return weight


def initialize_sharded(mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]) -> tuple[torch.Tensor, int, int]:
    """The gathered parameter, the size of this rank's shard, and the collectives that initializing took."""
    mesh = init_device_mesh("cpu", mesh_shape)
    parameter = distribute_tensor(torch.full(SHAPE, math.nan), mesh, placements)
    with CommDebugMode() as communication:
        initialize({"weight": parameter}, {"weight": Normal(0.02)}, seed=5)
    return parameter.full_tensor(), parameter.to_local().numel(), communication.get_total_counts()


LAYOUTS = [
    ((2,), (Replicate(),)),
    ((2,), (Shard(0),)),
    ((2,), (Shard(1),)),
    ((4,), (Shard(0),)),
    ((4,), (Shard(1),)),
    ((4,), (Shard(2),)),
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 2), (Shard(0), Shard(1))),
    ((2, 2), (Shard(2), Shard(0))),
    ((2, 2), (Shard(0), Shard(0))),
]


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS)
def test_shards_of_any_layout_make_the_parameter_of_one_process(
    ranks: RankPool, mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    """A shard numbered from its own first element, or by the wrong strides: another model for every layout."""
    expected = one_process()
    results = ranks.run(math.prod(mesh_shape), initialize_sharded, mesh_shape, placements)
    for gathered, _, collectives in results:
        assert torch.equal(gathered, expected)
        assert collectives == 0
    if placements == (Shard(2),):
        assert [numel for _, numel, _ in results][-1] == 0, "an empty shard is part of this test"


def initialize_under_fsdp_and_tensor_parallel() -> list[torch.Tensor]:
    """Both shard dim 0 of the weight, which interleaves the rows of a rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 16))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    parameters = dict(model.named_parameters())
    initialize(parameters, {"0.weight": Normal(1.0), "0.bias": Normal(2.0)}, seed=1)
    return [parameter.full_tensor() for parameter in parameters.values() if isinstance(parameter, DTensor)]


def test_one_dim_sharded_by_fsdp_and_tensor_parallelism_makes_the_same_parameter(ranks: RankPool) -> None:
    """A shard taken for one contiguous block: FSDP over tensor parallelism on the same dim interleaves rows."""
    expected = {"0.weight": torch.empty(16, 6), "0.bias": torch.empty(16)}
    initialize(expected, {"0.weight": Normal(1.0), "0.bias": Normal(2.0)}, seed=1)
    for gathered in ranks.run(4, initialize_under_fsdp_and_tensor_parallel):
        assert len(gathered) == 2
        for value, reference in zip(gathered, expected.values(), strict=True):
            assert torch.equal(value, reference)


def initialize_each_shard_as_a_whole() -> torch.Tensor:
    """What a careless initializer does: every rank fills its shard as if it were the parameter."""
    parameter = distribute_tensor(torch.zeros(SHAPE), init_device_mesh("cpu", (2,)), [Shard(0)])
    initialize({"weight": parameter.to_local()}, {"weight": Normal(0.02)}, seed=5)
    return parameter.full_tensor()


def test_the_comparison_sees_shards_that_ignore_their_offset(ranks: RankPool) -> None:
    """Negative control: gathering that hides the difference between shards."""
    gathered = ranks.run(2, initialize_each_shard_as_a_whole)[0]
    assert torch.equal(gathered[:7], one_process()[:7])
    assert not torch.equal(gathered, one_process())


def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that starts at the wrong index, or a last short one left out."""
    expected = one_process()
    assert expected.isfinite().all()
    for chunk in (1, 8, 454, 455):
        monkeypatch.setattr(models.init, "CPU_CHUNK", chunk)
        assert torch.equal(one_process(), expected)


def test_a_transposed_parameter_gets_the_values_of_its_logical_indices() -> None:
    """Writing in memory order: a non-contiguous parameter would hold a permutation."""
    transposed = torch.empty(5, 7, 13).permute(2, 1, 0)
    initialize({"weight": transposed}, {"weight": Normal(0.02)}, seed=5)
    assert torch.equal(transposed, one_process())


def test_low_precision_is_the_rounded_fp32_value() -> None:
    """Drawing in bf16: a bf16 model would start from other weights than its fp32 master."""
    assert torch.equal(one_process(dtype=torch.bfloat16), one_process().to(torch.bfloat16))


def test_scalars_and_constants_are_filled() -> None:
    """A parameter without dims, which has one element and no coordinates."""
    parameters = {"scale": torch.tensor(math.nan), "norm": torch.full((3,), math.nan), "gate": torch.tensor(math.nan)}
    initialize(parameters, {"scale": Normal(1.0), "norm": Constant(1.0), "gate": Constant(-2.5)}, seed=0)
    assert parameters["scale"].isfinite()
    assert parameters["norm"].tolist() == [1.0, 1.0, 1.0]
    assert parameters["gate"].item() == -2.5


def test_mean_and_standard_deviation_are_those_asked_for() -> None:
    """A standard deviation applied twice or as a variance."""
    weight = one_process((512, 513))
    n = weight.numel()
    assert abs(weight.mean().item()) < 4 * 0.02 / math.sqrt(n)
    assert abs(weight.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * n)


def test_names_and_seeds_give_uncorrelated_weights_and_repeat_exactly() -> None:
    """One stream for all parameters: the layers of a model would start equal."""
    parameters = {name: torch.empty(300, 301) for name in ("layers.0.weight", "layers.1.weight")}
    initialize(parameters, {name: Normal(1.0) for name in parameters}, seed=0)
    first, second = parameters.values()
    again, other_seed = torch.empty_like(first), torch.empty_like(first)
    initialize({"layers.0.weight": again}, {"layers.0.weight": Normal(1.0)}, seed=0)
    initialize({"layers.0.weight": other_seed}, {"layers.0.weight": Normal(1.0)}, seed=1)
    bound = 5 / math.sqrt(first.numel())
    assert abs((first * second).mean().item()) < bound
    assert abs((first * other_seed).mean().item()) < bound
    assert torch.equal(first, again)


def test_missing_and_unknown_initializers_are_named_together_and_nothing_is_written() -> None:
    """A misspelt name that leaves a parameter at whatever its memory held."""
    weight = torch.full((3,), 9.0)
    with pytest.raises(ValueError, match=r"no initializer for b; .*initializers for c, which are not parameters"):
        initialize({"a": weight, "b": torch.empty(1)}, {"a": Constant(0.0), "c": Constant(0.0)}, seed=0)
    assert weight.tolist() == [9.0, 9.0, 9.0]


def test_a_parameter_on_the_meta_device_is_refused() -> None:
    """Writing to meta does nothing, in silence."""
    with pytest.raises(ValueError, match=r"w on the meta device; give the model memory with to_empty"):
        initialize({"w": torch.empty(2, device="meta")}, {"w": Constant(0.0)}, seed=0)


def initialize_partial() -> str:
    mesh = init_device_mesh("cpu", (2,))
    parameter = DTensor.from_local(torch.zeros(2), mesh, [Partial()])
    with pytest.raises(ValueError, match="replicated or sharded") as error:
        initialize({"w": parameter}, {"w": Constant(1.0)}, seed=0)
    return str(error.value)


def test_a_partial_placement_is_refused(ranks: RankPool) -> None:
    """A partial parameter: filled on both ranks it would be worth twice the value."""
    assert all("w has placements (Partial(sum),)" in message for message in ranks.run(2, initialize_partial))
