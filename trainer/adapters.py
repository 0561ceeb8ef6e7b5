"""Training of adapters (models/lora.py): where the model they are for comes from, and how a run begins and goes on.

Checkpoints hold adapters, of a reward model also its head, and their optimizer, as of a model that has nothing else,
and say which model they are for: its folder, and a fingerprint of the weights there. So they are small, move between
layouts, and are refused beside another model. So are those of a model that is trained beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.progress import Progress
from kernels.nf4 import dequantize_nf4, quantize_nf4
from models.adapter_config import AdapterConfig
from models.decoder import Decoder
from models.hf import load_hf_weights
from models.hf_files import DTYPES, TensorFolder
from models.init import SCORE_HEAD, initialize, start_score
from models.lora import A, B, M, adapter_initializers
from models.merge import Merged
from models.peft import LowRank, load_peft, load_score
from models.quantized import NF4, fill_quantized
from parallel.fused import separate
from parallel.regions import Located, local_region, local_tensor
from trainer.adapter_start import BEGUN, fill, principal_adapters, principal_adapters_of, residual
from trainer.agreement import CheckpointError, Ranks
from trainer.checkpoint import read_extra
from trainer.config import ConfigError, TrainConfig
from trainer.step import TrainState

ROWS, COLUMNS = 32, 64
"""Of each tensor, what a fingerprint reads: a folder of any size takes a moment."""
BASE = "model.path"
"""The field that says where the model is that the adapters of a run are for."""
RUN_TIME_FIELDS = ("lr_ratio", "path")
"""Of AdapterConfig, which may change between runs."""


def load_base(state: TrainState, config: TrainConfig, checkpoint: Path | None, *, prefix: str = "") -> None:
    """The weights that stay as they are, from the folder in model.path; each rank reads what it computes with.

    checkpoint: that the run goes on from, which says what adapters that begin as a part of the weights began as.
    prefix: of the state's names there (TrainState.beside). Collective.
    """
    assert config.model.path is not None
    path, kinds = config.model.path, (A, B, M, NF4)
    weights = {name: t for name, t in state.model.state_dict().items() if name.rpartition(".")[2] not in kinds}
    whole = config.parallel.pp == 1 and config.adapter.quantize == "none"
    progress = Progress(f"reading {path}", silent=dist.get_rank() > 0)
    load_hf_weights(path, weights, config.model, whole_model=whole, on_read=progress.tensors)
    begun: dict[str, LowRank] = {}
    if config.adapter.init == "pissa":
        if checkpoint is None:
            begun = principal_adapters(config.adapter, config.model, partial(_read, config), state.device)
        else:
            begun = principal_adapters_of(checkpoint, config.adapter, config.model, prefix=prefix)
        fill(separate(state.begun, state.fused), begun, suffix=BEGUN)
        taken = {name: replace(one, scale=-one.scale) for name, one in begun.items() if f"{name}.weight" in weights}
        Merged(weights, taken, keep=False)
    done = 0

    def read(name: str, weight: Located) -> None:
        nonlocal done
        done += 1
        progress.update(f"{done} matrices quantized")
        load_hf_weights(path, {name: weight}, config.model, whole_model=False)
        if one := begun.get(name.removesuffix(".weight")):
            here = local_tensor(weight)
            here.copy_(residual(here, one, local_region(weight)))

    fill_quantized(state.model, read)
    progress.finish()


def _read(config: TrainConfig, name: str, shape: Sequence[int]) -> Tensor:
    """One whole weight of the model, in the dtype that is computed with."""
    weight = torch.empty(tuple(shape), dtype=config.precision.compute_dtype)
    load_hf_weights(str(config.model.path), {name: weight}, config.model, whole_model=False)
    return weight


@torch.no_grad()
def start_adapters(state: TrainState, config: TrainConfig) -> None:
    """Adapters as they begin: those of adapter.path, the part of the weights that `load_base` took, or drawn."""
    masters = separate(state.data_parallel.masters, state.fused)
    if config.model.score and SCORE_HEAD in masters:
        _start_head(masters.pop(SCORE_HEAD), state, config)
    if config.adapter.path is not None:
        fill(masters, load_peft(Path(config.adapter.path).expanduser(), config.model))
        return
    if state.begun:
        begun = separate(state.begun, state.fused)
        for name, master in masters.items():
            local_tensor(master).copy_(local_tensor(begun[f"{name}{BEGUN}"]))
        return
    shapes = {name: master.shape for name, master in masters.items()}
    initialize(masters, adapter_initializers(shapes), config.train.seed)
    for name, master in masters.items():
        layer, _, kind = name.rpartition(".")
        if kind == M:
            local, region = local_tensor(master), local_region(master)
            weight = _read(config, f"{layer}.weight", (*shapes[name], shapes[f"{layer}.{A}"][1])).to(local.device)
            if config.adapter.quantize == "nf4":
                weight = dequantize_nf4(quantize_nf4(weight), weight.shape, weight.dtype)
            local.copy_(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)[region[0]])


def _start_head(head: Located, state: TrainState, config: TrainConfig) -> None:
    """The head of a reward model as it begins: that of adapter.path, else of model.path, else drawn."""
    assert isinstance(state.model, Decoder)
    start_score({SCORE_HEAD: head}, state.model.initializers(), config.train.seed)
    load_hf_weights(str(config.model.path), {SCORE_HEAD: head}, config.model, whole_model=False)
    if config.adapter.path is not None:
        saved = load_score(Path(config.adapter.path).expanduser(), config.model)
        if saved is not None:
            local_tensor(head).copy_(saved[local_region(head)])


def adapter_identity(config: TrainConfig, beside: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """What the adapters of a run mean: their settings and the models they are for; None: it has none. Collective.

    beside: where the models are that are trained beside the run's (TrainState.beside), by the field that says so.
    Rank 0 reads. Raises ConfigError where a folder holds no weights.
    """
    if config.adapter.name == "none":
        return None
    settings = {name: value for name, value in asdict(config.adapter).items() if name not in RUN_TIME_FIELDS}
    identity: dict[str, Any] = {"settings": settings}
    if config.adapter.quantize == "nf4" and config.model.moe.num_experts:
        identity["quantized_experts"] = True  # they were not, once
    identity["base"] = _base_identity(BASE, str(config.model.path))
    others = {field: _base_identity(field, folder) for field, folder in (beside or {}).items()}
    return identity | ({"beside": others} if others else {})


def _base_identity(field: str, folder: str) -> dict[str, str]:
    try:
        return {"path": folder, "fingerprint": fingerprint(Path(folder))}
    except CheckpointError as error:
        raise ConfigError([f"{field}={folder}: {error}"]) from None


def fingerprint(folder: Path) -> str:
    """Hex digest of the names, dtypes and shapes of all tensors of a Hugging Face folder and some values of each.

    Weights that were trained on differ in all tensors; a change of a few values may go unseen. Raises CheckpointError
    for a folder without weights. Collective.
    """
    return Ranks().on_first(lambda: _fingerprint(folder))


def _fingerprint(folder: Path) -> str:
    tensors = TensorFolder(folder)
    digest = hashlib.sha256()
    known = {name: dtype for dtype, name in DTYPES.items()}
    for name in sorted(tensors.file_of):
        tensor = tensors.tensor(name)
        shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
        digest.update(json.dumps([name, dtype, shape]).encode())
        if dtype in known and shape:
            corner = (*[slice(0, ROWS)] * (len(shape) - 1), slice(0, COLUMNS))
            sample = tensors.read(name, corner)
            digest.update(sample.double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def check_same_adapter(path: Path, ours: dict[str, Any] | None) -> None:
    """Raise ConfigError unless a checkpoint is of adapters that mean the same (`adapter_identity`), or of none."""
    saved = read_extra(path).get("adapter")
    if saved is None and ours is None:
        return
    if saved is None or ours is None:
        has, wants = ("adapters", "has none") if ours is None else ("a whole model", "trains adapters beside one")
        advice = (
            f"use adapter={saved['settings']['name']}"
            if saved is not None
            else "export it (launch/convert.py export) and give the folder to model.path"
        )
        raise ConfigError([f"checkpoint {path} holds {has}, and this run {wants}; {advice}, or another run.dir"])
    # A checkpoint from before a setting was there has its default.
    before = {name: value for name, value in asdict(AdapterConfig()).items() if name not in RUN_TIME_FIELDS}
    theirs = before | saved["settings"]
    different = [
        f"adapter.{name}={ours['settings'].get(name)} (checkpoint: {theirs.get(name)})"
        for name in sorted(ours["settings"].keys() | theirs.keys())
        if ours["settings"].get(name) != theirs.get(name)
    ]
    if different:
        raise ConfigError([f"checkpoint {path} is of other adapters: {', '.join(different)}; use its settings"])
    if saved.get("quantized_experts", False) != ours.get("quantized_experts", False):
        raise ConfigError(
            [
                f"checkpoint {path} was trained beside experts that were not quantized, and adapter.quantize=nf4 "
                "quantizes them; export its adapters (launch/convert.py export) and begin anew with adapter.path"
            ]
        )
    were = _bases(saved)
    different = [
        f"{field}={base['path']} is not the model that the adapters in {path} were trained for, which was in "
        f"{were[field]['path']}; give that one, or use another run.dir"
        for field, base in _bases(ours).items()
        if field in were and were[field]["fingerprint"] != base["fingerprint"]
    ]
    if different:
        raise ConfigError(different)


def _bases(identity: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The models that adapters are for, by the field that says where each is."""
    return {BASE: identity["base"], **identity.get("beside", {})}
