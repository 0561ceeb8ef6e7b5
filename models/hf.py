"""Weights from a Hugging Face folder and to one, without any rank holding the whole model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.config import ModelConfig
from models.decoder import Decoder
from models.family import HFWeight
from models.hf_files import INDEX, SINGLE, TensorFolder, write_tensors
from models.registry import FAMILIES, hf_config
from parallel.regions import Located, local_region, local_tensor

HEAD = "lm_head.weight"
SCORE = "score.weight"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@torch.no_grad()
def load_hf_weights(
    path: str | Path,
    parameters: Mapping[str, Located],
    config: ModelConfig,
    *,
    whole_model: bool = True,
    on_read: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every parameter of a Decoder in place from the folder `path`; each rank reads its own shards, no more.

    `parameters`: name to Tensor, or to DTensor replicated or sharded on any dim; with whole_model=False they may be a
    part of the model's (a pipeline stage). `config` is resolved. Sources of fp32, fp16 and bf16 are cast to the dtype
    of the parameter. The head of a reward model stays as it is where the folder is a language model's, whose
    own head is left out. on_read: told how many tensors have been read, and of how many. Raises ValueError for tensors
    that are missing, left over, damaged or of another shape, naming file and tensor, before anything is written (but
    for damaged data).
    """
    folder = TensorFolder(Path(path))
    weights = [weight for weight in weights_of(config) if not weight.copy]
    ours = {weight.ours for weight in weights}
    if differing := ours ^ parameters.keys() if whole_model else parameters.keys() - ours:
        raise ValueError(f"parameters do not match model.family={config.family}: {', '.join(sorted(differing))}")
    if config.score and SCORE not in folder.file_of:
        weights = [weight for weight in weights if weight.theirs != SCORE]
    names = _match_names(folder, weights, config)
    weights = [weight for weight in weights if weight.ours in parameters]
    shapes = _hf_shapes(weights, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for theirs, shape in shapes.items():
        folder.check(names[theirs], shape)
    for number, weight in enumerate(weights, start=1):
        parameter = parameters[weight.ours]
        local, region = _local_region(weight.ours, parameter)
        if weight.stack is not None:
            row = weight.stack - region[0].start
            local, region = local[row : row + 1] if row >= 0 else local[:0], region[1:]
        if local.numel():
            local.copy_(_read(folder, names[weight.theirs], weight, region))
        if on_read is not None:
            on_read(number, len(weights))
    if config.tie_embeddings and HEAD in folder.file_of and "embedding.weight" in parameters:
        _check_tied_head(folder, parameters["embedding.weight"])


def weights_of(config: ModelConfig) -> list[HFWeight]:
    """Where every parameter of a resolved config lies in its family's files."""
    weights = FAMILIES[config.family].weights(config)
    return [replace(w, theirs=SCORE) if config.score and w.ours == "head.weight" else w for w in weights]


def _match_names(folder: TensorFolder, weights: Sequence[HFWeight], config: ModelConfig) -> dict[str, str]:
    """Name in the files of each expected tensor. Raises ValueError for missing and for left-over tensors."""
    family = FAMILIES[config.family]
    names = {}
    for theirs in {weight.theirs for weight in weights}:
        short = theirs.removeprefix(family.optional_prefix)
        names[theirs] = short if theirs not in folder.file_of and short in folder.file_of else theirs
    missing = sorted(set(names.values()) - folder.file_of.keys())
    allowed = {HEAD} if config.tie_embeddings or config.score else set()
    left_over = sorted(
        name
        for name in folder.file_of.keys() - set(names.values()) - allowed
        if not re.fullmatch(family.ignored, name) and not _looks_ahead(name, folder.file_of)
    )
    found = []
    if missing:
        found.append(f"has no tensor {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" * (len(missing) > 5)))
    if left_over:
        listing = ", ".join(folder.where(name) for name in left_over[:5])
        found.append(f"has tensors config.json leaves no place for ({len(left_over)}): {listing}")
    if found:
        raise ValueError(f"{folder.folder} does not fit its config.json: it {'; it '.join(found)}")
    return names


def _looks_ahead(name: str, names: Container[str]) -> bool:
    """Whether a tensor is of a layer for multi-token prediction: one model.mtp.depth leaves out, or its copy of table
    or head. Such layers are numbered like others, and known by their projection of two hidden sizes."""
    layer = re.match(r"model\.layers\.\d+\.", name)
    return layer is not None and f"{layer[0]}eh_proj.weight" in names


def _hf_shapes(weights: Sequence[HFWeight], ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor, in file order, from the shapes of our parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        rows, *rest = ours[weight.ours] if weight.stack is None else ours[weight.ours][1:]
        end = weight.rows[1] if weight.rows else rows
        shape = (end, *rest)[::-1] if weight.transpose else (end, *rest)
        shapes[weight.theirs] = max(shapes.get(weight.theirs, shape), shape)  # of a fused one the last rows count
    return shapes


def _local_region(name: str, parameter: Located) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's part of a parameter and where it lies in the whole."""
    if isinstance(parameter, DTensor) and any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(f"{name} has placements {parameter.placements}; only replicas and shards can be loaded")
    return local_tensor(parameter), local_region(parameter)


def _read(folder: TensorFolder, name: str, weight: HFWeight, region: tuple[slice, ...]) -> Tensor:
    """A region of our parameter, read from the region of their tensor that holds it."""
    if weight.rows:
        shift = weight.rows[0]
        region = (slice(region[0].start + shift, region[0].stop + shift), *region[1:])
    if weight.transpose:
        return folder.read(name, region[::-1]).t()
    return folder.read(name, region)


def _check_tied_head(folder: TensorFolder, embedding: Located) -> None:
    """A tied model saved with its head: the copy must be one, or the file is of an untied model."""
    folder.check(HEAD, embedding.shape)
    local, region = _local_region("embedding.weight", embedding)
    if local.numel() and not torch.equal(folder.read(HEAD, region).to(local), local):
        raise ValueError(
            f"{folder.where(HEAD)} differs from the embeddings, but config.json says tie_word_embeddings=true; "
            "say false there if the head was trained on its own, or remove the tensor"
        )


def export_hf_weights(
    read: Callable[[str], Tensor],
    config: ModelConfig,
    out_dir: str | Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: float = 5e9,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: str | Path | None = None,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers' from_pretrained loads: config.json and safetensors files of `dtype`.

    `read(name)` returns one whole parameter; it is called only on the rank that writes the file it goes into (files
    go round), so it must not be a collective. `tokenizer`: a tokenizer.json or the folder of one, copied along.
    `token_ids`: bos_token_id, eos_token_id and pad_token_id of config.json (left out: null). `config` is resolved.
    With world_size > 1 every rank calls this, on one file system; the folder appears under its name when all of it is
    there. Raises ValueError, on every rank, if it exists, or the family cannot express the model.
    """
    out, partial = Path(out_dir), Path(f"{out_dir}.partial")
    description = hf_config(config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    description |= dict(token_ids or {}) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    weights = weights_of(config)
    read = _remember_last(read)  # each expert's tensor is a part of one parameter
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    files = _plan_files(_hf_shapes(weights, ours), dtype, max_shard_bytes)

    def prepare() -> None:
        if out.exists():
            raise ValueError(f"{out} exists already and is not overwritten; give another folder or remove it")
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what an interrupted export left
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")
            if tokenizer is not None:
                _copy_tokenizer(Path(tokenizer), partial)

    def write() -> None:
        for number, (file, shapes) in enumerate(files.items()):
            if number % world_size == rank:
                write_tensors(partial / file, shapes, dtype, lambda name: _assemble(name, weights, read, dtype))

    def finish() -> None:
        if rank == 0:
            _write_index(partial, files, dtype)
            partial.rename(out)

    for step in (prepare, write, finish):
        _together(step, world_size)


def _together(step: Callable[[], None], world_size: int) -> None:
    """Run a step on every rank; if it fails on one, raise on all, so that nobody waits for ever at the next one."""
    error: Exception | None = None
    try:
        step()
    except Exception as caught:
        error = caught
    if world_size > 1:
        errors: list[str | None] = [None] * world_size
        dist.all_gather_object(errors, None if error is None else str(error))
        first = next((text for text in errors if text is not None), None)
        if error is None and first is not None:
            raise ValueError(first)
    if error is not None:
        raise error


def _plan_files(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: float
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Files and their tensors in order: a file is closed before the tensor that would take it above max_bytes."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        bytes_ = prod(shape) * dtype.itemsize
        if groups[-1] and size + bytes_ > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += bytes_
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _assemble(theirs: str, weights: Sequence[HFWeight], read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """One Hugging Face tensor on the CPU from the parameters it holds."""
    parts = [weight for weight in weights if weight.theirs == theirs]
    pieces: list[Tensor] = []
    end = 0
    for part in parts:
        stored = read(part.ours) if part.stack is None else read(part.ours)[part.stack]
        piece = stored.detach().to("cpu", dtype)
        if dtype == torch.float16 and not piece.isfinite().all():
            raise ValueError(f"{part.ours} has values that fp16 cannot hold; export as bf16 or fp32")
        start = part.rows[0] if part.rows else 0
        if start > end:  # rows that nothing reads
            pieces.append(piece.new_zeros(start - end, *piece.shape[1:]))
        pieces.append(piece)
        end = start + piece.shape[0]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return whole.t() if parts[0].transpose else whole


def _remember_last(read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """read, without reading again what it was asked for the last time."""
    last: dict[str, Tensor] = {}

    def remembering(name: str) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = read(name)
        return last[name]

    return remembering


def _write_index(folder: Path, files: Mapping[str, Mapping[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ValueError(
            f"{folder} lacks {absent[0]}, which another rank wrote: export to a file system all nodes share"
        )
    if list(files) == [SINGLE]:
        return
    total = sum(prod(shape) * dtype.itemsize for shapes in files.values() for shape in shapes.values())
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if source.is_dir():
        files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    else:
        files = [source] if source.is_file() else []
    if not files:
        raise ValueError(f"{source} holds no tokenizer; give a tokenizer.json or the folder it is in")
    for file in files:
        shutil.copyfile(file, folder / (file.name if source.is_dir() else "tokenizer.json"))
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
