"""A model for the inference lab: from a Hugging Face folder, or from a checkpoint of the trainer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data.config import DataError
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.decoder import Decoder
from models.hf import load_hf_weights
from models.registry import build_model, resolve_model
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.convert import load_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass
class LabModelConfig:
    """`model`: what is served."""

    path: str | None = None  # a Hugging Face folder, a checkpoint, or a run: its newest good one
    dtype: str = "auto"  # of weights, activations and cache: auto (bf16 on CUDA, else fp32), or one of DTYPES
    tokenizer: str | None = None  # a tokenizer.json or its folder; None: the model's own


@dataclass
class OpenedModel:
    """Filled by `open_model`."""

    model: Decoder
    tokenizer: Tokenizer | None
    no_tokenizer: str | None  # why there is none
    eos_ids: list[int]  # tokens that end a document


def model_problems(config: LabModelConfig) -> list[str]:
    """What is wrong with `model` before any file is read; one line each."""
    found = []
    if config.path is None:
        found.append("model.path is missing; set model.path=DIR, a Hugging Face folder or a checkpoint")
    elif not Path(config.path).expanduser().exists():
        found.append(f"model.path={config.path} does not exist; give a Hugging Face folder or a checkpoint")
    if config.dtype not in ("auto", *DTYPES):
        found.append(f"model.dtype={config.dtype} is unknown; use auto, {', '.join(DTYPES)}")
    return found


def open_model(config: LabModelConfig, device: torch.device) -> OpenedModel:
    """The model with its weights on `device`, in eval mode. Raises ConfigError for a folder that holds none."""
    assert config.path is not None
    path = Path(config.path).expanduser()
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(config.dtype, auto)
    try:
        if (path / "config.json").is_file():
            opened = _open_folder(path, dtype, device)
        else:
            loaded = load_checkpoint(path, name="model.path", dtype=dtype, device=device)
            opened = OpenedModel(loaded.model, loaded.tokenizer, loaded.no_tokenizer, [])
        if config.tokenizer is not None:
            opened.tokenizer, opened.no_tokenizer = Tokenizer.from_path(config.tokenizer), None
    except CheckpointError as error:
        raise ConfigError([f"{error}; the folder of a Hugging Face model would have a config.json"]) from None
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    _check_vocabulary(opened)
    return opened


def _open_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> OpenedModel:
    config = resolve_model(ModelConfig(family="hf", path=str(folder)))
    with torch.device("meta"):
        model = build_model(config).to(dtype)
    model.to_empty(device=device)
    load_hf_weights(folder, model.state_dict(), config)
    try:
        tokenizer, missing = Tokenizer.from_path(folder), None
    except DataError as error:
        tokenizer, missing = None, str(error)
    return OpenedModel(model.eval(), tokenizer, missing, _eos_ids(folder))


def _eos_ids(folder: Path) -> list[int]:
    """What a Hugging Face folder says ends a document: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        said = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if said is not None:
            return [said] if isinstance(said, int) else list(said)
    return []


def _check_vocabulary(opened: OpenedModel) -> None:
    """The end of a document is the tokenizer's where the model's files do not say it; it must be one of its tokens."""
    vocab_size, tokenizer = opened.model.config.vocab_size, opened.tokenizer
    if tokenizer is not None and tokenizer.eos_id >= vocab_size:
        raise ConfigError([
            f"the tokenizer ends documents with token {tokenizer.eos_id} ({tokenizer.eos_token}), outside of the "
            f"model's vocabulary of {vocab_size}: they do not belong together; set model.tokenizer to the model's own"
        ])  # fmt: skip
    if not opened.eos_ids and tokenizer is not None:
        opened.eos_ids = [tokenizer.eos_id]
