"""From tokens to pairs: sums over answers that lie in a batch's rows, and over cp on several ranks.

With context parallelism a rank has some tokens of an answer. Their sums are added up over the ranks of a sequence, so
each knows every pair of its rows; the one that holds the label at which a pair ends (data/preference.py, `pair`) counts
it. Sums are fp64: D of DPO is a small difference of large numbers.

B rows, T tokens of each on this rank, P places for pairs in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from data.batch import IGNORE_INDEX, Batch
from parallel.collectives import Axis, all_reduce, sum_of_gradients
from parallel.groups import ModelParallel


@dataclass(frozen=True)
class Pairs:
    """The pairs in the rows of a batch."""

    batch: Batch
    places: int  # P: more than there can be
    context: DeviceMesh | None  # ranks with the other tokens of these rows

    @classmethod
    def of(cls, batch: Batch, groups: ModelParallel) -> Pairs:
        assert batch.documents is not None  # validated: data.mask_documents
        # Each of both examples of a pair has a token to begin with and one that is learned. Whole rows: documents are.
        return cls(batch, batch.documents.shape[1] // 4 + 1, groups.cp if groups.cp_size > 1 else None)

    def answers(self, values: Tensor, column: str = "completion") -> Tensor:
        """Sums [B, P, 2] fp64 of values [B, T] over the tokens of each answer, by the column that numbers these.

        Differentiable, for a loss of which each rank counts its own pairs.
        """
        return self._sums(values, self.batch.columns[column], 2 * self.places).unflatten(1, (self.places, 2))

    def lengths(self) -> Tensor:
        """Labels of each answer, [B, P, 2] fp64; 1 where there is no pair."""
        return self.answers((self.batch.labels != IGNORE_INDEX).double()).clamp(min=1.0)

    def margins(self) -> Tensor:
        """[B, P] fp64."""
        return self.at_ends("margin")

    def at_ends(self, column: str) -> Tensor:
        """[B, P] fp64 of a column that says something where pairs end."""
        return self._sums(self.batch.columns[column], self.batch.columns["pair"], self.places)

    def counted(self) -> Tensor:
        """[B, P] fp64: 1 for pairs that this rank counts, else 0."""
        pair = self.batch.columns["pair"]
        return self._local_sums(torch.ones_like(pair, dtype=torch.float64), pair, self.places)

    def _sums(self, values: Tensor, numbers: Tensor, places: int) -> Tensor:
        sums = self._local_sums(values, numbers, places)
        if self.context is None:
            return sums
        axis = Axis.of(self.context)
        return sum_of_gradients(all_reduce(sums, axis), axis)

    def _local_sums(self, values: Tensor, numbers: Tensor, places: int) -> Tensor:
        """[B, places] fp64 of values [B, T] by their numbers [B, T]; those below 0 go nowhere."""
        rows = torch.arange(len(numbers), device=numbers.device)[:, None]
        place = torch.where(numbers < 0, places, numbers) + rows * (places + 1)
        sums = torch.zeros(len(numbers) * (places + 1), dtype=torch.float64, device=values.device)
        # index_add, which unlike scatter_add has a deterministic kernel on CUDA
        sums = sums.index_add(0, place.flatten(), values.double().flatten())
        return sums.view(len(numbers), places + 1)[:, :places]


def count_pairs(batch: Batch) -> Tensor:
    """Pairs that this rank counts, 0-d int64."""
    return (batch.columns["pair"] >= 0).sum()
