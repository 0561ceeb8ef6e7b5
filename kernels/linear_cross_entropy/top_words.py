"""A teacher's k likeliest words with the mass of all others, and how far a student's distribution is from them.

What is kept of a teacher's distribution T = softmax(y / tau) over V words are k of its words and the log-probabilities
of k + 1 outcomes: each of these words, and "any other". The student's S = softmax(x / tau) is seen through the same
k + 1 outcomes, S_rest = sum of its other words, and the divergence of divergence.py is taken of these. It is at most
the divergence over all words (what is not told apart cannot differ), 0 for equal distributions, and for k = V the same.

With o(v) the outcome that word v belongs to and a_o the derivative by S_o,

    a_o = (1 - beta) log(S_o / M_o),    -T_o / S_o for beta = 0,    log(S_o / T_o) for beta = 1
    d / d(x_v / tau) = S_v (a_o(v) - sum_o S_o a_o)

so other words are raised or lowered together: nothing says which of them the teacher prefers. Shapes as in
divergence.py; J = k + 1 outcomes, the rest last. Words may lie on several ranks: what travels are k logits per token.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from kernels.linear_cross_entropy.divergence import Compared, Divergence, divergence_sum
from kernels.linear_cross_entropy.op import _accumulation_dtype, _check
from kernels.linear_cross_entropy.vocab_parallel import VocabularyShard

NONE = -math.inf  # log-probability of the rest where all words are named


def linear_top_words(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    shard: VocabularyShard | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(words [..., k] int64, the likeliest first; log-probabilities [..., k + 1] fp32, of fp64 fp64, the last of all
    other words).

    hidden [..., D], weight [V, D]: of the teacher's output layer, or with a shard this rank's words of it; the call is
    then collective and every rank gets the same. Raises ValueError for k outside 1 .. V.
    """
    num_words = len(weight)
    if shard is not None:
        counted = torch.tensor(num_words, device=weight.device)
        dist.all_reduce(counted, group=shard.group)
        num_words = int(counted)
    if not 1 <= k <= num_words:
        raise ValueError(f"k={k} must lie in 1 .. {num_words}, the number of words")
    rows_ND, found = hidden.reshape(-1, hidden.shape[-1]), []
    for start in range(0, max(1, len(rows_ND)), chunk_tokens):
        logits_CV = (
            F.linear(rows_ND[start : start + chunk_tokens], weight).to(_accumulation_dtype(hidden)).div_(temperature)
        )
        found.append(_top_words(logits_CV, k, shard))
    words, logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return words.view(*hidden.shape[:-1], k), logprobs.view(*hidden.shape[:-1], k + 1)


def _top_words(logits_CV: Tensor, k: int, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    values, words = logits_CV.topk(min(k, logits_CV.shape[1]), dim=1)
    if shard is not None:
        missing = (0, k - values.shape[1])  # where a rank has fewer words than k
        mine = (F.pad(values, missing, value=NONE), F.pad(words + shard.first, missing))
        size = dist.get_world_size(shard.group)
        of_ranks = [[torch.empty_like(each) for _ in range(size)] for each in mine]
        for each, gathered in zip(mine, of_ranks, strict=True):
            dist.all_gather(gathered, each.contiguous(), group=shard.group)
        values, places = torch.cat(of_ranks[0], 1).topk(k, dim=1)
        words = torch.cat(of_ranks[1], 1).gather(1, places)
    logits_CJ = torch.cat([values, _rest(logits_CV, words, shard)[:, None]], 1)
    return words, logits_CJ.log_softmax(1)


def linear_top_words_divergence(
    hidden: Tensor,
    weight: Tensor,
    words: Tensor,
    logprobs: Tensor,
    labels: Tensor,
    divergence: Divergence,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = 1024,
) -> Tensor:
    """`linear_divergence` over the k + 1 outcomes that the teacher names: words [..., k] int, logprobs [..., k + 1].

    logprobs: in nats, under logits divided by divergence.temperature; the last may be -inf, where there is no rest.
    Both are read at tokens with a label alone. Gradients, errors and the shard as there.
    """
    _check(hidden, weight, labels, chunk_tokens)
    divergence.check()
    k = words.shape[-1]
    if words.shape[:-1] != labels.shape or logprobs.shape != (*labels.shape, k + 1):
        raise ValueError(
            f"words {list(words.shape)} and logprobs {list(logprobs.shape)} do not fit labels {list(labels.shape)}; "
            "they must be [..., k] and [..., k + 1]"
        )
    valid = labels != ignore_index
    words_Nk, logprobs_NJ, valid_N1 = words.reshape(-1, k), logprobs.detach().reshape(-1, k + 1), valid.reshape(-1, 1)

    def compare(student_CV: Tensor, chunk: slice, *, gradient: bool) -> Compared:
        counted = valid_N1[chunk]
        chosen = torch.where(counted, words_Nk[chunk].long(), 0)
        wanted = torch.where(counted, logprobs_NJ[chunk], 0.0).to(student_CV.dtype)
        return _divergences(student_CV, chosen, wanted, divergence, gradient=gradient)

    return divergence_sum(hidden, weight, valid, compare, divergence.temperature, chunk_tokens)


def _divergences(
    logits_CV: Tensor, words_Ck: Tensor, log_t_CJ: Tensor, divergence: Divergence, *, gradient: bool
) -> Compared:
    beta, shard = divergence.beta, divergence.shard
    here, local_Ck = _here(words_Ck, logits_CV.shape[1], shard)
    named_Ck = torch.where(here, logits_CV.gather(1, local_Ck), 0.0)
    if shard is not None:
        dist.all_reduce(named_Ck, group=shard.group)
    logits_CJ = torch.cat([named_Ck, _rest(logits_CV, words_Ck, shard)[:, None]], 1)
    lse_C1 = logits_CJ.logsumexp(1, keepdim=True)
    log_s_CJ = logits_CJ - lse_C1
    s_CJ, t_CJ = log_s_CJ.exp(), log_t_CJ.exp()
    losses_C, slopes_CJ = _of_outcomes(log_s_CJ, s_CJ, log_t_CJ, t_CJ, beta)
    if not gradient:
        return losses_C, None
    s_CV = (logits_CV - lse_C1).exp_()
    if beta == 0.0:  # S_v - T_v, and of others S_v - T_rest S_v / S_rest, in which no quotient overflows
        d_named_Ck = s_CJ[:, :-1] - t_CJ[:, :-1]
        shared_C1 = torch.where(t_CJ[:, -1:] > 0, log_t_CJ[:, -1:] - logits_CJ[:, -1:], NONE)
        d_logits_CV = s_CV - (logits_CV + shared_C1).exp_()
    else:
        mean_C1 = (s_CJ * slopes_CJ).sum(1, keepdim=True)
        d_named_Ck = (s_CJ * (slopes_CJ - mean_C1))[:, :-1]
        d_logits_CV = s_CV.mul_(slopes_CJ[:, -1:] - mean_C1)
    return losses_C, _scattered(d_logits_CV, here, local_Ck, d_named_Ck)


def _of_outcomes(log_s_CJ: Tensor, s_CJ: Tensor, log_t_CJ: Tensor, t_CJ: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(divergences [C], their slopes a_o by S_o [C, J]); an outcome that neither knows adds nothing to either."""

    def log_ratio(over: Tensor, under: Tensor) -> Tensor:
        return torch.where(torch.isneginf(over), 0.0, over - under)

    if beta == 0.0:
        return (t_CJ * log_ratio(log_t_CJ, log_s_CJ)).sum(1), torch.zeros_like(s_CJ)
    if beta == 1.0:
        slopes = log_ratio(log_s_CJ, log_t_CJ)
        return (s_CJ * slopes).sum(1), slopes
    log_m_CJ = torch.logaddexp(log_t_CJ + math.log(beta), log_s_CJ + math.log1p(-beta))
    ratio_CJ = log_ratio(log_s_CJ, log_m_CJ)
    of_teacher = (t_CJ * log_ratio(log_t_CJ, log_m_CJ)).sum(1)
    return beta * of_teacher + (1 - beta) * (s_CJ * ratio_CJ).sum(1), ratio_CJ * (1 - beta)


def _here(words_Ck: Tensor, num_words: int, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """([C, k] bool: which of the words have their logits on this rank; their numbers there, 0 for others)."""
    local = words_Ck if shard is None else words_Ck - shard.first
    here = (local >= 0) & (local < num_words)
    return here, torch.where(here, local, 0)


def _rest(logits_CV: Tensor, words_Ck: Tensor, shard: VocabularyShard | None) -> Tensor:
    """[C] log-sum-exp over all words but these; -inf where there is none."""
    here, local_Ck = _here(words_Ck, logits_CV.shape[1], shard)
    left_CV = _scattered(logits_CV.clone(), here, local_Ck, torch.full_like(words_Ck, NONE, dtype=logits_CV.dtype))
    highest_C = left_CV.amax(1)
    if shard is not None:
        dist.all_reduce(highest_C, dist.ReduceOp.MAX, group=shard.group)
    offset_C = torch.where(torch.isneginf(highest_C), 0.0, highest_C)
    sums_C = left_CV.sub_(offset_C[:, None]).exp_().sum(1)
    if shard is not None:
        dist.all_reduce(sums_C, group=shard.group)
    return sums_C.log() + offset_C


def _scattered(into_CV: Tensor, here: Tensor, local_Ck: Tensor, values_Ck: Tensor) -> Tensor:
    """into, in place, with values at the words that are here. Of several at one place, others', none is written."""
    spare = into_CV.shape[1]  # a column that is cut off again takes what belongs to other ranks
    padded = F.pad(into_CV, (0, 1))
    padded.scatter_(1, torch.where(here, local_Ck, spare), values_Ck)
    return into_CV.copy_(padded[:, :-1])
