"""Ranks that train on the same completions share out who samples them.

The ranks of a pipeline, and of a context axis, have the same prompts. Each has an engine of its own, samples its share
of their completions, and tells the others: what a rollout is depends on no rank. Those of tp sample together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.mesh import Meshes

T = TypeVar("T")


class SamePrompts:
    """The ranks that have the prompts of this one."""

    def __init__(self, mesh: Meshes) -> None:
        self._group = None if mesh.alike is None else mesh.alike.get_group()
        self.rank, self.size = (0, 1) if mesh.alike is None else (mesh.alike.get_local_rank(), mesh.alike.size())

    def mine(self, every: Sequence[T]) -> list[T]:
        """What of all this rank is to do: neighbours, for completions of a prompt share its cache."""
        first, last = (len(every) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(every[first:last])

    def all(self, mine: Sequence[T]) -> list[T]:
        """What was found for all of them, from what each rank found for its own, in their order. Collective."""
        if self._group is None:
            return list(mine)
        of_ranks: list[Any] = [None] * self.size
        dist.all_gather_object(of_ranks, mine, group=self._group)
        return [one for theirs in of_ranks for one in theirs]
