"""RMSNorm and LayerNorm: what the generic tests do not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import interpreted
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_fp8
from kernels.rms_norm.kernel import Tiles
from kernels.rms_norm.quantized import _rms_norm_fp8
from kernels.rms_norm.reference import quantize_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-5


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    with nullcontext() if CUDA else interpreted():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def share_equal(y: Tensor, expected: Tensor) -> float:
    """Of numbers in fp8. On the GPU sums in another order move a few across a rounding boundary. The interpreter
    rounds up without a carry, so that a thirtieth is half of what it should be, and halves by a step of 1/8."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if CUDA else {"rtol": 0.13, "atol": 2e-3}
    return float(torch.isclose(y.float(), expected.float(), **tolerance).float().mean())


def test_they_are_those_of_torch() -> None:
    """A reference that shares a mistake with its kernel."""
    x, weight, bias = draw(5, 77), draw(77, seed=1), draw(77, seed=2)
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (77,), weight, EPS))
    torch.testing.assert_close(layer_norm(x, weight, bias, EPS), F.layer_norm(x, (77,), weight, bias, EPS))


def test_a_large_mean_does_not_drown_the_variance() -> None:
    """mean(x^2) - mean(x)^2, which has no digit left of this variance in fp32."""
    x = draw(4, 300) + 1e4
    expected = F.layer_norm(x.double(), (300,), None, None, EPS)
    torch.testing.assert_close(layer_norm(x, None, None, EPS).double(), expected, rtol=1e-3, atol=5e-3)


def test_a_parameter_in_fp32_beside_activations_in_half_precision() -> None:
    """Results in the dtype of the weight; a gradient of the weight rounded to that of the activations."""
    x, weight = draw(6, 40).half().requires_grad_(), draw(40, seed=1).requires_grad_()
    y = rms_norm(x, weight, EPS)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float16, torch.float32)
    normed = F.rms_norm(x.detach().double(), (40,), None, EPS)
    torch.testing.assert_close(weight.grad.double(), normed.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("used", ["y", "stream"])
def test_the_gradient_when_one_of_both_results_is_used(used: str) -> None:
    """A crash at the last block, whose stream nobody reads, or a gradient lost."""
    x, residual, weight = draw(3, 20), draw(3, 20, seed=1), draw(20, seed=2)
    for add in (add_rms_norm, lambda x, r, w, eps: add_layer_norm(x, r, w, w, eps)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual, weight)]
        y, stream = add(*leaves, EPS)
        (y if used == "y" else stream).square().sum().backward()
        assert leaves[0].grad is not None
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        if used == "stream":
            torch.testing.assert_close(leaves[0].grad, 2 * (x + residual))


@pytest.mark.parametrize("scaled", ["tensor", "row"])
@pytest.mark.parametrize("added", [False, True])
def test_fp8_is_the_cast_of_the_norm(scaled: str, added: bool) -> None:
    """A scale applied the wrong way round, an amax after scaling, an overflow to NaN instead of saturation."""
    x, residual, weight = draw(9, 70), draw(9, 70, seed=1) if added else None, draw(70, seed=2)
    scale = torch.tensor(3e-3, device=DEVICE) if scaled == "tensor" else None  # saturates beyond 1.34
    result = rms_norm_fp8(x, weight, EPS, scale=scale, residual=residual)
    stream = x if residual is None else x + residual
    expected, extra = quantize_reference(F.rms_norm(stream, (70,), weight, EPS), scale)
    assert share_equal(result.y, expected) > (0.99 if CUDA else 0.94)
    if scale is None:
        torch.testing.assert_close(result.scale, extra)
        assert result.amax is None
    else:
        assert result.amax is not None
        torch.testing.assert_close(result.amax, extra)
        assert float(result.y.float().abs().max()) == 448.0 or not CUDA
    torch.testing.assert_close(result.stream, stream)


def test_fp8_op_is_proper_and_keeps_nan() -> None:
    """A fake result that differs; a diverged run hidden by a cast that turns NaN into a number."""
    x, weight = draw(4, 33), draw(33, seed=1)
    scale = torch.tensor(0.01, device=DEVICE)
    for arguments in (
        (x, weight, None, None, EPS, True),
        (x, weight, x, scale, EPS, False),
        (x[:0], None, None, scale, EPS, False),
    ):
        torch.library.opcheck(_rms_norm_fp8, arguments)
    x[1, 5] = float("nan")
    for given in (scale, None):
        y = rms_norm_fp8(x, weight, EPS, scale=given).y.float()
        assert y[1].isnan().any() or not CUDA  # the interpreter's cast has no NaN
        assert not y[0].isnan().any()


def test_the_backward_of_fp8_is_that_of_the_norm() -> None:
    """An interface that a linear layer in fp8 cannot use."""
    x, residual, weight = (t.requires_grad_() for t in (draw(5, 24), draw(5, 24, seed=1), draw(24, seed=2)))
    d_y, d_stream = draw(5, 24, seed=3), draw(5, 24, seed=4)
    expected = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS), (x, weight), (d_y, d_stream))
    with torch.no_grad():
        kept = rms_norm_fp8(x, weight, EPS, residual=residual)
        got = rms_norm_backward(d_y, kept.stream, weight, kept.rstd, EPS, d_stream=d_stream)
    for ours, truth in zip(got, expected, strict=True):
        assert ours is not None
        # The two forwards are two kernels, whose sums of squares a GPU may add in different orders.
        torch.testing.assert_close(ours, truth, rtol=1e-5 if CUDA else 0.0, atol=1e-6 if CUDA else 0.0)


def test_what_is_refused() -> None:
    """Wrong sizes that would read beyond a tensor."""
    x, weight = draw(2, 8), draw(8)
    with pytest.raises(ValueError, match=r"weight has shape \[7\]"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match="residual has shape"):
        add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(TypeError, match="residual has dtype"):
        add_rms_norm(x, x.half(), weight, EPS)
    with pytest.raises(ValueError, match="1 to 16384"):
        rms_norm(draw(1, 16385), None, EPS)
    with pytest.raises(ValueError, match="without weight"):
        layer_norm(x, None, weight, EPS)
    with pytest.raises(TypeError, match="bias has dtype"):
        layer_norm(x, weight, weight.half(), EPS)
    with pytest.raises(ValueError, match="scale has shape"):
        rms_norm_fp8(x, weight, EPS, scale=weight)


def test_tiles_in_flight_fit_in_shared_memory() -> None:
    """A launch that fails for rows in fp32 with a configuration chosen for bf16."""
    tiles = Tiles(4096, 16, 1, 3)
    half, whole = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    assert tiles.fetched(4096, half, half, None) == 3
    assert tiles.fetched(16384, half, half) == 3
    assert tiles.fetched(16384, whole, whole) == 2
    assert tiles.fetched(65536, whole, whole) == 1
