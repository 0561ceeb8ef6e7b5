"""Stages: which layers of a model run together, and which rank holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Stage:
    """Layers [start, stop) of a model. The first stage has the embedding too, the last one final norm and head."""

    index: int
    num_stages: int
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


def make_stages(sizes: Sequence[int]) -> tuple[Stage, ...]:
    """Stages of the given numbers of layers, in order."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Stage(i, len(sizes), start, start + n) for i, (start, n) in enumerate(zip(starts, sizes, strict=True)))


def balance(layer_costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Layers per stage, at least one each, so that the dearest stage is as cheap as possible.

    first, last: what embedding and head cost besides the layers of their stages. Of equally good splits, later stages
    get the longer share, because earlier ones hold more activations. Raises ValueError for fewer layers than stages.
    """
    num_layers = len(layer_costs)
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers do not fill {num_stages} stages")
    return list(_balance(tuple(layer_costs), num_stages, first, last))


@lru_cache(maxsize=128)  # a search of layouts asks for the same ones many times
def _balance(layer_costs: tuple[float, ...], num_stages: int, first: float, last: float) -> tuple[int, ...]:
    num_layers = len(layer_costs)
    before = [0.0]
    for cost in layer_costs:
        before.append(before[-1] + cost)
    # best[k][n]: (cost of the dearest stage, layers of the last stage) of the first n layers in k + 1 stages
    best: list[dict[int, tuple[float, int]]] = []
    for k in range(num_stages):
        extra = (first if k == 0 else 0.0) + (last if k == num_stages - 1 else 0.0)
        row: dict[int, tuple[float, int]] = {}
        for n in range(k + 1, num_layers - (num_stages - 1 - k) + 1):
            if k == 0:
                row[n] = (before[n] + extra, n)
                continue
            row[n] = min(
                (max(best[k - 1][n - size][0], before[n] - before[n - size] + extra), -size)
                for size in range(1, n - k + 1)
            )
            row[n] = (row[n][0], -row[n][1])
        best.append(row)
    sizes, left = [], num_layers
    for k in reversed(range(num_stages)):
        size = best[k][left][1] if k else left
        sizes.append(size)
        left -= size
    return tuple(sizes[::-1])
