"""Batch: what the data pipeline hands to a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""


@dataclass
class Batch:
    """A micro-batch of one rank: B sequences of S tokens, or (see `take`) T of the tokens of each; else T = S."""

    tokens: torch.Tensor  # [B, T] int64; filled by packing
    labels: torch.Tensor  # [B, T] int64; the token after each, IGNORE_INDEX where there is no loss; filled by packing
    positions: torch.Tensor  # [B, T] int64; index in the sequence, or in the document under data.mask_documents
    documents: torch.Tensor | None  # [B, S] int32, ascending in a row; None: attention crosses documents
    samples: torch.Tensor  # [B] int64; number of each sample in the run, the key of its dropout; filled by the loader
    ahead: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # tokens, labels [B, T]; filled by `look_ahead`, else ()
    indices: torch.Tensor | None = None  # [T] int64; where the tokens lie in the sequence; filled by `take`, else None
    cut: Any = None  # parallel.cut.Cut: where all others lie; filled by `take`; None: zigzag, or nowhere else
    columns: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # [B, T] or [B, T, n] int or fp32 each, of labels; -1 in those of
    # int: nothing there; filled by packing and by recipes

    def take(self, indices: torch.Tensor, cut: Any = None) -> Batch:
        """The tokens at `indices` [T] of every sequence; `documents` stays whole, for they see tokens elsewhere."""
        return replace(
            self,
            tokens=self.tokens[:, indices],
            labels=self.labels[:, indices],
            positions=self.positions[:, indices],
            ahead=tuple((tokens[:, indices], labels[:, indices]) for tokens, labels in self.ahead),
            indices=indices,
            cut=cut,
            columns={name: column[:, indices] for name, column in self.columns.items()},
        )

    def with_columns(self, **columns: torch.Tensor) -> Batch:
        """With more of what is known of each label: [B, T], of the same tokens as this batch."""
        return replace(self, columns=self.columns | columns)

    def look_ahead(self, depth: int) -> Batch:
        """With `ahead` for k = 1 .. depth: the tokens and labels k places later. Of whole sequences, so before `take`.

        The last k positions have no later token: 0 stands there, and no label. A label in another document carries no
        loss where documents are masked. depth is below T; 0: the batch as it is.
        """
        if depth == 0:
            return self
        ahead = []
        for k in range(1, depth + 1):
            tokens, labels = F.pad(self.tokens[:, k:], (0, k)), self.labels[:, k:]
            if self.documents is not None:
                labels = labels.masked_fill(self.documents[:, k:] != self.documents[:, :-k], IGNORE_INDEX)
            ahead.append((tokens, F.pad(labels, (0, k), value=IGNORE_INDEX)))
        return replace(self, ahead=tuple(ahead))

    def to(self, device: torch.device) -> Batch:
        """The same batch on device; asynchronous from pinned memory."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda t: t.pin_memory())

    @property
    def shapes(self) -> tuple[tuple[str, torch.Size], ...]:
        """Of all tensors, by name."""
        return tuple((name, tensor.shape) for name, tensor in self._tensors())

    def clone(self) -> Batch:
        """In memory of its own."""
        return self._map(torch.clone)

    def copy_(self, other: Batch) -> None:
        """Take the numbers of a batch of the same shapes."""
        mine, theirs = (list(batch._tensors()) for batch in (self, other))
        for (name, target), (its_name, source) in zip(mine, theirs, strict=True):
            assert name == its_name
            target.copy_(source)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("tokens", "labels", "positions", "documents", "samples", "indices"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor
        for k, pair in enumerate(self.ahead):
            yield from ((f"ahead.{k}.{name}", tensor) for name, tensor in zip(("tokens", "labels"), pair, strict=True))
        yield from ((f"columns.{name}", self.columns[name]) for name in sorted(self.columns))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            tokens=change(self.tokens),
            labels=change(self.labels),
            positions=change(self.positions),
            documents=None if self.documents is None else change(self.documents),
            samples=change(self.samples),
            ahead=tuple((change(tokens), change(labels)) for tokens, labels in self.ahead),
            indices=None if self.indices is None else change(self.indices),
            cut=self.cut,
            columns={name: change(column) for name, column in self.columns.items()},
        )
