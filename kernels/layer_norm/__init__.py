"""LayerNorm (1607.06450), with the residual addition before it where it is wanted. Its kernel is RMSNorm's."""

from kernels.layer_norm.op import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
