"""Every ZeRO stage against one process: gradients, updates, bytes, collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import collectives
from parallel.data import state_bytes
from parallel.dims import ParallelConfig, ParallelDims
from parallel.mesh import build_mesh
from parallel.parallelize import BlockOptions, parallelize
from parallel.precision import PrecisionConfig
from parallel.zero import WholeParameters
from tests.parallel.small_model import NUM_BLOCKS, Model, Sizes, build, data, full, oracle, steps, weights
from tests.parity.harness import largest
from tests.pool import RankPool
from trainer.config import OptimConfig
from trainer.optim import build_optimizer

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, dp_replicate)


@pytest.mark.some(8)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "dp_replicate"), LAYOUTS)
def test_gradients_and_updates_equal_one_process(
    ranks: RankPool, stage: int, world_size: int, dp_replicate: int
) -> None:
    """A mean instead of a sum, a shard in the wrong place, a stale all-gather: each moves a gradient or a weight."""
    expected = oracle(num_steps=3)
    for result in ranks.run(world_size, steps, stage, dp_replicate, 2, "fp32", 3):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("grad/"):
                assert (result[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
            else:
                torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_compute_keeps_fp32_masters_and_fp32_sums(ranks: RankPool, stage: int) -> None:
    """A master rounded to bf16 would lose every update smaller than 1/256 of its weight."""
    expected = oracle(num_steps=3)
    result = ranks.run(2, steps, stage, 1, 2, "bf16", 3)[0]
    weight = result["weight/blocks.0.up.weight"]
    assert weight.dtype == torch.float32
    assert (weight != weight.bfloat16().float()).float().mean() > 0.9
    for name, value in expected.items():
        if name.startswith("grad/"):
            assert (result[name] - value).norm() <= 2e-2 * value.norm(), name


def _stay_here(shards: list[torch.Tensor], wholes: list[torch.Tensor], *, group: dist.ProcessGroup) -> None:
    """A reduce-scatter that takes this rank's part of its own summand for the sum."""
    for shard, whole in zip(shards, wholes, strict=True):
        shard.copy_(whole[dist.get_rank(group)])


def _corrupt(stage: int) -> float:
    """Like steps, but this rank's gradients never leave it; the largest relative gradient error."""
    with pytest.MonkeyPatch.context() as patch:
        if stage == 2:
            patch.setattr("parallel.zero.reduce_scatter_together", _stay_here)
        return _error_of_corrupt(stage)


def _error_of_corrupt(stage: int) -> float:
    model, data_parallel = build(stage, 1)
    if stage == 0:
        data_parallel._reduce = lambda bucket: None  # type: ignore[attr-defined, method-assign]
    elif stage == 3:
        model.set_gradient_divide_factor(dist.get_world_size())  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            block.set_gradient_divide_factor(dist.get_world_size())  # type: ignore[operator, union-attr]
    inputs, labels = data()
    rank, world = dist.get_rank(), dist.get_world_size()
    data_parallel.start_microbatch(last=True)
    logits = model(inputs.chunk(world)[rank])
    y = labels.chunk(world)[rank]
    (F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / labels.numel()).backward()
    data_parallel.finish_backward()
    expected = oracle(num_steps=1)
    errors = []
    for name, master in data_parallel.masters.items():
        value = expected[f"grad/{name}"]
        assert master.grad is not None
        errors.append(((full(master.grad) - value).abs().max() / value.abs().max()).item())
    return largest(errors)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_comparison_notices_a_missing_or_averaged_reduction(ranks: RankPool, stage: int) -> None:
    """Negative control of the equality tests above."""
    assert max(ranks.run(2, _corrupt, stage)) > 0.1


def _unused() -> None:
    _, data_parallel = build(0, 1)
    data_parallel.start_microbatch(last=True)
    data_parallel.finish_backward()


def test_a_parameter_without_gradient_is_an_error(ranks: RankPool) -> None:
    """Its stale gradient would be applied again and again."""
    with pytest.raises(AssertionError, match="received no gradient"):
        ranks.run(2, _unused)


def _bytes(
    stage: int, precision: PrecisionConfig, optim: OptimConfig | None = None, width: int = 16, hidden: int = 32
) -> tuple[int, dict[str, int]]:
    """(number of parameters, bytes of state on this rank when gradients are complete), with rows that divide by 4."""
    config = ParallelConfig(zero_stage=stage)
    mesh = build_mesh(ParallelDims.resolve(config, dist.get_world_size()), "cpu")
    with torch.device("meta"):
        model = Model(Sizes(width, hidden, vocab=12))
    device = torch.device("cpu")
    data_parallel = parallelize(model, mesh, config, precision=precision, blocks=BlockOptions(), device=device)
    for master in data_parallel.masters.values():
        (master.to_local() if isinstance(master, DTensor) else master).detach().fill_(0.1)
    data_parallel.publish()
    optimizer = build_optimizer(data_parallel.masters, optim or OptimConfig())
    inputs, labels = data()
    data_parallel.start_microbatch(last=True)
    F.cross_entropy(model(inputs).float().flatten(0, 1), labels.flatten()).backward()
    moments = {n: t for n, t in optimizer.state_tensors().items() if t.ndim > 0}
    num_parameters = sum(m.numel() for m in data_parallel.masters.values())
    measured = state_bytes(data_parallel, moments)
    data_parallel.finish_backward()
    return num_parameters, measured


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_per_rank_is_the_zero_papers_sixteen_bytes(ranks: RankPool, stage: int, num_ranks: int) -> None:
    """1910.02054, figure 1, with K = 12: 16-bit weights and gradients 2 + 2, fp32 master and moments 4 + 8 bytes each,
    of which stage 1 shards the last two, stage 2 also gradients, stage 3 everything.

    Stages 0 to 2 are that to the byte. fully_shard (3) keeps one fp32 shard as parameter and master at once, and an
    fp32 gradient shard: the paper's 16 / N, counted as 4 + 4 + 0 + 8; whole 16-bit weights come and go.
    """
    n = num_ranks
    per_parameter = {
        0: {"parameters": 2, "gradients": 2, "master": 4, "optimizer": 8},
        1: {"parameters": 2, "gradients": 2, "master": 4 / n, "optimizer": 8 / n},
        2: {"parameters": 2, "gradients": 2 / n, "master": 4 / n, "optimizer": 8 / n},
        3: {"parameters": 4 / n, "gradients": 4 / n, "master": 0, "optimizer": 8 / n},
    }[stage]
    for num_parameters, measured in ranks.run(n, _bytes, stage, PrecisionConfig(compute="bf16", reduce="bf16")):
        assert measured == {kind: size * num_parameters for kind, size in per_parameter.items()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fp32_costs_no_second_copy_of_the_weights(ranks: RankPool, stage: int) -> None:
    """In the model's own dtype the master is a view of the model: 4 + 4 + 0 + 8 (sharded: 8 / N, at stage 2 4 / N)."""
    for num_parameters, measured in ranks.run(2, _bytes, stage, PrecisionConfig()):
        gradients, moments = 4 if stage < 2 else 2, 8 if stage == 0 else 4
        expected = {"parameters": 4, "gradients": gradients, "master": 0, "optimizer": moments}
        assert measured == {kind: size * num_parameters for kind, size in expected.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_moments_in_8_bits_cost_two_bytes_and_a_scale_per_256_elements(ranks: RankPool, stage: int) -> None:
    """A second copy in fp32, scales per element. Without fp32 masters too: 2 + 2 + 0 + 2.03 bytes, not 16."""
    precision = PrecisionConfig(compute="bf16", master="bf16", reduce="bf16")
    width, hidden = 256, 512
    vectors = NUM_BLOCKS * (2 * width + hidden) + 2 * width
    n = 1 if stage == 0 else 2
    for state_dtype, matrix in (("int8", 2 * (1 + 4 / 256)), ("bf16", 4), ("fp32", 8)):
        optim = OptimConfig(state_dtype=state_dtype)
        for num_parameters, measured in ranks.run(2, _bytes, stage, precision, optim, width, hidden):
            vector = 4 if state_dtype == "bf16" else 8
            assert measured["optimizer"] == (matrix * (num_parameters - vectors) + vector * vectors) / n
            assert measured["master"] == 0
            if stage < 3:
                assert measured["parameters"] == 2 * num_parameters
                assert measured["gradients"] == 2 * num_parameters / (n if stage == 2 else 1)


def _together(packs: bool, in_place: bool) -> None:
    """Each collective of several tensors against its definition."""
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    generator = torch.Generator().manual_seed(3)
    of_ranks = [torch.randint(9, (world, world, n), generator=generator).float() for n in (5, 1, 8)]  # sums are exact
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_packs", lambda tensor: packs)
        wholes = [x[rank].clone() for x in of_ranks]
        shards = [x[rank] if in_place else torch.empty_like(x[rank]) for x in wholes]
        collectives.reduce_scatter_together(shards, wholes, group=group)
        for shard, x in zip(shards, of_ranks, strict=True):
            assert torch.equal(shard, x.sum(0)[rank])
        wholes = [torch.full_like(x[0], float("nan")) for x in of_ranks]
        for whole, x in zip(wholes, of_ranks, strict=True):
            whole[rank] = x[rank, rank]
        collectives.all_gather_together(wholes, rank=rank, group=group)
        for whole, x in zip(wholes, of_ranks, strict=True):
            assert torch.equal(whole, x.diagonal().T)
        tensors = [x[rank].clone() for x in of_ranks]
        collectives.all_reduce_together(tensors, group=group)
        for tensor, x in zip(tensors, of_ranks, strict=True):
            assert torch.equal(tensor, x.sum(0))


@pytest.mark.parametrize(("packs", "in_place"), [(True, True), (True, False), (False, True), (False, False)])
def test_collectives_of_several_tensors_are_those_of_each(ranks: RankPool, packs: bool, in_place: bool) -> None:
    """Packed, as on gloo, or coalesced, as on NCCL (here by gloo as well): parts of a tensor that end up in another."""
    ranks.run(4, _together, packs, in_place)


def _most_held() -> tuple[int, int, int]:
    """At stage 2, over two micro-batches: the most whole gradients held at once, and how many bucket and model have."""
    model, data_parallel = build(2, 1)
    assert isinstance(data_parallel, WholeParameters)
    inputs, labels = data()
    held = []
    add = data_parallel.add_gradient

    def watched(name: str, grad: torch.Tensor) -> None:
        add(name, grad)
        held.append(sum(len(bucket.arrived) for bucket in data_parallel.buckets))

    data_parallel.add_gradient = watched  # type: ignore[method-assign]
    for last in (False, True):
        data_parallel.start_microbatch(last=last)
        F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    data_parallel.finish_backward()
    buckets = [len(bucket.layout.slots) for bucket in data_parallel.buckets]
    return max(held), max(buckets), sum(buckets)


def test_stage_2_holds_the_whole_gradients_of_one_unit(ranks: RankPool) -> None:
    """Gradients that stay until the backward is over: the memory of stage 1."""
    held, of_unit, of_model = ranks.run(2, _most_held)[0]
    assert held < of_unit < of_model


class _CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that are really issued, by name. (CommDebugMode trips over forward hooks.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._schema.name.split("::")[1].replace("_", "")] += 1
        return func(*args, **(kwargs or {}))


def _collectives(stage: int, dp_replicate: int = 1) -> Counter[str]:
    model, data_parallel = build(stage, dp_replicate, bucket_mb=64)
    inputs, labels = data()
    with torch.no_grad():
        model(inputs)  # what `build` published has arrived
    with _CollectiveCounter() as counter:
        for last in (False, True):
            data_parallel.start_microbatch(last=last)
            F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
        data_parallel.finish_backward()
        data_parallel.publish()
        with torch.no_grad():
            model(inputs)
    return counter.counts


def test_collectives_are_the_ones_each_stage_promises(ranks: RankPool) -> None:
    """Two micro-batches, one update, one forward. One collective too many is time nobody sees."""
    assert ranks.run(2, _collectives, 0)[0] == {"allreduce": 1}
    assert ranks.run(2, _collectives, 1)[0] == {"reducescatterbase": 1, "allgatherbase": 1}
    # Units at stage 2: the blocks, the embedding, the last norm. fully_shard has one for what is in no block, gathered
    # once between updates; blocks are gathered for every forward and backward.
    units = NUM_BLOCKS + 2
    assert ranks.run(2, _collectives, 2)[0] == {"reducescatterbase": 2 * units, "allgatherbase": units}
    stage3 = ranks.run(2, _collectives, 3)[0]
    assert stage3 == {"reducescatterbase": 2 * (NUM_BLOCKS + 1), "allgatherbase": 5 * NUM_BLOCKS + 2}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_cross_replicas_once_per_step(ranks: RankPool, stage: int) -> None:
    """Two micro-batches. An all-reduce for each of them is traffic between nodes, the slowest there is."""
    all_reduces = ranks.run(4, _collectives, stage, 2)[0]["allreduce"]
    assert all_reduces == {1: 1, 2: NUM_BLOCKS + 2, 3: NUM_BLOCKS + 1}[stage]


def _delivered(stage: int, dp_replicate: int, axes: dict[str, Any]) -> tuple[float, Counter[str]]:
    """Bring two gradients of every parameter, in another order than the model's, as split backward does. The largest
    relative error of their sum over the ranks of a pipeline stage, and the collectives issued."""
    _, data_parallel = build(stage, dp_replicate, **axes)
    shapes = {name: value.shape for name, value in reversed(weights().items())}
    peers = dist.get_world_size() // axes.get("pp", 1)
    mine = dist.get_rank() % peers
    generator = torch.Generator().manual_seed(5)
    brought = [{name: torch.randn(peers, *shape, generator=generator) for name, shape in shapes.items()} for _ in "ab"]
    data_parallel.start_pipeline()
    with _CollectiveCounter() as counter:
        for gradients in brought:
            for name, of_ranks in gradients.items():
                data_parallel.add_gradient(name, of_ranks[mine])
        data_parallel.gradients_complete(sorted(shapes))
        data_parallel.finish_backward()
    errors = []
    for name, master in data_parallel.masters.items():
        assert master.grad is not None
        total = sum(gradients[name].sum(0) for gradients in brought)
        errors.append(((full(master.grad) - total).abs().max() / total.abs().max()).item())
    return largest(errors), counter.counts


@pytest.mark.parametrize(
    ("stage", "world_size", "dp_replicate", "axes"),
    [
        (0, 2, 2, {}),
        (1, 4, 2, {}),
        (2, 2, 1, {}),
        (2, 8, 2, {"pp": 2}),
        (3, 4, 1, {}),
        (3, 8, 2, {"pp": 2}),
        (2, 4, 2, {"pp": 2, "dp_shard": 1}),
        (3, 2, 1, {"cpu_offload": True}),
    ],
)
def test_gradients_that_autograd_does_not_deliver_are_summed_like_others(
    ranks: RankPool, stage: int, world_size: int, dp_replicate: int, axes: dict[str, Any]
) -> None:
    """Rows of an uneven cut on the wrong rank; a sum of one micro-batch, of one replica, or of a replica twice."""
    for error, counts in ranks.run(world_size, _delivered, stage, dp_replicate, axes):
        assert error <= 1e-6
        shards = world_size // dp_replicate // axes.get("pp", 1)
        if stage == 2:  # block by block, so that no rank holds whole gradients
            assert counts["reducescatterbase"] == (2 * (NUM_BLOCKS + 2) if shards > 1 else 0)
        if stage == 3:  # each at once
            assert counts["reducescatterbase"] == 2 * len(weights())
        if stage >= 2:  # replicas once per block, table, norm
            assert counts["allreduce"] == (NUM_BLOCKS + stage if dp_replicate > 1 else 0)
