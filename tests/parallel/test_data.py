"""Every ZeRO stage against one process: gradients, updates, bytes, collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.data import DataParallel, state_bytes
from parallel.dims import ParallelConfig, ParallelDims
from parallel.mesh import build_mesh
from parallel.parallelize import BlockOptions, parallelize
from parallel.precision import PrecisionConfig
from tests.parity.harness import largest
from tests.pool import RankPool
from trainer.config import OptimConfig
from trainer.optim import build_optimizer

WIDTH, HIDDEN, NUM_BLOCKS, VOCAB = 13, 17, 3, 11  # odd: shards are uneven on every number of ranks


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class _Model(nn.Module):
    """The shape parallelize expects: blocks, and parameters before and after them; a tied table."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(_Block(width, hidden) for _ in range(NUM_BLOCKS))
        self.final_norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.embedding.weight)


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in _Model().named_parameters()}


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (8, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _build(
    stage: int, dp_replicate: int, *, precision: PrecisionConfig | None = None, bucket_mb: float = 0.002, **axes: Any
) -> tuple[nn.Module, DataParallel]:
    """A model in the given layout with `_weights`; buckets of ~2 KiB, so that there are several."""
    precision = precision or PrecisionConfig()
    config = ParallelConfig(dp_replicate=dp_replicate, zero_stage=stage, bucket_mb=bucket_mb, **axes)
    mesh = build_mesh(ParallelDims.resolve(config, dist.get_world_size()), "cpu")
    with torch.device("meta"):
        model = _Model()
    data_parallel = parallelize(
        model, mesh, config, precision=precision, blocks=BlockOptions(), device=torch.device("cpu")
    )
    full = _weights()
    for name, master in data_parallel.masters.items():
        if isinstance(master, DTensor):
            local = distribute_tensor(full[name], master.device_mesh, master.placements).to_local()
            master.to_local().detach().copy_(local)
        else:
            master.detach().copy_(full[name])
    data_parallel.publish()
    return model, data_parallel


def _full(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def _steps(stage: int, dp_replicate: int, num_micro: int, compute: str, num_steps: int) -> dict[str, torch.Tensor]:
    """SGD-free check: gradients of the first step and weights after AdamW steps, gathered whole."""
    precision = PrecisionConfig(compute=compute)
    model, data_parallel = _build(stage, dp_replicate, precision=precision)
    optimizer = build_optimizer(data_parallel.masters, OptimConfig(lr=1e-2))
    inputs, labels = _data()
    rank, world = dist.get_rank(), dist.get_world_size()
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    out: dict[str, torch.Tensor] = {}
    for step in range(num_steps):
        mine = inputs.chunk(world)[rank].chunk(num_micro), labels.chunk(world)[rank].chunk(num_micro)
        for i, (x, y) in enumerate(zip(*mine, strict=True)):
            data_parallel.start_microbatch(last=i == num_micro - 1)
            logits = model(x).float()
            (F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / labels.numel()).backward()
        data_parallel.finish_backward()
        if step == 0:
            out |= {f"grad/{n}": _full(m.grad) for n, m in data_parallel.masters.items()}  # type: ignore[arg-type]
        optimizer.step(lr=1e-2, grad_scale=one, skip=zero)
        data_parallel.publish()
    out |= {f"weight/{n}": _full(m) for n, m in data_parallel.masters.items()}
    with torch.no_grad():
        out["logits"] = model(inputs).float()
    return out


def _oracle(num_steps: int) -> dict[str, torch.Tensor]:
    """torch alone: one process, torch.optim.AdamW."""
    model = _Model()
    model.load_state_dict(_weights())
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith("embedding")]
    kept = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.startswith("embedding")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    inputs, labels = _data()
    out: dict[str, torch.Tensor] = {}
    for step in range(num_steps):
        F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
        if step == 0:
            out |= {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    out |= {f"weight/{n}": p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        out["logits"] = model(inputs)
    return out


LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, dp_replicate)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "dp_replicate"), LAYOUTS)
def test_gradients_and_updates_equal_one_process(
    ranks: RankPool, stage: int, world_size: int, dp_replicate: int
) -> None:
    """A mean instead of a sum, a shard in the wrong place, a stale all-gather: each moves a gradient or a weight."""
    expected = _oracle(num_steps=3)
    for result in ranks.run(world_size, _steps, stage, dp_replicate, 2, "fp32", 3):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("grad/"):
                assert (result[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
            else:
                torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_compute_keeps_fp32_masters_and_fp32_sums(ranks: RankPool, stage: int) -> None:
    """A master rounded to bf16 would lose every update smaller than 1/256 of its weight."""
    expected = _oracle(num_steps=3)
    result = ranks.run(2, _steps, stage, 1, 2, "bf16", 3)[0]
    weight = result["weight/blocks.0.up.weight"]
    assert weight.dtype == torch.float32
    assert (weight != weight.bfloat16().float()).float().mean() > 0.9
    for name, value in expected.items():
        if name.startswith("grad/"):
            assert (result[name] - value).norm() <= 2e-2 * value.norm(), name


def _corrupt(stage: int) -> float:
    """Like _steps, but this rank's gradients never leave it; the largest relative gradient error."""
    model, data_parallel = _build(stage, 1)
    if stage < 2:
        data_parallel._reduce = lambda bucket: None  # type: ignore[attr-defined, method-assign]
    else:
        model.set_gradient_divide_factor(dist.get_world_size())  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            block.set_gradient_divide_factor(dist.get_world_size())  # type: ignore[operator, union-attr]
    inputs, labels = _data()
    rank, world = dist.get_rank(), dist.get_world_size()
    data_parallel.start_microbatch(last=True)
    logits = model(inputs.chunk(world)[rank])
    y = labels.chunk(world)[rank]
    (F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / labels.numel()).backward()
    data_parallel.finish_backward()
    expected = _oracle(num_steps=1)
    errors = []
    for name, master in data_parallel.masters.items():
        value = expected[f"grad/{name}"]
        assert master.grad is not None
        errors.append(((_full(master.grad) - value).abs().max() / value.abs().max()).item())
    return largest(errors)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_comparison_notices_a_missing_or_averaged_reduction(ranks: RankPool, stage: int) -> None:
    """Negative control of the equality tests above."""
    assert max(ranks.run(2, _corrupt, stage)) > 0.1


def _unused() -> None:
    _, data_parallel = _build(0, 1)
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
        model = _Model(width=width, hidden=hidden, vocab=12)
    device = torch.device("cpu")
    data_parallel = parallelize(model, mesh, config, precision=precision, blocks=BlockOptions(), device=device)
    for master in data_parallel.masters.values():
        (master.to_local() if isinstance(master, DTensor) else master).detach().fill_(0.1)
    data_parallel.publish()
    optimizer = build_optimizer(data_parallel.masters, optim or OptimConfig())
    inputs, labels = _data()
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

    Stages 0 and 1 are that to the byte. fully_shard (2, 3) keeps one fp32 shard as parameter and master at once, and an
    fp32 gradient shard: the paper's 16 / N of stage 3, counted as 4 + 4 + 0 + 8; whole 16-bit weights come and go.
    """
    n = num_ranks
    per_parameter = {
        0: {"parameters": 2, "gradients": 2, "master": 4, "optimizer": 8},
        1: {"parameters": 2, "gradients": 2, "master": 4 / n, "optimizer": 8 / n},
        2: {"parameters": 4 / n, "gradients": 4 / n, "master": 0, "optimizer": 8 / n},
        3: {"parameters": 4 / n, "gradients": 4 / n, "master": 0, "optimizer": 8 / n},
    }[stage]
    for num_parameters, measured in ranks.run(n, _bytes, stage, PrecisionConfig(compute="bf16", reduce="bf16")):
        assert measured == {kind: size * num_parameters for kind, size in per_parameter.items()}


@pytest.mark.parametrize("stage", [0, 1])
def test_fp32_costs_no_second_copy_of_the_weights(ranks: RankPool, stage: int) -> None:
    """In the model's own dtype the master is a view of the model: 4 + 4 + 0 + 8 (sharded: 8 / N)."""
    for num_parameters, measured in ranks.run(2, _bytes, stage, PrecisionConfig()):
        expected = {"parameters": 4, "gradients": 4, "master": 0, "optimizer": 8 if stage == 0 else 4}
        assert measured == {kind: size * num_parameters for kind, size in expected.items()}


@pytest.mark.parametrize("stage", [0, 1, 3])
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
            if stage < 2:
                assert measured["parameters"] == measured["gradients"] == 2 * num_parameters


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
    model, data_parallel = _build(stage, dp_replicate, bucket_mb=64)
    inputs, labels = _data()
    with torch.no_grad():
        model(inputs)  # what `_build` published has arrived
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
    groups = NUM_BLOCKS + 1
    assert ranks.run(2, _collectives, 0)[0] == {"allreduce": 1}
    assert ranks.run(2, _collectives, 1)[0] == {"reducescatterbase": 1, "allgatherbase": 1}
    # What a forward gathers stays for the next at stage 2 (at stage 3: the root group), until a backward or an update.
    # So here stage 2 gathers only for the last forward, stage 3 blocks for every forward and backward.
    stage2, stage3 = ranks.run(2, _collectives, 2)[0], ranks.run(2, _collectives, 3)[0]
    assert stage2 == {"reducescatterbase": 2 * groups, "allgatherbase": groups}
    assert stage3 == {"reducescatterbase": 2 * groups, "allgatherbase": 5 * NUM_BLOCKS + 2}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_cross_replicas_once_per_step(ranks: RankPool, stage: int) -> None:
    """Two micro-batches. An all-reduce for each of them is traffic between nodes, the slowest there is."""
    all_reduces = ranks.run(4, _collectives, stage, 2)[0]["allreduce"]
    assert all_reduces == (1 if stage == 1 else NUM_BLOCKS + 1)


def _delivered(stage: int, dp_replicate: int, axes: dict[str, Any]) -> tuple[float, Counter[str]]:
    """Bring two gradients of every parameter, in another order than the model's, as split backward does. The largest
    relative error of their sum over the ranks of a pipeline stage, and the collectives issued."""
    _, data_parallel = _build(stage, dp_replicate, **axes)
    shapes = {name: value.shape for name, value in reversed(_weights().items())}
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
        errors.append(((_full(master.grad) - total).abs().max() / total.abs().max()).item())
    return largest(errors), counter.counts


@pytest.mark.parametrize(
    ("stage", "world_size", "dp_replicate", "axes"),
    [
        (0, 2, 2, {}),
        (1, 4, 2, {}),
        (2, 2, 1, {}),
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
        if stage >= 2:  # each at once, so that no rank holds whole gradients; replicas once per block, table, norm
            assert counts["reducescatterbase"] == 2 * len(_weights())
            assert counts["allreduce"] == (NUM_BLOCKS + 3 if dp_replicate > 1 else 0)
