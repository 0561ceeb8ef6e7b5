"""Runs the real trainer on pool ranks and brings back what must not depend on the layout.

A layout may differ from one process in the order of sums and in nothing else. So every loss is held to 1e-6 and every
gradient of the first step to 1e-5 of its tensor's maximum, which rounding stays far below and no real error does. Final
weights have no such number: Adam turns the rounding of a gradient near zero into a step of lr. They are held to
TWICE the sensitivity of the run, which is measured: the largest deviation among runs of one process that differ in the
order of sums as layouts do,

    in the micro-batches (sums over tokens, grouped otherwise),
    in the order of the samples of a global batch (the same sums, begun elsewhere),
    and, where an axis cuts what is computed of a token, in the sums over features, taken in parts (of linear layers
    and of experts alike).

The last counts for most: one weight whose first gradient is 1e-6 of its tensor's largest or less decides the maximum,
and the sums over features move it several times as far as those over tokens: by 1e-5 in one order and 1e-4 in the next,
so it takes several to know how far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from data.config import DataConfig, TokenizerConfig
from data.reader import Slice
from kernels.grouped_linear import grouped_linear, input_gradient, weight_gradient
from models.config import ModelConfig
from models.layers import moe
from parallel.dims import ParallelConfig
from parallel.fused import separate
from parallel.regions import Located, Piece, local_region, local_tensor
from tests.pool import RankPool
from trainer.config import (
    CheckpointConfig,
    LoggingConfig,
    LoopConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.step import TrainState
from trainer.trainer import Trainer
from trainer.validate import finalize


@dataclass
class Outcome:
    """What a run produced. Filled by `run_here` on rank 0 (None elsewhere)."""

    losses: list[float]
    grad_norms: list[float]
    # Whole tensors; of models that are trained beside the run's (TrainState.beside) as NAME/...
    first_gradients: dict[str, torch.Tensor]  # of the first step, before clipping
    weights: dict[str, torch.Tensor]  # after the last step
    metrics: list[dict[str, Any]]


def tiny_config(run_dir: Path, data: DataConfig, **changes: Any) -> TrainConfig:
    """A small model with odd sizes and grouped-query attention; `changes` are dotted keys, such as train__steps=3."""
    config = TrainConfig(
        train=LoopConfig(
            steps=20, seq_len=24, global_batch_size=8, micro_batch_size=1, seed=7, device="cpu", grad_clip=1.0
        ),
        model=ModelConfig(
            vocab_size=300,
            hidden_size=36,
            intermediate_size=50,
            num_layers=2,
            num_heads=6,
            num_kv_heads=2,
            max_seq_len=64,
        ),
        data=copy.deepcopy(data),
        parallel=ParallelConfig(zero_stage=0, bucket_mb=0.02),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(name="cosine", warmup_steps=3),
        checkpoint=CheckpointConfig(at_end=False, asynchronous=False),
        logging=LoggingConfig(console=False),
        run=RunConfig(dir=str(run_dir)),
    )
    for key, value in changes.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name), key
        setattr(getattr(config, group), name, value)
    return config


def text_corpus(folder: Path) -> DataConfig:
    """Forty documents of very different lengths, and a tokenizer of 300 entries trained on them."""
    generator = torch.Generator().manual_seed(3)
    words = ["tensor", "rank", "shard", "mesh", "loss", "step", "token", "layer", "scale", "batch"]
    source = folder / "corpus"
    source.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        length = int(torch.randint(3, 160, (1,), generator=generator))
        picks = torch.randint(len(words), (length,), generator=generator).tolist()
        (source / f"{i:02d}.txt").write_text(" ".join(words[p] for p in picks))
    return DataConfig(
        source="text",
        path=str(source),
        tokenizer=TokenizerConfig(vocab_size=300),
        cache_dir=str(folder / "cache"),
        num_workers=0,
        validation_fraction=0.1,
    )


def whole(tensor: Located) -> torch.Tensor:
    """A copy of the full tensor behind any sharding. Collective."""
    if not isinstance(tensor, DTensor | Piece):
        return tensor.detach().cpu().clone()
    # Not full_tensor: torch's own puts uneven shards of shards together in the wrong order.
    result = torch.zeros(tensor.shape, dtype=tensor.dtype)
    result[local_region(tensor)] = local_tensor(tensor).detach()
    placed = tensor.inside if isinstance(tensor, Piece) else tensor
    for axis, placement in enumerate(placed.placements):
        if not placement.is_replicate():
            dist.all_reduce(result, group=placed.device_mesh.get_group(axis))
    return result


def run_here(config: TrainConfig) -> Outcome | None:
    """Train on this rank's process group; rank 0's Outcome."""
    import json

    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    gradients: dict[str, torch.Tensor] = {}
    states = {"": trainer.state} | {f"{name}/": other for name, other in trainer.state.beside.items()}
    for prefix, state in states.items():
        capture_first_gradients(state, gradients, prefix)
    try:
        trainer.run()
        weights = {
            f"{prefix}{name}": whole(master)
            for prefix, state in states.items()
            for name, master in separate(state.data_parallel.masters, state.fused).items()
        }
        gradients, weights = (union_over_ranks(tensors) for tensors in (gradients, weights))
    finally:
        trainer.close()
    if dist.get_rank() != 0:
        return None
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        losses=[line["loss"] for line in lines],
        grad_norms=[line["grad_norm"] for line in lines],
        first_gradients=gradients,
        weights=weights,
        metrics=lines,
    )


def capture_first_gradients(state: TrainState, into: dict[str, torch.Tensor], prefix: str) -> None:
    """Have the first update of a state write the gradients that it is given, by name behind the prefix."""
    update, captured = state.optimizer.step, False

    def capture_then_update(**kwargs: Any) -> None:
        nonlocal captured
        if not captured:
            captured = True
            held = {name: m.grad for name, m in state.data_parallel.masters.items() if m.grad is not None}
            into.update({f"{prefix}{name}": whole(grad) for name, grad in separate(held, state.fused).items()})
        update(**kwargs)

    state.optimizer.step = capture_then_update  # type: ignore[method-assign]


def run_and_count_graphs(config: TrainConfig) -> tuple[Outcome | None, int]:
    """What a run on this rank gave, and how many graphs torch.compile made of it."""
    torch._dynamo.utils.counters.clear()
    outcome = run_here(config)
    return outcome, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def union_over_ranks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of every pipeline stage by name. Those that several ranks hold must agree, bit for bit. Collective."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, tensors)
    union: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(union.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return union


def run_on(ranks: RankPool, world_size: int, config: TrainConfig, **kwargs: Any) -> Outcome:
    """Train on world_size pool ranks."""
    outcome = ranks.run(world_size, run_here, config, **kwargs)[0]
    assert outcome is not None
    return outcome


def largest(deviations: Iterable[float]) -> float:
    """The largest; NaN if one is, which max() would lose."""
    values = list(deviations)
    return math.nan if any(map(math.isnan, values)) else max(values)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of any element, relative to the largest expected one; 0 for tensors that are both 0."""
    difference = (found - expected).abs().max().item()
    if difference == 0:
        return 0.0
    scale = expected.abs().max().item()
    return difference / scale if scale else math.inf


def weight_deviation(a: Outcome, b: Outcome) -> float:
    """Largest difference of any weight, relative to the maximum of its tensor."""
    assert a.weights.keys() == b.weights.keys()
    return largest(relative_difference(a.weights[n], w) for n, w in b.weights.items())


def gradient_deviation(a: Outcome, b: Outcome) -> float:
    """Largest difference of any first-step gradient, relative to the maximum of its tensor."""
    assert a.first_gradients.keys() == b.first_gradients.keys()
    return largest(relative_difference(a.first_gradients[n], g) for n, g in b.first_gradients.items())


def loss_deviation(a: Outcome, b: Outcome) -> float:
    """Largest relative difference of any step's loss."""
    return largest(abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True))


def norm_deviation(a: Outcome, b: Outcome) -> float:
    """Largest relative difference of any step's gradient norm, before clipping."""
    return largest(abs(x - y) / abs(y) for x, y in zip(a.grad_norms, b.grad_norms, strict=True))


def changed(config: TrainConfig, run_dir: Path, **changes: Any) -> TrainConfig:
    """A copy with other values and a run directory of its own."""
    copied = copy.deepcopy(config)
    for key, value in changes.items():
        group, name = key.split("__")
        assert hasattr(getattr(copied, group), name), key
        setattr(getattr(copied, group), name, value)
    return replace(copied, run=RunConfig(dir=str(run_dir)))


# ---- one process, and what rounding does to it


class Reference(NamedTuple):
    """What one process makes of a model."""

    config: TrainConfig
    outcome: Outcome
    sensitivity: float  # weight_deviation between runs of one process that differ in the order of sums


class References:
    """References by variant, each made when it is first asked for."""

    def __init__(
        self,
        ranks: RankPool,
        corpus: DataConfig,
        folder: Path,
        variants: Mapping[str, Mapping[str, Any]],
        *,
        splits: Sequence[int],
        feature_parts: Sequence[int] = (),
        comparable: Callable[[Outcome], Outcome] = lambda outcome: outcome,
    ) -> None:
        """variants: changes of `tiny_config`. splits: other micro_batch_sizes. feature_parts: in how many
        parts to try sums over features. comparable: leaves out of an outcome what is nothing but rounding.
        """
        self.ranks, self.corpus, self.folder, self.variants = ranks, corpus, folder, variants
        self.splits, self.feature_parts, self.comparable = splits, feature_parts, comparable
        self.made: dict[str, Reference] = {}

    def of(self, variant: str) -> Reference:
        if variant not in self.made:
            self.made[variant] = self._make(variant)
        return self.made[variant]

    def _make(self, variant: str) -> Reference:
        config = tiny_config(self.folder / variant, self.corpus, **self.variants[variant])
        return make_reference(
            self.ranks, config, splits=self.splits, feature_parts=self.feature_parts, comparable=self.comparable
        )


def make_reference(
    ranks: RankPool,
    config: TrainConfig,
    *,
    splits: Sequence[int],
    feature_parts: Sequence[int] = (),
    comparable: Callable[[Outcome], Outcome] = lambda outcome: outcome,
) -> Reference:
    """Train on one process, and again with sums in other orders; arguments as of `References`."""
    outcome = comparable(run_on(ranks, 1, config))
    own, split = config.train.micro_batch_size, splits[0]
    orders = [_Order(size) for size in splits] + [_Order(split, turned=True)]
    orders += [order for n in feature_parts for order in (_Order(own, parts=n), _Order(split, parts=n, turned=True))]
    sensitivity = 0.0
    for order in orders:
        name = "-".join(map(str, order))
        other_config = changed(config, Path(f"{config.run.dir}-{name}"), train__micro_batch_size=order.micro_batch_size)
        other = ranks.run(1, _run_in_another_order, other_config, order)[0]
        assert other is not None
        other = comparable(other)
        # A perturbation that is more than rounding would make room for errors.
        assert loss_deviation(other, outcome) <= 1e-6, name
        assert gradient_deviation(other, outcome) <= 1e-5, name
        sensitivity = largest((sensitivity, weight_deviation(other, outcome)))
    return Reference(config, outcome, sensitivity)


def assert_same_model(outcome: Outcome, reference: Reference, *, weights: float = 2.0) -> None:
    """Within the tolerances at the top of this file. weights: times the sensitivity that final weights may deviate."""
    assert loss_deviation(outcome, reference.outcome) <= 1e-6
    assert gradient_deviation(outcome, reference.outcome) <= 1e-5
    assert norm_deviation(outcome, reference.outcome) <= 1e-5
    assert weight_deviation(outcome, reference.outcome) <= weights * reference.sensitivity


class _Order(NamedTuple):
    """Of the sums of a run."""

    micro_batch_size: int
    parts: int = 1  # of sums over features
    turned: bool = False  # the samples of a global batch from its last to its first


def _run_in_another_order(config: TrainConfig, order: _Order) -> Outcome | None:
    with ExitStack() as stack:
        if order.turned:
            stack.enter_context(_samples_turned_round())
        if order.parts > 1:
            stack.enter_context(_features_in_parts(order.parts))
        return run_here(config)


def _samples_turned_round() -> AbstractContextManager[Any]:
    numbers = Slice.numbers

    def turned(part: Slice, first: int) -> list[list[int]]:
        return [group[::-1] for group in reversed(numbers(part, first))]

    return mock.patch.object(Slice, "numbers", turned)


@contextmanager
def _features_in_parts(parts: int) -> Iterator[None]:
    """Matrix products summed as under tensor parallelism: in parts over features in, backward over those out."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _InParts.apply(x, weight, bias, parts)

    def grouped(x: Tensor, weight: Tensor, ends: Tensor, *, implementation: str | None) -> Tensor:
        assert implementation is None, "what is summed in parts is summed as the chosen one does"
        return _GroupedInParts.apply(x, weight, ends, parts)

    def pair(x: Tensor, *weights: Tensor, implementation: str | None) -> tuple[Tensor, ...]:
        *both, ends = weights
        return tuple(grouped(x, weight, ends, implementation=implementation) for weight in both)

    with (
        mock.patch.object(functional, "linear", linear),
        mock.patch.object(moe, "grouped_linear", grouped),
        mock.patch.object(moe, "grouped_linear_pair", pair),
    ):
        yield


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parts, ctx.biased = parts, bias is not None
        y = sum(a @ w.T for a, w in zip(x.chunk(parts, -1), weight.chunk(parts, 1), strict=True))
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = sum(g @ w for g, w in zip(grad.chunk(ctx.parts, -1), weight.chunk(ctx.parts, 0), strict=True))
        rows = grad.flatten(0, -2)
        return grad_x, rows.T @ x.flatten(0, -2), rows.sum(0) if ctx.biased else None, None


class _GroupedInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, parts: int) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.parts = parts
        pairs = zip(x.chunk(parts, 1), weight.chunk(parts, 2), strict=True)
        return sum(grouped_linear(a, w, ends) for a, w in pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        pairs = zip(grad.chunk(ctx.parts, 1), weight.chunk(ctx.parts, 1), strict=True)
        return sum(input_gradient(g, w, ends) for g, w in pairs), weight_gradient(grad, x, ends), None, None
