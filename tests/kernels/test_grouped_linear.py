"""The grouped linear layer: values and gradients against the reference, empty groups, rows of no group, every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.grouped_linear import choose_grouped_linear, grouped_linear, grouped_linear_pair, op
from kernels.grouped_linear.reference import grouped_linear_reference

ENDS = {
    "all rows": [3, 4, 11],
    "empty groups": [0, 5, 5, 5, 9],
    "rows of no group": [2, 2, 7],
    "no rows at all": [0, 0],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def problem(ends: list[int], dtype: torch.dtype, k: int = 13, m: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """x [11, K], weight [G, M, K] and ends [G]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(ends), m, k, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.tensor(ends, dtype=torch.int32)


def with_gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return (y.detach(), *torch.autograd.grad(y, inputs, direction))


@pytest.mark.parametrize("path", ["split", "masked"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ENDS)
def test_values_and_gradients_are_those_of_the_reference(
    case: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that gets its neighbour's weight, and rows of no group that hold or receive what lay in memory."""
    monkeypatch.setattr(op, "choose_grouped_linear", lambda *_: path)
    x, weight, ends = problem(ENDS[case], dtype)
    actual = with_gradients(grouped_linear(x, weight, ends), x, weight)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = with_gradients(grouped_linear_reference(*wide, ends), *wide)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("path", ["split", "masked"])
@pytest.mark.parametrize("case", ENDS)
def test_a_pair_is_two_with_the_gradients_of_both(case: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of one weight alone, or of the other one's rows."""
    monkeypatch.setattr(op, "choose_grouped_linear", lambda *_: path)
    x, first, ends = problem(ENDS[case], torch.float64)
    second = (first.detach().flip(0) * 0.7 + 0.1).requires_grad_()
    actual = with_gradients(torch.cat(grouped_linear_pair(x, first, second, ends), 1), x, first, second)
    apart = torch.cat([grouped_linear_reference(x, weight, ends) for weight in (first, second)], 1)
    for ours, theirs in zip(actual, with_gradients(apart, x, first, second), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_pair_may_have_parts_that_are_frozen(frozen: int) -> None:
    x, first, ends = problem(ENDS["empty groups"], torch.float64)
    second = (first.detach() * 0.7).requires_grad_()
    inputs = [x, first, second]
    inputs[frozen] = inputs[frozen].detach()
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    actual = with_gradients(torch.cat(grouped_linear_pair(*inputs, ends), 1), *wanted)
    apart = torch.cat([grouped_linear_reference(inputs[0], weight, ends) for weight in inputs[1:]], 1)
    for ours, theirs in zip(actual, with_gradients(apart, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_weights_that_are_no_pair_are_refused() -> None:
    x, weight, ends = problem(ENDS["all rows"], torch.float32)
    with pytest.raises(ValueError, match="are no pair"):
        grouped_linear_pair(x, weight, weight[:, 1:], ends)


def test_an_implementation_that_does_not_fit_is_refused() -> None:
    """A kernel that reads rows at addresses its copies cannot start at; a misspelt name that is ignored."""
    x, weight, ends = problem(ENDS["all rows"], torch.float32)
    with pytest.raises(ValueError, match="multiples of 16 bytes, here 4"):
        grouped_linear(x, weight, ends, implementation="triton")
    with pytest.raises(ValueError, match="implementation=tritn; use one of grouped_mm"):
        grouped_linear(x, weight, ends, implementation="tritn")


def test_a_shifted_group_would_be_seen() -> None:
    """Negative control: ends off by one row."""
    x, weight, ends = problem(ENDS["all rows"], torch.float32)
    wrong = torch.tensor([3, 5, 11], dtype=torch.int32)
    assert not torch.allclose(grouped_linear(x, weight, ends), grouped_linear(x, weight, wrong))


@pytest.mark.parametrize("case", ENDS)
def test_it_is_a_proper_operator(case: str) -> None:
    """A compiled graph with a wrong shape, stride or gradient of the op."""
    x, weight, ends = problem(ENDS[case], torch.float32)
    torch.library.opcheck(op._grouped_linear, (x, weight, ends))
    second = (weight.detach() + 1).requires_grad_()
    torch.library.opcheck(op._grouped_linear_pair, (x, weight, second, ends))


def test_the_implementation_follows_device_dtype_and_sizes() -> None:
    """A grouped product asked for sizes that it refuses in the middle of a run."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_grouped_linear(cpu, torch.bfloat16, 64, 64) == "split"
    assert choose_grouped_linear(cuda, torch.bfloat16, 64, 128) == "triton"
    assert choose_grouped_linear(cuda, torch.bfloat16, 64, 12) == "masked"
    assert choose_grouped_linear(cuda, torch.float32, 64, 12) == "triton"
    assert choose_grouped_linear(cuda, torch.float64, 64, 128) == "masked"


def test_what_does_not_fit_is_refused() -> None:
    """A kernel that reads beyond its input, or a DTensor that is silently gathered."""
    x, weight, ends = problem(ENDS["all rows"], torch.float32)
    with pytest.raises(ValueError, match=r"\[11, 13\]"):
        grouped_linear(x, weight[..., :-1], ends)
    with pytest.raises(ValueError, match="ends"):
        grouped_linear(x, weight, ends[:-1])
    with pytest.raises(TypeError, match="int64"):
        grouped_linear(x, weight, ends.long())
    with pytest.raises(TypeError, match="float64"):
        grouped_linear(x.double(), weight, ends)
