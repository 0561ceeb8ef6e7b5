"""Checkpoints of adapters as PEFT folders, and merged into the model they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.adapter_config import AdapterConfig, adapted_layers
from models.config import ModelConfig
from models.hf import load_hf_weights
from models.hf_files import DTYPES, TensorFolder
from models.init import SCORE_HEAD
from models.merge import check_fits, with_adapter
from models.peft import LowRank, save_peft
from models.registry import build_model
from trainer.adapter_start import read_with_beginning, with_beginning
from trainer.adapters import fingerprint
from trainer.agreement import CheckpointError
from trainer.checkpoint import TensorReader

WEIGHTS = "model/"


def base_folder(checkpoint: Path, extra: Mapping[str, Any]) -> Path:
    """The model that the adapters of a checkpoint are for. Raises CheckpointError where it is gone or changed."""
    base = extra["adapter"]["base"]
    folder = Path(base["path"])
    if not folder.is_dir():
        raise CheckpointError(f"{checkpoint} holds adapters for the model in {folder}, which is not there any more")
    if fingerprint(folder) != base["fingerprint"]:
        raise CheckpointError(f"{checkpoint} holds adapters for the model in {folder}, which has other weights now")
    return folder


def dtype_of(base: Path) -> torch.dtype:
    """The dtype of most of the tensors in a Hugging Face folder."""
    tensors = TensorFolder(base)
    names = Counter(tensors.tensor(name).get_dtype() for name in tensors.file_of)
    return {name: dtype for dtype, name in DTYPES.items()}[names.most_common(1)[0][0]]


def read_adapters(reader: TensorReader, adapter: AdapterConfig, config: ModelConfig) -> dict[str, LowRank]:
    """The adapters in a checkpoint, by layer. Raises CheckpointError for one that is not there."""
    found, read = {}, _reading(reader, adapter)
    if adapter.init == "pissa":
        adapter = with_beginning(adapter)
    for name in adapted_layers(adapter, config):
        a, b = (read(f"{name}.lora_{matrix}") for matrix in "ab")
        lengths = reader.read(f"{WEIGHTS}{name}.lora_m") if adapter.dora else None
        found[name] = LowRank(a, b, adapter.scale, lengths)
    return found


def export_adapters(
    reader: TensorReader,
    adapter: AdapterConfig,
    config: ModelConfig,
    out: Path,
    *,
    base: str,
    dtype: torch.dtype | None,
) -> None:
    """Write a PEFT folder; base: where the model is, for its config."""
    described = with_beginning(adapter) if adapter.init == "pissa" else adapter
    save_peft(out, described, config, _reading(reader, adapter), base=base, dtype=dtype)


def _reading(reader: TensorReader, adapter: AdapterConfig) -> Callable[[str], Tensor]:
    """A function that reads a matrix of adapters for the model as it is in its folder, by name."""

    def read(name: str) -> Tensor:
        return reader.read(f"{WEIGHTS}{name}")

    return partial(read_with_beginning, read) if adapter.init == "pissa" else read


def merged_weights(
    base: Path, config: ModelConfig, adapters: Mapping[str, LowRank], dtype: torch.dtype, reader: TensorReader
) -> Callable[[str], Tensor]:
    """A function that reads one weight of the model in `base` by name, with its adapter in it; the head of a reward
    model from the checkpoint of the adapters."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    check_fits(shapes, adapters)

    def read(name: str) -> Tensor:
        if config.score and name == SCORE_HEAD:
            return reader.read(f"{WEIGHTS}{name}").to(dtype)
        # Added in fp32, so that what is written has been rounded once.
        weight = torch.empty(shapes[name], dtype=torch.float32)
        load_hf_weights(base, {name: weight}, config, whole_model=False)
        adapter = adapters.get(name.removesuffix(".weight"))
        return (weight if adapter is None else with_adapter(weight, adapter)).to(dtype)

    return read
