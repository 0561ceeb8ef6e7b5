"""A smaller model of the same vocabulary drafts, with a paged cache of its own."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from inference.blocks import BlockManager
from inference.config import EngineConfig, longest
from inference.memory import working_memory
from inference.pages import make_pages
from inference.runner import ModelRunner, demand_of
from inference.sampling import wide
from inference.scheduler import Chunk
from inference.sequence import Sequence, Status
from inference.speculation.config import SpeculationConfig
from inference.speculation.drafter import SeesTokensOnly, Wanted, distribution_bytes
from inference.speculation.rejection import Drafts, Places, propose, to_device
from models.decoder import Decoder


class DraftModel(SeesTokensOnly):
    """Drafts token by token, as an engine of its own would.

    Each sequence has a shadow: the same tokens, with blocks in the drafter's cache. What the shadow is behind (a
    prompt, or tokens that came without drafts) is computed when drafts are wanted, and nothing at other times.
    """

    def __init__(self, config: SpeculationConfig, model: Decoder) -> None:
        self._config, self._model = config, model
        self._shadows: dict[Sequence, Sequence] = {}

    def block_bytes(self, config: EngineConfig) -> int:
        dtype = next(self._model.parameters()).dtype
        return make_pages(self._model, config, 1, dtype, torch.device("meta")).nbytes

    def working_bytes(self, config: EngineConfig) -> int:
        parameter = next(self._model.parameters())
        memory = working_memory(self._model, demand_of(self._model, self._own(config)), parameter.itemsize)
        # Its steps come before the model's, never beside them.
        drawing = distribution_bytes(self._config, config, self._model.config.vocab_size, parameter.itemsize)
        return memory.graphs + drawing

    def warm_up(self) -> int:
        return self._runner.warm_up()

    def _own(self, config: EngineConfig) -> EngineConfig:
        """The engine's settings, as far as this model has positions."""
        own = longest(replace(config, max_seq_len=None), self._model.config)
        return replace(config, host_blocks=0, max_seq_len=min(own, longest(config, self._model.config)))

    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        own = longest(replace(config, max_seq_len=None), self._model.config)
        self._max_seq_len = min(own, runner.max_seq_len)
        self._budget = config.max_batch_tokens
        config = replace(config, num_blocks=runner.num_blocks, host_blocks=0, max_seq_len=self._max_seq_len)
        self._runner = ModelRunner(self._model, config)
        self._blocks = BlockManager(runner.num_blocks, config.block_size, prefix_cache=config.prefix_cache)

    def wanted(self, sequence: Sequence, most: int) -> int:
        return max(0, min(most, self._max_seq_len - len(sequence.tokens)))

    def draft(self, wanted: Seq[Wanted], places: Places) -> Drafts:
        self._release_idle()
        shadows, counts = [], []
        for one in wanted:
            shadow = self._shadow(one.sequence, one.num_drafts)
            shadows.append(shadow)
            counts.append(one.num_drafts if shadow is not None else 0)
        most = max(one.num_drafts for one in wanted)
        drafts = torch.zeros(len(wanted), most, dtype=torch.int64, device=self._runner.device)
        q: Tensor | None = None
        for offset in range(most):
            here = [number for number, count in enumerate(counts) if count > offset]
            if not here:
                break
            of = to_device(here, drafts.device)
            owners = to_device([wanted[number].owner for number in here], drafts.device)
            logits = self._logits([shadow for n in here if (shadow := shadows[n]) is not None], offset)
            before = torch.zeros(places.lengths.shape[0], offset, dtype=torch.int64, device=drafts.device)
            before[owners] = drafts[of, :offset]
            settings = places.behind(owners, torch.full_like(owners, offset), before)
            tokens, of_these = propose(logits, settings, sampled=self._config.drafts == "sampled")
            drafts[of, offset] = tokens
            self._runner.give(self._rows, tokens)
            if of_these is not None:
                if q is None:
                    q = of_these.new_zeros(len(wanted), most, of_these.shape[1])
                q[of, offset] = of_these
        return Drafts(drafts, q)

    def settle(self, sequence: Sequence, num_tokens: int) -> None:
        shadow = self._shadows.get(sequence)
        if shadow is not None:
            shadow.num_computed = min(shadow.num_computed, num_tokens)

    def describe(self) -> str:
        config = self._model.config
        return f"draft model {config.family} of {config.num_layers} layers x {config.hidden_size}"

    def _shadow(self, sequence: Sequence, count: int) -> Sequence | None:
        """With blocks for its tokens and all drafts but the last, whose keys nobody needs; None: no room."""
        shadow = self._shadows.get(sequence)
        if shadow is None:
            shadow = replace(sequence, blocks=[], host_blocks=[], contents=[], num_computed=0, text=None)
            shadow.tokens = sequence.tokens  # the very list: it grows with the sequence
            if not self._blocks.start(shadow):
                return None
            self._shadows[sequence] = shadow
        self._blocks.keep(shadow)
        return shadow if self._blocks.extend(shadow, len(shadow.tokens) + count - 1) else None

    def _release_idle(self) -> None:
        for sequence in [s for s in self._shadows if s.status is not Status.RUNNING]:
            self._blocks.release(self._shadows.pop(sequence))

    def _logits(self, shadows: list[Sequence], offset: int) -> Tensor:
        """[R, V] of the tokens `offset` places behind the next ones, with what the shadows are behind computed."""
        chunks = []
        for shadow in shadows:
            end = len(shadow.tokens) + offset
            chunks.append(Chunk(shadow, end - shadow.num_computed, shadow.num_computed, True))
            shadow.num_computed = end
        logits: list[Tensor] = []
        self._rows: list[int] = []
        while chunks:
            part = self._next_part(chunks)
            rows, found = self._runner.logits(part)
            logits.append(found.clone() if chunks else found)  # the next part may overwrite it
            self._rows += rows
        return wide(torch.cat(logits) if len(logits) > 1 else logits[0])

    def _next_part(self, chunks: list[Chunk]) -> list[Chunk]:
        """Taken off the front of chunks: no more tokens than the engine computes in a step."""
        part, budget = [], self._budget
        while chunks and budget:
            chunk = chunks.pop(0)
            if chunk.num_tokens > budget:
                chunks.insert(0, Chunk(chunk.sequence, chunk.num_tokens - budget, chunk.first + budget, True))
                chunk = Chunk(chunk.sequence, budget, chunk.first, False)
            part.append(chunk)
            budget -= chunk.num_tokens
        return part


def draft_model_problems(model: Decoder, draft: Decoder, path: str | None) -> list[str]:
    """Why `draft` cannot draft for `model`; one line each."""
    name = f"speculation.draft_path={path}" if path is not None else "the draft model"
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        return [
            f"{name} has a vocabulary of {theirs} tokens and the model one of {ours}: their token ids do not mean the "
            "same; use a draft model of the same tokenizer, or speculation.method=ngram"
        ]
    return []
