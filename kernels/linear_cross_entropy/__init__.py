"""Cross entropy of a linear head, chunk by chunk: the logits of a whole batch are never in memory."""

from kernels.linear_cross_entropy.divergence import Divergence, linear_divergence
from kernels.linear_cross_entropy.op import linear_cross_entropy
from kernels.linear_cross_entropy.tokens import linear_token_losses, linear_token_losses_and_entropies
from kernels.linear_cross_entropy.top_words import linear_top_words, linear_top_words_divergence
from kernels.linear_cross_entropy.vocab_parallel import VocabularyShard, vocab_parallel_linear_cross_entropy

__all__ = [
    "Divergence",
    "VocabularyShard",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_token_losses",
    "linear_token_losses_and_entropies",
    "linear_top_words",
    "linear_top_words_divergence",
    "vocab_parallel_linear_cross_entropy",
]
