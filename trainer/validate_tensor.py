"""What tensor and sequence parallelism ask of a model and a run."""

from __future__ import annotations

from models.config import ModelConfig
from parallel.dims import divisors
from parallel.dims import problems as dims_problems
from parallel.tensor import chunk_bounds
from trainer.config import TrainConfig


def tensor_parallel_problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[str]:
    """Every reason why this run cannot use parallel.tp, one line each; none while the layout or model are illegal."""
    tp = config.parallel.tp
    if tp == 1 or dims_problems(config.parallel, world_size) or model.num_kv_heads is None:
        return []
    found = _model_problems(model, tp)
    seq_len, cp = config.train.seq_len, config.parallel.cp
    if config.parallel.sequence_parallel and seq_len % (cp * tp):
        nearest = max(cp * tp, round(seq_len / (cp * tp)) * cp * tp)
        over = f"parallel.tp={tp}" if cp == 1 else f"parallel.cp={cp} x parallel.tp={tp}"
        found.append(
            f"train.seq_len={seq_len} does not divide by {over}, and parallel.sequence_parallel=true "
            f"gives each rank an equal slice; use {nearest}, or sequence_parallel=false"
        )
    return found


def _model_problems(model: ModelConfig, tp: int) -> list[str]:
    assert model.num_kv_heads is not None  # resolved
    found = []
    for name in ("num_heads", "intermediate_size") if has_mlp(model) else ("num_heads",):
        size = getattr(model, name)
        if size % tp:
            what = "attention heads" if name == "num_heads" else "the inner features of an MLP"
            found.append(
                f"parallel.tp={tp} does not divide model.{name}={size}, and ranks share {what} equally; "
                f"use {_legal(model)}"
            )
    if not _kv_heads_fit(model.num_kv_heads, tp):
        found.append(
            f"parallel.tp={tp} and model.num_kv_heads={model.num_kv_heads} do not divide one another, so that query "
            f"heads of one rank would need an uneven number of key heads; use {_legal(model)}"
        )
    first, last = chunk_bounds(model.vocab_size, tp, tp - 1)
    if first >= last:
        found.append(f"parallel.tp={tp} leaves the last rank no word of model.vocab_size={model.vocab_size}; use less")
    return found


def _kv_heads_fit(num_kv_heads: int, tp: int) -> bool:
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


def has_mlp(model: ModelConfig) -> bool:
    """Whether any layer is without experts."""
    return not all(model.moe.in_layer(layer) for layer in range(model.num_blocks))


def _legal(model: ModelConfig) -> str:
    """The degrees that this model allows, as an error offers them."""
    assert model.num_kv_heads is not None  # resolved
    legal = [
        d
        for d in divisors(model.num_heads)
        if (model.intermediate_size % d == 0 or not has_mlp(model)) and _kv_heads_fit(model.num_kv_heads, d)
    ]
    return f"parallel.tp={' or '.join(map(str, legal))}"
