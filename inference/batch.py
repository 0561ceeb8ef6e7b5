"""What a step sends to the device: one packed tensor of whole numbers, and the same taken apart there.

N tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.scheduler import Chunk
from inference.sequence import PENDING


class Batch(NamedTuple):
    """int64; padding sequences have length 0, padding tokens belong to the last sequence and have row `nobody`."""

    tokens: Tensor  # [N]; PENDING: what was sampled last for its row
    positions: Tensor  # [N]
    owners: Tensor  # [N] number of the token's sequence
    token_rows: Tensor  # [N] row of block tables; that of nobody: the token pads
    rows: Tensor  # [S]
    lengths: Tensor  # [S] with the tokens of this step
    lasts: Tensor  # [S] number of each sequence's last token of this step
    starts: Tensor  # [S + 1] number of its first


def pack(chunks: Seq[Chunk], rows: Seq[int], nobody: int, size: tuple[int, int] | None = None) -> Tensor:
    """A step's batch on the host, padded to (sequences, tokens)."""
    counts = np.array([chunk.num_tokens for chunk in chunks])
    ends = counts.cumsum()
    sequences, tokens = (len(chunks), int(ends[-1])) if size is None else size
    packed = np.zeros((4 * tokens + 4 * sequences + 1,), dtype=np.int64)
    of_tokens, of_sequences = packed[: 4 * tokens].reshape(4, tokens), packed[4 * tokens : -1].reshape(4, sequences)
    of_tokens[2], of_tokens[3] = sequences - 1, nobody
    here = of_tokens[:, : ends[-1]]
    if ends[-1] == len(chunks):
        here[0] = [tokens_of(chunk)[0] for chunk in chunks]
        here[1] = [chunk.first for chunk in chunks]
    else:
        here[0] = np.concatenate([tokens_of(chunk) for chunk in chunks])
        here[1] = np.concatenate([np.arange(chunk.first, chunk.end) for chunk in chunks])
    here[2] = np.repeat(np.arange(len(chunks)), counts)
    here[3] = np.array(rows)[here[2]]
    of_sequences[0] = nobody
    of_sequences[3] = ends[-1]
    packed[-1] = ends[-1]
    there = of_sequences[:, : len(chunks)]
    there[0], there[1] = rows, [chunk.end for chunk in chunks]
    there[2], there[3] = ends - 1, ends - counts
    return torch.from_numpy(packed)


def padding(nobody: int, sequences: int, tokens: int) -> Tensor:
    """The batch of a step that computes nothing, packed."""
    packed = torch.zeros(4 * tokens + 4 * sequences + 1, dtype=torch.int64)
    of_tokens, of_sequences = packed[: 4 * tokens].view(4, tokens), packed[4 * tokens : -1].view(4, sequences)
    of_tokens[2], of_tokens[3], of_sequences[0] = sequences - 1, nobody, nobody
    return packed


def tokens_of(chunk: Chunk) -> list[int]:
    """A chunk's tokens; those behind the sequence's last are PENDING."""
    tokens = chunk.sequence.tokens[chunk.first : chunk.end]
    return tokens + [PENDING] * (chunk.num_tokens - len(tokens))


def unpack(packed: Tensor, sequences: int) -> Batch:
    """The parts of `pack`'s tensor."""
    tokens = (len(packed) - 4 * sequences - 1) // 4
    of_tokens, of_sequences = packed[: 4 * tokens].view(4, tokens), packed[4 * tokens : -1].view(4, sequences)
    parts = [*of_tokens.unbind(), *of_sequences[:3].unbind(), packed[4 * tokens + 3 * sequences :]]
    return Batch(*parts)
