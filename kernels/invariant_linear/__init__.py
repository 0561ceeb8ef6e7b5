"""A linear layer whose rows do not depend on their number or their neighbours, to the bit."""

from kernels.invariant_linear.op import invariant_linear

__all__ = ["invariant_linear"]
