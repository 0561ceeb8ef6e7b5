"""What a recipe says to the trainer: its data, models beside the one that is trained, an objective and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from data.batch import Batch
from data.loader import Loader
from parallel.mesh import Meshes, groups_in_layers
from trainer.config import TrainConfig
from trainer.frozen import Beside
from trainer.loss import Objective, choose_loss_kernel, next_token, vocabulary_shard
from trainer.recipes.loaders import open_rows
from trainer.step import TrainState, evaluate


@dataclass
class StepReport:
    """What the host knows of a step before it runs. Filled by `Recipe.report`, the same on all ranks."""

    metrics: dict[str, float] = field(default_factory=dict)  # fields of metrics.jsonl
    events: list[tuple[str, str]] = field(default_factory=list)  # kind and text, for events.jsonl
    positions: int | None = None  # that the step trains on; None: train.global_batch_size x train.seq_len


class TrainedBeside(NamedTuple):
    """A model that is trained beside that of the run (TrainState.beside). Filled by `Recipe.trained_beside`."""

    config: TrainConfig  # that of the run with its own model, resolved, and with how its adapters begin
    path_field: str  # of the run's configuration, that says where the model is
    objective: Objective
    lr_factor: float  # times the learning rate of the run


class Recipe:
    """Where nothing is overridden: the loss of trainer/loss.py over every label of a batch, on rows of tokens."""

    reads: tuple[str, ...] = ()
    """Fields of RecipeConfig besides the name; others have no effect, and are refused where they are set."""
    validates_prompts = False
    """Whether `validate` answers prompts, whose batches it gets as they were read: whole, and not prepared."""
    loss_kernel = "linear_cross_entropy"
    """What computes the loss, for run.json."""

    @classmethod
    def computes_loss(cls, config: TrainConfig) -> str:
        """The kernel that this configuration's loss runs on."""
        return cls.loss_kernel

    def problems(self, config: TrainConfig) -> list[str]:
        """Every reason why it cannot run, one line each, before any process group exists."""
        return []

    def open_data(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        """The loader of one data-parallel rank; split: train or validation. Raises DataError."""
        return open_rows(config, split=split, rank=rank, world_size=world_size, device_type=device_type)

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        """What a step minimises on this rank."""
        return next_token(
            config.model.mtp,
            device=device,
            kernel=choose_loss_kernel(config, device.type),
            vocabulary=vocabulary_shard(config.model.vocab_size, groups_in_layers(mesh, config.parallel)),
            batch_invariant=config.train.batch_invariant,
        )

    def frozen_beside(self, config: TrainConfig) -> Beside | None:
        """The model that `start` makes beside the one that is trained; None: there is none. Raises ValueError."""
        return None

    def trained_beside(self, config: TrainConfig, device: torch.device) -> dict[str, TrainedBeside]:
        """Models that are trained beside the one of the run, by name. Raises ValueError for one that is not there."""
        return {}

    def start_beside(self, config: TrainConfig, state: TrainState, *, imported: bool) -> None:
        """Give those of `state.beside` the weights that a new run begins with. Raises ValueError for what has none.

        imported: the run's own model has its weights from a checkpoint that holds nothing else.
        """

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        """Called once the weights are there, before the first step: makes models beside the one that is trained."""

    def collect(self, data: Loader) -> list[Batch]:
        """The micro-batches to train on, of whole sequences, from those that the data has next."""
        return data.next_step()

    def report(self) -> StepReport:
        """Of the step that `collect` has made last."""
        return StepReport()

    def prepare(self, microbatches: list[Batch]) -> list[Batch]:
        """With what other models say of them: on the device, and of each sequence this rank's tokens on the cp axis."""
        return microbatches

    def measured(self) -> dict[str, torch.Tensor]:
        """More metrics of a step that has just been launched, 0-d on the device. Collective."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold for the next steps to be those of this run, in JSON values. Collective."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Called before `start`, where a run goes on from a checkpoint."""

    def close(self) -> None:
        """Called when the run ends, however: stops what is under way in the background."""

    def validate(self, state: TrainState, steps: Iterable[list[Batch]]) -> dict[str, float]:
        """What `validation_metrics` gets, over these lists of micro-batches of the held-out data. Collective."""
        return evaluate(state, steps)

    def validation_metrics(self, found: Mapping[str, float]) -> dict[str, float]:
        """Fields of metrics.jsonl, of the objective's numbers over the validation data."""
        loss = found["loss"]
        return {
            **{f"validation_{name}": value for name, value in found.items()},
            "validation_perplexity": math.exp(loss) if loss < 700 else math.inf,
        }

    def validation_events(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Kind, text and fields of what the last `validate` has to say, for events.jsonl; of rank 0."""
        return []

    def describe_data(self, data: Loader) -> str:
        """What the run should say of its data when it begins; empty: nothing."""
        return ""
