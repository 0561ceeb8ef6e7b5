"""Runs of recipe=grpo on a tiny random model, with rewards that differ from completion to completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from data.config import DataConfig, TokenizerConfig
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from tests.data.conversing import chat_folder, write_rows
from tests.parity.harness import tiny_config
from trainer.config import RecipeConfig, TrainConfig
from trainer.rl.config import RewardConfig, RLConfig
from trainer.rl.rewards import Answer

WORDS = ["one", "two", "three", "user", "assistant"]
ROWS = [{"prompt": f"{' '.join(WORDS[: n % 5 + 1])} {n}?", "answer": str(n)} for n in range(23)]
SEQ_LEN = 40
EVEN = "tests.trainer.rl.rolling:even"


def even(answer: Answer) -> float:
    """The share of even tokens: another one for nearly every completion."""
    return sum(token % 2 == 0 for token in answer.token_ids) / len(answer.token_ids)


def rolling(folder: Path, **changes: Any) -> TrainConfig:
    """4 prompts of 4 completions each a step. changes: as of tiny_config, and rl__NAME of RLConfig,
    recipe__NAME of RecipeConfig."""
    rl = {name.removeprefix("rl__"): changes.pop(name) for name in list(changes) if name.startswith("rl__")}
    recipe = {name.removeprefix("recipe__"): changes.pop(name) for name in list(changes) if name.startswith("recipe__")}
    data = DataConfig(
        source="prompts",
        path=str(write_rows(folder / "prompts.jsonl", changes.pop("rows", ROWS))),
        tokenizer=TokenizerConfig(path=str(chat_folder(folder / "tokenizer"))),
        mask_documents=True,
        validation_fraction=0.1,
        num_workers=0,
    )
    sizes: dict[str, Any] = {
        "train__seq_len": SEQ_LEN,
        "train__global_batch_size": 16,
        "train__micro_batch_size": 3,
        "train__steps": 2,
        "model__max_seq_len": SEQ_LEN,
        "schedule__warmup_steps": 0,
    }
    config = tiny_config(folder / "run", data, **(sizes | changes))
    settings: dict[str, Any] = {"group_size": 4, "max_tokens": 8, "rewards": [RewardConfig(EVEN)]}
    config.recipe = RecipeConfig(**({"name": "grpo", "rl": RLConfig(**(settings | rl))} | recipe))
    return config


def metrics_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def adapting(config: TrainConfig, folder: Path, **settings: Any) -> TrainConfig:
    """The same with adapters beside a random model of transformers; settings: of AdapterConfig."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64} if settings.get("quantize") else {}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{
                "vocab_size": 300,
                "hidden_size": 24,
                "intermediate_size": 36,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": SEQ_LEN,
                "initializer_range": 0.3,
                "bos_token_id": None,
                "eos_token_id": 0,
                "pad_token_id": None,
            }
            | shape
        )
    ).save_pretrained(folder / "tokenizer")  # a model's folder has both
    config.model = ModelConfig(family="hf", path=str(folder / "tokenizer"))
    config.data.tokenizer.path = None
    config.adapter = AdapterConfig(name="lora", rank=3, alpha=6.0, **settings)
    return config
