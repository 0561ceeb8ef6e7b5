"""Attention sinks (gpt-oss, 2508.10925): a learned logit per head that takes part in the softmax and has no value.

With scores s_j, their log-sum-exp L and the sink's logit z, the probabilities are

    exp(s_j) / (exp(z) + sum_i exp(s_i)) = softmax(s)_j * sigmoid(L - z)

so any attention that returns L has sinks by one product at its end, and a head may attend to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention with sinks [H] from the one without: output [B, T, H, V] and its log-sum-exp [B, H, T]. Keeps dtype."""
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (output * share.transpose(1, 2)[..., None]).to(output.dtype)
