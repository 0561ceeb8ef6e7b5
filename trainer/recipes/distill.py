"""Distillation: a student learns what a teacher thinks of every next word (kernels/linear_cross_entropy/divergence.py).

    loss = sum of the divergences at tokens with a label / number of these tokens in the global batch

The teacher runs beside the student (trainer/frozen.py). What is kept of it for a step are its last hidden states: its
logits are made chunk by chunk, next to the student's, from a copy of its output layer on the ranks that compute the
loss. Data is pretraining's, or conversations, of which the answers alone are learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.config import NO_TOKENIZER, PAIRS, has_conversations
from data.loader import Loader
from kernels.linear_cross_entropy import Divergence, VocabularyShard, linear_divergence
from models.decoder import Head
from parallel.mesh import Meshes, groups_in_layers
from parallel.problem import Problem, values
from trainer.config import RecipeConfig, TrainConfig, configuration_errors
from trainer.frozen import Beside, FrozenModel, load_frozen, problems_beside, resolve_beside
from trainer.loss import Objective, count_valid, token_loss_sum, vocabulary_shard
from trainer.recipes.pretrain import Pretrain
from trainer.step import TrainState


class DistillationObjective:
    """trainer.loss.Objective of a student; the batch has the teacher's hidden states as its column `teacher`."""

    def __init__(self, recipe: RecipeConfig, *, vocabulary: VocabularyShard | None, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.divergence = Divergence(recipe.divergence, recipe.temperature, vocabulary)
        self.names: Sequence[str] = ("nll",) if recipe.nll_weight else ()
        self.weights = torch.tensor([1.0, recipe.nll_weight] if self.names else [1.0], device=device)
        self.teacher_weight: Tensor | None = None  # [V, K] of this rank's words; filled by `Distillation.prepare`

    def counts(self, batch: Batch) -> Tensor:
        return count_valid(batch.labels).expand(len(self.weights))

    def head(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            assert self.teacher_weight is not None
            divergence = linear_divergence(
                hidden,
                weight,
                batch.columns["teacher"],
                self.teacher_weight,
                batch.labels,
                self.divergence,
                ignore_index=IGNORE_INDEX,
            )
            if not self.names:
                return divergence
            return torch.stack([divergence, token_loss_sum(hidden, weight, batch.labels, vocabulary=self.vocabulary)])

        return head

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return []


class Distillation(Pretrain):
    loss_kernel = "linear_divergence"
    reads = ("teacher_path", "teacher_offload", "divergence", "temperature", "nll_weight")

    def __init__(self) -> None:
        self.teacher: FrozenModel | None = None
        self.wanted: DistillationObjective | None = None

    def problems(self, config: TrainConfig) -> list[str]:
        recipe, data, found = config.recipe, config.data, list[str]()
        if data.source in PAIRS:
            found.append(f"recipe.name=distill does not read data.source={data.source}; use another data or recipe")
        elif has_conversations(data) and data.tokenizer.path is None and config.model.path is None:
            found.append(NO_TOKENIZER)
        if recipe.teacher_path is None:
            found.append("recipe.teacher_path is missing: give the Hugging Face folder of the model to learn from")
        if not 0.0 <= recipe.divergence <= 1.0:
            why = f"recipe.divergence={recipe.divergence} must lie between 0 and 1"
            found.append(Problem(why, values("recipe.divergence", [0.0, 0.5, 1.0])))
        for name in ("temperature", "nll_weight"):
            least = 0.0 if name == "nll_weight" else math.ulp(0.0)
            if not least <= (value := getattr(recipe, name)) < math.inf:
                why = f"recipe.{name}={value} must {'not be negative' if name == 'nll_weight' else 'be positive'}"
                found.append(Problem(why, values(f"recipe.{name}", [getattr(RecipeConfig(), name)])))
        if config.model.mtp.depth:
            why = (
                f"model.mtp.depth={config.model.mtp.depth} with recipe.name=distill: a teacher says the next word alone"
            )
            found.append(Problem(why, values("model.mtp.depth", [0])))
        if (kind := config.model.speculator.kind) != "none":
            why = f"model.speculator.kind={kind} with recipe.name=distill: heads that draft learn from text"
            found.append(Problem(why, values("model.speculator.kind", ["none"])))
        return found + problems_beside("recipe.teacher_path", recipe.teacher_path, config)

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        vocabulary = vocabulary_shard(config.model.vocab_size, groups_in_layers(mesh, config.parallel))
        self.wanted = DistillationObjective(config.recipe, vocabulary=vocabulary, device=device)
        return self.wanted

    def frozen_beside(self, config: TrainConfig) -> Beside | None:
        return Beside(resolve_beside(config.recipe.teacher_path, config), config.recipe.teacher_offload)

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        with configuration_errors():
            if (beside := self.frozen_beside(config)) is not None:
                self.teacher = load_frozen(beside.model, config, mesh, state.device, offload=beside.offload)

    def prepare(self, microbatches: list[Batch]) -> list[Batch]:
        assert self.teacher is not None
        found = self.teacher.per_token(microbatches, self._states, everywhere=False)
        return [batch.with_columns(teacher=each) for batch, each in zip(microbatches, found, strict=True)]

    def _states(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            assert self.wanted is not None
            if self.wanted.teacher_weight is None:  # what is gathered here does not outlive the teacher's forward
                self.wanted.teacher_weight = weight.detach().clone()
            return hidden

        return head

    def validation_metrics(self, found: Mapping[str, float]) -> dict[str, float]:
        return {f"validation_{name}": value for name, value in found.items()}

    def describe_data(self, data: Loader) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in data.counts.items() if count)
        return f"of the training split: {counts}" if counts else ""
