"""Determinism on CUDA: bits of kernels, engines and the trainer's forward, at sizes that use tensor cores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.grouped_linear import grouped_linear
from kernels.invariant_linear import invariant_linear
from kernels.invariant_linear.kernel import TILES
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from models.registry import resolve_model
from tests.inference.test_deterministic import assert_bits, bits, served, together, trained
from tests.models.test_invariant import MODELS

pytestmark = pytest.mark.gpu


def wide(**changes: object) -> ModelConfig:
    base = ModelConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_layers=2, num_heads=8, num_kv_heads=2,
        max_seq_len=32, init_std=0.05,
    )  # fmt: skip
    return resolve_model(replace(base, **changes))  # type: ignore[arg-type]


WIDE: dict[str, ModelConfig] = {
    "llama": wide(),
    "long_heads": wide(head_dim=128, qk_norm=True),
    "mixtral": wide(moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=256)),
    "deepseek": wide(num_kv_heads=None, mla=MLAConfig(kv_rank=128, nope_dim=64, rope_dim=32, value_dim=64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_small_models_have_the_same_bits_however_they_are_computed(name: str) -> None:
    """As on the CPU."""
    assert_bits(served(MODELS[name], "cuda"), seed=3)


@pytest.mark.parametrize("name", WIDE)
def test_wide_models_have_the_same_bits_however_they_are_computed(name: str) -> None:
    """A tile whose rows are not alike, CUDA graphs that pad, or two compilations of one kernel that add otherwise."""
    assert_bits(served(WIDE[name], "cuda"), seed=5)


def test_an_ordinary_model_has_other_bits() -> None:
    """Negative control, with sizes at which everything is alike anyway."""
    model = served(WIDE["llama"], "cuda", invariant=False)
    completions = together(model)
    assert trained(model, completions) != bits(completions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("features", "width"), [(512, 1000), (1376, 512), (4096, 6144), (120, 70)])
def test_rows_of_products_do_not_depend_on_their_number(dtype: torch.dtype, features: int, width: int) -> None:
    """1 row to thousands, and rows at every place of a tile."""
    x = torch.randn(3000, features, device="cuda", dtype=dtype)
    weight = torch.randn(width, features, device="cuda", dtype=dtype)
    expected = invariant_linear(x, weight)
    for begin, end in ((0, 1), (7, 8), (5, 69), (1, 1000), (999, 3000)):
        assert torch.equal(invariant_linear(x[begin:end], weight), expected[begin:end])
        ends = torch.tensor([0, end - begin], dtype=torch.int32, device="cuda")
        stacked = torch.stack([weight, weight])
        rows = grouped_linear(x[begin:end], stacked, ends, implementation="invariant")
        whole = grouped_linear(x, stacked, torch.tensor([999, 3000], dtype=torch.int32, device="cuda"),
                               implementation="invariant")  # fmt: skip
        assert torch.equal(rows, whole[begin:end])


@pytest.mark.parametrize("features", [512, 4096, 14336])
def test_all_tiles_for_half_precision_give_the_same_bits(features: int) -> None:
    """What would have to hold for a choice of tiles by the number of rows."""
    x = torch.randn(300, features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1000, features, device="cuda", dtype=torch.bfloat16)
    expected = invariant_linear(x, weight)
    for tile in TILES.configs:
        with TILES.forced(tile):
            assert torch.equal(invariant_linear(x, weight), expected), tile
