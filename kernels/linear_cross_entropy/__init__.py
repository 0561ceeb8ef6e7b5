"""Cross entropy of a linear head, chunk by chunk: the logits of a whole batch are never in memory."""

from kernels.linear_cross_entropy.op import linear_cross_entropy
from kernels.linear_cross_entropy.vocab_parallel import VocabularyShard, vocab_parallel_linear_cross_entropy

__all__ = ["VocabularyShard", "linear_cross_entropy", "vocab_parallel_linear_cross_entropy"]
