"""Ranks that train on the same completions share out who samples them.

The ranks of a pipeline, and of a context axis, have the same prompts. Each has an engine of its own, samples its share
of their completions, and tells the others: what a rollout is depends on no rank. Those of tp sample together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist

from parallel.mesh import Meshes

T = TypeVar("T")


class RolloutError(ValueError):
    """Rollouts of another rank failed; the message says how."""


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
        return [one for theirs in self.of_each(mine) for one in theirs]

    def of_each(self, mine: Any) -> list[Any]:
        """One object of each of these ranks. Collective."""
        if self._group is None:
            return [mine]
        of_ranks: list[Any] = [None] * self.size
        dist.all_gather_object(of_ranks, mine, group=self._group)
        return of_ranks

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns. Where it fails on one of these ranks it does on all: else those that have done theirs
        would wait for what that one found. Collective. Raises RolloutError, and FloatingPointError for one elsewhere.
        """
        failure, done = None, None
        try:
            done = work()
        except Exception as error:
            failure = error
        of_ranks = self.of_each(None if failure is None else (type(failure).__name__, str(failure)))
        if failure is not None:
            raise failure
        for rank, failed in enumerate(of_ranks):
            if failed is not None:
                kind, text = failed
                if kind == FloatingPointError.__name__:
                    raise FloatingPointError(text)
                raise RolloutError(f"rollouts failed on rank {rank} of those with the same prompts: {kind}: {text}")
        return cast("T", done)
