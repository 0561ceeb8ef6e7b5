"""Checkpoints to Hugging Face folders and back, on any number of ranks, without any of them holding the whole model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

from data.config import DataConfig, DataError, TokenizerConfig
from data.progress import Progress
from data.tokenizer import Tokenizer, load_tokenizer
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from models.decoder import Decoder
from models.hf import export_hf_weights, load_hf_weights
from models.init import SCORE_HEAD
from models.merge import Merged
from models.mtp_config import MTPConfig
from models.registry import build_model, resolve_model
from models.speculator import Speculator, save_speculator
from parallel.groups import NO_GROUPS, ModelParallel
from trainer.agreement import CheckpointError, Ranks
from trainer.checkpoint import CheckpointManager, TensorReader, find_checkpoint, newest_checkpoint, read_extra
from trainer.config import CheckpointConfig, ConfigError
from trainer.convert_adapters import base_folder, dtype_of, export_adapters, merged_weights, read_adapters
from trainer.identity import model_identity

WEIGHTS = "model/"
"""Names of the weights in a checkpoint start with this."""
SHARD_BYTES = 5e9

T = TypeVar("T")


@dataclass(frozen=True)
class Exported:
    """What an export did. Filled by `export_checkpoint`, the same on every rank."""

    checkpoint: Path  # the one that was read
    no_tokenizer: str | None  # why none was written; None: one was


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = SHARD_BYTES,
    merged: bool = False,
) -> Exported:
    """Write the weights of a checkpoint as a Hugging Face folder that transformers loads.

    Of a checkpoint of adapters: as a folder that PEFT loads or, merged, as the model they are for with them in it.

    source: a checkpoint, a run or its `checkpoints/` (the newest good one); every file is verified before a tensor is
    read. dtype: of the files; None: that of the weights in the checkpoint. The run's tokenizer goes along where it can
    still be found. Collective over the default process group, if there is one; each rank reads the tensors of the files
    it writes, one at a time. Raises ConfigError when out holds something, CheckpointError for a checkpoint that is
    absent, damaged or of no model, ValueError for a model that its family's format cannot express.
    """
    ranks = Ranks()
    _refuse_occupied(out, ranks)
    checkpoint = find_checkpoint(source, name="CHECKPOINT_DIR")
    extra = read_extra(checkpoint)
    config = _model_of(checkpoint, extra)
    reader = TensorReader(checkpoint)
    if config.speculator.kind != "none":
        ranks.on_first(lambda: _export_heads(checkpoint, reader, config, out, dtype))
        return Exported(checkpoint, "these are heads for a model, and go with its own")
    adapter = _adapter_of(checkpoint, extra)
    read: Callable[[str], torch.Tensor]
    if adapter is None:
        if merged:
            raise ConfigError([f"--merged, but {checkpoint} holds no adapters; leave it out"])
        saved_dtype = _weight_dtype(checkpoint, reader, config)
        read = partial(_read_weight, reader)
    elif not merged:
        base = str(extra["adapter"]["base"]["path"])
        ranks.on_first(lambda: export_adapters(reader, adapter, config, out, base=base, dtype=dtype))
        return Exported(checkpoint, "these are adapters for a model, and go with its own")
    else:
        base_model = base_folder(checkpoint, extra)
        saved_dtype = dtype or dtype_of(base_model)
        read = merged_weights(base_model, config, read_adapters(reader, adapter, config), saved_dtype, reader)
    progress = Progress(f"exporting {checkpoint}", silent=ranks.rank > 0)
    with tempfile.TemporaryDirectory(prefix="lattice-tokenizer-") as scratch:
        tokenizer = ranks.on_first(lambda: _save_tokenizer(checkpoint, extra, Path(scratch)))
        ranks.on_first(lambda: out.rmdir() if out.exists() else None)  # empty; it comes back whole, by a rename
        export_hf_weights(
            _counted(read, progress),
            config,
            out,
            dtype=dtype or saved_dtype,
            max_shard_bytes=max_shard_bytes,
            rank=ranks.rank,
            world_size=ranks.size,
            tokenizer=scratch if tokenizer.missing is None else None,
            token_ids=tokenizer.token_ids,
        )
    progress.finish()
    return Exported(checkpoint, tokenizer.missing)


def _counted(read: Callable[[str], torch.Tensor], progress: Progress) -> Callable[[str], torch.Tensor]:
    """read(name), with the number and size of what this rank has read shown."""
    done = [0, 0]

    def counted(name: str) -> torch.Tensor:
        tensor = read(name)
        done[0] += 1
        done[1] += tensor.nbytes
        progress.update(f"{done[0]} tensors of this rank's files, {done[1] / 2**30:.1f} GiB")
        return tensor

    return counted


def _read_weight(reader: TensorReader, name: str) -> torch.Tensor:
    return reader.read(f"{WEIGHTS}{name}")


def _export_heads(
    checkpoint: Path, reader: TensorReader, config: ModelConfig, out: Path, dtype: torch.dtype | None
) -> None:
    """The heads of a checkpoint as a folder for model.speculator_path."""
    with torch.device("meta"):
        names = Speculator(config.speculator, config).state_dict()
    missing = sorted(name for name in names if f"{WEIGHTS}{name}" not in reader.shapes)
    if missing:
        raise CheckpointError(f"{checkpoint} does not hold all of its heads: {', '.join(missing[:5])} are missing")
    weights = {name: reader.read(f"{WEIGHTS}{name}") for name in names}
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    save_speculator(out, config.speculator, config, weights)


@dataclass(frozen=True)
class Loaded:
    """A model of a checkpoint, on this rank's device. Filled by `load_checkpoint`."""

    model: Decoder
    tokenizer: Tokenizer | None
    no_tokenizer: str | None  # why there is none


def load_checkpoint(
    source: Path, *, name: str, dtype: torch.dtype, device: torch.device, groups: ModelParallel = NO_GROUPS
) -> Loaded:
    """The model of a checkpoint, or of a run's newest good one, with its weights in `dtype`, for inference.

    name: what the user calls the path, for messages. groups: the ranks its layers are cut over, each of which reads its
    own part. Every file is verified, by the ranks of the default process group together. Raises CheckpointError for a
    checkpoint that is absent, damaged or of no model.
    """
    checkpoint = find_checkpoint(source, name=name)
    extra = read_extra(checkpoint)
    config = _model_of(checkpoint, extra)
    if config.speculator.kind != "none":
        raise CheckpointError(
            f"{checkpoint} holds {config.speculator.kind} heads for a model; give {name} the model, and "
            "model.speculator_path the folder that launch/convert.py export makes of this"
        )
    reader, adapter = TensorReader(checkpoint), _adapter_of(checkpoint, extra)
    if adapter is None:
        _weight_dtype(checkpoint, reader, config)
    with torch.device("meta"):
        model = build_model(config, groups=groups).to(dtype)
    model.to_empty(device=device)
    if adapter is None:
        reader.fill({f"{WEIGHTS}{key}": tensor for key, tensor in model.state_dict().items()})
    else:
        load_hf_weights(base_folder(checkpoint, extra), model.state_dict(), config)
        Merged(model.state_dict(), read_adapters(reader, adapter, config), keep=False)
        if config.score:
            reader.fill({f"{WEIGHTS}{SCORE_HEAD}": model.state_dict()[SCORE_HEAD]})
    try:
        return Loaded(model.eval(), _tokenizer_of(checkpoint, extra), None)
    except DataError as error:
        return Loaded(model.eval(), None, str(error))


def model_of_checkpoint(source: Path, *, name: str) -> ModelConfig:
    """The model that `load_checkpoint` would find, resolved; nothing is verified. Raises CheckpointError for none."""
    checkpoint = newest_checkpoint(source, name=name)
    return _model_of(checkpoint, read_extra(checkpoint))


def import_folder(source: Path, out: Path, *, dtype: torch.dtype = torch.float32, mtp_depth: int = 0) -> Path:
    """Write the weights of a Hugging Face folder as a checkpoint that a run can start from; returns it (out/step_0).

    It holds the weights alone: a run with checkpoint.resume=OUT starts at step 0 with an optimizer of its own. dtype:
    of the weights, that of the run's precision.master. mtp_depth: model.mtp.depth of the run, at most what the folder
    has. Needs a process group and is collective over it; each rank reads
    and writes its share. Raises ConfigError for a folder that is absent or of no supported family and when out holds
    something, ValueError for tensors that are missing, left over, damaged or of another shape.
    """
    ranks = Ranks()
    _refuse_occupied(out, ranks)
    try:
        config = resolve_model(ModelConfig(family="hf", path=str(source), mtp=MTPConfig(depth=mtp_depth)))
    except ValueError as error:
        raise ConfigError([str(error).replace("model.path=", "HF_DIR=", 1)]) from None
    weights = _sharded_zeros(config, dtype)
    progress = Progress(f"reading {source}", silent=ranks.rank > 0)
    _agreed(lambda: load_hf_weights(source, weights, config, on_read=progress.tensors), ranks)
    progress.finish()
    origin = {"model": asdict(config)}  # what a run would say in its config
    if (source / "tokenizer.json").is_file():
        origin["data"] = asdict(DataConfig(tokenizer=TokenizerConfig(path=str(source.resolve()))))
    extra = {"step": 0, "weights_only": True, "model": model_identity(config), "config": origin}
    # Only here is anything written: a folder that is refused leaves nothing behind.
    manager = CheckpointManager(out, CheckpointConfig(asynchronous=False), device=torch.device("cpu"))
    try:
        manager.save(0, {f"{WEIGHTS}{name}": weight for name, weight in weights.items()}, extra)
    finally:
        manager.close()
    return out / "step_0"


def _refuse_occupied(out: Path, ranks: Ranks) -> None:
    """Make sure that nothing at `out` would be overwritten. Raises ConfigError on every rank."""

    def occupied() -> bool:
        return out.exists() and (not out.is_dir() or any(out.iterdir()))

    if ranks.on_first(occupied):
        raise ConfigError([f"OUT_DIR={out} exists already and is not overwritten; give another folder or remove it"])


def _agreed(function: Callable[[], None], ranks: Ranks) -> None:
    """function() on every rank. Its ValueError or OSError on one is a ValueError on all: nobody waits for ever."""

    def attempt() -> str | None:
        try:
            function()
        except (ValueError, OSError) as error:
            return str(error)
        return None

    found = [problem for problem in ranks.everywhere(attempt) if problem is not None]
    if found:
        raise ValueError("; ".join(dict.fromkeys(found)))


def _sharded_zeros(config: ModelConfig, dtype: torch.dtype) -> dict[str, DTensor]:
    """Every parameter by name, its rows shared out over all ranks."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_model(config).state_dict().items()}
    mesh = init_device_mesh("cpu", (Ranks().size,))
    return {name: zeros(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)]) for name, shape in shapes.items()}


def _model_of(checkpoint: Path, extra: Mapping[str, Any]) -> ModelConfig:
    """The model of a checkpoint, resolved. Raises CheckpointError when the checkpoint does not say."""
    values = extra.get("config", {}).get("model")
    if values is None:
        raise CheckpointError(f"{checkpoint} does not say which model it holds (config.model in its extra.json)")
    return _typed(ModelConfig, values, f"{checkpoint}: config.model in its extra.json")


def _adapter_of(checkpoint: Path, extra: Mapping[str, Any]) -> AdapterConfig | None:
    """The adapters that a checkpoint holds; None: it holds a whole model."""
    if extra.get("adapter") is None:
        return None
    return _typed(AdapterConfig, extra["config"]["adapter"], f"{checkpoint}: config.adapter in its extra.json")


def _weight_dtype(checkpoint: Path, reader: TensorReader, config: ModelConfig) -> torch.dtype:
    """The dtype of the weights. Raises CheckpointError unless they are exactly those of the model."""
    with torch.device("meta"):
        model = build_model(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    stored = {name.removeprefix(WEIGHTS): entry for name, entry in reader.shapes.items() if name.startswith(WEIGHTS)}
    different = sorted(
        name for name in wanted.keys() | stored.keys() if name not in stored or wanted.get(name) != stored[name][0]
    )
    buffers = dict(model.named_buffers())  # biases of routers, fp32 beside weights of any dtype
    dtypes = {dtype for name, (_, dtype) in stored.items() if name not in buffers}
    if different or len(dtypes) != 1:
        raise CheckpointError(
            f"{checkpoint} does not hold the weights of its model: {', '.join(different[:5])} missing or of another "
            f"shape; dtypes {', '.join(map(str, dtypes))}"
        )
    return dtypes.pop()


@dataclass(frozen=True)
class _SavedTokenizer:
    """Filled by `_save_tokenizer`."""

    token_ids: dict[str, int | None]  # for config.json
    missing: str | None  # why there is none; None: it was saved


def _save_tokenizer(checkpoint: Path, extra: Mapping[str, Any], folder: Path) -> _SavedTokenizer:
    """Write the files of the run's tokenizer to folder, if it can be found."""
    try:
        tokenizer = _tokenizer_of(checkpoint, extra)
    except DataError as error:
        return _SavedTokenizer({}, str(error))
    tokenizer.save(folder)
    return _SavedTokenizer({"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}, None)


def _tokenizer_of(checkpoint: Path, extra: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of the run that saved a checkpoint. Raises DataError when it is not there, or no more the same."""
    values = extra["config"].get("data")
    if values is None:
        raise DataError("the folder that was imported had none")
    config = _typed(DataConfig, values, f"{checkpoint}: config.data in its extra.json")
    if config.tokenizer.path is None and any(source == "tokens" for source in _sources(config)):
        raise DataError("the run trained on token arrays and had none")
    tokenizer = load_tokenizer(config, train=False)
    saved = extra.get("tokenizer")
    if saved is not None and tokenizer.fingerprint() != saved:
        raise DataError(f"data.tokenizer.path={config.tokenizer.path} is not the tokenizer the run had any more")
    return tokenizer


def _sources(config: DataConfig) -> list[str]:
    return [config.source, *(part.source for part in config.blend)]


def _typed(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """values as the dataclass `schema`. Raises CheckpointError for fields this version does not have.

    A checkpoint is data from elsewhere: it must not have OmegaConf look into the environment (`${oc.env:NAME}`).
    """
    if "${" in json.dumps(values):
        raise CheckpointError(f"{where} holds an interpolation (${{...}}), which no checkpoint written here does")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(values)))
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{where} cannot be understood by this version: {str(error).splitlines()[0]}") from None
    assert isinstance(typed, schema)
    return typed
