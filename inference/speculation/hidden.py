"""Drafters that go on from the model's hidden states: Medusa, EAGLE-style heads, and a model's own MTP block.

The newest hidden state of each block of the cache is kept beside it: that is where a sequence goes on, also one that
found its beginning in the prefix cache, or was swapped.

S sequences, N tokens of a step, D hidden_size, P blocks of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from inference.config import EngineConfig
from inference.pages import Pages, make_pages
from inference.runner import ModelRunner, evaluating
from inference.sampling import wide
from inference.sequence import Sequence
from inference.speculation.config import SpeculationConfig
from inference.speculation.drafter import Followed, Wanted, distribution_bytes
from inference.speculation.rejection import Drafts, Places, propose, to_device
from models.decoder import Decoder
from models.layers.attention import Context, build_context
from models.layers.paged_cache import PagedCache
from models.speculator import MedusaHead, Speculator


class HiddenStates:
    """[1, P + 1, D]: of each block the hidden state of its newest token that stands; the last row is nobody's."""

    def __init__(self, config: EngineConfig, runner: ModelRunner) -> None:
        like, size = next(runner.model.parameters()), runner.model.config.hidden_size
        self.block_size, self.nobody = config.block_size, runner.num_blocks
        self.states = torch.zeros(1, runner.num_blocks + 1, size, dtype=like.dtype, device=like.device)
        self.host = torch.zeros(1, config.host_blocks, size, dtype=like.dtype, pin_memory=like.is_cuda)

    def keep(self, seen: Followed) -> None:
        """Those of a step: the last of each sequence, and the last of each block that was filled."""
        newest = torch.zeros_like(seen.stands).index_fill(0, seen.last, True)
        fills = seen.positions % self.block_size == self.block_size - 1
        blocks = seen.block_tables[seen.owners, seen.positions // self.block_size].to(torch.int64)
        places = blocks.where(seen.stands & (fills | newest), self.nobody)
        self.states[0].index_copy_(0, places, seen.hidden)

    def behind(self, wanted: Seq[Wanted]) -> Tensor:
        """[S, D]: that of the token before each sequence's last one, from which the last one was made."""
        blocks = [one.sequence.blocks[(len(one.sequence.tokens) - 2) // self.block_size] for one in wanted]
        return self.states[0, to_device(blocks, self.states.device)]


class _FromHidden:
    """What both kinds share."""

    follows = True

    def __init__(self, config: SpeculationConfig, model: Decoder) -> None:
        self._config, self._model = config, model
        self.paged: list[tuple[Tensor, Tensor]] = []

    def block_bytes(self, config: EngineConfig) -> int:
        return self._model.config.hidden_size * next(self._model.parameters()).itemsize

    def working_bytes(self, config: EngineConfig) -> int:
        itemsize = next(self._model.parameters()).itemsize
        return distribution_bytes(self._config, config, self._model.config.vocab_size, itemsize)

    def warm_up(self) -> int:
        return 0  # its passes have no graphs

    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        self._hidden = HiddenStates(config, runner)
        self.paged.append((self._hidden.states, self._hidden.host))

    def wanted(self, sequence: Sequence, most: int) -> int:
        return most

    def settle(self, sequence: Sequence, num_tokens: int) -> None:
        pass

    def _chain(
        self, wanted: Seq[Wanted], places: Places, logits_of: Callable[[int, list[int], Tensor], Tensor]
    ) -> Drafts:
        """Drafts place by place: logits_of(offset, numbers of `wanted` that get one, drafts so far) are [R, V]."""
        most = max(one.num_drafts for one in wanted)
        device = places.lengths.device
        drafts = torch.zeros(len(wanted), most, dtype=torch.int64, device=device)
        spread = torch.zeros(places.lengths.shape[0], most, dtype=torch.int64, device=device)
        q: Tensor | None = None
        for offset in range(most):
            here = [number for number, one in enumerate(wanted) if one.num_drafts > offset]
            of = to_device(here, device)
            owners = to_device([wanted[number].owner for number in here], device)
            logits = wide(logits_of(offset, here, drafts))
            settings = places.behind(owners, torch.full_like(owners, offset), spread[:, :offset])
            tokens, of_these = propose(logits, settings, sampled=self._config.drafts == "sampled")
            drafts[of, offset] = tokens
            spread[owners, offset] = tokens
            if of_these is not None:
                q = of_these.new_zeros(len(wanted), most, of_these.shape[1]) if q is None else q
                q[of, offset] = of_these
        return Drafts(drafts, q)


class MedusaDrafter(_FromHidden):
    """Head j drafts the token j places behind the next one, knowing nothing of the drafts before it."""

    def __init__(self, config: SpeculationConfig, model: Decoder, heads: Speculator) -> None:
        super().__init__(config, model)
        self._heads = heads

    def wanted(self, sequence: Sequence, most: int) -> int:
        return min(most, len(self._heads.blocks))

    def draft(self, wanted: Seq[Wanted], places: Places) -> Drafts:
        hidden = self._hidden.behind(wanted)

        def logits_of(offset: int, here: list[int], drafts: Tensor) -> Tensor:
            head = self._heads.blocks[offset]
            assert isinstance(head, MedusaHead)
            return head.logits(hidden[to_device(here, hidden.device)])

        return self._chain(wanted, places, logits_of)

    def follow(self, seen: Followed) -> None:
        self._hidden.keep(seen)

    def describe(self) -> str:
        return f"Medusa, {len(self._heads.blocks)} heads"


class _HeadCache(PagedCache):
    """The pages of one layer, whatever its number."""

    def attend(self, layer: int, *args: object, **options: object) -> Tensor:
        return super().attend(0, *args, **options)  # type: ignore[arg-type]


class BlockDrafter(_FromHidden):
    """A block that makes the next hidden state of one and the token it gave; the model's output layer reads it.

    Its keys lie in pages of their own under the block tables of the engine. The one made of the hidden state at i and
    token i + 1 has the place of that token, so that what a block of the cache holds depends on no token behind it, and
    can be shared as the model's keys are. Nothing is at place 0: tables are read as pages of one token, from place 1.
    """

    def __init__(self, config: SpeculationConfig, model: Decoder, block: Block, what: str) -> None:
        super().__init__(config, model)
        self._block, self._what = block, what

    def block_bytes(self, config: EngineConfig) -> int:
        return super().block_bytes(config) + self._pages(config, 1, torch.device("meta")).nbytes

    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        super().start(config, runner)
        here = self._pages(config, runner.num_blocks, runner.device)
        there = self._pages(config, config.host_blocks, torch.device("cpu"), pin=runner.device.type == "cuda")
        self.paged += [(x, y) for x, y in zip(here, there, strict=True) if x is not None and y is not None]
        # The same memory as pages of one token.
        self._keys, self._values = (None if x is None else x.flatten(1, 2)[:, :, None] for x in here[:2])
        self._tables, self._max_seq_len = runner.block_tables, runner.max_seq_len
        self._block_size = config.block_size

    def draft(self, wanted: Seq[Wanted], places: Places) -> Drafts:
        hidden = self._hidden.behind(wanted)
        device = hidden.device
        last = to_device([one.sequence.tokens[-1] for one in wanted], device)
        lengths = to_device([len(one.sequence.tokens) for one in wanted], device)
        tables = self._tables[to_device([one.row for one in wanted], device)]
        furthest = max(len(one.sequence.tokens) + one.num_drafts for one in wanted)
        tables = tables[:, : -(-furthest // self._block_size)]

        def logits_of(offset: int, here: list[int], drafts: Tensor) -> Tensor:
            nonlocal hidden
            of = to_device(here, device)
            tokens = last[of] if offset == 0 else drafts[of, offset - 1]
            owners = torch.arange(len(here), device=device)
            states = self._next(hidden[of], tokens, lengths[of] - 1 + offset, owners, tables[of])
            hidden = hidden.index_copy(0, of, states)
            return self._read(states)

        with evaluating(self._model):
            return self._chain(wanted, places, logits_of)

    def follow(self, seen: Followed) -> None:
        """Make the keys of a step's tokens, of the model's own hidden states."""
        begun = [number for number, first in enumerate(seen.first) if first > 0]
        before = seen.hidden.roll(1, 0)
        device = before.device
        if begun:
            of = to_device(begun, device)
            rows = to_device([seen.starts[number] for number in begun], device)
            last = to_device([seen.first[number] - 1 for number in begun], device)
            blocks = seen.block_tables[of, last // self._block_size].to(torch.int64)
            before = before.index_copy(0, rows, self._hidden.states[0, blocks])
        self._hidden.keep(seen)
        first_of_all = [start for start, position in zip(seen.starts, seen.first, strict=True) if position == 0]
        with_one_before = np.delete(np.arange(seen.tokens.shape[0]), first_of_all)
        if not with_one_before.size:
            return
        rows = to_device(with_one_before, device)
        with evaluating(self._model):
            self._next(before[rows], seen.tokens[rows], seen.positions[rows], seen.owners[rows], seen.block_tables)

    def describe(self) -> str:
        return self._what

    def _pages(self, config: EngineConfig, blocks: int, device: torch.device, *, pin: bool = False) -> Pages:
        """Of one layer, in the dtype of the weights whatever the model's own cache is in."""
        dtype, plain = next(self._model.parameters()).dtype, replace(config, cache_dtype="auto")
        return make_pages(self._model, plain, blocks, dtype, device, pin=pin, num_layers=1)

    def _next(self, hidden: Tensor, tokens: Tensor, positions: Tensor, owners: Tensor, tables: Tensor) -> Tensor:
        """The next hidden states [N, D] of hidden [N, D] and the tokens [N] they gave, which are at `positions` of
        sequences `owners` (ascending) with the block tables [S, M]."""
        model, num_sequences = self._model, tables.shape[0]
        assert model.embedding is not None
        assert self._keys is not None
        counts = positions.new_zeros(num_sequences).index_add(0, owners, torch.ones_like(owners))
        lengths = torch.zeros_like(counts).scatter_reduce(0, owners, positions, "amax")
        within = torch.arange(self._block_size, device=tables.device, dtype=torch.int32)
        slots = (tables[:, :, None] * self._block_size + within).flatten(1)
        cache = _HeadCache(
            keys=self._keys,
            values=self._values,
            slots=slots[owners, positions].to(torch.int64),
            block_tables=slots[:, 1:].contiguous(),
            query_starts=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
            lengths=lengths.to(torch.int32),
            max_seq_len=self._max_seq_len,
        )
        context = build_context(
            model.config,
            seq_len=self._max_seq_len,
            device=hidden.device,
            dtype=hidden.dtype,
            positions=positions[None] - 1,
            documents=None,
            samples=None,
            cache=cache,
        )
        return self._block(hidden[None], model.embedding(tokens)[None], context)[0]

    def _read(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D]."""
        head = self._model.head
        assert head is not None
        return head(*head.inputs(hidden, self._model.output_weight()))


Block = Callable[[Tensor, Tensor, Context], Tensor]


def mtp_drafter(config: SpeculationConfig, model: Decoder) -> BlockDrafter:
    """The first of the model's own blocks of multi-token prediction, again and again."""
    block = model.blocks.get_submodule(str(model.config.num_layers))
    depth = model.config.mtp.depth
    what = "the model's block of multi-token prediction" + (f" (the first of {depth})" if depth > 1 else "")
    return BlockDrafter(config, model, lambda hidden, embedded, context: block(hidden, embedded, context=context), what)
