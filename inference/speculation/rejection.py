"""Which drafted tokens stand: speculative sampling (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

With the model's distribution p and a draft d from q: d stands with probability min(1, p(d) / q(d)); otherwise the token
is drawn from what p has more than q, max(p - q, 0). Either way it is one of p, for any q.

A draft that is not drawn (the most probable token, or one found in the prompt) has q(d) = 1. The rule is then: draw
from p, and if that is d, the draft stood. So it is done, with the random number that the place has without speculation:
the tokens are those of an engine that does not speculate.

S sequences, K drafted tokens of each, R rows of logits: 1 + K of a sequence at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.constraints import allowed
from inference.sampling import Settings, penalized, probabilities, settings_of
from inference.sequence import Sequence
from kernels.sampling import draw, uniform_48

DRAFT_STREAMS = ("inference.speculation.draft", "inference.speculation.draft.low")
ACCEPT_STREAMS = ("inference.speculation.accept", "inference.speculation.accept.low")


class Drafts(NamedTuple):
    """What a drafter proposes behind S sequences; on the device."""

    tokens: Tensor  # [S, K] int64
    probabilities: Tensor | None = None  # [S, K, V]: what each was drawn from; None: none was drawn


def to_device(values: object, device: torch.device) -> Tensor:
    """Whole numbers from the host, int64, without waiting for the device."""
    made = torch.as_tensor(values, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


class Places:
    """How the tokens at places behind some sequences are sampled: penalties and random numbers of each place."""

    def __init__(self, sequences: Seq[Sequence], *, vocab_size: int, device: torch.device) -> None:
        self.settings = settings_of(sequences, vocab_size=vocab_size, device=device)
        self.vocab_size = vocab_size
        self.lengths = to_device([len(sequence.tokens) for sequence in sequences], device)

    def behind(self, owners: Tensor, offsets: Tensor, drafts: Tensor | None = None) -> Settings:
        """Settings of rows: of sequence owners[r], offsets[r] places behind its next token.

        owners and offsets int64 [R]; drafts [S, K]: the tokens before these places. A constraint's mask is that of
        offset 0: what may be behind a draft is known once it is on the host. `on_host` stays that of the sequences:
        owners are on the device.
        """
        s, penalties = self.settings, self.settings.penalties
        if penalties is not None:
            tokens, lengths = penalties.tokens, self.lengths
            if drafts is not None and drafts.shape[1]:
                tokens = F.pad(tokens, (0, drafts.shape[1]), value=self.vocab_size)
                columns = lengths[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
                tokens = tokens.scatter(1, columns, drafts)
            place = torch.arange(tokens.shape[1], device=tokens.device)
            known = place < (lengths[owners] + offsets)[:, None]
            penalties = penalties._replace(
                repetition=penalties.repetition[owners],
                presence=penalties.presence[owners],
                frequency=penalties.frequency[owners],
                tokens=tokens[owners].where(known, self.vocab_size),
                num_prompt=penalties.num_prompt[owners],
            )
        return s._replace(
            temperature=s.temperature[owners],
            top_k=s.top_k[owners],
            top_p=s.top_p[owners],
            min_p=s.min_p[owners],
            draw=s.draw[owners] + offsets,
            penalties=penalties,
            allowed=None if s.allowed is None else s.allowed[owners].where((offsets == 0)[:, None], -1),
        )


def propose(logits: Tensor, settings: Settings, *, sampled: bool) -> tuple[Tensor, Tensor | None]:
    """A drafted token of each row of a drafter's logits [R, V], and what it was drawn from [R, V].

    The drafter's distribution is made of its logits as the model's is: that raises acceptance, and no more. None: the
    most probable tokens, as without `sampled`, or where all rows are greedy.
    """
    if settings.penalties is not None:
        logits = penalized(logits, settings.penalties)
    if settings.allowed is not None:
        logits = logits.masked_fill(~allowed(settings.allowed, vocab_size=logits.shape[1]), float("-inf"))
    tokens = logits.argmax(-1)
    if not (sampled and settings.random):
        return tokens, None
    q = normalized(probabilities(logits, settings))
    return torch.where(settings.temperature > 0, draw(q, settings.draw, DRAFT_STREAMS), tokens), q


def keep_or_draw(p: Tensor, index: Tensor, *, drafts: Tensor, q: Tensor) -> Tensor:
    """The token of each row: its draft where it stands, else one of max(p - q, 0).

    p [R, V] as of `probabilities`, index [R] of the random numbers, drafts [R] int64, q [R, V] what they were drawn
    from. Rows without a draft have -1 and q 0: their token is drawn from p, as it is. Returns int64 [R].
    """
    given, p = p, normalized(p)
    of_draft = drafts.clamp(min=0)[:, None]
    p_d, q_d = (x.gather(1, of_draft)[:, 0].to(torch.float64) for x in (p, q))
    stands = uniform_48(ACCEPT_STREAMS, index) * q_d < p_d
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p = q up to rounding: nothing is left
    rest = torch.where(drafts[:, None] < 0, given, rest)
    return torch.where(stands & (q_d > 0), drafts, draw(rest, index))


def normalized(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)
