"""GeGLU: SwiGLU's ops with another activation."""

from __future__ import annotations

from torch import Tensor

from kernels.swiglu.op import _glu, _glu_fused, check_fused, check_pair

ACTIVATIONS = {"tanh": "gelu_tanh", "none": "gelu"}  # by torch's name of the approximation


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up (2002.05202), elementwise: two tensors [..., I] of one floating dtype to [..., I], contiguous.

    approximate: "tanh" (Gemma) or "none" (erf), as in torch.nn.functional.gelu. Guarantees and errors as in
    `kernels.swiglu.swiglu`; ValueError for another approximation.
    """
    check_pair(gate, up)
    return _glu(gate, up, _activation(approximate))


def geglu_fused(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up of one tensor [..., 2I], gate beside up, to [..., I], with one tensor as the gradient."""
    check_fused(gate_up)
    return _glu_fused(gate_up, _activation(approximate))


def _activation(approximate: str) -> str:
    if approximate not in ACTIVATIONS:
        raise ValueError(f"approximate={approximate!r}; use 'tanh' or 'none'")
    return ACTIVATIONS[approximate]
