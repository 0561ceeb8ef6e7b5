"""Reward models as rewards: what the head of a model trained on preferences says at a completion's last token.

A folder that transformers loads as AutoModelForSequenceClassification with one label, such as launch/convert.py export
makes of a run of recipe=reward. It reads the tokens of prompt and completion as they were sampled, so its tokenizer has
to be the policy's. It stays as it is, sharded over all ranks in the compute dtype (trainer/frozen.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.batch import IGNORE_INDEX, Batch
from data.examples import pack
from data.tokenizer import Tokenizer
from models.decoder import Head
from models.hf import SCORE
from models.hf_files import TensorFolder
from parallel.mesh import Meshes
from trainer.config import TrainConfig, configuration_errors
from trainer.frozen import FrozenModel, load_frozen, problems_beside, resolve_beside
from trainer.loss import token_scores
from trainer.rl.config import MODEL, RewardConfig
from trainer.rl.packing import filled_length, filled_rows, in_step
from trainer.sequence import SequenceParts, row_step


class RewardModels:
    """All reward models of a configuration."""

    def __init__(
        self,
        models: Mapping[str, RewardConfig],
        config: TrainConfig,
        mesh: Meshes,
        device: torch.device,
        *,
        tokenizer: Tokenizer,
        all_gather: Callable[[Any], list[Any]],
    ) -> None:
        """models: by name. tokenizer: the policy's. all_gather: one object of every rank with other prompts.
        Collective.

        Raises ConfigError for a folder that does not hold one, or whose tokenizer numbers tokens otherwise.
        """
        for one in models.values():
            check_tokenizer(str(one.path), tokenizer)
        self._config, self._all_gather, self._device = config, all_gather, device
        self._models = {name: _load(one, config, mesh, device) for name, one in models.items()}
        # Of each model: windows of its layers decide who computes which tokens.
        self._parts = {name: SequenceParts(config, mesh, model.model.config) for name, model in self._models.items()}

    def of(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[float]]:
        """By name, the reward of each sequence of at most train.seq_len tokens. Collective over all ranks."""
        if not self._models:
            return {}
        train = self._config.train
        laid_out = scoring_batches(
            sequences,
            seq_len=train.seq_len,
            micro_batch_size=train.micro_batch_size,
            few_shapes=train.compile,
            row_step=row_step(self._config.parallel),
        )
        batches = in_step([one.batch for one in laid_out], self._config, self._all_gather)
        found: dict[str, list[float]] = {}
        for name, model in self._models.items():
            split = self._parts[name]
            parts = [split.of(batch).to(self._device) for batch in batches]
            of_parts = zip(model.per_token(parts, scores_head), parts, strict=True)
            scores = [split.whole(each, part).cpu() for each, part in of_parts]
            rewards = [0.0] * len(sequences)
            for each, one in zip(scores, laid_out, strict=False):
                for sequence, row, place in one.ends:
                    rewards[sequence] = each[row, place].item()
            found[name] = rewards
        return found


class LaidOut(NamedTuple):
    """Filled by `scoring_batches`."""

    batch: Batch  # every token is an input; there are no labels
    ends: list[tuple[int, int, int]]  # number of a sequence, and the row and place of its last token


def scoring_batches(
    sequences: Sequence[Sequence[int]],
    *,
    seq_len: int,
    micro_batch_size: int,
    few_shapes: bool = False,
    row_step: int = 1,
) -> list[LaidOut]:
    """Sequences of at most seq_len tokens, several in a row, none of which sees another. few_shapes, row_step: see
    `rollout_batches`."""
    rows = pack(np.asarray([len(tokens) for tokens in sequences], dtype=np.int64), seq_len)
    parts = [rows[first : first + micro_batch_size] for first in range(0, len(rows), micro_batch_size)]
    if not few_shapes:
        return [_lay_out(part, sequences, step=row_step) for part in parts]
    parts = [part + [[]] * (filled_rows(len(part), micro_batch_size) - len(part)) for part in parts]
    return [_lay_out(part, sequences, length=seq_len) for part in parts]


def _lay_out(
    rows: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]], *, length: int | None = None, step: int = 1
) -> LaidOut:
    length = length or filled_length(max(sum(len(sequences[member]) for member in row) for row in rows), step)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    documents = torch.zeros(len(rows), length, dtype=torch.int32)
    ends = []
    for number, row in enumerate(rows):
        filled = 0
        for place, member in enumerate(row):
            here = slice(filled, filled := filled + len(sequences[member]))
            tokens[number, here] = torch.tensor(sequences[member])
            positions[number, here] = torch.arange(here.stop - here.start)
            documents[number, here] = place
            ends.append((member, number, filled - 1))
        # What is left of the row is a document of its own.
        documents[number, filled:] = len(row)
        positions[number, filled:] = torch.arange(length - filled)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    samples = torch.tensor([row[0] if row else 0 for row in rows])
    return LaidOut(Batch(tokens, labels, positions, documents, samples), ends)


def scores_head(batch: Batch) -> Head:
    """For `Passes.per_token`: what a reward model says of each token, [B, T] fp32."""
    return lambda hidden, weight: token_scores(hidden, weight).float()


def reward_model_problems(config: TrainConfig) -> list[str]:
    """Why the reward models of a configuration cannot be used, one line each; config is not resolved."""
    found: list[str] = []
    for number, one in enumerate(config.recipe.rl.rewards):
        if one.function == MODEL and one.path is not None:
            field, path = f"recipe.rl.rewards[{number}].path", str(Path(one.path).expanduser())
            found += problems_beside(field, path, config, score=True) or _head_problems(field, path)
    return found


def _head_problems(field: str, path: str) -> list[str]:
    try:
        folder = TensorFolder(Path(path))
        if SCORE not in folder.file_of:
            why = f"has no {SCORE}, so it is no reward model; give what launch/convert.py export makes of one"
            return [f"{field}={path} {why}"]
        if (labels := folder.tensor(SCORE).get_shape()[0]) != 1:
            return [f"{field}={path} classifies into {labels} labels; a reward model has one"]
    except ValueError as error:
        return [f"{field}: {error}"]
    return []


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError for a folder with another one. A folder without a tokenizer is taken at its word."""
    with configuration_errors():
        if (Path(path).expanduser() / "tokenizer.json").is_file():
            theirs = Tokenizer.from_path(Path(path).expanduser())
            if not tokenizer.is_part_of(theirs):
                raise ValueError(
                    f"the model in {path} has another tokenizer than the policy, whose tokens it would read as "
                    "other words; give one that was trained from the policy's family"
                )


def _load(one: RewardConfig, config: TrainConfig, mesh: Meshes, device: torch.device) -> FrozenModel:
    assert one.path is not None  # validated
    with configuration_errors():
        beside = resolve_beside(str(Path(one.path).expanduser()), config, score=True)
        return load_frozen(beside, config, mesh, device, offload=one.offload)
