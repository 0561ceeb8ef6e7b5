"""Attention over keys and values that lie in pages, and writing them there."""

from kernels.paged_attention.op import implementation, paged_attention, rotate_and_write, write_pages

__all__ = ["implementation", "paged_attention", "rotate_and_write", "write_pages"]
