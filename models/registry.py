"""The families there are, and how a ModelConfig becomes a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from models.config import ModelConfig, check
from models.decoder import Decoder
from models.deepseek_v2 import DEEPSEEK_V2
from models.deepseek_v3 import DEEPSEEK_V3
from models.family import Family
from models.gpt2 import GPT2
from models.llama import LLAMA
from models.mistral import MISTRAL
from models.mixtral import MIXTRAL
from models.mtp_config import MTPConfig
from models.opt import OPT
from models.qwen2 import QWEN2
from models.qwen3 import QWEN3
from models.qwen3_moe import QWEN3_MOE
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.pipeline.stages import Stage

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, OPT, MIXTRAL, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3)
}

RUN_TIME_FIELDS = (
    "path",
    "score",
    "dropout",
    "attention_dropout",
    "routing",
    "attention",
    "fused_projections",
    "speculator",
    "activation_checkpoint",
    "activation_checkpoint_save",
    "activation_memory_gib",
)
"""Fields that say how a model is run, not what it is: a Hugging Face folder does not decide them."""


def resolve_model(config: ModelConfig) -> ModelConfig:
    """The complete shape: read from the folder where config.path is set (run-time fields stay), sizes derived.

    Raises ValueError for a missing or damaged config.json, an architecture that is not supported and for every reason
    of models.config.problems.
    """
    if config.path is not None:
        config = _read_folder(config, Path(config.path))
    check(config)
    return config.resolve()


def build_model(
    config: ModelConfig,
    seed: int = 0,
    groups: ModelParallel = NO_GROUPS,
    *,
    stages: Sequence[Stage] | None = None,
) -> Decoder:
    """The model of a config, which need not be resolved unless it has a path; seed keys its dropout.
    groups: the process groups inside its layers.

    stages: those of a pipeline that this rank holds; None: all of the model.

    Its parameters hold nothing of value yet: fill them with models.init or models.hf. Under torch.device("meta") they
    take no memory until `to_empty`.
    """
    if config.num_kv_heads is None or config.head_dim is None:
        config = resolve_model(config)  # one that is resolved does not need its folder any more
    check(config)
    return Decoder(config, seed, groups, stages=stages)


def _read_folder(config: ModelConfig, folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ValueError(f"model.path={folder} {what}; give the folder of a Hugging Face model")
    try:
        content = json.loads(file.read_text())
        model_type = content.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object ({error}); the folder is damaged") from error
    if model_type not in FAMILIES:
        raise ValueError(f"{file} has model_type={model_type!r}; supported are {', '.join(FAMILIES)}")
    if config.family not in ("hf", model_type):
        raise ValueError(
            f"model.family={config.family} but {file} is of family {model_type}; use model=hf to follow the folder"
        )
    try:
        shape = FAMILIES[model_type].from_hf(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error
    if config.mtp.depth > shape.mtp.depth:
        raise ValueError(
            f"model.mtp.depth={config.mtp.depth}, but {file} speaks of {shape.mtp.depth} layers for multi-token "
            f"prediction; use at most {shape.mtp.depth}"
        )
    return replace(shape, mtp=config.mtp, **{name: getattr(config, name) for name in RUN_TIME_FIELDS})


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """The fields of a resolved config that say what weights mean, by name; others a run may change."""
    what = replace(config, mtp=MTPConfig(depth=config.mtp.depth))
    return {field.name: getattr(what, field.name) for field in fields(what) if field.name not in RUN_TIME_FIELDS}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a resolved config. Raises ValueError when its family cannot say all of it, naming the fields.

    What is written is read back and compared, so a field that the family has no word for cannot get lost.
    """
    family = FAMILIES[config.family]
    written = {"architectures": [family.architecture], "model_type": family.name, **family.to_hf(config)}
    if config.score:
        written["architectures"] = [family.architecture.replace("ForCausalLM", "").replace("LMHeadModel", "")]
        written["architectures"][0] += "ForSequenceClassification"
        written |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    back = shape_of(family.from_hf(written).resolve())
    lost = [f"model.{name}={value}" for name, value in shape_of(config).items() if back[name] != value]
    if lost:
        raise ValueError(f"the Hugging Face format of {family.name} cannot express {', '.join(lost)}")
    return written
