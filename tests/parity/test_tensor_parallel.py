"""Tensor and sequence parallelism against one process, through the real trainer: three steps in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import parallel.tensor
from data.config import DataConfig
from parallel.collectives import Axis
from tests.parity.harness import (
    Outcome,
    Reference,
    References,
    assert_same_model,
    changed,
    gradient_deviation,
    run_here,
    run_on,
    text_corpus,
)
from tests.pool import RankError, RankPool
from trainer.config import TrainConfig

# Odd where it may be: 301 words are 151 + 150, or 76 + 76 + 76 + 73 on four ranks; 36 features, heads of 6.
SHAPE: dict[str, Any] = {
    "model__num_heads": 4,
    "model__num_kv_heads": 2,  # fewer than four ranks
    "model__head_dim": 6,
    "model__intermediate_size": 52,
    "model__vocab_size": 301,
    "train__steps": 3,
    "data__mask_documents": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        "model__family": "gpt2",
        "model__num_kv_heads": 4,
        "model__norm": "layernorm",
        "model__activation": "gelu_tanh",
        "model__gated_mlp": False,
        "model__positions": "learned",
        "model__qkv_bias": True,
        "model__attention_bias": True,
        "model__mlp_bias": True,
        "model__tie_embeddings": True,
        "model__dropout": 0.1,
    },
    "qwen": {
        "model__qk_norm": True,
        "model__qkv_bias": True,
        "model__num_kv_heads": 1,
        "model__tie_embeddings": True,
        "optim__name": "muon",
    },
    "alibi": {
        "model__positions": "alibi",
        "model__attention": "reference",
        "model__attention_dropout": 0.1,
        "model__norm_first": False,
        "data__mask_documents": False,
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("parity"))


def _without_key_bias(outcome: Outcome) -> Outcome:
    """Without the bias of keys, which nothing turns: it adds the same to all scores of a query, so the model does
    not depend on it, and its gradient is rounding that Adam makes steps of."""
    kept = replace(
        outcome,
        first_gradients={n: g for n, g in outcome.first_gradients.items() if not n.endswith("k.bias")},
        weights={n: w for n, w in outcome.weights.items() if not n.endswith("k.bias")},
    )
    for name in outcome.first_gradients.keys() - kept.first_gradients.keys():
        of_queries = outcome.first_gradients[name.replace("k.bias", "q.bias")]
        assert outcome.first_gradients[name].abs().max() <= 1e-5 * of_queries.abs().max()
    return kept


def _comparable(outcome: Outcome) -> Outcome:
    return _without_key_bias(outcome) if "positions.weight" in outcome.weights else outcome


@pytest.fixture(scope="module")
def references(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> References:
    variants = {name: SHAPE | {"train__micro_batch_size": 2} | changes for name, changes in VARIANTS.items()}
    folder = tmp_path_factory.mktemp("one-process")
    return References(ranks, corpus, folder, variants, splits=(1, 8), feature_parts=(2, 4), comparable=_comparable)


def _assert_same_model(outcome: Outcome, reference: Reference) -> None:
    assert_same_model(_comparable(outcome), reference)


def _layout(tp: int, stage: int, *, sequence_parallel: bool, **others: Any) -> dict[str, Any]:
    return {
        "parallel__tp": tp,
        "parallel__zero_stage": stage,
        "parallel__sequence_parallel": sequence_parallel,
        **others,
    }


LAYOUTS = [
    *(("llama", 2, _layout(2, 0, sequence_parallel=sp)) for sp in (False, True)),
    *(("llama", 4, _layout(2, stage, sequence_parallel=stage % 2 == 1)) for stage in (0, 1, 2, 3)),
    *(("llama", 4, _layout(4, stage, sequence_parallel=sp)) for stage, sp in ((0, True), (1, False), (3, True))),
    ("llama", 8, _layout(2, 1, sequence_parallel=True, parallel__dp_replicate=2)),
    ("llama", 8, _layout(2, 3, sequence_parallel=True, parallel__dp_replicate=2)),
    ("llama", 8, _layout(4, 2, sequence_parallel=True, parallel__dp_replicate=2)),
    ("gpt2", 2, _layout(2, 0, sequence_parallel=False)),
    *(("gpt2", 4, _layout(2, stage, sequence_parallel=True)) for stage in (1, 2)),
    ("gpt2", 4, _layout(4, 0, sequence_parallel=True)),
    ("qwen", 2, _layout(2, 0, sequence_parallel=False)),
    ("qwen", 4, _layout(2, 2, sequence_parallel=True)),
    ("qwen", 4, _layout(2, 3, sequence_parallel=False)),
    ("qwen", 4, _layout(2, 3, sequence_parallel=False, parallel__cpu_offload=True)),
    ("qwen", 4, _layout(4, 1, sequence_parallel=True)),
    ("qwen", 8, _layout(4, 1, sequence_parallel=True, train__micro_batch_size=1)),
    ("gpt2", 2, _layout(2, 1, sequence_parallel=True, parallel__sp_chunks=4)),
    ("alibi", 2, _layout(2, 1, sequence_parallel=True)),
    ("alibi", 4, _layout(4, 0, sequence_parallel=False)),
    ("llama", 4, _layout(2, 3, sequence_parallel=True, parallel__cpu_offload=True)),
    ("gpt2", 4, _layout(2, 1, sequence_parallel=True, model__activation_checkpoint="full")),
    ("gpt2", 4, _layout(2, 3, sequence_parallel=False, model__activation_checkpoint="selective")),
    ("gpt2", 4, _layout(2, 3, sequence_parallel=True, model__activation_checkpoint="offload")),
]


@pytest.mark.some(3)
@pytest.mark.parametrize(("variant", "world_size", "changes"), LAYOUTS)
def test_every_layout_trains_the_same_model(
    ranks: RankPool, references: References, tmp_path: Path, variant: str, world_size: int, changes: dict[str, Any]
) -> None:
    """A gradient that is lost, doubled or of some ranks only; a head, word or dropout mask of the wrong rank."""
    reference = references.of(variant)
    outcome = run_on(ranks, world_size, changed(reference.config, tmp_path / "run", **changes))
    _assert_same_model(outcome, reference)


@pytest.mark.thorough
@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("gpt2", _layout(2, 3, sequence_parallel=True, parallel__sp_chunks=3, model__activation_checkpoint="full")),
        ("qwen", _layout(4, 1, sequence_parallel=False, model__activation_checkpoint="selective")),
    ],
)
def test_compiled_blocks_train_the_same_model(
    ranks: RankPool, references: References, tmp_path: Path, variant: str, changes: dict[str, Any]
) -> None:
    """A collective that is reordered, dropped or run once instead of twice inside a graph."""
    reference = references.of(variant)
    compiled = {"train__compile": True, "train__compile_backend": "aot_eager"}
    outcome = run_on(ranks, 4, changed(reference.config, tmp_path / "run", **changes, **compiled), timeout=240)
    _assert_same_model(outcome, reference)


# ---- negative controls: each breaks one thing that parity must notice


def _run_with(name: str, replacement: Callable[..., Any], config: TrainConfig) -> Outcome | None:
    original = getattr(parallel.tensor, name)
    setattr(parallel.tensor, name, replacement)
    try:
        return run_here(config)
    finally:
        setattr(parallel.tensor, name, original)


def _nothing_summed(x: Tensor, axis: Axis) -> Tensor:
    return x


def _without_the_sum_of_partial_gradients(config: TrainConfig) -> Outcome | None:
    return _run_with("sum_of_gradients", _nothing_summed, config)


def _without_the_sum_of_input_gradients(config: TrainConfig) -> Outcome | None:
    return _run_with("start_all_reduce", _nothing_summed, config)


def _with_the_slices_of_a_sequence_permuted(config: TrainConfig) -> Outcome | None:
    def permuted(x: Tensor, axis: Axis, dim: int) -> Tensor:
        return gather(x, axis, dim).roll(x.shape[dim], dims=dim)

    gather = parallel.tensor._gather
    return _run_with("_gather", permuted, config)


@pytest.mark.parametrize(
    ("broken", "sequence_parallel"),
    [
        (_without_the_sum_of_partial_gradients, True),
        (_without_the_sum_of_input_gradients, False),
        (_with_the_slices_of_a_sequence_permuted, True),
    ],
)
def test_a_missing_sum_or_a_permuted_shard_is_noticed(
    ranks: RankPool,
    references: References,
    tmp_path: Path,
    broken: Callable[[TrainConfig], Outcome | None],
    sequence_parallel: bool,
) -> None:
    """Negative control."""
    reference = references.of("gpt2")
    layout = _layout(2, 0, sequence_parallel=sequence_parallel)
    try:
        outcome = ranks.run(2, broken, changed(reference.config, tmp_path / "run", **layout))[0]
    except RankError as error:  # the harness itself compares what ranks hold alike
        if "differs between ranks" in str(error):
            return
        raise
    assert outcome is not None
    assert gradient_deviation(_without_key_bias(outcome), reference.outcome) > 1e-2
    with pytest.raises(AssertionError):
        _assert_same_model(outcome, reference)
