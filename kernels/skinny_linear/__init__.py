"""Linear layers of a few rows (decoding), with the norm before them and what follows fused."""

from kernels.skinny_linear.op import MAX_ROWS, add_skinny_linear, obstacle, skinny_linear

__all__ = ["MAX_ROWS", "add_skinny_linear", "obstacle", "skinny_linear"]
