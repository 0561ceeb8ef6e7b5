"""Linear cross entropy: values and gradients against the reference, precision, memory, and where it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.linear_cross_entropy import linear_cross_entropy, op
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.pool import RankPool

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((5,), 3, 7), ((2, 9), 17, 123), ((3, 1, 7), 8, 1031)]  # tokens, D, V


def problem(
    tokens: tuple[int, ...], d: int, v: int, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels with about a third of the tokens ignored, at least one valid."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*tokens, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(v, tokens, generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.35] = -100
    labels.view(-1)[-1] = v - 1
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        labels.to(device),
    )


def with_gradients(loss: Tensor, hidden: Tensor, weight: Tensor, factor: float = 1.0) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss * factor, (hidden, weight)))


def in_fp64(hidden: Tensor, weight: Tensor, labels: Tensor, factor: float = 1.0) -> tuple[Tensor, ...]:
    """Loss and gradients of exactly these numbers, without rounding."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    return with_gradients(linear_cross_entropy_reference(hidden, weight, labels), hidden, weight, factor)


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "d", "v"), SHAPES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 4096])
def test_loss_and_gradients_are_those_of_the_reference(
    tokens: tuple[int, ...], d: int, v: int, dtype: torch.dtype, chunk_tokens: int
) -> None:
    """A chunk boundary off by one, an ignored token with a gradient, a gradient summed in half precision."""
    hidden, weight, labels = problem(tokens, d, v, dtype)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    actual = with_gradients(loss, hidden, weight)
    reference = with_gradients(linear_cross_entropy_reference(hidden, weight, labels), hidden, weight)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual[0], reference[0], rtol=1e-6, atol=0)
    exact = in_fp64(hidden, weight, labels)
    for value, by_autograd, truth, parameter in zip(
        actual[1:], reference[1:], exact[1:], (hidden, weight), strict=True
    ):
        assert value.dtype == dtype
        assert value.shape == parameter.shape
        # fp64 itself rounds to 1e-16; half precision may be as far from the truth as autograd is, and no farther
        bound = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1.5 * largest_error(by_autograd, truth) + 1e-4)
        assert largest_error(value, truth) < bound


def test_the_comparison_sees_one_wrong_token() -> None:
    """Negative control: tolerances so wide that an ignored token with a gradient passes."""
    hidden, weight, labels = problem((2, 9), 17, 123, torch.bfloat16)
    wrong = labels.clone()
    wrong.view(-1)[int((labels.view(-1) == -100).nonzero()[0])] = 5
    actual = with_gradients(linear_cross_entropy(hidden, weight, wrong), hidden, weight)
    for value, truth in zip(actual, in_fp64(hidden, weight, labels), strict=True):
        assert largest_error(value, truth) > 0.02


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_gradients_are_those_of_finite_differences(chunk_tokens: int) -> None:
    """A reference that is wrong in the same way."""
    hidden, weight, labels = problem((5,), 3, 7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk_tokens=chunk_tokens), (hidden, weight)
    )


def test_chunking_changes_rounding_only_and_repeats_bit_for_bit() -> None:
    """A sum in fp32 over 4000 tokens, which drifts with the chunks; a result that depends on what ran before."""
    hidden, weight, labels = problem((4001,), 5, 61, torch.float32)

    def run(chunk_tokens: int) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
        return with_gradients(loss, hidden, weight)

    whole = run(4096)
    for chunk_tokens in (37, 1000):
        chunked = run(chunk_tokens)
        torch.testing.assert_close(chunked[0], whole[0], rtol=2.5e-7, atol=0)
        assert largest_error(chunked[1], whole[1]) < 1e-6
        assert largest_error(chunked[2], whole[2]) < 1e-6
        for first, second in zip(chunked, run(chunk_tokens), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_frozen_input_gets_no_gradient_and_the_other_the_right_one(frozen: str) -> None:
    """Fine-tuning with a frozen head, or a head trained on frozen features."""
    hidden, weight, labels = problem((2, 9), 17, 123, torch.float64)
    _, d_hidden, d_weight = in_fp64(hidden, weight, labels)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=4).backward()
    trained, expected = (weight, d_weight) if frozen == "hidden" else (hidden, d_hidden)
    assert (hidden if frozen == "hidden" else weight).grad is None
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [(3, 4), (0, 4)])
def test_no_valid_token_is_a_loss_of_zero_with_zero_gradients(tokens: tuple[int, ...]) -> None:
    """0 / 0, or no gradient at all: a rank whose micro-batch is all prompt would hang or poison the others."""
    hidden = torch.randn(*tokens, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    loss, d_hidden, d_weight = with_gradients(
        linear_cross_entropy(hidden, weight, torch.full(tokens, -100)), hidden, weight
    )
    assert loss.item() == 0.0
    assert torch.equal(d_hidden, torch.zeros_like(hidden))
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_a_transposed_hidden_state_gets_its_gradient_in_place() -> None:
    """A view in backward that needs contiguous memory: [T, B, D] models, or a slice of a longer sequence."""
    base, weight, labels = problem((7, 3), 5, 11, torch.float64)
    transposed = base.transpose(0, 1)
    actual = torch.autograd.grad(linear_cross_entropy(transposed, weight, labels.t(), chunk_tokens=4), base)[0]
    torch.testing.assert_close(actual, in_fp64(base, weight, labels)[1], rtol=1e-12, atol=1e-12)


def test_backward_may_run_twice() -> None:
    """Scaling the saved gradients in place: the second backward of a retained graph would scale them again."""
    hidden, weight, labels = problem((5,), 3, 7, torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels) * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_not_a_number_is_passed_on() -> None:
    """A broken activation hidden by masking: the step would train on it in silence."""
    hidden, weight, labels = problem((5,), 3, 7, torch.float32)
    broken = hidden.detach().clone()
    broken[-1, 0] = float("nan")
    assert linear_cross_entropy(broken, weight, labels).isnan()


def test_fp16_survives_loss_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """d_logits rounded to fp16 as they are, or times the loss scale: small ones vanish, or large ones overflow."""
    v, factor = 50, 2.0**17  # loss scale / number of tokens, at its largest
    hidden = torch.full((1, 4), 0.1, dtype=torch.float16, requires_grad=True)
    # The last word has logit -16 against about 0 for the others: probability 2e-9, less than fp16 can hold.
    weight = (torch.randn(v, 4, generator=torch.Generator().manual_seed(0)) * 0.1).half()
    weight[-1] = -40.0
    weight.requires_grad_()
    labels = torch.tensor([3])
    _, d_hidden, d_weight = with_gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight, factor)
    _, exact_hidden, exact_weight = in_fp64(hidden, weight, labels, factor)
    assert largest_error(d_hidden, exact_hidden) < 2e-3
    assert largest_error(d_weight[:-1], exact_weight[:-1]) < 2e-3
    assert exact_weight[-1].abs().max() < 5e-5
    assert largest_error(d_weight[-1], exact_weight[-1]) < 1e-2
    _, by_autograd, _ = with_gradients(linear_cross_entropy_reference(hidden, weight, labels), hidden, weight, factor)
    assert not by_autograd.isfinite().all(), "autograd must overflow here, or the test shows nothing"
    monkeypatch.setattr(op, "FP16_GRADIENT_SCALE", 1.0)
    _, _, d_weight = with_gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight, factor)
    assert d_weight[-1].count_nonzero() == 0, "a probability must vanish here, or the test shows nothing"


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that an operation allocated (views and in-place results do not count)."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in taken:
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(dtype: torch.dtype) -> None:
    """Logits of all tokens in memory, which is what the op exists to avoid, in forward or in backward."""
    tokens, d, v, chunk = 64, 3, 257, 8
    hidden, weight, labels = problem((tokens,), d, v, dtype)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
    assert seen.numel == chunk * v
    with LargestTensor() as seen:
        linear_cross_entropy_reference(hidden, weight, labels).backward()
    assert seen.numel == tokens * v, "the recorder must see logits where there are some"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_forms_no_gradient(mode: Any) -> None:
    """A parameter's requires_grad taken for the wish for a gradient: evaluation would cost as much as training."""
    hidden, weight, labels = problem((1,), 40, 50, torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels)
    with mode(), LargestTensor() as seen:
        loss = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(loss, expected.detach())
    assert not loss.requires_grad
    assert seen.numel == 50
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, labels)
    assert seen.numel == weight.numel(), "the recorder must see d_weight where it is formed"


def test_compiled_and_eager_agree() -> None:
    """A chunk function that breaks the graph, or compiles to other numbers."""
    hidden, weight, labels = problem((18,), 17, 123, torch.float32)  # two chunks of one shape: compiled once
    eager = with_gradients(linear_cross_entropy(hidden, weight, labels, chunk_tokens=9), hidden, weight)
    compiled_loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=9, compile=True)
    for value, expected in zip(with_gradients(compiled_loss, hidden, weight), eager, strict=True):
        assert largest_error(value, expected) < 1e-6


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, weight, _ = problem((1,), 6, 19, torch.float32)
        self.weight = nn.Parameter(weight.detach())

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.weight, labels, chunk_tokens=4)


def head_under_fsdp() -> tuple[float, Tensor]:
    """Each rank takes every other token; the summed loss and the summed gradient of the weight."""
    mesh = init_device_mesh("cpu", (2,))
    head = Head()
    fully_shard(head, mesh=mesh)
    assert isinstance(head, FSDPModule)
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)
    hidden, _, labels = problem((11,), 6, 19, torch.float32, seed=1)
    part = slice(mesh.get_rank(), None, 2)
    loss = head(hidden[part], labels[part])
    loss.backward()
    torch.distributed.all_reduce(loss := loss.detach())
    assert isinstance(head.weight.grad, DTensor)
    return loss.item(), head.weight.grad.full_tensor()


def test_under_fsdp_the_sums_are_those_of_one_process(ranks: RankPool) -> None:
    """A gradient that is formed in forward and saved must outlive FSDP freeing the gathered weight."""
    hidden, _, labels = problem((11,), 6, 19, torch.float32, seed=1)
    head = Head()
    expected = head(hidden, labels)
    expected.backward()
    assert head.weight.grad is not None
    for loss, gradient in ranks.run(2, head_under_fsdp):
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert largest_error(gradient, head.weight.grad) < 1e-6


def a_dtensor_is_refused() -> None:
    hidden, weight, labels = problem((5,), 3, 7, torch.float32)
    sharded = DTensor.from_local(weight, init_device_mesh("cpu", (2,)), [Replicate()])
    with pytest.raises(TypeError, match="weight is a DTensor"):
        linear_cross_entropy(hidden, sharded, labels)


def test_a_dtensor_is_refused(ranks: RankPool) -> None:
    """Taken as a local shard in silence, a sharded vocabulary would be a smaller one."""
    ranks.run(2, a_dtensor_is_refused)


def test_arguments_that_do_not_fit_are_refused() -> None:
    """Broadcasting or casting that makes wrong arguments run."""
    hidden, weight, labels = problem((2, 9), 17, 123, torch.float32)
    with pytest.raises(TypeError, match=r"hidden has dtype torch\.float32 and weight torch\.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(TypeError, match=r"labels have dtype torch\.int32"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match=r"labels \[18\] do not fit"):
        linear_cross_entropy(hidden, weight, labels.flatten())
    with pytest.raises(ValueError, match=r"weight \[123, 16\]"):
        linear_cross_entropy(hidden, weight[:, :-1], labels)
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, torch.full_like(labels, 123))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compile", [False, True])
def test_on_cuda_loss_and_gradients_are_as_exact_as_those_of_autograd(dtype: torch.dtype, compile: bool) -> None:
    """The fp32 sums of half-precision products use an op that exists on CUDA only."""
    hidden, weight, labels = problem((2, 333), 128, 5003, dtype, torch.device("cuda"))
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=256, compile=compile)
    actual = with_gradients(loss, hidden, weight)
    reference = with_gradients(linear_cross_entropy_reference(hidden, weight, labels), hidden, weight)
    for value, by_autograd, truth in zip(actual, reference, in_fp64(hidden, weight, labels), strict=True):
        assert largest_error(value, truth) < 1.5 * largest_error(by_autograd, truth) + 1e-6
