"""Distillation: a student learns what a teacher thinks of every next word (kernels/linear_cross_entropy/divergence.py).

    loss = sum of the divergences at tokens with a label / number of these tokens in the global batch

The teacher runs beside the student (trainer/frozen.py). What is kept of it for a step are its last hidden states: its
logits are made chunk by chunk, next to the student's, from a copy of its output layer on the ranks that compute the
loss. Or its k likeliest words come from recipe.teacher_cache, which launch/teach.py wrote, and the divergence is that
over k + 1 outcomes (kernels/linear_cross_entropy/top_words.py). Data is pretraining's, or conversations, of which the
answers alone are learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.config import NO_TOKENIZER, PAIRS, DataError, has_conversations
from data.loader import Loader, build_loader
from data.teacher import TeacherCache, cacheable, data_identity
from kernels.linear_cross_entropy import (
    Divergence,
    VocabularyShard,
    linear_divergence,
    linear_top_words_divergence,
)
from models.decoder import Head
from parallel.mesh import Meshes, groups_in_layers
from parallel.problem import Problem, values
from trainer.adapters import fingerprint
from trainer.config import RecipeConfig, TrainConfig, configuration_errors
from trainer.frozen import FrozenModel, load_frozen, problems_beside, resolve_beside
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
        self.cached = recipe.teacher_cache is not None
        self.teacher_weight: Tensor | None = None  # [V, K] of this rank's words; filled by `Distillation.prepare`

    def counts(self, batch: Batch) -> Tensor:
        return count_valid(batch.labels).expand(len(self.weights))

    def head(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            divergence = self._of_cache(hidden, weight, batch) if self.cached else self._online(hidden, weight, batch)
            if not self.names:
                return divergence
            return torch.stack([divergence, token_loss_sum(hidden, weight, batch.labels, vocabulary=self.vocabulary)])

        return head

    def _online(self, hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        assert self.teacher_weight is not None
        teacher, teacher_weight = batch.columns["teacher"], self.teacher_weight
        return linear_divergence(
            hidden, weight, teacher, teacher_weight, batch.labels, self.divergence, ignore_index=IGNORE_INDEX
        )

    def _of_cache(self, hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        words, logprobs = batch.columns["teacher_words"], batch.columns["teacher_logprobs"]
        return linear_top_words_divergence(
            hidden, weight, words, logprobs, batch.labels, self.divergence, ignore_index=IGNORE_INDEX
        )

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return []


class Distillation(Pretrain):
    loss_kernel = "linear_divergence"
    reads = ("teacher_path", "teacher_cache", "teacher_offload", "divergence", "temperature", "nll_weight")

    def __init__(self) -> None:
        self.teacher: FrozenModel | None = None
        self.cache: TeacherCache | None = None
        self.wanted: DistillationObjective | None = None

    @classmethod
    def computes_loss(cls, config: TrainConfig) -> str:
        return cls.loss_kernel if config.recipe.teacher_cache is None else "linear_top_words_divergence"

    def problems(self, config: TrainConfig) -> list[str]:
        recipe, data, found = config.recipe, config.data, list[str]()
        if data.source in PAIRS:
            found.append(f"recipe.name=distill does not read data.source={data.source}; use another data or recipe")
        elif has_conversations(data) and data.tokenizer.path is None and config.model.path is None:
            found.append(NO_TOKENIZER)
        if recipe.teacher_path is None and recipe.teacher_cache is None:
            found.append(
                "recipe.teacher_path is missing: give the Hugging Face folder of the model to learn from, or "
                "recipe.teacher_cache"
            )
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
        if recipe.teacher_cache is not None:
            found += cache_problems(config)
        return found + problems_beside("recipe.teacher_path", recipe.teacher_path, config)

    def open_data(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        if config.recipe.teacher_cache is None:
            return super().open_data(config, split=split, rank=rank, world_size=world_size, device_type=device_type)
        train = config.train
        self.cache = self.cache or TeacherCache(Path(config.recipe.teacher_cache).expanduser())
        data = build_loader(
            config.data,
            seq_len=train.seq_len,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=train.seed,
            split=split,
            vocab_size=config.model.vocab_size,
            device_type=device_type,
            annotate=self.cache.annotate,
        )
        check_cache(self.cache, config, data)
        return data

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        vocabulary = vocabulary_shard(config.model.vocab_size, groups_in_layers(mesh, config.parallel))
        self.wanted = DistillationObjective(config.recipe, vocabulary=vocabulary, device=device)
        return self.wanted

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        if self.cache is not None:
            return
        with configuration_errors():
            beside = resolve_beside(config.recipe.teacher_path, config)
            self.teacher = load_frozen(beside, config, mesh, state.device, offload=config.recipe.teacher_offload)

    def prepare(self, microbatches: list[Batch]) -> list[Batch]:
        if self.teacher is None:
            return microbatches
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


def cache_problems(config: TrainConfig) -> list[str]:
    """Why no teacher's words can be kept of this configuration's data, one line each."""
    cache = f"recipe.teacher_cache={config.recipe.teacher_cache}"
    if (field := cacheable(config.data)) is None:
        return []
    why = f"{field} with {cache}: what stands before a token would be something else than when its row was written"
    if field == "data.shuffle=true":
        return [Problem(why, values("data.shuffle", [False]), words="use data=conversations or data=tokens")]
    return [f"{why}; use data=conversations, data=tokens, or data=text with data.shuffle=false"]


def check_cache(cache: TeacherCache, config: TrainConfig, data: Loader) -> None:
    """Raises DataError for rows of another teacher, tokenizer, temperature or of other data. Collective."""
    recipe, made = config.recipe, cache.made
    tokenizer = None if data.tokenizer is None else data.tokenizer.fingerprint()
    different = [
        f"{name} was {was} and is {now}"
        for name, was, now in (
            ("recipe.temperature", made.temperature, recipe.temperature),
            ("model.vocab_size", made.vocab_size, config.model.vocab_size),
            ("the tokenizer", made.tokenizer, tokenizer),
            ("the data", made.data, data_identity(config.data, data.identity)),
        )
        if was != now
    ]
    if config.train.seq_len > made.seq_len:
        different.append(f"train.seq_len was {made.seq_len} and is {config.train.seq_len}")
    if recipe.teacher_path is not None:
        teacher = fingerprint(Path(recipe.teacher_path).expanduser())
        if teacher != made.teacher:
            different.append(f"recipe.teacher_path={recipe.teacher_path} has other weights")
    if different:
        raise DataError(
            f"recipe.teacher_cache={recipe.teacher_cache} does not fit this run: {'; '.join(different)}. Restore "
            "these, or make another by launch/teach.py with the arguments of this run"
        )
