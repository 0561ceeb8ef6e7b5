"""What tensor and sequence parallelism ask of a model and a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from models.config import ModelConfig
from models.registry import build_model
from parallel.dims import divisors
from parallel.dims import problems as dims_problems
from parallel.problem import Advice, Problem, multiples, values
from parallel.tensor import chunk_bounds
from trainer.config import TrainConfig


def tensor_parallel_problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[Problem]:
    """Every reason why this run cannot use parallel.tp, one line each; none while the layout or model are illegal."""
    tp = config.parallel.tp
    if tp == 1 or dims_problems(config.parallel, world_size) or model.num_kv_heads is None:
        return []
    found = problems_of_model(model, tp, candidates=divisors(world_size))
    seq_len, cp = config.train.seq_len, config.parallel.cp
    if config.parallel.sequence_parallel and seq_len % (cp * tp):
        over = f"parallel.tp={tp}" if cp == 1 else f"parallel.cp={cp} x parallel.tp={tp}"
        step = cp * tp if cp == 1 else math.lcm(2 * cp, cp * tp)  # what cp asks for as well
        found.append(
            Problem(
                f"train.seq_len={seq_len} does not divide by {over}, and parallel.sequence_parallel=true gives each "
                "rank an equal slice",
                values("train.seq_len", multiples(step, seq_len), near=seq_len),
                values("parallel.sequence_parallel", [False]),
            )
        )
    return found


def problems_of_model(model: ModelConfig, tp: int, *, candidates: Iterable[int]) -> list[Problem]:
    """Every reason why the layers of a model, resolved, cannot be cut over tp ranks; advice is of the candidates."""
    assert model.num_kv_heads is not None  # resolved
    found = []
    fitting = _fitting(model, tp, candidates)
    for name in ("num_heads", "intermediate_size") if has_mlp(model) else ("num_heads",):
        size = getattr(model, name)
        if size % tp:
            what = "attention heads" if name == "num_heads" else "the inner features of an MLP"
            why = f"parallel.tp={tp} does not divide model.{name}={size}, and ranks share {what} equally"
            found.append(Problem(why, fitting))
    if not _kv_heads_fit(model.num_kv_heads, tp):
        found.append(
            Problem(
                f"parallel.tp={tp} and model.num_kv_heads={model.num_kv_heads} do not divide one another, so that "
                "query heads of one rank would need an uneven number of key heads",
                fitting,
            )
        )
    if not _words_for_all(model.vocab_size, tp):
        why = f"parallel.tp={tp} leaves the last rank no word of model.vocab_size={model.vocab_size}"
        found.append(Problem(why, fitting))
    return found


def _kv_heads_fit(num_kv_heads: int, tp: int) -> bool:
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


def has_mlp(model: ModelConfig) -> bool:
    """Whether any layer is without experts."""
    return not all(model.moe.in_layer(layer) for layer in range(model.num_blocks))


WHOLE = ("q_a", "kv_a", "project", "router", "positions")
"""Layers with a matrix that every rank of tp has whole, by name."""
CUT_BY_INPUT = ("o", "down")
"""Those at the end of a branch, which are cut by features in; all others are by features out (parallel/tensor.py)."""


def tp_dim(name: str, shape: torch.Size, model: ModelConfig, tp: int) -> int | None:
    """The dim of a parameter (matrix, or stack of them) that tp cuts; None for those that every rank has whole."""
    assert model.num_kv_heads is not None  # resolved
    layer = name.split(".")[-2]
    if layer == "head" and model.score:
        return None
    shared = name.endswith((".attention.k.weight", ".attention.v.weight")) and tp > model.num_kv_heads
    if tp == 1 or layer in WHOLE or shared:
        return None
    return len(shape) - (1 if layer in CUT_BY_INPUT else 2)


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Of every parameter, by name; whole; of fused ones their parts. model: legal and resolved."""
    if (key := repr(model)) not in _SHAPES:
        _SHAPES.clear()
        with torch.device("meta"):
            separate = build_model(replace(model, fused_projections=False))
            _SHAPES[key] = {name: p.shape for name, p in separate.named_parameters()}
    return _SHAPES[key]


_SHAPES: dict[str, dict[str, torch.Size]] = {}
"""Of the last model: advice tries layouts of one."""


def _words_for_all(vocab_size: int, tp: int) -> bool:
    first, last = chunk_bounds(vocab_size, tp, tp - 1)
    return first < last


def _fitting(model: ModelConfig, tp: int, candidates: Iterable[int]) -> Advice | None:
    """The degrees that this model allows."""
    assert model.num_kv_heads is not None  # resolved
    legal = [
        d
        for d in candidates
        if model.num_heads % d == 0
        and (model.intermediate_size % d == 0 or not has_mlp(model))
        and _kv_heads_fit(model.num_kv_heads, d)
        and _words_for_all(model.vocab_size, d)
    ]
    return values("parallel.tp", legal, near=tp)
