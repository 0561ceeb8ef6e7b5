"""What blocks and loss move when nothing is compiled: every operation reads its inputs and writes its output.

Counted from the layers' code, in elements (of the compute dtype) or bytes of a token and layer. D hidden_size, F
features between the matrices of an MLP, H heads, G key heads, K head_dim, k experts of a token.

    norms             2 D and a residual sum 3 D, twice; backward 5 D (its input and gradient read twice) and 3 D
    rope              48 bytes for each feature of q and k: to fp32, four products of halves, two sums, cat, and back;
                      backward 52. Fused projections: their gradients are put side by side, 2 (H + 2 G) K backward
    activation        gated 5 F and 9 F, and 4 F backward where gate and up are one layer; else 2 F and 3 F
    loss              46 bytes a logit: log-softmax reads a row three times and writes fp32, one-hot 4, exp, difference
                      and factor 26 in fp32, and what is cast back 6; train.loss_kernel=triton is
                      no more than compiled operations (planner/operators.py)
    router            its input in fp32: 10 D bytes forward and 20 D backward; and KERNELS of next to no bytes
"""

from __future__ import annotations

from models.config import ModelConfig

ROPE_BYTES = (48, 52)
"""Of a feature, forward and backward, in half precision (models/layers/rope.py: rotate)."""
LOSS_BYTES = 46
"""Of a logit, in half precision (kernels/linear_cross_entropy)."""
ROUTER_BYTES = (10, 20)
"""Of a feature of a token."""
KERNELS = (40, 80)
"""That a block launches, forward and backward: about."""
ROUTER_KERNELS = (50, 40)
"""Beside these: a router's and the sorting of its choices, which torch's dispatcher counts as 41 and 32 operations;
some, as topk and logsumexp, are several kernels."""


def stream_elements(model: ModelConfig) -> tuple[float, float]:
    """Of the residual stream of a token in a layer, forward and backward."""
    return 10.0 * model.hidden_size, 16.0 * model.hidden_size


def rope_bytes(model: ModelConfig, *, heads: float, kv_heads: float) -> tuple[float, float]:
    """Of a token in a layer, of so many heads; 0 without rope."""
    assert model.head_dim is not None  # resolved
    if model.positions != "rope":
        return 0.0, 0.0
    mla = model.mla
    turned = (heads + 1) * mla.rope_dim if mla.kv_rank else (heads + kv_heads) * model.head_dim
    return ROPE_BYTES[0] * turned, ROPE_BYTES[1] * turned


def activation_elements(model: ModelConfig, *, experts: bool) -> tuple[float, float]:
    """For each feature between the matrices of an MLP, or of experts, which are always gated and never fused."""
    if experts:
        return 5.0, 9.0
    if not model.gated_mlp:
        return 2.0, 3.0
    return 5.0, 13.0 if model.fused_projections else 9.0
