"""Rotary position embedding: what the generic tests do not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from kernels.backend import interpreted
from kernels.rope import rope, rope_, rope_qkv
from models.config import RopeConfig
from models.layers.rope import rotate, tables

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    with nullcontext() if CUDA else interpreted():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def angles(batch: int, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(batch * length, device=DEVICE).view(batch, length) * 7
    return tables(RopeConfig(), head_dim, positions, length)


def test_it_is_the_rotation_of_the_models() -> None:
    """Another pairing of dimensions, or the other direction."""
    q, k, (cos, sin) = draw(2, 6, 4, 32), draw(2, 6, 2, 32, seed=1), angles(2, 6, 32)
    turned = rope(q, k, cos, sin)
    for ours, x in zip(turned, (q, k), strict=True):
        torch.testing.assert_close(ours, rotate(x, cos, sin))


def test_it_multiplies_complex_numbers() -> None:
    """A formula wrong in both places."""
    q, (cos, sin) = draw(1, 5, 3, 16), angles(1, 5, 16)
    product = torch.complex(q[..., :8], q[..., 8:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rope(q, None, cos, sin)[0], torch.cat((product.real, product.imag), dim=-1))


def test_slices_of_a_projection_are_read_and_turned_where_they_lie() -> None:
    """Strides taken for those of a contiguous tensor; values or neighbours overwritten."""
    qkv, (cos, sin) = draw(2, 5, 8, 16), angles(1, 5, 16)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    expected = [rotate(q, cos, sin), rotate(k, cos, sin), v.clone()]
    for ours, truth in zip((*rope(q, k, cos, sin), v), expected, strict=True):
        torch.testing.assert_close(ours, truth)
    for ours, truth in zip(rope_qkv(qkv, cos, sin, num_heads=4, num_kv_heads=2), expected, strict=True):
        torch.testing.assert_close(ours, truth)
    rope_(q, k, cos, sin)
    torch.testing.assert_close(qkv, torch.cat(expected, dim=2))


def test_the_gradient_of_heads_first_layouts() -> None:
    """Attention hands gradients back as [B, H, T, K] transposed, which does not collapse into tokens."""
    qkv, (cos, sin) = draw(2, 5, 5, 8).requires_grad_(), angles(2, 5, 8)
    grads = [draw(2, heads, 5, 8, seed=heads).transpose(1, 2) for heads in (3, 1, 1)]
    (ours,) = torch.autograd.grad(rope_qkv(qkv, cos, sin, num_heads=3, num_kv_heads=1), qkv, grads)
    q, k, v = qkv.split((3, 1, 1), dim=2)
    (truth,) = torch.autograd.grad((rotate(q, cos, sin), rotate(k, cos, sin), v), qkv, grads)
    torch.testing.assert_close(ours, truth)


def test_what_is_refused() -> None:
    """Tables that a cast of the block's inputs reached, shapes that would be read beyond their end."""
    q, (cos, sin) = draw(2, 5, 4, 16), angles(2, 5, 16)
    with pytest.raises(TypeError, match="fp32"):
        rope(q, None, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(ValueError, match="cos has shape"):
        rope(q[:1, :4], None, cos, sin)
    with pytest.raises(ValueError, match="k has shape"):
        rope(q, q[:, :4], cos, sin)
    with pytest.raises(ValueError, match="even K"):
        rope(q[..., :15], None, cos, sin)
    with pytest.raises(ValueError, match="dim 2 must be"):
        rope_qkv(q, cos, sin, num_heads=3, num_kv_heads=1)
    with pytest.raises(RuntimeError, match="needs a gradient"):
        rope_(q.clone().requires_grad_(), None, cos, sin)
