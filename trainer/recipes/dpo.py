"""Direct preference optimisation and its family (trainer/preference_losses.py): of two answers one was better.

    loss = sum of the losses of pairs / number of pairs in the global batch

and beside it, where recipe.nll_weight asks for it (of orpo it is 1), the chosen answers' negative log-likelihood,

    nll = sum over their tokens / number of these tokens in the global batch

so that nothing depends on packing, micro-batches or ranks. The reference is that of trainer/reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.batch import Batch
from data.config import NO_TOKENIZER
from data.loader import Loader
from data.preference import REFERENCE_COLUMNS
from kernels.linear_cross_entropy import VocabularyShard
from models.decoder import Head
from parallel.groups import ModelParallel
from parallel.mesh import Meshes, groups_in_layers
from parallel.problem import Problem, values
from trainer.config import ConfigError, RecipeConfig, TrainConfig
from trainer.frozen import Beside
from trainer.loss import Objective, token_losses, vocabulary_shard
from trainer.pairs import Pairs, count_pairs
from trainer.preference_losses import LOSSES, WITHOUT_REFERENCE, implicit_rewards, preference_losses
from trainer.recipes.recipe import Recipe
from trainer.reference import REFERENCES, Reference, load_reference, no_effect, reference_beside
from trainer.reference import reference_problems as problems_of_reference
from trainer.step import TrainState

SMOOTHED = ("sigmoid", "robust")

PAIR_NAMES = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


class PreferenceObjective:
    """trainer.loss.Objective of pairs."""

    names: Sequence[str] = (*PAIR_NAMES, "logp_chosen", "logp_rejected", "nll")

    def __init__(
        self,
        recipe: RecipeConfig,
        *,
        groups: ModelParallel,
        vocabulary: VocabularyShard | None,
        batch_invariant: bool,
        device: torch.device,
    ) -> None:
        self.recipe, self.groups = recipe, groups
        self.vocabulary, self.batch_invariant = vocabulary, batch_invariant
        orpo = recipe.loss == "orpo"
        of_pairs = recipe.beta if orpo else 1.0
        self.weights = torch.tensor([of_pairs, *[0.0] * 6, 1.0 if orpo else recipe.nll_weight], device=device)

    def counts(self, batch: Batch) -> Tensor:
        chosen = (batch.columns["completion"] >= 0) & (batch.columns["completion"] % 2 == 0)
        return torch.cat([count_pairs(batch).expand(7), chosen.sum()[None]])

    def head(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            losses = token_losses(
                hidden, weight, batch.labels, vocabulary=self.vocabulary, batch_invariant=self.batch_invariant
            )
            return self.sums(batch, -losses)

        return head

    def sums(self, batch: Batch, logprobs: Tensor) -> Tensor:
        """[8] fp32 of the log-probabilities of labels [B, T]."""
        recipe, pairs = self.recipe, Pairs.of(batch, self.groups)
        counted, lengths = pairs.counted(), pairs.lengths()
        answers, reference = pairs.answers(logprobs), None
        if recipe.loss not in WITHOUT_REFERENCE:
            reference = pairs.answers(batch.columns["reference"])
        losses = preference_losses(
            recipe.loss,
            answers,
            reference,
            lengths,
            beta=recipe.beta,
            label_smoothing=recipe.label_smoothing,
            gamma=recipe.gamma,
        )
        said = answers.detach()
        rewards = implicit_rewards(recipe.loss, said, reference, lengths, beta=recipe.beta)
        of_pairs = torch.stack([losses, *reports(rewards), *said.unbind(-1)])
        chosen = (batch.columns["completion"] >= 0) & (batch.columns["completion"] % 2 == 0)
        nll = torch.where(chosen, -logprobs, 0.0).sum(dtype=torch.float64)
        return torch.cat([(of_pairs * counted).sum((1, 2)), nll[None]]).float()

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return []


def reports(rewards: Tensor) -> list[Tensor]:
    """PAIR_NAMES of rewards [..., 2]: each [...]."""
    chosen, rejected = rewards.unbind(-1)
    return [chosen, rejected, chosen - rejected, (chosen > rejected).to(rewards.dtype)]


class Preferences(Recipe):
    """What recipes over pairs have in common."""

    name: str
    source = "preferences"
    loss_kernel = "linear_token_losses"

    def problems(self, config: TrainConfig) -> list[str]:
        data, found = config.data, []
        if data.source != self.source:
            found.append(
                f"recipe.name={self.name} with data.source={data.source} has nothing to compare; use data={self.source}"
            )
        elif data.tokenizer.path is None and config.model.path is None:
            found.append(NO_TOKENIZER)
        if config.model.mtp.depth:
            why = (
                f"model.mtp.depth={config.model.mtp.depth} with recipe.name={self.name}: its blocks would learn nothing"
            )
            found.append(Problem(why, values("model.mtp.depth", [0])))
        if (kind := config.model.speculator.kind) != "none":
            why = f"model.speculator.kind={kind} with recipe.name={self.name}: heads that draft learn from text"
            found.append(Problem(why, values("model.speculator.kind", ["none"])))
        if config.train.seq_len < 4:
            found.append(Problem(f"train.seq_len={config.train.seq_len} holds no pair", values("train.seq_len", [4])))
        return found

    def validation_metrics(self, found: Mapping[str, float]) -> dict[str, float]:
        return {f"validation_{name}": value for name, value in found.items()}

    def describe_data(self, data: Loader) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in data.counts.items() if count)
        left_out = "".join(f"; left out, for example, {why}" for why in data.left_out)
        return f"of the training split: {counts}{left_out}"


class DirectPreferenceOptimization(Preferences):
    name = "dpo"
    reads = (
        "loss",
        "beta",
        "label_smoothing",
        "gamma",
        "nll_weight",
        "reference",
        "reference_path",
        "reference_offload",
    )

    def __init__(self) -> None:
        self.reference: Reference | None = None

    def problems(self, config: TrainConfig) -> list[str]:
        return super().problems(config) + loss_problems(config.recipe) + reference_problems(config)

    def open_data(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        data = super().open_data(config, split=split, rank=rank, world_size=world_size, device_type=device_type)
        if needs_reference(config.recipe) and config.recipe.reference == "precomputed":
            check_precomputed(config, data, split)
        return data

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        groups = groups_in_layers(mesh, config.parallel)
        return PreferenceObjective(
            config.recipe,
            groups=groups,
            vocabulary=vocabulary_shard(config.model.vocab_size, groups),
            batch_invariant=config.train.batch_invariant,
            device=device,
        )

    def frozen_beside(self, config: TrainConfig) -> Beside | None:
        return reference_beside(config) if needs_reference(config.recipe) else None

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        if needs_reference(config.recipe) and config.recipe.reference != "precomputed":
            self.reference = load_reference(config, state, mesh)

    def prepare(self, microbatches: list[Batch]) -> list[Batch]:
        if self.reference is None:
            return microbatches
        found = self.reference.token_logprobs(microbatches)
        return [batch.with_columns(reference=each) for batch, each in zip(microbatches, found, strict=True)]


def needs_reference(recipe: RecipeConfig) -> bool:
    return recipe.loss not in WITHOUT_REFERENCE


def check_precomputed(config: TrainConfig, data: Loader, split: str) -> None:
    """Raises ConfigError for rows that do not say what the reference makes of them."""
    if data.counts["with_reference"]:
        return
    raise ConfigError([
        f"recipe.reference=precomputed: a pair of the {split} split has no number in {' or '.join(REFERENCE_COLUMNS)}; "
        "give the log-probabilities of both answers in every row, or use recipe.reference=model"
    ])  # fmt: skip


def loss_problems(recipe: RecipeConfig) -> list[str]:
    """What is wrong with the loss and its numbers."""
    found: list[str] = []
    if recipe.loss not in LOSSES:
        return [Problem(f"recipe.loss={recipe.loss} is unknown", values("recipe.loss", list(LOSSES)))]
    if not 0.0 < recipe.beta < math.inf:
        found.append(Problem(f"recipe.beta={recipe.beta} must be positive", values("recipe.beta", [0.1])))
    if not 0.0 <= recipe.label_smoothing < 0.5:
        why = f"recipe.label_smoothing={recipe.label_smoothing} must be at least 0 and below 0.5, a coin's"
        found.append(Problem(why, values("recipe.label_smoothing", [0.0, 0.1])))
    elif recipe.label_smoothing and recipe.loss not in SMOOTHED:
        why = f"recipe.label_smoothing={recipe.label_smoothing} has no effect with recipe.loss={recipe.loss}"
        found.append(Problem(why, values("recipe.label_smoothing", [0.0]), values("recipe.loss", list(SMOOTHED))))
    if recipe.gamma and recipe.loss != "simpo":
        why = f"recipe.gamma={recipe.gamma} has no effect with recipe.loss={recipe.loss}"
        found.append(Problem(why, values("recipe.gamma", [0.0]), values("recipe.loss", ["simpo"])))
    if not 0.0 <= recipe.nll_weight < math.inf:
        found.append(
            Problem(f"recipe.nll_weight={recipe.nll_weight} must not be negative", values("recipe.nll_weight", [0.0]))
        )
    elif recipe.nll_weight and recipe.loss == "orpo":
        why = f"recipe.nll_weight={recipe.nll_weight} has no effect with recipe.loss=orpo, where beta weights the rest"
        found.append(Problem(why, values("recipe.nll_weight", [0.0])))
    return found


def reference_problems(config: TrainConfig) -> list[str]:
    """What is wrong with the reference."""
    recipe = config.recipe
    if not needs_reference(recipe):
        return no_effect(config, ("reference", "reference_path", "reference_offload"), f"recipe.loss={recipe.loss}")
    found = problems_of_reference(config, kinds=REFERENCES)
    if recipe.reference == "precomputed" and config.data.conversations.too_long == "truncate":
        why = "data.conversations.too_long=truncate with recipe.reference=precomputed compares sums over other tokens"
        found.append(Problem(why, values("data.conversations.too_long", ["skip", "error"])))
    return found
