"""MTPConfig: multi-token prediction (DeepSeek-V3, 2412.19437, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MTPConfig:
    """`model.mtp`: blocks behind the last one, each of which predicts one token further. depth=0: none."""

    depth: int = 0  # block k of these predicts, at position i, token i + 1 + k
    loss_weight: float = 0.3  # of the mean of their losses in the training loss; a run may change it


def mtp_problems(mtp: MTPConfig, *, seq_len: int | None) -> list[str]:
    """Every reason why these blocks cannot be built, or trained on sequences of `seq_len` tokens; one line each."""
    if mtp.depth < 0:
        return [f"model.mtp.depth={mtp.depth} must not be negative; 0 switches multi-token prediction off"]
    if mtp.depth == 0:
        return []
    found = []
    if not 0.0 < mtp.loss_weight < float("inf"):
        found.append(
            f"model.mtp.loss_weight={mtp.loss_weight} must be positive and finite; DeepSeek-V3 has 0.3, later 0.1"
        )
    if seq_len is not None and seq_len <= mtp.depth:
        found.append(
            f"model.mtp.depth={mtp.depth} leaves the last block no target in sequences of train.seq_len={seq_len}; use "
            f"less than {seq_len}"
        )
    return found
