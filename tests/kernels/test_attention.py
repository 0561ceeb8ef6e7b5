"""Attention: the reference against a loop over queries, and the fast versions against the reference."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from kernels.attention import flex, reference, sdpa
from kernels.attention.alibi import slopes
from kernels.attention.sinks import with_sinks

B, T, K = 2, 13, 10
CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 9, [0] * 12 + [1]], dtype=torch.int32)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 4},
    "window_of_one": {"window": 1},
    "wide_window": {"window": T},
    "documents": {"documents": DOCUMENTS},
    "alibi": {"slopes": True},
    "all": {"window": 5, "documents": DOCUMENTS, "slopes": True},
}


def inputs(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """q, k, v with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, heads, K), (B, T, kv_heads, K), (B, T, kv_heads, K)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def options(name: str, heads: int, device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments of a mask, slopes made for the number of heads."""
    found = dict(MASKS[name])
    if "slopes" in found:
        found["slopes"] = slopes(heads, torch.device(device))
    if "documents" in found:
        found["documents"] = found["documents"].to(device)
    return found


def one_query_at_a_time(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Any = None, slopes: Any = None
) -> Tensor:
    """The definition: for every batch row, head and query, a list of the keys it may see and a softmax over them."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    output = torch.zeros_like(q)
    for b in range(B):
        for h in range(q.shape[2]):
            g = h // (q.shape[2] // k.shape[2])
            for i in range(T):
                seen = [j for j in range(i + 1) if window is None or j > i - window]
                seen = [j for j in seen if documents is None or documents[b, j] == documents[b, i]]
                scores = k[b, seen, g] @ q[b, i, h] / math.sqrt(K)
                if slopes is not None:
                    scores = scores - slopes[h].item() * (i - torch.tensor(seen))
                output[b, i, h] = scores.softmax(0) @ v[b, seen, g]
    return output


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_the_reference_is_the_definition(name: str, heads: int, kv_heads: int) -> None:
    """A mask edge, head group, scale or slope that is off: everything else is compared with this."""
    q, k, v = inputs(heads, kv_heads)
    output, _ = reference.attention(q, k, v, **options(name, heads))
    torch.testing.assert_close(
        output.double(), one_query_at_a_time(q, k, v, **options(name, heads)), rtol=1e-5, atol=1e-6
    )


def test_a_window_one_token_too_wide_is_noticed() -> None:
    """Negative control of the comparison above."""
    q, k, v = inputs(6, 2)
    output, _ = reference.attention(q, k, v, window=5)
    assert (output - one_query_at_a_time(q, k, v, window=4)).abs().max() > 1e-2


@pytest.mark.parametrize("name", MASKS)
def test_the_log_sum_exp_renormalises_two_halves_of_the_keys(name: str) -> None:
    """A wrong log-sum-exp: ring attention puts pieces together with it. Here it must undo the softmax."""
    q, k, v = inputs(6, 2)
    _, lse = reference.attention(q, k, v, **options(name, 6))
    assert lse.shape == (B, 6, T)
    assert lse.dtype == torch.float32
    # exp(score of a key - lse) is its probability: with v = one-hot keys, the output holds the probabilities.
    one_hot = torch.eye(T)[None, :, None, :].expand(B, T, 2, T)
    probabilities, _ = reference.attention(q, k, one_hot, **options(name, 6))  # [B, T, H, T]
    itself = torch.einsum("bthk,bthk->bht", q, k.repeat_interleave(3, dim=2)) / math.sqrt(K)
    diagonal = probabilities.permute(0, 2, 1, 3).diagonal(dim1=2, dim2=3)
    torch.testing.assert_close((itself - lse).exp(), diagonal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_sdpa_equals_the_reference_forward_and_backward(name: str, heads: int, kv_heads: int) -> None:
    """A mask built otherwise than the reference's, or gradients that lose a head group."""
    q, k, v = inputs(heads, kv_heads)
    choice = options(name, heads)
    expected, _ = reference.attention(q, k, v, **choice)
    output = sdpa.attention(q, k, v, sdpa.build_mask(T, CPU, q.dtype, **choice))
    assert_same(output, expected, (q, k, v), tolerance=1e-5)


def test_plain_causal_attention_and_a_window_of_the_whole_sequence_need_no_mask() -> None:
    """A T x T mask where the fast kernels have causal attention built in."""
    assert sdpa.build_mask(T, CPU, torch.float32) is None
    assert sdpa.build_mask(T, CPU, torch.float32, window=T) is None
    mask = sdpa.build_mask(T, CPU, torch.float32, window=T - 1)
    assert mask is not None
    assert mask.dtype == torch.bool


def test_dropout_acts_on_the_probabilities() -> None:
    """Dropout of scores, or of unnormalised weights."""
    q, k, v = inputs(6, 2)
    plain, lse = reference.attention(q, k, v)
    doubled, same_lse = reference.attention(q, k, v, dropout=lambda p: 2 * p)
    torch.testing.assert_close(doubled, 2 * plain)
    assert torch.equal(lse, same_lse)


def test_bf16_attention_rounds_once() -> None:
    """Softmax in bf16, which loses far more than the rounding of inputs and output."""
    q, k, v = inputs(6, 2, torch.bfloat16)
    exact, _ = reference.attention(q.float(), k.float(), v.float())
    output, _ = reference.attention(q, k, v)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16())


def test_flex_is_refused_where_it_has_no_backward() -> None:
    """An error from the depths of the compiler, or gradients that are missing."""
    q, k, v = inputs(2, 2)
    with pytest.raises(ValueError, match="flex attention does not run on cpu"):
        flex.attention(q, k, v, flex.build_block_mask(T, CPU))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("name", MASKS)
def test_flex_means_the_same_masks_and_scores(
    name: str, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask or score function that is wrong, which needs no GPU to see: uncompiled, flex runs anywhere."""
    monkeypatch.setattr(flex, "obstacle", lambda *args: None)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    q, k, v = (x.detach() for x in inputs(heads, kv_heads))
    choice = options(name, heads)
    expected, _ = reference.attention(q, k, v, **choice)
    alibi = choice.pop("slopes", None)
    output = flex.attention(q, k, v, flex.build_block_mask(T, CPU, **choice), alibi)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_sinks_are_those_of_gpt_oss(heads: int, kv_heads: int, window: int | None) -> None:
    """A sink on the wrong head or with a value, a gradient that does not go through the log-sum-exp."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = inputs(heads, kv_heads)
    sinks = torch.linspace(-2.0, 3.0, heads, requires_grad=True)
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=heads // kv_heads, training=False)
    mask = torch.where(reference.visible(T, CPU, window=window), 0.0, -math.inf)
    expected, _ = gpt_oss.eager_attention_forward(
        module, *(x.transpose(1, 2) for x in (q, k, v)), mask, scaling=K**-0.5
    )
    output = with_sinks(*reference.attention(q, k, v, window=window), sinks)
    assert_same(output, expected, (q, k, v, sinks), tolerance=1e-5)
    without, _ = reference.attention(q, k, v, window=window)
    assert (without - expected).abs().max() > 1e-2  # negative control


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_has_the_same_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-sum-exp of another base, or of heads in another order."""
    monkeypatch.setattr(flex, "obstacle", lambda *args: None)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    q, k, v = (x.detach() for x in inputs(6, 2))
    sinks = torch.linspace(-2.0, 3.0, 6)
    expected = with_sinks(*reference.attention(q, k, v, window=4), sinks)
    output = flex.attention(q, k, v, flex.build_block_mask(T, CPU, window=4), sinks=sinks)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_flex_has_the_same_sinks(dtype: torch.dtype) -> None:
    """A gradient that does not come back through the log-sum-exp of the compiled kernel."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, 8, 64), (B, T, 2, 64), (B, T, 2, 64)]
    q, k, v = (torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes)
    sinks = torch.linspace(-2.0, 3.0, 8, device="cuda").to(dtype).requires_grad_()
    expected = with_sinks(*reference.attention(q, k, v, window=4), sinks)
    output = flex.attention(q, k, v, flex.build_block_mask(T, q.device, window=4), sinks=sinks)
    assert_same(output, expected, (q, k, v, sinks), tolerance=5e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
def test_on_a_gpu_the_fast_versions_equal_the_reference(
    implementation: str, dtype: torch.dtype, name: str, heads: int, kv_heads: int
) -> None:
    """A kernel that treats masks, groups or dtypes otherwise than the CPU ones do."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, heads, 64), (B, T, kv_heads, 64), (B, T, kv_heads, 64)]
    q, k, v = (torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes)
    choice = options(name, heads, "cuda")
    expected, _ = reference.attention(q, k, v, **choice)
    if implementation == "sdpa":
        output = sdpa.attention(q, k, v, sdpa.build_mask(T, q.device, dtype, **choice))
    else:
        alibi = choice.pop("slopes", None)
        output = flex.attention(q, k, v, flex.build_block_mask(T, q.device, **choice), alibi)
    assert_same(output, expected, (q, k, v), tolerance=5e-3 if dtype == torch.float32 else 2e-2)


def assert_same(output: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], tolerance: float) -> None:
    """Outputs and all gradients agree to a fraction of their largest value, or of 1 where all are small."""
    assert output.shape == expected.shape
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
    grads = torch.autograd.grad(output, leaves, direction)
    expected_grads = torch.autograd.grad(expected, leaves, direction)
    for ours, theirs in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1.0)
