"""Where the elements of a shard lie in the whole parameter: what random numbers are numbered by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.philox import stream_id


@dataclass(frozen=True)
class ElementIndex:
    """Element i = (i0 n1 + i1) n2 + i2 of a contiguous shard is element first + i0 s0 + i1 s1 + i2 of the whole.

    A shard that is a run of the whole, such as all of it or some of its rows, has n1 = n2 = s0 = 1.
    """

    name: str  # of the parameter, the same in every layout
    first: int = 0
    sizes: tuple[int, int] = (1, 1)  # n1, n2
    strides: tuple[int, int] = (1, 0)  # s0, s1

    @classmethod
    def of_shard(
        cls, name: str, shape: Sequence[int], local_shape: Sequence[int], offsets: Sequence[int]
    ) -> ElementIndex:
        """The shard [offsets : offsets + local_shape] of a parameter of this shape.

        Raises ValueError for a shard cut in so many dims that it has four or more that do not merge.
        """
        steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        first = sum(offset * step for offset, step in zip(offsets, steps, strict=True))
        merged: list[tuple[int, int]] = []  # (local size, stride in the whole), outermost first
        for dim, (size, step) in enumerate(zip(local_shape, steps, strict=True)):
            if merged and size == shape[dim]:  # of a dim that is not cut, the one outside goes on where it ends
                merged[-1] = (merged[-1][0] * size, step)
            else:
                merged.append((size, step))
        if merged and merged[-1][1] != 1:
            raise AssertionError("the innermost stride of a contiguous parameter is 1")
        if len(merged) <= 1:
            return cls(name, first)
        if len(merged) > 3:
            raise ValueError(
                f"{name}: shard {list(local_shape)} of {list(shape)} is cut in too many dims; use at most 3"
            )
        (_, s0), (n1, s1), (n2, _) = merged if len(merged) == 3 else (merged[0], (1, 0), merged[1])
        return cls(name, first, (max(n1, 1), max(n2, 1)), (s0, s1))

    @property
    def is_run(self) -> bool:
        """Whether the shard is a run of the whole that starts at a multiple of 8: eight neighbours share one draw."""
        return self.sizes == (1, 1) and self.first % 8 == 0

    def key(self, seed: int) -> int:
        """64-bit Philox key of this parameter's rounding, as the int64 with the same bits."""
        key = seed ^ stream_id(f"stochastic_rounding/{self.name}")
        return key - 2**64 if key >= 2**63 else key
