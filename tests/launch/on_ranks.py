"""What the tests of launch run on each rank of a group."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import launch.lab_ranks
import trainer.convert
from benchmarks import serving
from inference.config import EngineConfig
from inference.layout import ServingLayout, serving_groups
from launch.lab import lab
from launch.modes.parity import ParityError
from launch.open_model import OpenedModel, random_model
from models.config import ModelConfig
from models.hf_files import TensorFolder
from parallel.regions import local_region, local_tensor
from trainer.checkpoint import TensorReader
from trainer.config import ConfigError
from trainer.convert import Exported, export_checkpoint


def export_and_watch(source: Path, out: Path, *, max_shard_bytes: float) -> tuple[list[str], int]:
    """Export in many files. Returns (parameters this rank read, most of them it held when it asked for another)."""
    names: list[str] = []
    held: list[weakref.ref[Tensor]] = []
    most = 0
    read = TensorReader.read

    def watched(reader: TensorReader, name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in held))
        tensor = read(reader, name)
        names.append(name)
        held.append(weakref.ref(tensor))
        return tensor

    TensorReader.read = watched  # type: ignore[method-assign]
    try:
        export_checkpoint(source, out, max_shard_bytes=max_shard_bytes)
    finally:
        TensorReader.read = read  # type: ignore[method-assign]
    return names, most


def import_and_watch(source: Path, out: Path, *, fails_on: int | None = None) -> int | str:
    """Import. Returns the elements of weights this rank held, or the error; fails_on: a rank that cannot read."""
    held = 0
    load = trainer.convert.load_hf_weights

    def watched(path: Any, parameters: Any, config: Any, **options: Any) -> None:
        nonlocal held
        held = sum(p.to_local().numel() for p in parameters.values())
        if dist.get_rank() == fails_on:
            raise ValueError("the disk is gone")
        load(path, parameters, config, **options)

    trainer.convert.load_hf_weights = watched
    try:
        trainer.convert.import_folder(source, out)
    except ValueError as error:
        return str(error)
    finally:
        trainer.convert.load_hf_weights = load
    return held


def export_here(source: Path, out: Path, dtype: torch.dtype | None = None) -> Exported:
    return export_checkpoint(source, out, dtype=dtype)


def import_here(source: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    return trainer.convert.import_folder(source, out, dtype=dtype)


def lab_and_watch(arguments: list[str]) -> tuple[str, int]:
    """Run the lab. Returns what it refused, and the elements of Hugging Face files that this rank read."""
    elements = 0
    read = TensorFolder.read

    def watched(folder: TensorFolder, name: str, region: tuple[slice, ...]) -> Tensor:
        nonlocal elements
        tensor = read(folder, name, region)
        elements += tensor.numel()
        return tensor

    TensorFolder.read = watched  # type: ignore[method-assign]
    try:
        lab(arguments)
    except ConfigError as error:
        return str(error), elements
    finally:
        TensorFolder.read = read  # type: ignore[method-assign]
    return "", elements


def parity_verdict(arguments: list[str], *, damaged: int | None = None) -> str:
    """mode=parity; what it says of a bound that is broken. damaged: a rank that serves one wrong number."""
    real = launch.lab_ranks._open

    def opened(*given: Any, **options: Any) -> OpenedModel:
        found = real(*given, **options)
        if found.model.groups.tp is not None and dist.get_rank() == damaged:
            with torch.no_grad():
                local_tensor(found.model.state_dict()["blocks.1.mlp.down.weight"])[3, 5] += 0.1
        return found

    launch.lab_ranks._open = opened
    try:
        lab(arguments)
    except ParityError as error:
        return str(error)
    finally:
        launch.lab_ranks._open = real
    return ""


def drawn_part(config: ModelConfig, layout: ServingLayout) -> dict[str, tuple[tuple[slice, ...], Tensor]]:
    """Of each tensor of a model with random weights, where this rank's part lies and what is in it."""
    model = random_model(config, torch.float32, torch.device("cpu"), serving_groups(layout, "cpu"))
    return {n: (local_region(each), local_tensor(each).detach().clone()) for n, each in model.state_dict().items()}


def serving_case(out: Path) -> None:
    """benchmarks/serving.py with one case of a tiny model."""

    def batch3(engine: serving.Engine, repeats: int) -> dict[str, Any]:
        return {"tokens_per_second": 3 * repeats / serving.timed(engine, [4, 5, 6], [3] * 3, 0.0, seed=0)}

    config = EngineConfig(max_seq_len=32, block_size=4, num_blocks=30, max_sequences=4, max_batch_tokens=32)
    with (
        patch.object(serving, "CASES", {"batch3": (["model=llama_tiny"], config, batch3)}),
        patch("sys.argv", ["serving.py", "--cases", "batch3", "--out", str(out)]),
    ):
        serving.main()
