"""Rotary position embedding (2104.09864) of queries and keys at once."""

from kernels.rope.op import rope, rope_, rope_qkv

__all__ = ["rope", "rope_", "rope_qkv"]
