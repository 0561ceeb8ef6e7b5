"""Short runs of adapters on random models of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

from data.config import DataConfig
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from models.initializers import Normal
from tests.parity.harness import Outcome, run_here, tiny_config
from tests.pool import RankPool
from trainer import adapters
from trainer.config import TrainConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama_of_blocks": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.04},
    ),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, {"num_local_experts": 4}),
    "mixtral_of_blocks": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {
            "num_local_experts": 4,
            "hidden_size": 128,
            "intermediate_size": 128,
            "head_dim": 32,
            "initializer_range": 0.06,
        },
    ),
}


def adapter_config(folder: Path, corpus: DataConfig, family: str = "llama", **changes: Any) -> TrainConfig:
    """A short run of adapters on a random model of transformers."""
    base = folder / family
    if not base.exists():
        config, model, more = FAMILIES[family]
        torch.manual_seed(0)
        model(config(**(SHAPE | more))).save_pretrained(base)
    sizes = {"train__steps": 3, "schedule__warmup_steps": 0}
    run = tiny_config(folder / f"run-{family}", corpus, **(sizes | changes))
    run.model = ModelConfig(family="hf", path=str(base))
    run.adapter = AdapterConfig(name="lora", rank=3, alpha=6.0)
    return run


def token_data(folder: Path) -> DataConfig:
    """Tokens, some of which follow from the one before."""
    tokens = np.random.default_rng(0).integers(0, 300, 2000)
    tokens[1::2] = (tokens[::2] * 7 + 3) % 300
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    return DataConfig(source="tokens", path=str(folder / "tokens.npy"), num_workers=0)


def run_adapted(ranks: RankPool, world_size: int, config: TrainConfig) -> Outcome:
    """`harness.run_on` from adapters none of which is 0: where B is, no gradient of A could be wrong."""
    outcome = ranks.run(world_size, _run_from_random, config)[0]
    assert outcome is not None
    return outcome


def _run_from_random(config: TrainConfig) -> Outcome | None:
    with randomly():
        return run_here(config)


@contextmanager
def randomly() -> Iterator[None]:
    """Inside, adapters begin at random."""

    def initializers(shapes: Mapping[str, Sequence[int]]) -> dict[str, Normal]:
        return dict.fromkeys(shapes, Normal(0.1))

    with mock.patch.object(adapters, "adapter_initializers", initializers):
        yield
