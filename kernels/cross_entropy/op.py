"""Cross entropy as ops that compiled graphs keep whole. N tokens, V words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import reference_gradients, refuse_dtensors, runs_triton
from kernels.cross_entropy.reference import cross_entropy_reference
from kernels.rows import has_kernel


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Loss of each token: -log softmax(logits)[label], 0 and without a gradient where the label is ignore_index.

    logits [..., V] of a floating dtype, labels [...] int64. Returns [...] in fp32 (fp64 for fp64). With label smoothing
    e the loss is (1 - e) times that plus e times its mean over all words (1512.00567, section 7); z_loss adds
    z_loss log(sum exp(logits))^2, which keeps logits from drifting (2204.02311, section 5). Softmax and sums are in
    fp32; a token's loss does not depend on its neighbours. Keeps the logits for the backward pass.

    Raises TypeError for DTensors and wrong dtypes, ValueError for shapes that do not fit and for label_smoothing
    outside [0, 1]. A label that is no word fails an assertion, on CUDA on the device.
    """
    _check(logits, labels, label_smoothing)
    flat, labels_N = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses, _ = _cross_entropy(flat, labels_N, ignore_index, label_smoothing, z_loss)
    return losses.view(labels.shape)


@torch.no_grad()
def invariant_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """`cross_entropy` without a gradient, whose losses depend on their own row alone, to the bit: by the kernel, which
    has a program per row, and where it does not run (off CUDA, and for fp64) a row at a time."""
    if has_kernel(logits) or not labels.numel():
        return cross_entropy(logits, labels, ignore_index=ignore_index)
    rows = zip(logits.reshape(-1, 1, logits.shape[-1]), labels.reshape(-1, 1), strict=True)
    losses = [cross_entropy_reference(row.clone(), label, ignore_index) for row, label in rows]
    return torch.cat(losses).view(labels.shape)


def cross_entropy_in_place(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`cross_entropy` times scale, a 0-d fp32, whose gradient takes the logits' place already in the forward pass.

    logits are contiguous, and lost if they need a gradient: autograd refuses whoever still wants them. Backward can run
    once, and costs nothing where the losses' gradients are 1: put what the loss is divided by into scale, and add the
    losses up. In fp16 give a scale that keeps probabilities above 6e-8.
    """
    _check(logits, labels, label_smoothing)
    if not logits.is_contiguous():
        raise ValueError("logits are not contiguous in memory; make them so with .contiguous(), or use cross_entropy")
    scale = torch.ones((), device=logits.device) if scale is None else scale
    if not (torch.is_grad_enabled() and logits.requires_grad):
        losses = cross_entropy(
            logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
        return losses * scale
    return _InPlace.apply(logits, labels, scale, ignore_index, label_smoothing, z_loss)


def loss_and_gradient_(logits: Tensor, labels: Tensor, *, scale: Tensor, ignore_index: int = -100) -> Tensor:
    """Losses [N] fp32 of contiguous logits [N, V], which become scale times the gradient of their sum. No autograd.

    scale: 0-d fp32. Labels are not checked: those of no word have a loss without meaning.
    """
    return _forward_in_place(logits, labels, scale, ignore_index, 0.0, 0.0)


def _check(logits: Tensor, labels: Tensor, label_smoothing: float) -> None:
    refuse_dtensors(logits=logits, labels=labels)
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(f"logits have dtype {logits.dtype} and labels {labels.dtype}; use a floating one and int64")
    if logits.dtype == torch.float64 and runs_triton(logits):
        raise TypeError("logits have dtype torch.float64; the kernel computes in fp32: use torch.float32")
    if logits.ndim < 2 or logits.shape[:-1] != labels.shape or not logits.shape[-1]:
        raise ValueError(
            f"shapes logits {list(logits.shape)} and labels {list(labels.shape)}: they are [..., V], [...]"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1]")


def assert_words(labels: Tensor, num_words: int, ignore_index: int) -> None:
    """A failed assertion, on CUDA on the device, for a label that is neither a word nor ignore_index."""
    known = (labels == ignore_index) | ((labels >= 0) & (labels < num_words))
    torch._assert_async(known.all(), f"a label is not in [0, {num_words}) and not {ignore_index}")


@torch.library.custom_op("lattice::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(losses [N], lse [N]); lse is for the backward pass of the kernel, and empty where there is none."""
    if not runs_triton(logits):
        losses = cross_entropy_reference(logits, labels, ignore_index, label_smoothing, z_loss)
        return losses, torch.empty_like(losses)
    from kernels.cross_entropy.kernel import forward

    assert_words(labels, logits.shape[1], ignore_index)
    return forward(logits.contiguous(), labels.contiguous(), ignore_index, label_smoothing, z_loss, None)


@torch.library.custom_op("lattice::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    if not runs_triton(logits):
        inputs = (logits, labels, ignore_index, label_smoothing, z_loss)
        return reference_gradients(cross_entropy_reference, inputs, (grad,), (0,))[0].contiguous()
    from kernels.cross_entropy.kernel import gradient

    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    gradient(
        logits.contiguous(),
        d_logits,
        labels.contiguous(),
        lse,
        grad.contiguous(),
        ignore_index=ignore_index,
        smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return d_logits


@torch.library.custom_op("lattice::cross_entropy_in_place", mutates_args=("logits",))
def _forward_in_place(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """losses [N]; logits [N, V] become scale times their gradient."""
    if runs_triton(logits):
        from kernels.cross_entropy.kernel import forward

        return forward(logits, labels.contiguous(), ignore_index, label_smoothing, z_loss, scale)[0]
    inputs = (logits, labels, ignore_index, label_smoothing, z_loss)
    losses = cross_entropy_reference(*inputs)
    grads = (torch.ones_like(losses) * scale,)
    logits.copy_(reference_gradients(cross_entropy_reference, inputs, grads, (0,))[0])
    return losses


@torch.library.custom_op("lattice::scale_rows", mutates_args=("x",))
def _scale_rows(x: Tensor, factors: Tensor) -> None:
    """x [N, V] times factors [N], in place."""
    if runs_triton(x):
        from kernels.cross_entropy.kernel import scale_rows

        scale_rows(x, factors.contiguous())
    else:
        x.copy_(x.to(factors.dtype) * factors[:, None])


@_cross_entropy.register_fake
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(labels.shape, dtype=_loss_dtype(logits))
    return losses, torch.empty_like(losses)


@_cross_entropy_backward.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


@_forward_in_place.register_fake
def _(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    return logits.new_empty(labels.shape, dtype=_loss_dtype(logits))


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_cross_entropy.register_autograd(_gradients, setup_context=_save)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        scale: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
    ) -> Tensor:
        flat, labels_N = logits.view(-1, logits.shape[-1]), labels.reshape(-1)
        if runs_triton(logits):
            assert_words(labels_N, flat.shape[1], ignore_index)
        losses = _forward_in_place(flat, labels_N, scale, ignore_index, label_smoothing, z_loss)
        ctx.save_for_backward(logits)
        ctx.is_used = False
        return (losses * scale).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_used:
            raise RuntimeError("backward of cross_entropy_in_place can run once; use cross_entropy to keep the graph")
        ctx.is_used = True
        (d_logits,) = ctx.saved_tensors
        _scale_rows(d_logits.view(-1, d_logits.shape[-1]), grad.reshape(-1))
        return d_logits, None, None, None, None, None
