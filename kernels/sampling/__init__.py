"""A token of each row of logits, greedy or drawn, and its log-probability."""

from kernels.sampling.op import sample_tokens
from kernels.sampling.reference import draw, uniform_48

__all__ = ["draw", "sample_tokens", "uniform_48"]
