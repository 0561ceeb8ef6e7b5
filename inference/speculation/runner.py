"""SpeculativeRunner: a ModelRunner whose steps compute drafted tokens behind a sequence's own and keep what stands.

A step of a sequence with k drafts is a chunk of 1 + k tokens through the same paged cache; its logits say which drafts
stand, and one token more. Keys and values of drafts that do not stand are overwritten by the tokens that take their
places before anybody reads them, and a block is shared only when it is full of tokens that stand.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.batch import Batch, pack, unpack
from inference.blocks import Copy
from inference.config import EngineConfig
from inference.constraints import Constraint, allowed_bits
from inference.graphs import GraphKey, GraphSizes, StepGraphs
from inference.memory import Demand, GraphSize
from inference.pages import make_copies
from inference.ranks import agreed, agreed_tokens
from inference.runner import Launched, ModelRunner, Result, evaluating, next_of_prompt
from inference.sampling import Rows, Sampled, sample
from inference.scheduler import Chunk, Step
from inference.sequence import PENDING, Sequence
from inference.speculation.config import SpeculationConfig
from inference.speculation.counts import DraftCounts
from inference.speculation.drafter import Drafter, Followed, Wanted
from inference.speculation.policy import Policy
from inference.speculation.rejection import Drafts, Places, keep_or_draw
from models.decoder import Decoder
from models.layers.paged_cache import PagedCache

MAX_GRAPH_TOKENS = 256
"""Of a step that has a graph, which keeps the logits of all of them in memory."""


def state_keys(config: EngineConfig, drafts: int, *, follows: bool) -> list[GraphKey]:
    """Passes that are captured for sequences with drafts; and for those without, if a drafter follows their states."""
    sizes = GraphSizes(config.max_sequences, config.max_batch_tokens, config.graph_sizes).sizes
    keys = [GraphKey(False, size, size * (1 + drafts)) for size in sizes]
    keys += [GraphKey(True, size, size) for size in sizes if follows]
    return [key for key in keys if key.tokens <= MAX_GRAPH_TOKENS]


class Seen(NamedTuple):
    """What the model was given and gave: N tokens of S chunks, R rows of logits."""

    logits: Tensor  # [R, V]
    hidden: Tensor  # [N, D]
    tokens: Tensor  # [N]
    positions: Tensor  # [N]
    block_tables: Tensor  # [S, M]
    of_prompts: dict[int, Tensor]  # log-probabilities, by number of the chunk


@dataclass
class Speculation:
    """What an engine needs to speculate. Made by inference/speculation/build.py."""

    config: SpeculationConfig
    drafter: Drafter


class _Rows:
    """Which rows of a step's tokens get logits: the last token of each chunk that samples, and its drafts."""

    def __init__(self, chunks: list[Chunk], counts: list[int]) -> None:
        self.sampling = [number for number, chunk in enumerate(chunks) if chunk.samples]
        self.chunks = [c._replace(num_tokens=c.num_tokens + k) for c, k in zip(chunks, counts, strict=True)]
        self.ends = np.cumsum([chunk.num_tokens for chunk in self.chunks])
        per = np.array([1 + counts[number] for number in self.sampling], dtype=np.int64)
        self.starts = np.cumsum(per) - per  # of each sampling chunk, among the rows
        self.owners = np.repeat(np.arange(len(per)), per)
        self.offsets = np.arange(int(per.sum())) - self.starts[self.owners]
        self.per = per
        self.only_decode = all(chunk.samples and chunk.num_tokens == 1 for chunk in chunks)
        first = self.ends[self.sampling] - per
        self.tokens = first[self.owners] + self.offsets  # rows among the step's tokens
        self.drafted = self.offsets + 1 < per[self.owners]  # the row's token has a draft, the next row's


class SpeculativeRunner(ModelRunner):
    """Launches steps with drafts (`plan_drafts` says how many), and those without as any."""

    def __init__(self, model: Decoder, config: EngineConfig, speculation: Speculation) -> None:
        self.drafter, self.speculation = speculation.drafter, speculation.config
        super().__init__(model, config, extra_block_bytes=self.drafter.block_bytes(config))
        self.drafter.start(config, self)
        self.policy = Policy(self.speculation)
        self._state_graphs: StepGraphs | None = None
        if self.graphs is not None:
            sizes = config.max_sequences, config.max_batch_tokens, config.graph_sizes
            self._state_graphs = StepGraphs(self._decode_states, self._mixed_states, *sizes)
        self._planned = False  # whether the next step may have drafts
        self._active: list[bool] = []  # the same of the steps whose results are not known yet
        self._before: tuple[bool, bool] | None = None  # whether the last step was active, and had anything in it
        self._ended = 0.0  # when its results were known

    def _demand(self, config: EngineConfig) -> Demand:
        demand, drafts = super()._demand(config), self.speculation.num_tokens
        states = state_keys(config, drafts, follows=self.drafter.follows) if demand.graphs else []
        return demand._replace(
            rows=min(demand.rows * (1 + drafts), config.max_batch_tokens),
            graphs=[*demand.graphs, *(GraphSize(key.tokens, key.tokens, key.tokens) for key in states)],
            extra=self.drafter.working_bytes(config),
        )

    def warm_up(self) -> int:
        captured = super().warm_up() + self.drafter.warm_up()
        if self._state_graphs is None:
            return captured
        keys = state_keys(self.config, self.speculation.num_tokens, follows=self.drafter.follows)
        with torch.no_grad(), evaluating(self.model):
            self._state_graphs.capture(keys, self._tables.nobody)
        return captured + len(keys)

    def must_know_tokens(self) -> bool:
        """Whether the next step may have drafts, so that the results of those before it are needed."""
        return self.policy.active

    def plan_drafts(self, chunks: list[Chunk]) -> list[int]:
        """How many drafts each of a step's chunks could have."""
        continued = [chunk.samples and chunk.num_tokens == 1 and chunk.first > 0 for chunk in chunks]
        self.policy.consider(sum(continued))
        # One that was not active when the step before was launched may not know its tokens yet.
        known = all(chunk.sequence.tokens[-1] != PENDING for chunk in chunks)
        self._planned = self.policy.active and known
        if not self._planned:
            return [0] * len(chunks)
        return [self._wanted(chunk) if one else 0 for chunk, one in zip(chunks, continued, strict=True)]

    def _wanted(self, chunk: Chunk) -> int:
        sequence = chunk.sequence
        if not sequence.sampling.speculate:
            return 0
        left = sequence.num_prompt + sequence.max_tokens - len(sequence.tokens)
        most = min(self.speculation.num_tokens, left - 1)  # one more comes with them
        return self.drafter.wanted(sequence, most) if most > 0 else 0

    @torch.no_grad()
    def launch(self, step: Step) -> Launched:
        if step.chunks:
            self._active.append(self._planned)
        if not any(step.num_drafts) and not self.drafter.follows:
            return super().launch(step)
        self._copy(step.copies)
        if not step.chunks:
            return Launched(step.chunks, [], None, {}, None)
        drafted = zip(step.chunks, step.num_drafts or [0] * len(step.chunks), strict=True)
        chunks, counts = zip(*sorted(drafted, key=lambda one: one[0].first != 0), strict=True)  # as `_fresh` wants them
        rows = _Rows(list(chunks), list(counts))
        sequences = [chunks[number].sequence for number in rows.sampling]
        table_rows = self._tables.rows([chunk.sequence for chunk in chunks])
        places = Places(sequences, vocab_size=self.model.config.vocab_size, device=self.device)
        drafts = self._draft(rows, table_rows, places) if any(counts) else None
        with evaluating(self.model):
            seen = self._forward_drafted(rows, table_rows, drafts)
        sampled, of_rows, accepted = None, None, None
        if rows.sampling:
            masks = self._masks(sequences, rows, drafts)
            sampled, of_rows = self._verify(seen.logits, rows, places, drafts, masks)
            sampled = agreed(sampled, self.model.groups.tp)
            accepted = self._accepted(sampled.tokens, of_rows, rows)
            last = sampled.tokens[self._tensor(rows.starts, torch.int64) + accepted]
            self.give([table_rows[number] for number in rows.sampling], last)
        if self.drafter.follows:
            self._show(seen, rows, accepted)
        sampling = [rows.sampling[owner] for owner in rows.owners]
        return self._on_its_way(
            Launched(list(chunks), sampling, sampled, seen.of_prompts, None, None if drafts is None else of_rows)
        )

    def results(self, launched: Launched) -> list[Result]:
        if launched.drafts is None:
            results = super().results(launched)
        else:
            results = self._results_of_rows(launched)
        self._observe(launched, results)
        return results

    def _draft(self, rows: _Rows, table_rows: list[int], places: Places) -> Drafts:
        """Drafts for all sampling chunks, [S, K], zeros where there are none."""
        wanted = [
            Wanted(rows.chunks[number].sequence, owner, table_rows[number], int(rows.per[owner]) - 1)
            for owner, number in enumerate(rows.sampling)
            if rows.per[owner] > 1
        ]
        found = self.drafter.draft(wanted, places)
        # A draft model is whole on every rank of tp, and may round otherwise there.
        found = found._replace(tokens=agreed_tokens(found.tokens.contiguous(), self.model.groups.tp))
        if len(wanted) == len(rows.sampling):
            return found
        owners = self._tensor([one.owner for one in wanted], torch.int64)

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(len(rows.sampling), *x.shape[1:]).index_copy(0, owners, x)

        return Drafts(spread(found.tokens), None if found.probabilities is None else spread(found.probabilities))

    def _forward_drafted(self, rows: _Rows, table_rows: list[int], drafts: Drafts | None) -> Seen:
        """The model on a step's tokens and drafts."""
        targets = {n: found for n, chunk in enumerate(rows.chunks) if (found := next_of_prompt(chunk))}
        size = None if targets or not rows.only_decode else self._size_of_graph(rows, drafted=drafts is not None)
        packed = self._tensor(pack(rows.chunks, table_rows, self._tables.nobody, size), torch.int64)
        if drafts is not None:
            of_drafts = np.stack([rows.tokens + 1, rows.owners, rows.offsets])[:, rows.drafted]
            place, owner, offset = self._tensor(of_drafts, torch.int64)
            packed = packed.index_put((place,), drafts.tokens[owner, offset])  # tokens are the first of what is packed
        wanted = self._tensor(rows.tokens, torch.int64)
        num_sequences = len(rows.chunks) if size is None else size[0]
        batch = unpack(packed, num_sequences)
        of_prompts: dict[int, Tensor] = {}
        if size is None:
            cache, states = self._cache(batch)._replace(fresh=self._fresh(rows.chunks)), list[Tensor]()
            logits, of_prompts = self._logits(batch, cache, wanted, rows.chunks, targets, states)
            hidden = states[0]
        else:
            num_tokens, decodes = len(rows.tokens), drafts is None
            if self._state_graphs is None:
                logits, hidden = (self._decode_states if decodes else self._mixed_states)(packed, num_sequences)
            else:
                logits, hidden = self._state_graphs.run(packed, size, decodes=decodes)
            logits, hidden = logits[:num_tokens], hidden[:num_tokens]  # of each token: all are wanted
            batch = batch._replace(tokens=batch.tokens[:num_tokens], token_rows=batch.token_rows[:num_tokens])
        tables = self._tables.tables[batch.rows[: len(rows.chunks)]]
        return Seen(logits, hidden, self._known(batch), batch.positions[: len(hidden)], tables, of_prompts)

    def _size_of_graph(self, rows: _Rows, *, drafted: bool) -> tuple[int, int] | None:
        """What a step that only continues sequences is padded to; None: it is too large for a graph."""
        if self._state_graphs is None:
            return len(rows.chunks), len(rows.tokens)
        found = self._state_graphs.size_of(len(rows.chunks), len(rows.chunks), decodes=True)
        if found is None:
            return None
        sequences, _ = found
        tokens = sequences * (1 + self.speculation.num_tokens) if drafted else sequences
        return (sequences, tokens) if tokens <= MAX_GRAPH_TOKENS else None

    def _decode_states(self, packed: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and hidden states [N, D] of one token of each sequence. Nothing here looks at the device."""
        batch = unpack(packed, sequences)
        return self._all_states(batch, self._cache(batch)._replace(decodes=True))

    def _mixed_states(self, packed: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """The same of any number of tokens of each."""
        batch = unpack(packed, sequences)
        return self._all_states(batch, self._cache(batch))

    def _all_states(self, batch: Batch, cache: PagedCache) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        logits, _ = self._logits(batch, cache, torch.arange(len(batch.tokens), device=self.device), states=states)
        return logits, states[0]

    def _masks(self, sequences: list[Sequence], rows: _Rows, drafts: Drafts | None) -> Tensor | None:
        """What each row may be behind the drafts before it, [R, W] int32; None: nobody with drafts has a constraint.

        Grammars are kept on the host, so drafts are waited for. One that its grammar forbids does not stand, as the
        model gives it no probability; whatever lies behind it is not looked at.
        """
        limited = [one.constraint is not None and rows.per[owner] > 1 for owner, one in enumerate(sequences)]
        if drafts is None or not any(limited):
            return None
        tokens = drafts.tokens.tolist()
        states: list[Constraint | None] = []
        for owner, sequence in enumerate(sequences):
            behind = int(rows.per[owner]) - 1
            constraint = sequence.constraint
            states.append(constraint)
            states += [None] * behind if constraint is None else constraint.along(tokens[owner][:behind])
        return self._tensor(allowed_bits(states, vocab_size=self.model.config.vocab_size), torch.int32)

    def _verify(
        self, logits: Tensor, rows: _Rows, places: Places, drafts: Drafts | None, masks: Tensor | None
    ) -> tuple[Sampled, Tensor]:
        """The token of each row as if all drafts before it stood, and the row's own draft (-1: none), [R]."""
        owners, offsets, drafted = self._tensor(np.stack([rows.owners, rows.offsets, rows.drafted]), torch.int64)
        invariant = self.model.batch_invariant
        on_host = places.settings.on_host.of_rows(rows.owners)
        if drafts is None:
            settings = places.behind(owners, offsets)._replace(on_host=on_host)
            return sample(logits, settings, batch_invariant=invariant), torch.full_like(owners, -1)
        settings = places.behind(owners, offsets, drafts.tokens)
        settings = settings if masks is None else settings._replace(allowed=masks)
        offsets = offsets.clamp(max=drafts.tokens.shape[1] - 1)
        of_rows = drafts.tokens[owners, offsets].where(drafted == 1, -1)
        pick = None
        if (of_drafts := drafts.probabilities) is not None:
            # A row without a draft is sampled as in a step without any.
            plain = [plain and not one for plain, one in zip(on_host.plain, rows.drafted, strict=True)]
            on_host = on_host._replace(plain=plain)

            def pick(p: Tensor, index: Tensor, some: Rows) -> Tensor:
                q = of_drafts[owners[some], offsets[some]] * drafted[some, None]
                return keep_or_draw(p, index, drafts=of_rows[some], q=q)

        return sample(logits, settings._replace(on_host=on_host), pick, batch_invariant=invariant), of_rows

    def _accepted(self, tokens: Tensor, of_rows: Tensor, rows: _Rows) -> Tensor:
        """How many drafts of each sampling chunk stand: [S] int64."""
        most = int(rows.per.max())
        starts, per = self._tensor(np.stack([rows.starts, rows.per]), torch.int64)
        offset = torch.arange(most, device=self.device)
        index = (starts[:, None] + offset).clamp(max=tokens.shape[0] - 1)
        stands = (tokens == of_rows)[index] & (offset + 1 < per[:, None])
        return stands.to(torch.int64).cumprod(1).sum(1)

    def _show(self, seen: Seen, rows: _Rows, accepted: Tensor | None) -> None:
        """Let the drafter see the step."""
        counts = np.array([chunk.num_tokens for chunk in rows.chunks])
        starts = rows.ends - counts
        owners = self._tensor(np.repeat(np.arange(len(counts)), counts), torch.int64)
        last = self._tensor(rows.ends - 1, torch.int64)
        if accepted is not None:
            numbers, known = self._tensor(np.stack([rows.sampling, rows.ends[rows.sampling] - rows.per]), torch.int64)
            last = last.index_copy(0, numbers, known + accepted)
        self.drafter.follow(
            Followed(
                hidden=seen.hidden,
                tokens=seen.tokens,
                positions=seen.positions,
                owners=owners,
                stands=torch.arange(seen.tokens.shape[0], device=self.device) <= last[owners],
                last=last,
                starts=starts.tolist(),
                first=[chunk.first for chunk in rows.chunks],
                block_tables=seen.block_tables,
            )
        )

    def _results_of_rows(self, launched: Launched) -> list[Result]:
        """`results` of a step some of whose chunks have several rows."""
        assert launched.drafts is not None
        by_row = launched._replace(
            chunks=[launched.chunks[number] for number in launched.sampling],
            sampling=list(range(len(launched.sampling))),
            of_prompts={},
        )
        rows = zip(launched.sampling, super().results(by_row), launched.drafts.tolist(), strict=True)
        results = [Result() for _ in launched.chunks]
        for number, group in groupby(rows, key=lambda row: row[0]):
            _, found, drafts = zip(*group, strict=True)
            accepted = 0
            while found[accepted].token == drafts[accepted]:  # the last row has no draft
                accepted += 1
            results[number] = replace(found[0], then=list(found[1 : accepted + 1]))
            if len(drafts) > 1:
                chunk = launched.chunks[number]
                self.policy.counts.add(len(drafts) - 1, accepted)
                self._of_request(chunk.sequence).add(len(drafts) - 1, accepted)
                self.drafter.settle(chunk.sequence, chunk.end + accepted)
        for number, logprobs in launched.of_prompts.items():
            results[number].prompt_logprobs = logprobs.tolist()
        return results

    def _of_request(self, sequence: Sequence) -> DraftCounts:
        if sequence.completion.speculation is None:
            sequence.completion.speculation = DraftCounts()
        return sequence.completion.speculation

    def _observe(self, launched: Launched, results: list[Result]) -> None:
        """Tell the policy of a step. Its time is the one since the step before, where both were of one kind."""
        now = time.perf_counter()
        seconds, self._ended = now - self._ended, now
        active = self._active.pop(0)
        comparable, self._before = self._before == (active, bool(launched.chunks)), (active, bool(launched.chunks))
        continued = [number for number, c in enumerate(launched.chunks) if c.samples and c.num_tokens == 1]
        total = sum(chunk.num_tokens for chunk in launched.chunks)
        rows = len(continued)
        if launched.drafts is not None:
            rows += sum(draft >= 0 for draft in launched.drafts.tolist())
        self.policy.observe(
            sequences=len(continued),
            computed=rows,
            given=sum(1 + len(results[number].then) for number in continued),
            prompts=total - len(continued),
            active=active,
            seconds=seconds if comparable else None,
        )

    def _copy(self, copies: list[Copy]) -> None:
        super()._copy(copies)
        make_copies(copies, self.drafter.paged)
