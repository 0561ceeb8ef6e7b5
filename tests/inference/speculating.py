"""Engines that speculate, and a drafter that is right as often as a test wants."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from typing import Any

import torch

from inference.config import EngineConfig
from inference.engine import Engine
from inference.sequence import Sequence
from inference.speculation.build import build_speculation
from inference.speculation.config import SpeculationConfig
from inference.speculation.drafter import Drafter, SeesTokensOnly, Wanted
from inference.speculation.policy import Policy
from inference.speculation.rejection import Drafts, Places
from inference.speculation.runner import Speculation, SpeculativeRunner
from models.decoder import Decoder


class Scripted(SeesTokensOnly):
    """Knows how sequences go on, and is wrong now and then: every number of drafts stands at times."""

    def __init__(self, texts: Seq[Seq[int]], *, right: float, seed: int = 0) -> None:
        self._texts, self._right, self._chance = [list(text) for text in texts], right, random.Random(seed)

    def wanted(self, sequence: Sequence, most: int) -> int:
        return self._chance.randint(0, most)

    def draft(self, wanted: Seq[Wanted], places: Places) -> Drafts:
        most = max(one.num_drafts for one in wanted)
        tokens = torch.tensor([(self._next(one) + [0] * most)[:most] for one in wanted])
        return Drafts(tokens.to(places.lengths.device))

    def _next(self, one: Wanted) -> list[int]:
        tokens = one.sequence.tokens
        (text,) = [text for text in self._texts if text[: len(tokens)] == tokens][:1] or [[]]
        known = (text[len(tokens) :] + [0] * one.num_drafts)[: one.num_drafts]
        return [token if self._chance.random() < self._right else self._chance.randrange(61) for token in known]

    def describe(self) -> str:
        return "scripted"


class Flipping(Policy):
    """Switches by chance."""

    def __init__(self, config: SpeculationConfig, seed: int) -> None:
        super().__init__(config)
        self._chance = random.Random(seed)

    def consider(self, sequences: int) -> None:
        self.counts.speculating = self._chance.random() < 0.7


def speculating(
    model: Decoder,
    config: EngineConfig,
    *,
    drafter: Drafter | None = None,
    flipping: int | None = None,
    draft_model: Decoder | None = None,
    heads: Any = None,
    tokenizer: Any = None,
    eos_ids: Seq[int] = (),
    **settings: Any,
) -> Engine:
    """An engine with this drafter, or the one that the settings name. flipping: a seed, to switch by chance."""
    settings = {"switch_off": False, **settings}
    if draft_model is not None:
        settings |= {"method": "draft", "draft_path": "DIR"}
    speculation = SpeculationConfig(**settings)
    made = (
        build_speculation(speculation, model, draft_model=draft_model, heads=heads)
        if drafter is None
        else Speculation(speculation, drafter)
    )
    engine = Engine(model, config, tokenizer=tokenizer, eos_ids=eos_ids, speculation=made)
    if flipping is not None:
        assert isinstance(engine.runner, SpeculativeRunner)
        engine.runner.policy = Flipping(speculation, flipping)
    return engine
