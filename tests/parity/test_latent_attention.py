"""Multi-head latent attention cut by heads, by tokens and by both against one process, through the real trainer.

Tolerances: 1e-6 on every loss, 1e-5 of a tensor's maximum on its first gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import models.layers.mla
from models.config import RopeConfig
from models.mla_config import MLAConfig
from parallel.collectives import Axis
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    run_here,
    run_on,
    text_corpus,
    tiny_config,
)
from tests.pool import RankError, RankPool
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize

# Dense models: experts have layouts of their own. A head's keys (5 + 6) and values (7) differ in size.
VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {
        "model__family": "deepseek_v3",
        "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
        "model__attention_bias": True,
        "data__mask_documents": True,
    },
    "v2": {
        "model__family": "deepseek_v2",
        "model__mla": MLAConfig(kv_rank=10, q_rank=None, nope_dim=5, rope_dim=6, value_dim=7),
        "model__rope": RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=16, mscale=0.7, mscale_all_dim=0.7),
        "model__dropout": 0.1,
        "model__attention": "reference",
        "model__attention_dropout": 0.1,
    },
}
CHECKPOINTED = {"model__activation_checkpoint": "full"}
COMPILED = {"train__compile": True, "train__compile_backend": "aot_eager"}


def _layout(tp: int = 1, cp: int = 1, method: str = "ring", *, sp: bool = False, zero: int = 0, **others: Any) -> Any:
    return {
        "parallel__tp": tp,
        "parallel__cp": cp,
        "parallel__cp_method": method,
        "parallel__sequence_parallel": sp,
        "parallel__zero_stage": zero,
        **others,
    }


LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("v3", 2, _layout(tp=2)),
    ("v3", 4, _layout(tp=4, sp=True)),
    ("v3", 4, _layout(tp=2, zero=1, **CHECKPOINTED)),
    ("v2", 4, _layout(tp=4)),
    ("v2", 2, _layout(tp=2, sp=True, **COMPILED)),
    ("v3", 2, _layout(cp=2, method="ulysses", zero=1)),
    ("v2", 4, _layout(cp=4, method="ring", parallel__cp_ulysses=2)),
    ("v2", 4, _layout(cp=4, method="allgather", zero=2, parallel__cp_ulysses=2)),
    ("v2", 4, _layout(tp=2, cp=2, method="allgather", sp=True, zero=3)),
    ("v3", 4, _layout(tp=2, sp=True, parallel__pp=2)),
]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainConfig, Outcome]]:
    folder = tmp_path_factory.mktemp("latent")
    corpus = text_corpus(folder)
    made = {}
    for name, changes in VARIANTS.items():
        config = tiny_config(
            folder / name,
            corpus,
            train__steps=2,
            schedule__warmup_steps=1,
            train__micro_batch_size=2,
            model__num_heads=4,
            model__num_kv_heads=None,
            model__intermediate_size=52,
            **changes,
        )
        made[name] = (config, run_on(ranks, 1, config))
    return made


@pytest.mark.some(2)
@pytest.mark.parametrize(("variant", "world_size", "changes"), LAYOUTS)
def test_every_layout_trains_the_same_model(
    ranks: RankPool,
    one_process: dict[str, tuple[TrainConfig, Outcome]],
    tmp_path: Path,
    variant: str,
    world_size: int,
    changes: dict[str, Any],
) -> None:
    """A latent whose gradient is that of one rank's heads, values cut to the size of keys, a shared key turned by the
    positions of other tokens."""
    config, reference = one_process[variant]
    outcome = run_on(ranks, world_size, changed(config, tmp_path / "run", **changes), timeout=240)
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5


def _with_gradients_of_one_rank(config: TrainConfig) -> Outcome | None:
    def only_here(x: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
        return x

    return _run_with(only_here, config)


def _with_slices_permuted(config: TrainConfig) -> Outcome | None:
    def permuted(x: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
        return true(x, axis, sequence_parallel=sequence_parallel).roll(x.shape[1], dims=1)

    true = models.layers.mla.enter
    return _run_with(permuted, config)


def _run_with(enter: Callable[..., Tensor], config: TrainConfig) -> Outcome | None:
    true, models.layers.mla.enter = models.layers.mla.enter, enter
    try:
        return run_here(config)
    finally:
        models.layers.mla.enter = true


@pytest.mark.parametrize(("broken", "sp"), [(_with_gradients_of_one_rank, False), (_with_slices_permuted, True)])
def test_a_latent_that_is_not_shared_rightly_is_noticed(
    ranks: RankPool,
    one_process: dict[str, tuple[TrainConfig, Outcome]],
    tmp_path: Path,
    broken: Callable[[TrainConfig], Outcome | None],
    sp: bool,
) -> None:
    """Negative control."""
    config, reference = one_process["v3"]
    try:
        outcome = ranks.run(2, broken, changed(config, tmp_path / "run", **_layout(tp=2, sp=sp)))[0]
    except RankError as error:  # the harness itself compares what ranks hold alike
        if "differs between ranks" in str(error):
            return
        raise
    assert outcome is not None
    assert gradient_deviation(outcome, reference) > 1e-3


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (_layout(tp=3), "parallel.tp=3 does not divide model.num_heads=4"),
        (_layout(cp=3, method="ulysses"), "parallel.cp=3"),
    ],
)
def test_heads_that_do_not_divide_are_refused(
    one_process: dict[str, tuple[TrainConfig, Outcome]], tmp_path: Path, layout: dict[str, Any], message: str
) -> None:
    """A rank without a head, found in the middle of building the model."""
    config = changed(one_process["v3"][0], tmp_path, train__micro_batch_size=1, train__global_batch_size=9, **layout)
    with pytest.raises(ConfigError, match=message):
        finalize(config, world_size=3)
