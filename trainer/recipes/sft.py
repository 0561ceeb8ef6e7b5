"""Supervised fine-tuning: conversations, of which the answers alone are predicted.

Its loss is pretraining's, sum over the tokens with a label / their number in the global batch; prompts, padding and the
first token of every example have none (data/examples.py). So it does not depend on how examples are packed, on
micro-batches or on ranks, and long answers count for more than short ones, as in one large batch. With recipe.answers
a validation also generates answers to held-out prompts (trainer/rl/held_out.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from data.batch import Batch
from data.config import NO_TOKENIZER, parts
from data.loader import Loader
from parallel.mesh import Meshes
from parallel.problem import Problem, values
from trainer.config import TrainConfig
from trainer.recipes.recipe import Recipe
from trainer.rl.held_out import HeldOutAnswers, answers_problems, held_out_answers
from trainer.step import TrainState


class SupervisedFineTuning(Recipe):
    reads: tuple[str, ...] = ("answers", "rl", "neftune_alpha")

    def __init__(self) -> None:
        self.answers: HeldOutAnswers | None = None  # with recipe.answers

    def problems(self, config: TrainConfig) -> list[str]:
        data = config.data
        if all(part.source != "conversations" for part in parts(data)):
            return [f"recipe.name=sft with data.source={data.source} has nothing to answer; use data=conversations"]
        if data.tokenizer.path is None and config.model.path is None:
            return [NO_TOKENIZER]
        return noise_problems(config) + answers_problems(config)

    def open_data(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        data = super().open_data(config, split=split, rank=rank, world_size=world_size, device_type=device_type)
        if split == "validation":
            self.answers = held_out_answers(config, data.tokenizer)
        return data

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        if self.answers is not None:
            self.answers.start(config, state, mesh)

    def validate(self, state: TrainState, steps: Iterable[list[Batch]]) -> dict[str, float]:
        found = super().validate(state, steps)
        return found if self.answers is None else found | self.answers.validate()

    def validation_events(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [] if self.answers is None else self.answers.events()

    def describe_data(self, data: Loader) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in data.counts.items() if count)
        left_out = "".join(f"; left out, for example, {why}" for why in data.left_out)
        return f"of the training split: {counts}{left_out}"


def noise_problems(config: TrainConfig) -> list[str]:
    """Why embeddings cannot have noise, one line each."""
    alpha = config.recipe.neftune_alpha
    if not 0.0 <= alpha < math.inf:
        why = f"recipe.neftune_alpha={alpha} must be finite and not negative"
        return [Problem(why, values("recipe.neftune_alpha", [0.0, 5.0]))]
    if not alpha:
        return []
    found: list[str] = []
    without = values("recipe.neftune_alpha", [0.0])
    if not config.data.mask_documents:
        why = f"recipe.neftune_alpha={alpha} with data.mask_documents=false: noise goes by the length of an example"
        found.append(Problem(why, values("data.mask_documents", [True]), without))
    if (kind := config.model.speculator.kind) != "none":
        why = f"recipe.neftune_alpha={alpha} with model.speculator.kind={kind}: the model that it would train stays"
        found.append(Problem(why, without))
    return found
