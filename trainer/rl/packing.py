"""Rollouts as micro-batches: several in a row, none of which sees another, with what their losses are made of.

Columns of a label (all of generated tokens, 0 elsewhere):

    advantage   of its completion, or (PPO) its own
    sampler     its log-probability as the engine drew it
    weight      its share in what a completion, or the whole batch, counts for
    old         its log-probability by the weights that rollouts were made with; not there where these are still there
    value       PPO: what it was foretold to be worth by the value model of then
    return      PPO: what that model should say
    sequence    number of its completion in the row, int64
    last        1 at a completion's last generated token
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.examples import pack
from trainer.config import TrainConfig
from trainer.rl.rollouts import Rollout
from trainer.sequence import row_step

FLOATS = ("advantage", "sampler", "weight", "last")
OPTIONAL = {"old": "old", "value": "values", "return": "returns"}
"""Columns that only some runs have, and what of a rollout they hold."""


class Packed(NamedTuple):
    """Filled by `rollout_batches`."""

    batch: Batch
    rows: list[list[Rollout]]  # whose tokens each row has, in their order


def rollout_batches(
    rollouts: Sequence[Rollout],
    *,
    seq_len: int,
    micro_batch_size: int,
    normalization: str,
    constant: int,
    few_shapes: bool = False,
    row_step: int = 1,
) -> list[Packed]:
    """Micro-batches of micro_batch_size rows of at most seq_len tokens; the last may have fewer, none may be empty.
    Rows have a multiple of row_step tokens, which divides seq_len.

    few_shapes: rows have seq_len tokens, and the last micro-batch as many rows as `filled_rows` says, filled up without
    loss: for compiled blocks, which make a graph of each shape. normalization: one of trainer.rl.config.NORMALIZATIONS;
    constant: what it divides by. No rollout has more than seq_len + 1 tokens, the last of which is only a label.
    """
    order = pack(np.asarray([len(rollout.tokens) - 1 for rollout in rollouts], dtype=np.int64), seq_len)
    rows = [[rollouts[member] for member in members] for members in order]
    parts = [rows[first : first + micro_batch_size] for first in range(0, len(rows), micro_batch_size)]
    if not few_shapes:
        return [Packed(_batch(part, normalization, constant, step=row_step), part) for part in parts]
    parts = [part + [[]] * (filled_rows(len(part), micro_batch_size) - len(part)) for part in parts]
    return [Packed(_batch(part, normalization, constant, length=seq_len), part) for part in parts]


def filled_rows(rows: int, micro_batch_size: int) -> int:
    """The next eighth of micro_batch_size: few graphs, and few rows that are computed for nothing."""
    step = -(-micro_batch_size // 8)
    return min(micro_batch_size, -(-rows // step) * step)


def in_step(
    batches: Sequence[Batch],
    config: TrainConfig,
    all_gather: Callable[[Any], list[Any]],
    *,
    columns: Sequence[str] = (),
) -> list[Batch]:
    """These micro-batches of whole rows, and empty ones up to the number that the rank with most of them has: sharded
    weights are gathered for each, on all ranks. With parallel.ep_buffer also of the shapes that the others have.

    all_gather: one object of every rank with other prompts. columns: of empty ones. Collective.
    """
    train, step = config.train, row_step(config.parallel)
    of_ranks = all_gather([tuple(batch.tokens.shape) for batch in batches])
    shapes = [
        (max(rows for rows, _ in alike), max(length for _, length in alike))
        for alike in zip_longest(*of_ranks, fillvalue=(1, step))
    ] or [(1, step)]
    of = (train.micro_batch_size, train.seq_len) if train.compile else None
    more = [empty_batch(columns, of=of, row_step=step) for _ in range(len(shapes) - len(batches))]
    together = [*batches, *more]
    if not config.parallel.ep_buffer:
        return together
    return [widened(batch, shape) for batch, shape in zip(together, shapes, strict=True)]


def widened(batch: Batch, shape: tuple[int, ...]) -> Batch:
    """Whole rows, filled up to this shape without loss: for buffers over ep, which are shares of what a rank has."""
    # An empty batch has more than was asked for where no rank has any other.
    more_rows, more = (max(0, size - had) for size, had in zip(shape, batch.tokens.shape, strict=True))
    if more_rows == more == 0:
        return batch

    def fill(tensor: Tensor, value: int = 0) -> Tensor:
        return F.pad(tensor, (0, more, 0, more_rows), value=value)

    assert batch.documents is not None
    return replace(
        batch,
        tokens=fill(batch.tokens),
        labels=fill(batch.labels, IGNORE_INDEX),
        positions=fill(batch.positions),
        documents=fill(batch.documents, int(batch.documents.max()) + 1),  # none sees what it is filled up with
        samples=F.pad(batch.samples, (0, more_rows)),
        columns={name: fill(column) for name, column in batch.columns.items()},
    )


def of_rollouts(packed: Packed, found: Tensor) -> Iterator[tuple[Rollout, list[float]]]:
    """Each rollout of a micro-batch with the numbers of its generated tokens, of those [B, T] of labels."""
    for row, rollouts in zip(found.cpu(), packed.rows, strict=True):
        filled = 0
        for rollout in rollouts:
            end = filled + len(rollout.tokens) - 1
            yield rollout, row[filled:end][_generated(rollout)].tolist()
            filled = end


def optional_columns(rollouts: Sequence[Rollout]) -> list[str]:
    """Those of OPTIONAL that these rollouts have."""
    return [name for name, field in OPTIONAL.items() if any(getattr(rollout, field) for rollout in rollouts)]


def empty_batch(columns: Sequence[str] = (), *, of: tuple[int, int] | None = None, row_step: int = 1) -> Batch:
    """A micro-batch without a label, for a rank that has fewer than another: what it computes counts nothing.

    of: with `few_shapes`, micro_batch_size and seq_len. row_step: of `rollout_batches`.
    """
    shape = (1, row_step) if of is None else (filled_rows(1, of[0]), of[1])
    zeros, positions = torch.zeros(shape, dtype=torch.int64), torch.arange(shape[1]).repeat(shape[0], 1)
    batch = Batch(zeros, torch.full_like(zeros, IGNORE_INDEX), positions, zeros.int(), zeros[:, 0])
    found = {name: torch.zeros(shape) for name in (*FLOATS, *columns)}
    return batch.with_columns(**found, sequence=zeros)


def filled_length(longest: int, row_step: int) -> int:
    """Of rows: the next multiple of row_step."""
    return -(-longest // row_step) * row_step


def _batch(
    rows: list[list[Rollout]], normalization: str, constant: int, *, length: int | None = None, step: int = 1
) -> Batch:
    """length: of the rows; None: of the longest, to a multiple of step. Rows may be empty."""
    longest = max(sum(len(rollout.tokens) - 1 for rollout in row) for row in rows)
    length = length or filled_length(longest, step)
    integers = {name: torch.zeros(len(rows), length, dtype=torch.int64) for name in ("tokens", "positions", "sequence")}
    optional = optional_columns([rollout for row in rows for rollout in row])
    floats = {name: torch.zeros(len(rows), length) for name in (*FLOATS, *optional)}
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)
    documents = torch.zeros(len(rows), length, dtype=torch.int32)
    for number, row in enumerate(rows):
        filled = 0
        for place, rollout in enumerate(row):
            end = filled + len(rollout.tokens) - 1
            here = slice(filled, end)
            tokens = torch.tensor(rollout.tokens)
            learned = _generated(rollout)
            integers["tokens"][number, here] = tokens[:-1]
            integers["positions"][number, here] = torch.arange(end - filled)
            integers["sequence"][number, here] = place
            documents[number, here] = place
            labels[number, here] = torch.where(learned, tokens[1:], IGNORE_INDEX)
            share = {"sequence": 1 / rollout.num_generated, "token": 1.0, "constant": 1 / constant}[normalization]
            advantages = torch.tensor(rollout.advantages) if rollout.advantages else rollout.advantage
            floats["advantage"][number, here][learned] = advantages
            floats["weight"][number, here][learned] = share
            floats["sampler"][number, here][learned] = torch.tensor(rollout.logprobs)
            for name in optional:
                floats[name][number, here][learned] = torch.tensor(getattr(rollout, OPTIONAL[name]))
            floats["last"][number, filled + rollout.spans[-1][1] - 2] = 1.0
            filled = end
        # What is left of the row is a document of its own.
        documents[number, filled:] = len(row)
        integers["positions"][number, filled:] = torch.arange(length - filled)
    samples = torch.tensor([row[0].number * 2**16 + row[0].sample if row else 0 for row in rows])
    batch = Batch(integers["tokens"], labels, integers["positions"], documents, samples)
    return batch.with_columns(**floats, sequence=integers["sequence"])


def _generated(rollout: Rollout) -> Tensor:
    """[n - 1] bool: which of the tokens behind the first were generated."""
    found = torch.zeros(len(rollout.tokens) - 1, dtype=torch.bool)
    for begin, end in rollout.spans:
        found[begin - 1 : end - 1] = True
    return found
