"""Drafter: whoever proposes the next tokens of sequences before the model computes them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from torch import Tensor

from inference.config import EngineConfig
from inference.memory import SAMPLING_BYTES
from inference.runner import ModelRunner
from inference.sequence import Sequence
from inference.speculation.config import SpeculationConfig
from inference.speculation.rejection import Drafts, Places


class Wanted(NamedTuple):
    """A sequence that is to have drafts in a step. Filled by SpeculativeRunner."""

    sequence: Sequence  # behind by its last token alone
    owner: int  # its number in Places
    row: int  # of the block tables
    num_drafts: int  # that there is room for


class Followed(NamedTuple):
    """What the model computed in a step, for a drafter that goes on from hidden states. Filled by SpeculativeRunner.

    N tokens of S sequences, one behind the other.
    """

    hidden: Tensor  # [N, D]: the model's last, normalised
    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    owners: Tensor  # [N] int64: numbers of the sequences here
    stands: Tensor  # [N] bool; false: a draft that does not
    last: Tensor  # [S] int64: rows of the last tokens that stand
    starts: list[int]  # rows of their first tokens
    first: list[int]  # positions of these
    block_tables: Tensor  # [S, M] int32


class Drafter(Protocol):
    """What a way to draft has to be able to do. Nothing it does can change what the engine gives out but in speed."""

    follows: bool
    """Whether it has to see every step of the model (`follow`)."""

    paged: list[tuple[Tensor, Tensor]]
    """Tensors [L, P, ...] by block of the engine's cache, and on the host, which move when a sequence is swapped."""

    def block_bytes(self, config: EngineConfig) -> int:
        """Device memory that it takes for each block of the engine's cache."""
        ...

    def working_bytes(self, config: EngineConfig) -> int:
        """Device memory that it takes besides: distributions of drafts, and graphs of its own."""
        ...

    def warm_up(self) -> int:
        """Capture its graphs before they are needed; how many."""
        ...

    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        """Called once, when the engine's cache is there; both are the engine's."""
        ...

    def wanted(self, sequence: Sequence, most: int) -> int:
        """How many tokens it would draft behind a sequence whose tokens are all known; `most` at most."""
        ...

    def draft(self, wanted: Seq[Wanted], places: Places) -> Drafts:
        """Drafts for some sequences, in their order; a row has as many as the largest count, zeros behind its own."""
        ...

    def follow(self, seen: Followed) -> None:
        """Look at what the model has computed. Called for every step if it `follows`, on the device's stream."""
        ...

    def settle(self, sequence: Sequence, num_tokens: int) -> None:
        """Of what it drafted behind a sequence, the tokens up to num_tokens of it stood."""
        ...

    def describe(self) -> str:
        """What it is, in a line."""
        ...


def distribution_bytes(config: SpeculationConfig, engine: EngineConfig, vocab_size: int, itemsize: int) -> int:
    """Of drawing drafts for all sequences, place by place: logits, probabilities and their sums, and what each draft
    was drawn from, which is kept until the model has judged it."""
    rows, wide = engine.max_sequences * vocab_size, max(itemsize, 4)
    if config.drafts != "sampled":
        return rows * wide * 3
    return rows * (SAMPLING_BYTES * wide // 4 + wide * config.num_tokens)


class SeesTokensOnly:
    """The parts of a Drafter that keeps nothing beside the engine's cache."""

    follows = False
    paged: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012

    def block_bytes(self, config: EngineConfig) -> int:
        return 0

    def working_bytes(self, config: EngineConfig) -> int:
        return 0

    def warm_up(self) -> int:
        return 0

    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        pass

    def follow(self, seen: Followed) -> None:
        raise AssertionError(f"{type(self).__name__} does not follow, and is told nothing")

    def settle(self, sequence: Sequence, num_tokens: int) -> None:
        pass
