"""What of every block to keep for backward so that activations fit a budget and least is computed twice.

A block that is checkpointed keeps its input and the outputs of some operations; all others run again in backward. Per
block that is a 0/1 knapsack: an operation weighs the bytes of its output and is worth the seconds of running it again.
Over the blocks together each takes one of its own solutions, which is a knapsack with choices. Both are solved exactly
by dynamic programming over Pareto frontiers (Nemhauser and Ullmann, Management Science 15(9), 1969): of all ways to
spend at most so many bytes, only those that no other beats in both bytes and seconds are carried on.

What blocks cost is an argument (parallel/activation_cost.py measures it), so the same costs give the same choice on
every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.activation_checkpoint import ActivationCheckpoint

MAX_POINTS = 8192
"""Of a frontier. Beyond it the cheapest of every 1/8192 of the budget stays; bytes remain exact: nothing exceeds it."""


@dataclass(frozen=True)
class Operation:
    """A call in a block's forward whose output may be kept, or several whose outputs are kept only together."""

    calls: tuple[str, ...]  # aten.mm#2: the third call of aten.mm
    num_bytes: int  # of the outputs
    seconds: float  # to run them again


@dataclass(frozen=True)
class BlockCost:
    """What a block of one micro-batch needs. Filled by parallel.activation_cost.measure_block."""

    input_bytes: int  # kept however it is checkpointed
    operations: tuple[Operation, ...]  # may be kept, in order of execution
    other_seconds: float  # of everything else that runs again once the block is checkpointed
    all_bytes: int | None  # kept without checkpointing, input included; None: that is no choice


@dataclass(frozen=True)
class Choice:
    """How one block is checkpointed, the bytes it then keeps and the seconds it computes again."""

    checkpoint: ActivationCheckpoint
    num_bytes: int
    seconds: float


class BudgetTooSmallError(ValueError):
    """Not even the inputs of the blocks fit. `smallest` would."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the inputs of all blocks alone take {smallest} bytes")
        self.smallest = smallest


@dataclass
class _Frontier:
    """Points that no other beats: bytes ascending, seconds descending. `left`, `right`: what each was made of."""

    num_bytes: Tensor  # int64 [P]
    seconds: Tensor  # fp64 [P]
    left: Tensor  # int64 [P]: point of the frontier before
    right: Tensor  # int64 [P]: alternative that was added to it


def choose(blocks: Sequence[BlockCost], budget: int) -> list[Choice]:
    """The choice for every block that computes least again among those that keep at most `budget` bytes together.

    Among blocks of equal cost the later ones keep more: they come first in backward, where their memory is free again
    before the earlier ones need room to recompute. Raises BudgetTooSmallError when nothing fits.
    """
    smallest = sum(block.input_bytes for block in blocks)
    if smallest > budget:
        raise BudgetTooSmallError(smallest)
    solutions = {block: block_choices(block, budget) for block in set(blocks)}
    frontiers = [_start()]
    needed = smallest  # by the blocks that are still to come
    for block in blocks:
        needed -= block.input_bytes
        frontiers.append(_extend(frontiers[-1], _points(solutions[block]), limit=budget - needed, grain=budget))
    point = len(frontiers[-1].seconds) - 1
    picked: list[Choice] = []
    for block, frontier in zip(reversed(blocks), reversed(frontiers[1:]), strict=True):
        picked.append(solutions[block][int(frontier.right[point])])
        point = int(frontier.left[point])
    picked.reverse()
    for block in set(blocks):
        places = [place for place, other in enumerate(blocks) if other == block]
        for place, choice in zip(places, sorted((picked[p] for p in places), key=lambda c: c.num_bytes), strict=True):
            picked[place] = choice
    return picked


def block_choices(block: BlockCost, limit: int) -> list[Choice]:
    """The ways to checkpoint one block in at most `limit` bytes that no other beats, by ascending bytes."""
    frontiers = [_start(block.input_bytes, block.other_seconds + sum(op.seconds for op in block.operations))]
    for op in block.operations:
        kept_or_not = (torch.tensor([0, op.num_bytes]), torch.tensor([0.0, -op.seconds], dtype=torch.float64))
        frontiers.append(_extend(frontiers[-1], kept_or_not, limit=limit, grain=limit))
    choices = []
    for last in range(len(frontiers[-1].seconds)):
        point, kept = last, list[str]()
        for op, frontier in zip(reversed(block.operations), reversed(frontiers[1:]), strict=True):
            kept = [*op.calls, *kept] if frontier.right[point] else kept
            point = int(frontier.left[point])
        checkpoint = ActivationCheckpoint("selective" if kept else "full", kept)
        num_bytes, seconds = int(frontiers[-1].num_bytes[last]), float(frontiers[-1].seconds[last])
        choices.append(Choice(checkpoint, num_bytes, max(0.0, seconds)))
    if block.all_bytes is not None and block.all_bytes <= limit:
        choices = [c for c in choices if c.num_bytes < block.all_bytes]
        choices.append(Choice(ActivationCheckpoint("none"), block.all_bytes, 0.0))
    return choices


def all_or_none(block: BlockCost) -> BlockCost:
    """The same block where all operations are kept or none is."""
    operations = block.operations
    if not operations:
        return block
    together = Operation(
        tuple(call for op in operations for call in op.calls),
        sum(op.num_bytes for op in operations),
        sum(op.seconds for op in operations),
    )
    return replace(block, operations=(together,))


def describe(choices: Sequence[Choice]) -> str:
    """What is kept where, the memory and the time, as one line for people."""
    kinds = Counter(_keeps(choice.checkpoint) for choice in choices)
    kept = ", ".join(f"{count} of {len(choices)} blocks {what}" for what, count in kinds.items())
    gib = sum(choice.num_bytes for choice in choices) / 2**30
    return f"{kept}; {gib:.3g} GiB per micro-batch, {1e3 * sum(c.seconds for c in choices):.3g} ms computed again"


def _keeps(checkpoint: ActivationCheckpoint) -> str:
    if checkpoint.mode == "selective":
        return f"keep {' '.join(checkpoint.save)}"
    return "keep everything" if checkpoint.mode == "none" else "keep their input"


def _start(num_bytes: int = 0, seconds: float = 0.0) -> _Frontier:
    nothing = torch.zeros(1, dtype=torch.int64)
    return _Frontier(torch.tensor([num_bytes]), torch.tensor([seconds], dtype=torch.float64), nothing, nothing)


def _points(choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor([choice.num_bytes for choice in choices]),
        torch.tensor([choice.seconds for choice in choices], dtype=torch.float64),
    )


def _extend(frontier: _Frontier, alternatives: tuple[Tensor, Tensor], *, limit: int, grain: int) -> _Frontier:
    """Every point with every alternative (bytes [A], seconds [A]) added, of which those within `limit` bytes that no
    other beats are kept."""
    num_bytes = (frontier.num_bytes[:, None] + alternatives[0]).flatten()
    seconds = (frontier.seconds[:, None] + alternatives[1]).flatten()
    order = torch.arange(num_bytes.numel())
    order = order[num_bytes <= limit]
    order = order[seconds[order].argsort(stable=True)]
    order = order[num_bytes[order].argsort(stable=True)]
    ahead = seconds[order].cummin(0).values.roll(1)  # the best of those before, in fewer or as many bytes
    if len(order):
        ahead[0] = torch.inf
    order = order[seconds[order] < ahead]
    if len(order) > MAX_POINTS:
        cell = num_bytes[order] * MAX_POINTS // max(1, grain)
        last_of_cell = torch.ones(len(order), dtype=torch.bool)
        last_of_cell[:-1] = cell[1:] != cell[:-1]
        order = order[last_of_cell]
    num = alternatives[0].numel()
    return _Frontier(num_bytes[order], seconds[order], order // num, order % num)
