"""Multi-head latent attention in fp64 against transformers: all tokens at once, and from a cache of latents."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import Context, build_context
from models.layers.mla import LatentAttention
from tests.models import oracle

B, T = 2, 19  # longer than the length that YaRN stretches from
CASES = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_v3_halves")
LIMIT = 1e-10


class Case(NamedTuple):
    ours: LatentAttention
    context: Context  # of T tokens
    x: Tensor  # [B, T, D]
    expected: Tensor  # [B, T, D], of transformers
    gradient: Tensor  # of sum(expected^2) by x, of transformers


def _in_fp64(attention: nn.Module) -> nn.Module:
    """A layer of transformers without its roundings to fp32 inside norms and softmax."""
    for module in attention.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: F.rms_norm(x, m.weight.shape, m.weight, 1e-6)
    attention.config._attn_implementation = "sdpa"
    return attention.double()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    reference, model = oracle.pair(request.param, tmp_path_factory.mktemp(request.param))
    x = torch.randn(B, T, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x.requires_grad_()
    turns: Any = reference.model.rotary_emb(x.float(), torch.arange(T)[None])
    theirs = _in_fp64(reference.model.layers[0].self_attn)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # the second version turns in fp32
        expected = theirs(x, position_embeddings=turns, attention_mask=None)[0]
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    cos, sin = (turns.real, turns.imag) if torch.is_tensor(turns) else turns
    cos, sin = (table[:, :, None, : model.config.mla.rope_dim // 2] for table in (cos, sin))
    context = build_context(
        model.config,
        seq_len=T,
        device=torch.device("cpu"),
        dtype=torch.float64,
        positions=None,
        documents=None,
        samples=None,
    )
    for ours, table in ((context.cos, cos), (context.sin, sin)):
        torch.testing.assert_close(ours, table, rtol=0, atol=1e-5)  # fp32; both sides go on with the same ones
    attention = model.blocks[0].attention.double()
    assert isinstance(attention, LatentAttention)
    return Case(attention, context._replace(cos=cos, sin=sin), x, expected.detach(), gradient)


def _deviation(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_all_tokens_at_once_are_those_of_transformers(case: Case) -> None:
    """Rope on the wrong part of a head or its pairs, YaRN's factor missing or squared, a latent without its norm."""
    output = case.ours(case.x, case.context)
    assert _deviation(output, case.expected) < LIMIT
    (gradient,) = torch.autograd.grad(output.square().sum(), case.x)
    assert _deviation(gradient, case.gradient) < LIMIT


# ---- from a cache


def _expanded(ours: LatentAttention, q: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
    """Values of one query [B, 1, H, V] over cached tokens, by the definition, of keys and values made of latents."""
    k, v = ours.expand(latent, k_rope)
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) * ours.head_dim**-0.5
    return torch.einsum("bhqs,bshv->bqhv", scores.softmax(-1), v)


def _absorbed(ours: LatentAttention, q: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
    """The same without making keys and values: q^T (W_k c) = (W_k^T q)^T c, and sum_s p_s W_v c_s = W_v sum_s p_s c_s
    (2405.04434, section 2.1.2)."""
    sizes = [ours.mla.nope_dim, ours.mla.value_dim]
    w_k, w_v = ours.kv_b.weight.unflatten(0, (ours.num_heads, sum(sizes))).split(sizes, dim=1)  # [H, N or V, R]
    q_nope, q_rope = q.split([ours.mla.nope_dim, ours.mla.rope_dim], dim=-1)
    q_latent = torch.einsum("bqhn,hnr->bqhr", q_nope, w_k)
    scores = torch.einsum("bqhr,bsr->bhqs", q_latent, latent) + torch.einsum("bqhp,bsp->bhqs", q_rope, k_rope[:, :, 0])
    of_latents = torch.einsum("bhqs,bsr->bqhr", (scores * ours.head_dim**-0.5).softmax(-1), latent)
    return torch.einsum("bqhr,hvr->bqhv", of_latents, w_v)


@torch.no_grad()
def _token_by_token(case: Case, attend: Any, *, turned_by: int = 1) -> Tensor:
    """[B, T, D] with nothing kept of earlier tokens but what `compress` returned. turned_by 0: all as the first."""
    ours, outputs = case.ours, []
    latents, k_ropes = case.x.new_empty(B, 0, ours.mla.kv_rank), case.x.new_empty(B, 0, 1, ours.mla.rope_dim)
    for t in range(T):
        here, turn = slice(t, t + 1), slice(t * turned_by, t * turned_by + 1)
        assert case.context.cos is not None
        assert case.context.sin is not None
        of_keys = case.context._replace(cos=case.context.cos[:, turn], sin=case.context.sin[:, turn])
        latent, k_rope = ours.compress(case.x[:, here], of_keys)
        latents, k_ropes = torch.cat([latents, latent], dim=1), torch.cat([k_ropes, k_rope], dim=1)
        of_query = case.context._replace(cos=case.context.cos[:, here], sin=case.context.sin[:, here])
        q = ours.queries(case.x[:, here], of_query)
        outputs.append(ours.o(attend(ours, q, latents, k_ropes).flatten(2)))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("attend", [_expanded, _absorbed])
def test_token_by_token_from_latents_is_all_at_once(case: Case, attend: Any) -> None:
    """A cache that holds less than attention needs: a key turned by its place in a chunk, a latent not yet normalised.

    Controls: without YaRN's factor (where there is one), and with keys that are all turned as the first.
    """
    assert _deviation(_token_by_token(case, attend), case.ours(case.x, case.context)) < LIMIT
    assert _deviation(_token_by_token(case, attend), case.expected) < LIMIT
    assert _deviation(_token_by_token(case, attend, turned_by=0), case.expected) > 1e-3
    if case.ours.query_scale != 1.0:
        with mock.patch.object(case.ours, "query_scale", 1.0):
            assert _deviation(_token_by_token(case, attend), case.expected) > 1e-3
