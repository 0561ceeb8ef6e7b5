"""Orders of items, epoch after epoch: functions of a key alone, so that a run goes on where it stopped."""

from __future__ import annotations

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """[count] int64: 0 .. count-1 in an order that depends on count and key only, on every machine and version.

    numpy promises to keep the raw output of a bit generator, but not what `Generator.permutation` makes of it, so the
    order is a sort of raw output (NEP 19).
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")


class EpochOrder:
    """The item that each number stands for, epoch after epoch: each once in an epoch, in an order of its own."""

    def __init__(self, count: int, key: tuple[int, ...] | None) -> None:
        """count: of items. key: of the permutations, (seed, ...); None: every epoch in the order of the items."""
        self._count, self._key = count, key
        self._kept: tuple[int, np.ndarray] | None = None  # the last epoch that was asked for, and its order

    def __getitem__(self, number: int) -> int:
        epoch, index = divmod(number, self._count)
        if self._key is None:
            return index
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, permutation(self._count, *self._key, epoch))
        return int(self._kept[1][index])
