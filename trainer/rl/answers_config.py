"""AnswersConfig: what a validation generates, and how it is compared with the rows' answers."""

from __future__ import annotations

from dataclasses import dataclass

COMPARISONS = ("text", "final")


@dataclass
class AnswersConfig:
    """`recipe.answers`, by the engine of recipe.rl.engine on weights as in recipe.rl.weights."""

    # Held-out rows that every validation answers greedily; 0: none. To train.timeout_seconds all are one batch of it.
    prompts: int = 0
    max_tokens: int | None = None  # of an answer; None: what train.seq_len leaves room for
    # text: the same but for blanks; final: what it ends in (\boxed{}, ####, last number) is the same number or text
    compare: str = "text"  # one of COMPARISONS
