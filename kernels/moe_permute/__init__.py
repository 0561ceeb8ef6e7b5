"""Rows of tokens in the order of their experts, and back with the router's weights: gathers in both directions."""

from kernels.moe_permute.op import Permutation, permute, sort_by_expert, unpermute

__all__ = ["Permutation", "permute", "sort_by_expert", "unpermute"]
