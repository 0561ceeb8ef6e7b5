"""Linear head and cross entropy in one op, which holds the logits of one chunk of tokens at a time.

The logits of 8192 tokens over 128256 words take 4.2 GB in fp32, and autograd keeps several such tensors. The gradient
of a sum of cross entropies is known as soon as the logits are, so the forward pass forms it chunk by chunk, multiplies
it into d_hidden and d_weight at once, and drops the logits. Backward is then a multiplication by grad_output.

Shapes: N tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from kernels.cross_entropy import cross_entropy, invariant_cross_entropy, loss_and_gradient_
from kernels.cross_entropy.op import assert_words
from kernels.invariant_linear import invariant_linear
from kernels.rows import has_kernel


class ChunkFunctions(NamedTuple):
    """How a chunk is computed."""

    loss: Callable[..., Tensor]  # between the products, without a gradient
    loss_and_gradient: Callable[..., tuple[Tensor, Tensor]]
    product: Callable[[Tensor, Tensor], Tensor] = F.linear  # hidden [C, D] and weight [V, D] to logits


# fp16 cannot hold a probability below 6e-8, and most of a large vocabulary is below that. d_logits lies in [-1, 1], so
# it is kept times the largest power of two that fits, and the fp32 sums are divided by it again without rounding.
FP16_GRADIENT_SCALE = 2.0**15


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = 4096,
    compile: bool = False,
    triton: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """Sum over valid tokens of -log softmax(hidden weight^T)[label]; 0 where no token is valid.

    hidden [..., D] and weight [V, D] have one floating dtype, labels [...] are int64; a label of ignore_index carries
    no loss and no gradient. Returns a 0-d tensor in fp32 (fp64 for fp64). The logits are rounded to the dtype of
    hidden, as a linear layer's are; softmax, sums and both gradients are accumulated in fp32 and multiplied by
    grad_output before they are rounded, so that fp16 neither overflows nor underflows for any loss scale that the
    gradients themselves survive. Two calls with the same arguments give the same bits.

    Besides d_hidden [N, D] and d_weight [V, D] in fp32, memory holds 9 bytes per logit of a chunk in half precision, 4
    with compile=True, which fuses what lies between the matrix products, and 2 with triton=True, where one kernel
    (kernels/cross_entropy) writes the gradient over the logits; fp64 has no such kernel. chunk_tokens trades that
    memory against one pass over d_weight per chunk; it changes results by rounding only.

    batch_invariant: what is summed up are the losses of `linear_token_losses` with batch_invariant, which depend on
    their own row of hidden alone, to the bit; the gradients are ordinary ones.

    Raises TypeError for DTensors and for wrong dtypes, ValueError for shapes that do not fit, for chunk_tokens < 1 and
    for more than one of compile, triton and batch_invariant. A label that is neither ignore_index nor in [0, V) is
    torch's index error, on CUDA its device-side assertion.
    """
    _check(hidden, weight, labels, chunk_tokens)
    check_choice(hidden, compile=compile, triton=triton, batch_invariant=batch_invariant)
    chunk_functions = _compiled() if compile else _FUSED if triton else _INVARIANT if batch_invariant else _PLAIN
    # Inside a Function grad mode is always off and requires_grad tells nothing about no_grad: look here.
    grad_hidden, grad_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, ignore_index, chunk_tokens, chunk_functions, grad_hidden, grad_weight
    )


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if isinstance(tensor, DTensor):
            raise TypeError(f"{name} is a DTensor; kernels work on plain tensors, so pass its local shard")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise TypeError(f"hidden has dtype {hidden.dtype} and weight {weight.dtype}; use one floating dtype for both")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels have dtype {labels.dtype}; use torch.int64")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"shapes hidden {list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)} do not fit; "
            "they are [..., D], [V, D] and [...]"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1; 4096 suits a GPU")


def check_choice(hidden: Tensor, *, compile: bool, triton: bool, batch_invariant: bool = False) -> None:
    """Raise for two ways at once, and for a kernel that does not exist."""
    chosen = {"compile": compile, "triton": triton, "batch_invariant": batch_invariant}
    asked = [f"{name}=True" for name, wanted in chosen.items() if wanted]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} each choose what runs between the products; use one of them")
    if triton and hidden.dtype == torch.float64:
        raise TypeError("hidden has dtype torch.float64, which the kernel does not have; use triton=False")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        chunk_tokens: int,
        chunk_functions: ChunkFunctions,
        grad_hidden: bool,
        grad_weight: bool,
    ) -> Tensor:
        loss_only, loss_and_gradient, product = chunk_functions
        scale = FP16_GRADIENT_SCALE if hidden.dtype == torch.float16 else 1.0
        dtype = _accumulation_dtype(hidden)
        flat_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        d_hidden_ND = torch.zeros(flat_ND.shape, dtype=dtype, device=hidden.device) if grad_hidden else None
        d_weight_VD = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if grad_weight else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, flat_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = product(flat_ND[chunk], weight)
            if not (grad_hidden or grad_weight):
                loss += loss_only(logits_CV, labels_N[chunk], ignore_index)
                continue
            chunk_sum, d_logits_CV = loss_and_gradient(logits_CV, labels_N[chunk], ignore_index, scale)
            loss += chunk_sum
            if d_hidden_ND is not None:
                _add_product(d_hidden_ND[chunk], d_logits_CV, weight)
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits_CV.t(), flat_ND[chunk])
            del logits_CV, d_logits_CV  # before those of the next chunk are allocated
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.hidden_shape, ctx.dtype, ctx.scale = hidden.shape, hidden.dtype, scale
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_output / ctx.scale

        def scaled(gradient: Tensor | None) -> Tensor | None:
            """gradient * factor, multiplied in fp32 and rounded once, without an fp32 tensor in between."""
            if gradient is None:
                return None
            return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=ctx.dtype))

        d_hidden, d_weight = (scaled(gradient) for gradient in ctx.saved_tensors)
        d_hidden = None if d_hidden is None else d_hidden.view(ctx.hidden_shape)
        return d_hidden, d_weight, None, None, None, None, None, None


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _log_softmax_and_loss(logits_CV: Tensor, labels_C: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log probabilities [C, V], valid [C], losses [C])."""
    log_probability_CV = torch.log_softmax(logits_CV, dim=-1, dtype=_accumulation_dtype(logits_CV))
    valid_C = labels_C != ignore_index
    target_C1 = torch.where(valid_C, labels_C, 0).unsqueeze(-1)
    losses_C = torch.where(valid_C, -log_probability_CV.gather(-1, target_C1).squeeze(-1), 0.0)
    return log_probability_CV, valid_C, losses_C


def _chunk_loss(logits_CV: Tensor, labels_C: Tensor, ignore_index: int) -> Tensor:
    """Sum of the token losses of a chunk, 0-d.

    In fp64, so that cutting the tokens otherwise changes the last bit of the result at most.
    """
    return _log_softmax_and_loss(logits_CV, labels_C, ignore_index)[2].sum(dtype=torch.float64)


def _chunk_loss_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses, 0-d fp64, and scale (softmax - one_hot) with zero rows for tokens that are not valid.

    In-place operations touch what is made here only. They halve the memory of the eager form; compiled, all of this is
    one reduction and one elementwise kernel.
    """
    log_probability_CV, valid_C, losses_C = _log_softmax_and_loss(logits_CV, labels_C, ignore_index)
    loss, target_C1 = losses_C.sum(dtype=torch.float64), torch.where(valid_C, labels_C, 0).unsqueeze(-1)
    words_V = torch.arange(logits_CV.shape[-1], device=logits_CV.device)
    one_hot_CV = (words_V == target_C1).to(logits_CV.dtype)
    d_logits_CV = log_probability_CV.exp_().sub_(one_hot_CV).mul_((valid_C * scale).unsqueeze(-1))
    return loss, d_logits_CV.to(logits_CV.dtype)


def _fused_chunk_loss(logits_CV: Tensor, labels_C: Tensor, ignore_index: int) -> Tensor:
    return cross_entropy(logits_CV, labels_C, ignore_index=ignore_index).sum(dtype=torch.float64)


def _fused_chunk_loss_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, scale: float
) -> tuple[Tensor, Tensor]:
    assert_words(labels_C, logits_CV.shape[1], ignore_index)
    factor = torch.full((), scale, dtype=torch.float32, device=logits_CV.device)
    losses_C = loss_and_gradient_(logits_CV, labels_C, scale=factor, ignore_index=ignore_index)
    return losses_C.sum(dtype=torch.float64), logits_CV


def _invariant_chunk_loss(logits_CV: Tensor, labels_C: Tensor, ignore_index: int) -> Tensor:
    return invariant_cross_entropy(logits_CV, labels_C, ignore_index=ignore_index).sum(dtype=torch.float64)


def _invariant_chunk_loss_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, scale: float
) -> tuple[Tensor, Tensor]:
    loss = _invariant_chunk_loss(logits_CV, labels_C, ignore_index)  # before the gradient takes the logits' place
    rest = _fused_chunk_loss_and_gradient if has_kernel(logits_CV) else _chunk_loss_and_gradient
    return loss, rest(logits_CV, labels_C, ignore_index, scale)[1]


_PLAIN = ChunkFunctions(_chunk_loss, _chunk_loss_and_gradient)
_FUSED = ChunkFunctions(_fused_chunk_loss, _fused_chunk_loss_and_gradient)
_INVARIANT = ChunkFunctions(_invariant_chunk_loss, _invariant_chunk_loss_and_gradient, invariant_linear)


@cache
def _compiled() -> ChunkFunctions:
    """The two chunk functions under torch.compile; one pair per process, so that each shape is compiled once."""
    return ChunkFunctions(
        torch.compile(_chunk_loss, fullgraph=True), torch.compile(_chunk_loss_and_gradient, fullgraph=True)
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of total: half-precision factors [m, k] and [k, n] into an fp32 sum [m, n]."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # aten.addmm.dtype has no CPU kernel: products of half-precision numbers are exact in fp32
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
