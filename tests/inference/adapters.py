"""A small model with adapters that the `peft` package made, and what `peft` and transformers compute with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.layout import ServingLayout, serving_groups
from inference.speculation.build import build_speculation
from inference.speculation.config import SpeculationConfig
from launch.open_model import LabModelConfig, open_model
from models.invariant import make_batch_invariant

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "all": {"r": 11, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
    "mixed": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["k_proj", "q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"k_proj": 9},
    },
}
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 1], [11, 3], [5, 6, 7, 8, 9], [40, 41, 42, 43, 44, 45, 46], [5, 6, 7, 8]]
CHOICES = ["attention", None, "all", "mixed", "attention", "all"]
"""Of PROMPTS: which one answers."""
GREEDY = SamplingConfig(temperature=0.0, max_tokens=9, ignore_eos=True)
SMALL = EngineConfig(block_size=2, num_blocks=64, max_sequences=4, max_batch_tokens=7)


def make_adapters(model: Path, folder: Path, chosen: dict[str, dict[str, Any]] | None = None) -> dict[str, str]:
    """PEFT folders of random adapters, by name."""
    found = {}
    for number, (name, settings) in enumerate((ADAPTERS if chosen is None else chosen).items()):
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        torch.manual_seed(number)
        adapted = peft.get_peft_model(base, config)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.4)
        adapted.save_pretrained(str(folder / name))
        found[name] = str(folder / name)
    return found


@torch.no_grad()
def by_peft(model: Path, adapters: dict[str, str], prompts: list[list[int]], choices: list[str | None]) -> list[Any]:
    """Greedy tokens of each prompt alone, in fp64, without a cache."""
    found = []
    for prompt, choice in zip(prompts, choices, strict=True):
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        if choice is not None:
            theirs = peft.PeftModel.from_pretrained(theirs, adapters[choice]).double().eval()
        tokens = list(prompt)
        for _ in range(GREEDY.max_tokens or 0):
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def engine_of(
    model: Path,
    adapters: dict[str, str],
    config: EngineConfig = SMALL,
    *,
    dtype: str = "fp64",
    drafts: bool = False,
    layout: ServingLayout | None = None,
) -> Engine:
    cpu = torch.device("cpu")
    groups = {} if layout is None else {"groups": serving_groups(layout, "cpu")}
    opened = open_model(LabModelConfig(path=str(model), dtype=dtype, adapters=adapters), cpu, **groups)
    if config.deterministic:
        make_batch_invariant(opened.model)
    drafting = build_speculation(SpeculationConfig(method="ngram"), opened.model) if drafts else None
    return Engine(opened.model, config, adapters=opened.adapters, speculation=drafting)


@dataclass
class Found:
    tokens: list[list[int]]
    logprobs: list[list[float]]


def on_a_rank(model: Path, adapters: dict[str, str], layout: ServingLayout) -> Found:
    """What one of several ranks, which are all asked alike, finds."""
    done = engine_of(model, adapters, layout=layout).generate(PROMPTS, GREEDY, CHOICES)
    return Found([one.token_ids for one in done], [one.logprobs for one in done])
