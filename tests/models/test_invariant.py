"""Batch-invariant models: a token's forward has the same bits whatever is computed beside it, and good gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kernels.linear_cross_entropy import linear_cross_entropy, linear_token_losses
from models.config import ModelConfig
from models.decoder import Decoder
from models.invariant import make_batch_invariant
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from parallel.groups import ModelParallel
from tests.models.small import random_decoder, sample_tokens, tiny

MODELS: dict[str, ModelConfig] = {
    "llama": tiny(),
    "masked": tiny(attention_sinks=True, sliding_window=5, sliding_window_layers=[1], qk_norm=True),
    "alibi": tiny(positions="alibi", tie_embeddings=True),
    "gpt2": tiny(
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        mlp_bias=True,
        attention_bias=True,
    ),
    "mixtral": tiny(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16)),
    "deepseek": tiny(
        num_kv_heads=None,
        mla=MLAConfig(kv_rank=20, q_rank=12, nope_dim=8, rope_dim=8, value_dim=12),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16, num_shared=1, router="sigmoid", first_dense=1),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def losses(model: Decoder, tokens: Tensor) -> Tensor:
    """-log p of each token of [B, T] but the first: [B, T - 1]."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_token_losses(hidden, weight, tokens[:, 1:], batch_invariant=model.batch_invariant)

    with torch.no_grad():
        return model(tokens[:, :-1], head=head)


def parts_of(model: Decoder, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same losses once in a whole batch and once of each row alone, and of its beginnings."""
    whole = losses(model, tokens)
    found = [(whole[row : row + 1], losses(model, tokens[row : row + 1])) for row in range(len(tokens))]
    return found + [(whole[:, : n - 1], losses(model, tokens[:, :n])) for n in (2, 5, 17)]


@each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_has_the_same_bits_alone_and_in_a_batch(name: str, dtype: torch.dtype) -> None:
    """One operation left that looks at the number of rows, at a row's place, or at its neighbours."""
    model = random_decoder(MODELS[name]).to(dtype)
    make_batch_invariant(model)
    for whole, part in parts_of(model, sample_tokens(3, 20)):
        assert torch.equal(whole, part)


def test_an_ordinary_model_does_not_keep_its_bits() -> None:
    """Negative control: sizes at which everything is invariant anyway."""
    model = random_decoder(MODELS["llama"])
    assert not all(torch.equal(whole, part) for whole, part in parts_of(model, sample_tokens(3, 20)))


@each_model
def test_values_and_gradients_are_those_of_the_ordinary_model(name: str) -> None:
    """Bits that agree because all of them are wrong; a gradient that is cut off where a function was replaced."""
    tokens = sample_tokens(2, 20)
    found = []
    for invariant in (False, True):
        model = random_decoder(MODELS[name]).double()
        if invariant:
            make_batch_invariant(model)
        loss = model(
            tokens[:, :-1],
            head=lambda h, w, on=invariant: linear_cross_entropy(h, w, tokens[:, 1:], batch_invariant=on),
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    tolerance = 1e-5 if MODELS[name].moe.num_experts else 1e-10  # routers compute in fp32
    for ordinary, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, ordinary, rtol=tolerance, atol=tolerance * float(ordinary.abs().max()))


def test_documents_are_what_they_are_alone() -> None:
    """A document whose tiles of keys begin where the packed row begins."""
    model = random_decoder(MODELS["llama"]).to(torch.bfloat16)
    make_batch_invariant(model)
    tokens = sample_tokens(2, 20)
    lengths = [[3, 16, 1], [20]]
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = model(tokens, documents=documents.int(), positions=positions)
        for row, row_lengths in enumerate(lengths):
            first = 0
            for length in row_lengths:
                alone = model(tokens[row : row + 1, first : first + length])
                assert torch.equal(packed[row : row + 1, first : first + length], alone)
                first += length


def test_two_losses_that_are_invariant_add_up_alike_with_and_without_a_gradient() -> None:
    """A kernel for training whose losses round otherwise than those that are compared."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=generator).bfloat16() for n in (9, 61))
    labels = torch.randint(0, 61, (9,), generator=generator)
    labels[3] = -100
    each = linear_token_losses(hidden, weight, labels, batch_invariant=True)
    plain = linear_cross_entropy(hidden, weight, labels, batch_invariant=True)
    recorded = linear_cross_entropy(hidden.requires_grad_(), weight, labels, batch_invariant=True)
    assert torch.equal(plain, recorded.detach())
    assert torch.equal(plain, each.sum(dtype=torch.float64).float())
    assert each[3] == 0
    with pytest.raises(ValueError, match="compile=True and batch_invariant=True each choose"):
        linear_cross_entropy(hidden, weight, labels, compile=True, batch_invariant=True)


def _in_fp8(model: Decoder) -> None:
    model.get_submodule("blocks.0.mlp.down").in_fp8 = True  # type: ignore[assignment]


def _over_context(model: Decoder) -> None:
    model.groups = ModelParallel(cp_ring=cast(DeviceMesh, SimpleNamespace(size=lambda: 2)))


@pytest.mark.parametrize(
    ("change", "says"), [(_in_fp8, "blocks.0.mlp.down multiplies in fp8"), (_over_context, "use parallel.cp=1")]
)
def test_a_model_that_cannot_be_made_so_is_refused(change: Callable[[Decoder], None], says: str) -> None:
    """A promise that is given and not kept."""
    model = random_decoder(tiny())
    change(model)
    with pytest.raises(ValueError, match=says):
        make_batch_invariant(model)
    assert not model.batch_invariant


def test_capacity_is_no_matter_where_nothing_is_trained() -> None:
    """An engine that refuses a model for how it was trained."""
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=16)
    model = random_decoder(tiny(moe=moe, routing=RoutingConfig(capacity_factor=0.5))).to(torch.bfloat16)
    make_batch_invariant(model)
    for whole, part in parts_of(model, sample_tokens(2, 20)):
        assert torch.equal(whole, part)
