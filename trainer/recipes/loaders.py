"""The loaders that recipes have in common, of one data-parallel rank."""

from __future__ import annotations

from typing import Any

from data.loader import Loader, build_loader
from data.prompts import PromptSamples, build_prompt_loader
from trainer.config import TrainConfig


def open_rows(
    config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str, **further: Any
) -> Loader:
    """Rows of train.seq_len tokens; split: train or validation; further: of `build_loader`. Raises DataError."""
    train = config.train
    return build_loader(
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
        **further,
    )


def open_prompts(
    config: TrainConfig, *, num_prompts: int, split: str, rank: int, world_size: int, device_type: str
) -> tuple[Loader, PromptSamples]:
    """Prompts, num_prompts of all ranks a step, that leave room for an answer in train.seq_len. Raises DataError."""
    return build_prompt_loader(
        config.data,
        num_prompts=num_prompts,
        max_prompt=config.train.seq_len - 1,
        rank=rank,
        world_size=world_size,
        seed=config.train.seed,
        split=split,
        vocab_size=config.model.vocab_size,
        device_type=device_type,
    )
