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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.config import NO_TOKENIZER, PAIRS, DataError, has_conversations
from data.loader import Loader
from data.prompts import PromptSamples
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
from trainer.frozen import Beside, FrozenModel, load_frozen, problems_beside, resolve_beside
from trainer.loss import Objective, count_valid, token_loss_sum, vocabulary_shard
from trainer.recipes.loaders import open_prompts, open_rows
from trainer.recipes.recipe import Recipe, StepReport
from trainer.rl.config import WEIGHTS, RLConfig
from trainer.rl.held_out import HeldOutAnswers, answers_problems, held_out_answers
from trainer.rl.problems import layout_problems
from trainer.rl.rollouts import answers
from trainer.rl.same_prompts import SamePrompts
from trainer.rl.serving import Room, start_sampler
from trainer.rl.student import StudentAnswers
from trainer.sequence import SequenceParts
from trainer.step import TrainState, evaluate


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


class Distillation(Recipe):
    loss_kernel = "linear_divergence"
    reads = (
        "teacher_path",
        "teacher_cache",
        "teacher_offload",
        "on_policy",
        "rl",
        "answers",
        "divergence",
        "temperature",
        "nll_weight",
    )

    def __init__(self) -> None:
        self.teacher: FrozenModel | None = None
        self.cache: TeacherCache | None = None
        self.student: StudentAnswers | None = None  # with recipe.on_policy
        self.answers: HeldOutAnswers | None = None  # with recipe.answers
        self._samples: dict[str, PromptSamples] = {}  # by split
        self._report = StepReport()
        self._parts: SequenceParts | None = None  # where there is a student
        self.wanted: DistillationObjective | None = None

    @classmethod
    def computes_loss(cls, config: TrainConfig) -> str:
        return cls.loss_kernel if config.recipe.teacher_cache is None else "linear_top_words_divergence"

    def problems(self, config: TrainConfig) -> list[str]:
        recipe, data, found = config.recipe, config.data, list[str]()
        if recipe.on_policy or data.source == "prompts":
            found += on_policy_problems(config)
        elif data.source in PAIRS:
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
        if not recipe.on_policy and recipe.answers.prompts:
            found += answers_problems(config)
        elif not recipe.on_policy and recipe.rl != RLConfig():
            found.append("recipe.rl is set and has no effect with recipe.on_policy=0; leave it out")
        if recipe.teacher_cache is not None and not recipe.on_policy:
            found += cache_problems(config)
        return found + problems_beside("recipe.teacher_path", recipe.teacher_path, config)

    def open_data(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        if config.recipe.on_policy:
            return self._open_prompts(config, split=split, rank=rank, world_size=world_size, device_type=device_type)
        if config.recipe.teacher_cache is None:
            data = super().open_data(config, split=split, rank=rank, world_size=world_size, device_type=device_type)
        else:
            data = self._open_cached(config, split=split, rank=rank, world_size=world_size, device_type=device_type)
        if split == "validation":
            self.answers = held_out_answers(config, data.tokenizer)
        return data

    def _open_cached(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        assert config.recipe.teacher_cache is not None
        self.cache = self.cache or TeacherCache(Path(config.recipe.teacher_cache).expanduser())
        data = open_rows(
            config,
            split=split,
            rank=rank,
            world_size=world_size,
            device_type=device_type,
            annotate=self.cache.annotate,
        )
        check_cache(self.cache, config, data)
        return data

    def _open_prompts(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        loader, self._samples[split] = open_prompts(
            config,
            num_prompts=config.train.global_batch_size,
            split=split,
            rank=rank,
            world_size=world_size,
            device_type=device_type,
        )
        self._tokenizer = loader.tokenizer
        return loader

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        vocabulary = vocabulary_shard(config.model.vocab_size, groups_in_layers(mesh, config.parallel))
        self.wanted = DistillationObjective(config.recipe, vocabulary=vocabulary, device=device)
        return self.wanted

    def frozen_beside(self, config: TrainConfig) -> Beside | None:
        if config.recipe.teacher_cache is not None:
            return None
        return Beside(resolve_beside(config.recipe.teacher_path, config), config.recipe.teacher_offload)

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        with configuration_errors():
            if (beside := self.frozen_beside(config)) is not None:
                self.teacher = load_frozen(beside.model, config, mesh, state.device, offload=beside.offload)
        if config.recipe.on_policy:
            assert self._tokenizer is not None
            room = Room.of_rollouts(config, mesh, self._tokenizer, self._samples["train"])
            sampler, weights = start_sampler(config, state, mesh, self._tokenizer, room)
            self._parts, self.validates_prompts = SequenceParts(config, mesh), True
            self.student = StudentAnswers(config, sampler, weights, mesh.samples.get_group(), SamePrompts(mesh))
        if self.answers is not None:
            self.answers.start(config, state, mesh)

    def collect(self, data: Loader) -> list[Batch]:
        batches = super().collect(data)
        if self.student is None:
            return batches
        numbers = [number for batch in batches for number in batch.samples.tolist()]
        made = self.student.step(numbers, self._samples["train"])
        self._report = StepReport(made.metrics, positions=made.positions)
        return made.batches

    def report(self) -> StepReport:
        return self._report

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

    def validate(self, state: TrainState, steps: Iterable[list[Batch]]) -> dict[str, float]:
        """On-policy: of the student's greedy answers, and how many of them are the row's `answer`, if it has one."""
        if self.student is None:
            found = super().validate(state, steps)
            return found if self.answers is None else found | self.answers.validate()
        right: list[bool] = []
        found = evaluate(state, (self._answered(step, right, state.device) for step in steps))
        exact = torch.tensor([sum(right), len(right)], device=state.device, dtype=torch.float64)
        dist.all_reduce(exact, group=self.student.data_group)
        return found | ({"exact_match": float(exact[0] / exact[1])} if exact[1] else {})

    def _answered(self, step: list[Batch], right: list[bool], device: torch.device) -> list[Batch]:
        assert self.student is not None
        assert self._tokenizer is not None
        samples = self._samples["validation"]
        real = [(batch.labels != IGNORE_INDEX).any(1) for batch in step]
        numbers = [n for batch, those in zip(step, real, strict=True) for n in batch.samples[those].tolist()]
        rollouts = self.student.sampled(numbers, samples, temperature=0.0)
        for rollout in rollouts:
            if "answer" in (row := samples[rollout.number].row):
                right.append(answers(rollout, self._tokenizer, str(row["answer"])))
        assert self._parts is not None
        return self.prepare([self._parts.of(batch).to(device) for batch in self.student.batches(rollouts)])

    def validation_events(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [] if self.answers is None else self.answers.events()

    def validation_metrics(self, found: Mapping[str, float]) -> dict[str, float]:
        return {f"validation_{name}": value for name, value in found.items()}

    def describe_data(self, data: Loader) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in data.counts.items() if count)
        left_out = "".join(f"; left out, for example, {why}" for why in data.left_out)
        return f"of the training split: {counts}{left_out}" if counts else ""


def on_policy_problems(config: TrainConfig) -> list[str]:
    """Why the student cannot answer prompts of this data on this layout, one line each."""
    recipe, data, train, found = config.recipe, config.data, config.train, list[str]()
    share = f"recipe.on_policy={recipe.on_policy}"
    if not 0.0 <= recipe.on_policy <= 1.0:
        why = f"{share} must lie between 0 and 1: it is a share of the prompts"
        return [Problem(why, values("recipe.on_policy", [1.0, 0.5, 0.0]))]
    if not recipe.on_policy:
        return [Problem(f"{share} with data.source=prompts: nobody answers them", values("recipe.on_policy", [1.0]))]
    if data.source != "prompts":
        found.append(f"{share} with data.source={data.source} has nothing to answer; use data=prompts")
    elif data.tokenizer.path is None and config.model.path is None:
        found.append(NO_TOKENIZER)
    elif not data.mask_documents:
        why = "data.mask_documents=false lets the completions of a row see one another"
        found.append(Problem(why, values("data.mask_documents", [True])))
    completion = data.prompts.completion
    if recipe.on_policy < 1 and completion is None:
        what = f"data.prompts.completion is missing: with {share} the answers to the other prompts are the rows'"
        found.append(Problem(what, values("recipe.on_policy", [1.0]), words="name the column that has them"))
    elif recipe.on_policy == 1 and completion is not None:
        why = f"data.prompts.completion={completion} has no effect with {share}: the student answers all prompts"
        found.append(Problem(why, values("recipe.on_policy", [0.5]), values("data.prompts.completion", [None])))
    if prompts := recipe.answers.prompts:
        why = f"recipe.answers.prompts={prompts} has no effect with {share}: a validation answers prompts by itself"
        found.append(Problem(why, values("recipe.answers.prompts", [0])))
    if recipe.teacher_cache is not None:
        why = f"recipe.teacher_cache={recipe.teacher_cache} with {share}: no cache has what the student will say"
        found.append(Problem(why, values("recipe.teacher_cache", [None])))
    if recipe.nll_weight:
        why = f"recipe.nll_weight={recipe.nll_weight} with {share} makes the student surer of what it says already"
        found.append(Problem(why, values("recipe.nll_weight", [0.0])))
    if train.sample_tokens:
        why = f"train.sample_tokens={train.sample_tokens} continues a text, and with {share} prompts are answered"
        found.append(Problem(why, values("train.sample_tokens", [0])))
    longest = recipe.rl.max_tokens
    if longest is not None and not 1 <= longest < train.seq_len:
        why = f"recipe.rl.max_tokens={longest} must be at least 1 and leave room for a prompt in train.seq_len"
        found.append(Problem(why, values("recipe.rl.max_tokens", [train.seq_len // 2])))
    default = RLConfig()
    for name in (field.name for field in fields(RLConfig) if field.name not in ("max_tokens", "weights", "engine")):
        if getattr(recipe.rl, name) != getattr(default, name):
            found.append(f"recipe.rl.{name} is set and has no effect with recipe.name=distill; leave it out")
    if recipe.rl.weights not in WEIGHTS:
        why = f"recipe.rl.weights={recipe.rl.weights} is unknown"
        found.append(Problem(why, values("recipe.rl.weights", list(WEIGHTS))))
    return found + layout_problems(config)


def cache_problems(config: TrainConfig) -> list[str]:
    """Why no teacher's words can be kept of this configuration's data, or be learned from, one line each."""
    cache = f"recipe.teacher_cache={config.recipe.teacher_cache}"
    if config.recipe.teacher_offload:
        why = f"recipe.teacher_offload=true has no effect with {cache}: no teacher is loaded"
        return [Problem(why, values("recipe.teacher_offload", [False]))]
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
    different += made.without_rows(config.data, validates=config.train.eval_interval > 0)
    if recipe.teacher_path is not None:
        teacher = fingerprint(Path(recipe.teacher_path).expanduser())
        if teacher != made.teacher:
            different.append(f"recipe.teacher_path={recipe.teacher_path} has other weights")
    if different:
        raise DataError(
            f"recipe.teacher_cache={recipe.teacher_cache} does not fit this run: {'; '.join(different)}. Restore "
            "these, or make another by launch/teach.py with the arguments of this run"
        )
