"""Sequences split over ranks against one process, through the real trainer: first steps in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from data.config import DataConfig
from kernels.attention.blockwise import BlockAttention
from models.layers.dropout import Dropout
from parallel import context
from parallel.cut import Cut
from parallel.dims import ParallelConfig
from parallel.groups import ModelParallel
from parallel.mesh import Meshes
from tests.parity.harness import (
    Outcome,
    Reference,
    References,
    assert_same_model,
    changed,
    gradient_deviation,
    run_and_count_graphs,
    run_here,
    run_on,
    text_corpus,
)
from tests.pool import RankPool
from trainer.config import TrainConfig

# Without qkv_bias: the gradient of a key's bias is zero but for rounding, and Adam would turn that into steps.
GPT2 = {
    "model__family": "gpt2",
    "model__norm": "layernorm",
    "model__activation": "gelu_tanh",
    "model__gated_mlp": False,
    "model__positions": "learned",
    "model__attention_bias": True,
    "model__mlp_bias": True,
    "model__num_kv_heads": 6,
    "model__tie_embeddings": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "masked": {"data__mask_documents": True},
    "dropout": {
        "data__mask_documents": True,
        "model__dropout": 0.1,
        "model__attention_dropout": 0.1,
        "model__attention": "reference",
    },
    "window": {"model__family": "mistral", "model__sliding_window": 7},
    "gpt2": GPT2 | {"model__dropout": 0.1},
    "alibi": {"model__positions": "alibi", "model__num_heads": 8, "model__num_kv_heads": 4, "model__head_dim": 5},
    "four_heads": {
        "model__num_heads": 4,
        "model__num_kv_heads": 2,
        "model__head_dim": 10,
        "model__qk_norm": True,
        "model__family": "qwen3",
    },
}
STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def references(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> References:
    run = {"train__steps": STEPS, "train__micro_batch_size": 8, "train__eval_interval": 2, "train__eval_batches": 1}
    variants = {name: run | changes for name, changes in VARIANTS.items()}
    folder = tmp_path_factory.mktemp("one-process")
    return References(ranks, corpus, folder, variants, splits=(1, 4), feature_parts=(2, 4))


def _assert_same_model(outcome: Outcome, reference: Reference) -> None:
    assert_same_model(outcome, reference)
    for ours, theirs in zip(outcome.metrics, reference.outcome.metrics, strict=True):
        assert ours["valid_tokens"] == theirs["valid_tokens"]
        assert ours.keys() == theirs.keys()
        if "validation_loss" in theirs:
            assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-6)


# variant, ranks, method, cp, zero_stage, dp_replicate, other changes; what is left of the ranks is dp_shard
LAYOUTS: list[tuple[str, int, str, int, int, int, dict[str, Any]]] = [
    ("masked", 2, "ring", 2, 0, 1, {}),
    ("masked", 2, "ulysses", 2, 3, 1, {"train__micro_batch_size": 4}),
    ("masked", 4, "ring", 4, 3, 1, {}),
    ("masked", 4, "ring", 2, 2, 2, {"model__activation_checkpoint": "full"}),
    ("masked", 4, "allgather", 2, 3, 2, {}),
    ("masked", 4, "ulysses", 2, 0, 1, {}),
    ("masked", 4, "ring", 4, 3, 1, {"parallel__cp_ulysses": 2}),
    ("alibi", 4, "allgather", 4, 1, 1, {"parallel__cp_ulysses": 2}),
    ("dropout", 4, "ring", 4, 0, 1, {"parallel__cp_ulysses": 2, "train__steps": 3}),
    ("dropout", 2, "ring", 2, 2, 1, {"model__activation_checkpoint": "full"}),
    ("dropout", 2, "allgather", 2, 1, 1, {"model__activation_checkpoint": "selective"}),
    ("dropout", 2, "ulysses", 2, 0, 1, {"model__activation_checkpoint": "full"}),
    ("dropout", 2, "ring", 2, 3, 1, {"model__activation_checkpoint": "offload"}),
    ("window", 4, "ring", 4, 2, 1, {}),
    ("window", 4, "allgather", 4, 0, 1, {}),
    ("gpt2", 4, "ring", 2, 3, 1, {}),
    ("gpt2", 2, "ulysses", 2, 1, 1, {}),
    ("alibi", 4, "ring", 4, 1, 1, {}),
    ("alibi", 4, "ulysses", 4, 3, 1, {}),
    ("four_heads", 4, "ulysses", 4, 2, 1, {}),
    ("four_heads", 4, "ring", 4, 0, 1, {"train__micro_batch_size": 4}),
]


@pytest.mark.some(3)
@pytest.mark.parametrize(("variant", "world_size", "method", "cp", "stage", "dp_replicate", "changes"), LAYOUTS)
def test_every_split_of_a_sequence_trains_the_same_model(
    ranks: RankPool,
    references: References,
    tmp_path: Path,
    variant: str,
    world_size: int,
    method: str,
    cp: int,
    stage: int,
    dp_replicate: int,
    changes: dict[str, Any],
) -> None:
    """A mask, position or dropout mask that takes a token's place on its rank for its place in the sequence; a gradient
    of keys that does not come home; a loss that is averaged over ranks; validation that sees a part only."""
    reference = references.of(variant)
    layout = {
        "parallel__cp": cp,
        "parallel__cp_method": method,
        "parallel__zero_stage": stage,
        "parallel__dp_replicate": dp_replicate,
        "train__micro_batch_size": 2,
    }
    outcome = run_on(ranks, world_size, changed(reference.config, tmp_path / "run", **(layout | changes)))
    _assert_same_model(outcome, reference)
    kernels = json.loads((tmp_path / "run" / "run.json").read_text())["kernels"]
    assert kernels["context_parallel"].startswith(f"{method}(")


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("variant", "method", "changes"),
    [
        ("masked", "ring", {}),
        ("dropout", "ulysses", {"parallel__zero_stage": 3, "model__activation_checkpoint": "full"}),
    ],
)
def test_compiled_blocks_around_attention_train_the_same_model(
    ranks: RankPool, references: References, tmp_path: Path, variant: str, method: str, changes: dict[str, Any]
) -> None:
    """A graph that swallows a message, keeps the positions of the first batch, or is not compiled after all."""
    reference = references.of(variant)
    layout = {"parallel__cp": 2, "parallel__cp_method": method, "train__micro_batch_size": 4}
    layout |= {"train__compile": True, "train__compile_backend": "aot_eager"}
    outcome, graphs = ranks.run(
        2, run_and_count_graphs, changed(reference.config, tmp_path / "run", **layout | changes)
    )[0]
    _assert_same_model(outcome, reference)
    assert graphs >= 4  # before and behind attention, with gradients and, in validation, without


@pytest.mark.exhaustive
def test_every_one_of_many_layers_is_compiled(ranks: RankPool, references: References, tmp_path: Path) -> None:
    """More layers with dropout than torch compiles variants of a function: an error, or the rest eager."""
    config = references.of("dropout").config
    layers = {"model__num_layers": 9, "train__steps": 1, "schedule__warmup_steps": 0, "train__eval_interval": 0}
    layers |= {"parallel__cp": 2, "train__compile": True, "train__compile_backend": "eager"}
    _, graphs = ranks.run(2, run_and_count_graphs, changed(config, tmp_path / "run", **layers))[0]
    assert graphs >= 9 + 3  # one per layer; around attention three more that layers share


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("method", "attention"), [("ring", "reference"), ("ulysses", "sdpa"), ("allgather", "reference")]
)
def test_a_checkpoint_moves_between_splits_and_a_sample_is_the_same(
    ranks: RankPool, references: References, tmp_path: Path, method: str, attention: str
) -> None:
    """A cursor that counts ranks instead of samples, state sharded over the wrong ranks, a sample that needs others."""
    reference = references.of("masked")
    split = {"parallel__cp": 2, "parallel__cp_method": method, "parallel__zero_stage": 3, "checkpoint__interval": 2}
    run_on(ranks, 4, changed(reference.config, tmp_path / "first", train__micro_batch_size=2, **split))
    start = str(tmp_path / "first" / "checkpoints" / "step_2")
    for name, world_size, layout in (("whole", 1, {}), ("other", 2, split | {"parallel__zero_stage": 1})):
        rest = run_on(
            ranks,
            world_size,
            changed(reference.config, tmp_path / name, checkpoint__resume=start, train__sample_tokens=3, **layout),
        )
        assert rest.losses == pytest.approx(reference.outcome.losses[2:], rel=1e-6)
    told = [json.loads((tmp_path / name / "run.json").read_text())["kernels"] for name in ("whole", "other")]
    cut = "" if method == "ulysses" else ", cut by documents"
    assert [t["context_parallel"] for t in told] == ["none", f"{method}(2){cut}"]
    assert told[1]["attention"].split()[0] == attention


def _mask_of_the_chunk_before(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, q, k, queries, keys: true(
        self, q, k, queries, [(first - length, length) for first, length in keys]
    )


def _keys_turned_round(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda hop: true(hop).flip(1)


def _no_sum(true: Callable[..., None]) -> Callable[..., None]:
    return lambda buffer, *, rank, group, async_op: None


def _contiguous(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda seq_len, *, rank, size: torch.arange(seq_len).chunk(size)[rank]


def _boundaries_shifted(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs of tokens begin one later than attention takes them to; the first token stands behind the last."""

    def indices(self: Cut, rank: int) -> Tensor:
        seq_len = sum(length for runs in self.runs for _, length in runs)
        return (true(self, rank) + 1) % seq_len

    return indices


def _first_keys_of_later_documents(true: Callable[..., int]) -> Callable[..., int]:
    return lambda self, run: true(self, run) + run[1]


def _in_rank_order(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda parts, *, dim, cut=None: torch.cat(parts.unbind(0), dim=dim)


def _exchanged(true: Callable[..., ModelParallel]) -> Callable[..., ModelParallel]:
    def groups_in_layers(mesh: Meshes, config: ParallelConfig) -> ModelParallel:
        groups = true(mesh, config)
        return replace(groups, cp_ring=groups.cp_ulysses, cp_ulysses=groups.cp_ring)

    return groups_in_layers


def _masks_of_the_first_heads(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, p, samples, **of: true(self, p, samples, **of | {"first_head": 0})


def _run_broken(config: TrainConfig, where: str | type, name: str, fault: Callable[..., Any]) -> Outcome | None:
    where = import_module(where) if isinstance(where, str) else where
    with mock.patch.object(where, name, fault(getattr(where, name))):
        return run_here(config)


@pytest.mark.some(7, unless_thorough=True)
@pytest.mark.parametrize(
    ("variant", "method", "where", "name", "fault"),
    [
        ("window", "ring", BlockAttention, "_scores", _mask_of_the_chunk_before),
        ("window", "allgather", BlockAttention, "_scores", _mask_of_the_chunk_before),
        ("masked", "ring", context._Hop, "wait", _keys_turned_round),
        ("masked", "allgather", "parallel.context", "reduce_scatter_rows", _no_sum),
        ("window", "ring", "trainer.sequence", "zigzag_indices", _contiguous),
        ("masked", "ring", Cut, "indices", _boundaries_shifted),
        ("masked", "ring", Cut, "first_key", _first_keys_of_later_documents),
        ("masked", "allgather", Cut, "indices", _boundaries_shifted),
        ("masked", "ulysses", "parallel.context", "to_sequence", _in_rank_order),
        ("masked", "ring x ulysses", context._Hop, "wait", _keys_turned_round),
        ("masked", "ring x ulysses", "parallel.context", "to_sequence", _in_rank_order),
        ("masked", "ring x ulysses", "trainer.sequence", "zigzag_indices", _contiguous),
        ("masked", "ring x ulysses", Cut, "indices", _boundaries_shifted),
        ("masked", "ring x ulysses", "trainer.build", "groups_in_layers", _exchanged),
        ("dropout", "ring x ulysses", Dropout, "on_probabilities", _masks_of_the_first_heads),
    ],
)
def test_the_comparison_notices_a_fault(
    ranks: RankPool,
    references: References,
    tmp_path: Path,
    variant: str,
    method: str,
    where: str | type,
    name: str,
    fault: Callable[..., Any],
) -> None:
    """Negative control: a mask one chunk off, keys in another order, a sum left out, parts that are not zigzag, a cut
    by documents with its boundaries shifted or keys hidden, ring and Ulysses between the wrong ranks, dropout of other
    heads."""
    reference = references.of(variant)
    split = {"parallel__cp": 2, "parallel__cp_method": method, "train__micro_batch_size": 4}
    if method == "ring x ulysses":
        split |= {"parallel__cp": 4, "parallel__cp_method": "ring", "parallel__cp_ulysses": 2}
    config = changed(reference.config, tmp_path / "run", **split)
    outcome = ranks.run(config.parallel.cp, _run_broken, config, where, name, fault)[0]
    assert outcome is not None
    assert outcome.losses[0] != pytest.approx(reference.outcome.losses[0], rel=1e-6) or (
        gradient_deviation(outcome, reference.outcome) > 1e-3
    )
