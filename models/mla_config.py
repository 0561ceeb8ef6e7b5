"""MLAConfig: multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MLAConfig:
    """`model.mla`: sizes of latent attention. kv_rank=0 is attention with keys and values of their own."""

    kv_rank: int = 0  # features of the latent that keys and values are made of
    q_rank: int | None = None  # the same for queries; None: queries are made of the hidden state
    nope_dim: int = 128  # of a head's query and key, without position
    rope_dim: int = 64  # with position; the key's is shared by all heads
    value_dim: int = 128  # of a head
    interleaved: bool = True  # rope turns dimensions 2i and 2i + 1; False: i and i + rope_dim / 2


def mla_problems(
    mla: MLAConfig, *, positions: str, num_heads: int, num_kv_heads: int | None, head_dim: int | None, plain: bool
) -> list[str]:
    """Every reason why this attention cannot be built; one line each. plain: neither qkv_bias nor qk_norm is set."""
    if mla.kv_rank == 0:
        return []
    found = [
        f"model.mla.{name}={value} must be at least 1"
        for name in ("kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim")
        if (value := getattr(mla, name)) is not None and value < 1
    ]
    if mla.rope_dim % 2:
        found.append(f"model.mla.rope_dim={mla.rope_dim} is odd; rope turns pairs of dimensions: make it even")
    if positions != "rope":
        found.append(
            f"model.positions={positions} does not work with model.mla, whose keys have a part for rope; use rope"
        )
    if num_kv_heads not in (None, num_heads):
        found.append(f"model.num_kv_heads={num_kv_heads} has no meaning with model.mla; use {num_heads} or null")
    if head_dim not in (None, mla.nope_dim + mla.rope_dim):
        found.append(
            f"model.head_dim={head_dim} is not model.mla.nope_dim + model.mla.rope_dim; use null or "
            f"{mla.nope_dim + mla.rope_dim}"
        )
    if not plain:
        found.append("model.qkv_bias=true and model.qk_norm=true do not work with model.mla; use false")
    return found
