"""Losses of single tokens under a linear head, with a gradient for each: the logits of a batch are never in memory.

The gradient of a sum of losses is known in the forward pass (op.py). That of single losses is not: what a pair of
answers or a ratio of policies makes of a token's log-probability comes later. So backward makes the logits of a chunk
again and multiplies token i's row by the gradient of its loss,

    d loss_i / d x_v    = p_v - [v = label_i]
    d entropy_i / d x_v = - p_v (log p_v + entropy_i)          entropy = - sum_v p_v log p_v

at the price of one more product with the weight. x are logits over temperature. Shapes as in op.py: N tokens, C of them
in a chunk, D hidden, V words of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import combine_shards, invariant_cross_entropy, shard_gradient_, shard_statistics
from kernels.invariant_linear import invariant_linear
from kernels.linear_cross_entropy.op import FP16_GRADIENT_SCALE, _accumulation_dtype, _add_product, _check
from kernels.linear_cross_entropy.vocab_parallel import VocabularyShard


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int = 4096,
    batch_invariant: bool = False,
) -> Tensor:
    """The losses [...] that `linear_cross_entropy` adds up: -log softmax(hidden weight^T / temperature)[label].

    hidden [..., D] and weight [V, D] have one floating dtype, labels [...] are int64; a label of ignore_index has loss
    0 and no gradient. fp32 (fp64 for fp64), differentiable once. The logits are rounded to the dtype of hidden, as a
    linear layer's are, and divided by temperature in fp32; softmax and gradients are accumulated in fp32. On CUDA the
    kernels of kernels/cross_entropy compute a chunk, but for fp64.

    shard: weight has these of all words, labels number all; every rank of its group calls this with the same hidden
    and labels, gets the same losses, and as the gradient of hidden its own summand: add it up over the group.
    batch_invariant: each loss is a function of its own row of hidden alone, to the bit; gradients are ordinary ones.

    Raises TypeError for DTensors and for wrong dtypes, ValueError for shapes that do not fit, for chunk_tokens < 1, for
    a temperature that is not positive, and for batch_invariant with a shard. A label that is no word fails an
    assertion, on CUDA on the device.
    """
    options = _Options(shard, temperature, ignore_index, chunk_tokens, batch_invariant, entropy=False)
    _check_options(hidden, weight, labels, options)
    return _TokenLosses.apply(hidden, weight, labels, options)[0]


def linear_token_losses_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int = 4096,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear_token_losses`, and the entropies [...] in nats of the distributions they come from, 0 where ignored.

    Both have gradients. Entropies take two fp32 numbers per logit of a chunk, on CUDA too, and are not batch-invariant.
    """
    options = _Options(shard, temperature, ignore_index, chunk_tokens, batch_invariant, entropy=True)
    _check_options(hidden, weight, labels, options)
    return _TokenLosses.apply(hidden, weight, labels, options)


class _Options(NamedTuple):
    shard: VocabularyShard | None
    temperature: float
    ignore_index: int
    chunk_tokens: int
    batch_invariant: bool
    entropy: bool

    @property
    def first(self) -> int:
        return 0 if self.shard is None else self.shard.first

    def logits(self, rows_CD: Tensor, weight: Tensor) -> Tensor:
        """[C, V], contiguous; wide where a temperature divides them."""
        logits_CV = invariant_linear(rows_CD, weight) if self.batch_invariant else F.linear(rows_CD, weight)
        if self.temperature == 1.0:
            return logits_CV.contiguous()
        return logits_CV.to(_accumulation_dtype(rows_CD)).div_(self.temperature)


def _check_options(hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> None:
    _check(hidden, weight, labels, options.chunk_tokens)
    if not options.temperature > 0.0:
        raise ValueError(f"temperature={options.temperature} must be positive; 1.0 leaves the logits as they are")
    if options.batch_invariant and options.shard is not None:
        raise ValueError("batch_invariant=True is for one rank with all words; leave it out, or the shard")


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        dtype = _accumulation_dtype(hidden)
        flat_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        losses_N, lse_N, entropies_N = (
            torch.zeros(labels_N.shape, dtype=dtype, device=hidden.device) for _ in range(3)
        )
        for start in range(0, len(labels_N), options.chunk_tokens):
            chunk = slice(start, start + options.chunk_tokens)
            logits_CV, labels_C = options.logits(flat_ND[chunk], weight), labels_N[chunk]
            valid_C = labels_C != options.ignore_index
            lse_N[chunk], losses_C = _losses(logits_CV, labels_C, valid_C, options)
            losses_N[chunk] = torch.where(valid_C, losses_C, 0.0)
            if options.entropy:
                entropies_N[chunk] = torch.where(valid_C, _entropies(logits_CV, lse_N[chunk], options), 0.0)
            del logits_CV  # before those of the next chunk are allocated
        ctx.save_for_backward(hidden, weight, labels, lse_N, entropies_N)
        ctx.options = options
        if not options.entropy:
            ctx.mark_non_differentiable(entropies_N)
        return losses_N.view(labels.shape), entropies_N.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        hidden, weight, labels, lse_N, entropies_N = ctx.saved_tensors
        flat_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        factors_N = torch.stack([d_losses.reshape(-1), d_entropies.reshape(-1)]).to(lse_N.dtype) / options.temperature
        back = None
        if hidden.dtype == torch.float16:
            # Most gradients of logits are below what fp16 holds: they are kept times a power of two like number under
            # which the largest possible one fits, and the fp32 sums are multiplied back. |p (log p + entropy)| < 8.
            largest = factors_N[0].abs().amax() + 8 * factors_N[1].abs().amax() if len(labels_N) else factors_N.sum()
            back = largest.clamp(min=1e-30) / FP16_GRADIENT_SCALE
            factors_N = factors_N / back
        d_hidden_ND = torch.empty_like(flat_ND) if ctx.needs_input_grad[0] else None
        wide_VD = (
            torch.zeros(weight.shape, dtype=lse_N.dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, len(labels_N), options.chunk_tokens):
            chunk = slice(start, start + options.chunk_tokens)
            d_logits_CV = _d_logits(
                options.logits(flat_ND[chunk], weight),
                labels_N[chunk],
                lse_N[chunk],
                entropies_N[chunk],
                factors_N[:, chunk],
                options,
            ).to(hidden.dtype)
            if d_hidden_ND is not None:
                wide_CD = torch.zeros(d_hidden_ND[chunk].shape, dtype=lse_N.dtype, device=hidden.device)
                _add_product(wide_CD, d_logits_CV, weight)
                d_hidden_ND[chunk] = wide_CD if back is None else wide_CD.mul_(back)
            if wide_VD is not None:
                _add_product(wide_VD, d_logits_CV.t(), flat_ND[chunk])
            del d_logits_CV
        d_hidden = None if d_hidden_ND is None else d_hidden_ND.view(hidden.shape)
        d_weight = None if wide_VD is None else (wide_VD if back is None else wide_VD.mul_(back)).to(weight.dtype)
        return d_hidden, d_weight, None, None


def _losses(logits_CV: Tensor, labels_C: Tensor, valid_C: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """(log-sum-exp over all words, losses), each [C]; without a meaning where not valid."""
    own_4C = shard_statistics(logits_CV, labels_C, first=options.first, ignore_index=options.ignore_index)
    all_R4C = own_4C[None]
    if options.shard is not None:
        all_R4C = own_4C.new_empty(options.shard.group.size(), *own_4C.shape)
        dist.all_gather_into_tensor(all_R4C.flatten(0, 1), own_4C, group=options.shard.group)
    lse_C, at_label_C, ranks_C = combine_shards(all_R4C)
    torch._assert_async((ranks_C == valid_C).all(), "a label is not in the vocabulary")
    if options.batch_invariant:
        return lse_C, invariant_cross_entropy(logits_CV, labels_C, ignore_index=options.ignore_index)
    return lse_C, lse_C - at_label_C


def _entropies(logits_CV: Tensor, lse_C: Tensor, options: _Options) -> Tensor:
    """[C], of the distributions over all words."""
    log_p_CV = logits_CV.to(lse_C.dtype) - lse_C[:, None]
    entropies_C = -(log_p_CV.exp() * log_p_CV).sum(1)  # not lse - mean: where one word is nearly sure, these cancel
    if options.shard is not None:
        dist.all_reduce(entropies_C, group=options.shard.group)
    return entropies_C


def _d_logits(
    logits_CV: Tensor, labels_C: Tensor, lse_C: Tensor, entropies_C: Tensor, factors_2C: Tensor, options: _Options
) -> Tensor:
    """Gradients [C, V] of this rank's logits, which are lost; factors: of losses and of entropies."""
    of_loss_C, of_entropy_C = factors_2C
    further_CV = None
    if options.entropy:
        log_p_CV = logits_CV.to(lse_C.dtype) - lse_C[:, None]
        masked_C = torch.where(labels_C != options.ignore_index, of_entropy_C, 0.0)
        further_CV = log_p_CV.exp() * (log_p_CV + entropies_C[:, None]) * masked_C[:, None]
        logits_CV = logits_CV.to(lse_C.dtype)
    shard_gradient_(
        logits_CV, labels_C, lse_C, first=options.first, scale=of_loss_C.contiguous(), ignore_index=options.ignore_index
    )
    return logits_CV if further_CV is None else logits_CV.sub_(further_CV)
