"""Drafts for constrained requests: the grammar's mask of every place, and the tokens of an engine without drafts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch

from inference.config import EngineConfig, SamplingConfig
from inference.constraints import Constraint, Grammars, allowed_bits
from inference.sequence import Sequence
from inference.speculation.drafter import Wanted
from inference.speculation.rejection import Drafts, Places, keep_or_draw
from tests.inference.serving import text_engine, text_model, text_tokenizer
from tests.inference.speculating import Scripted, speculating
from tests.inference.test_constraints import check, run_preempting_each, samplings
from tests.inference.test_sampling import chi_square
from tests.inference.test_speculative_sampling import INDEX, LIMIT, N, P, Q, drafted

pytest.importorskip("llguidance")
CONFIG = EngineConfig(block_size=4, max_sequences=6, max_batch_tokens=48, num_blocks=80, host_blocks=20)


class AsItWas(Scripted):
    """Knows the continuation of each request by its seed and constraint, and is wrong now and then."""

    def __init__(self, known: dict[str, list[int]], *, right: float, seed: int) -> None:
        super().__init__([], right=right, seed=seed)
        self._known = known

    def draft(self, wanted: Seq[Wanted], places: Places) -> Drafts:
        most = max(one.num_drafts for one in wanted)
        words = text_tokenizer().vocab_size
        rows = []
        for one in wanted:
            done = len(one.sequence.completion.token_ids)
            text = self._known[str(one.sequence.sampling)][done : done + one.num_drafts]
            row = [token if self._chance.random() < self._right else self._chance.randrange(words) for token in text]
            rows.append((row + [0] * most)[:most])
        return Drafts(torch.tensor(rows))

    def wanted(self, sequence: Sequence, most: int) -> int:
        return most


@pytest.mark.parametrize("seed", range(3))
def test_drafts_do_not_change_constrained_continuations(seed: int) -> None:
    """A draft judged by the mask of another place, or behind one that its grammar forbids; a grammar that is left
    where a draft has put it. At any temperature, with preemption at any time."""
    each = samplings(seeds=2, max_tokens=18)
    alone = text_engine().generate(["one two"] * len(each), each)
    known = {str(s): c.token_ids for s, c in zip(each, alone, strict=True)}
    drafter = AsItWas(known, right=(0.6, 0.9, 1.0)[seed], seed=seed)
    tokenizer = text_tokenizer()
    engine = speculating(
        text_model(), CONFIG, drafter=drafter, flipping=seed, tokenizer=tokenizer, eos_ids=[tokenizer.eos_id]
    )
    found = run_preempting_each(engine, each, seed=seed)
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in alone]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in alone]
    check(found, each)
    assert sum(sum(c.speculation.accepted) for c in found[:-1] if c.speculation is not None) > 10


def test_a_grammar_along_drafts_is_that_of_their_tokens() -> None:
    """States of a draft too many or too few, of one that is forbidden, or of the end; or the sequence's own moved."""
    tokenizer = text_tokenizer()
    grammars = Grammars(tokenizer, vocab_size=293, eos_ids=[tokenizer.eos_id])
    (a, b, c) = (tokenizer.encode(letter)[0] for letter in "abc")

    def begun(*tokens: int) -> Constraint:
        state = grammars.start(SamplingConfig(regex="a[bc]a"))
        assert state is not None
        for token in tokens:
            state.push(token)
        return state

    def bits(states: Seq[Constraint | None]) -> Any:
        found = allowed_bits(states, vocab_size=293)
        return None if found is None else found.tolist()

    start = begun()
    first, second, third = start.along([a, b, a])
    assert third is None  # it is complete
    assert bits([start, first, second]) == bits([begun(), begun(a), begun(a, b)])
    assert [state is None for state in begun(a).along([c, b, a])] == [False, True, True]
    assert begun(a, b, a).along([a, b]) == [None, None]
    assert bits([start]) == bits([begun()])


def test_a_forbidden_draft_is_rejected_and_does_not_count_as_none() -> None:
    """Exact is: it has no probability, so the token is one of what the model has more than the drafter. Drawing from
    the model, as if there had been no draft, is another distribution (negative control)."""
    p = torch.where(torch.arange(9) % 2 == 0, P, 0.0)  # what the grammar leaves, of which the drafter knows nothing
    drafts = drafted(Q)
    forbidden = p[drafts] == 0
    rows = p.expand(N, -1)
    found = keep_or_draw(rows, INDEX, drafts=drafts, q=Q.expand(N, -1))
    assert chi_square(found.bincount(minlength=9).double(), p / p.sum()) < LIMIT
    q = Q.expand(N, -1) * ~forbidden[:, None]
    wrong = keep_or_draw(rows, INDEX, drafts=drafts.where(~forbidden, -1), q=q)
    assert chi_square(wrong.bincount(minlength=9).double(), (p / p.sum()).clamp(min=1e-9)) > LIMIT


@pytest.mark.parametrize("drafts", ["greedy", "sampled"])
def test_drafts_of_a_model_without_a_grammar_are_held_to_it(drafts: str) -> None:
    """A draft of a later place that stands although its grammar forbids it; drafts that are never right because the
    drafter does not know what may come next."""
    tokenizer = text_tokenizer()
    each = samplings(seeds=3, max_tokens=40)
    engine = speculating(
        text_model(),
        CONFIG,
        draft_model=text_model(),
        drafts=drafts,
        num_tokens=3,
        tokenizer=tokenizer,
        eos_ids=[tokenizer.eos_id],
    )
    found = engine.generate(["one two"] * len(each), each)
    assert check(found, each) > 7
    if drafts == "greedy":
        alone = text_engine().generate(["one two"] * len(each), each)
        assert [completion.token_ids for completion in found] == [completion.token_ids for completion in alone]
    accepted = [c.speculation.accepted[0] for c in found[:-1] if c.speculation is not None]
    assert sum(accepted) > 20  # the first place's draft is masked as the model is
