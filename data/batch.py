"""Batch: what the data pipeline hands to a training step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""


@dataclass
class Batch:
    """A micro-batch of one rank. B sequences of T tokens."""

    tokens: torch.Tensor  # [B, T] int64; filled by packing
    labels: torch.Tensor  # [B, T] int64; the token after each, IGNORE_INDEX where there is no loss; filled by packing
    positions: torch.Tensor  # [B, T] int64; index in the sequence, or in the document under data.mask_documents
    documents: torch.Tensor | None  # [B, T] int32, ascending in a row; None: attention crosses documents
    samples: torch.Tensor  # [B] int64; number of each sample in the run, the key of its dropout; filled by the loader

    def to(self, device: torch.device) -> Batch:
        """The same batch on device; asynchronous from pinned memory."""

        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        return replace(self, **{name: move(getattr(self, name)) for name in self.__dataclass_fields__})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""

        def pin(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.pin_memory()

        return replace(self, **{name: pin(getattr(self, name)) for name in self.__dataclass_fields__})
