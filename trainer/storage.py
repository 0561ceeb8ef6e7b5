"""Tensors in and out of the files of torch.distributed.checkpoint (DCP): staged shards out, any layout in.

DCP plans who writes which part, and reads the parts a new layout needs. Added here: the data written is the staged
copy, not the live tensor; every file is checksummed as it is written; and reading never unpickles arbitrary objects.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.regions import Located, local_region, local_tensor
from trainer.agreement import CheckpointError, describe
from trainer.manifest import METADATA, ChecksummedFile, FileRecord
from trainer.staging import Shard

_LISTED = 8  # names an error lists of each kind
_METADATA_GLOBALS = frozenset(
    [
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ]
    + [
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ]
)


class _StagedPlanner(DefaultSavePlanner):
    """Plans and writes shards that are already in host memory. Of equal parts, DCP lets the least loaded rank write."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = {shard.name: shard for shard in shards}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(shard) for shard in self._shards.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._shards[write_item.index.fqn].data


def _write_item(shard: Shard) -> WriteItem:
    chunk = ChunkStorageMetadata(offsets=shard.offsets, sizes=shard.data.shape)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=shard.data.dtype), size=shard.shape)
    return WriteItem(index=MetadataIndex(shard.name, shard.offsets), type=WriteItemType.SHARD, tensor_data=data)


class _RegionPlanner(DefaultLoadPlanner):
    """Reads the parts that local_region names: torch's own plan errs for uneven shards of shards."""

    def __init__(self, tensors: Mapping[str, Located]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = tensors

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, tensor in self._tensors.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)  # read_metadata has refused all others
            part = local_region(tensor)
            chunk = ChunkStorageMetadata(
                offsets=torch.Size([side.start for side in part]),
                sizes=torch.Size([side.stop - side.start for side in part]),
            )
            if chunk.sizes.numel() or not tensor.numel():
                items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return local_tensor(self._tensors[index.fqn])


class _ChecksummedFiles(FileSystem):
    """The file system DCP writes to; `records` holds every file this rank has written, by name."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with ChecksummedFile.create(Path(path)) as file:
            yield file
        self.records[Path(path).name] = file.record

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    """Writes one checksummed file per rank, and the metadata on rank 0."""

    fs: _ChecksummedFiles

    def __init__(self, folder: Path) -> None:
        # Files are synced when they are closed: DCP's own sync does not flush the metadata file first. No copy-ahead:
        # on CUDA machines it would synchronise a stream of device 0, from whichever rank.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)
        self.fs = _ChecksummedFiles()

    def storage_meta(self) -> None:
        """Nothing: by default the metadata would record the absolute path of the temporary folder."""


def write_shards(folder: Path, shards: Sequence[Shard], group: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Write this rank's share of all ranks' shards, through to the disk. Collective over group (gloo).

    Returns the files this rank wrote. Raises CheckpointException, on all ranks, when one of them fails.
    """
    writer = _Writer(folder)
    dcp.save({}, storage_writer=writer, planner=_StagedPlanner(shards), process_group=group)
    return writer.fs.records


class _MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's metadata classes and torch's dtypes, nothing else: a checkpoint must not be able to run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype)
        if is_dtype or (module, name) in _METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint written here does")


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint whose metadata has been read, and checked, by read_metadata."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(path: Path) -> Metadata:
    """What tensors a checkpoint holds and where. Raises CheckpointError when it is missing, damaged or not ours."""
    try:
        with open(path / METADATA, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for name, stored in metadata.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"{name} is not a tensor")
        for place in metadata.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it refers to {place.relative_path}, outside of the checkpoint")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: {METADATA} is missing") from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path / METADATA} cannot be read: {error}") from None
    return metadata


def tensor_shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, by name, from its metadata only."""
    return _shapes(read_metadata(path))


def _shapes(metadata: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # read_metadata has refused all others
    }


def mismatches(path: Path, wanted: Mapping[str, Located], *, elsewhere: Set[str] = frozenset()) -> list[str]:
    """How the tensors of a checkpoint differ from the wanted ones: names, global shapes, dtypes; empty when equal.

    elsewhere: names that other ranks want, which the checkpoint may hold besides.
    """
    stored = tensor_shapes(path)
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys() - elsewhere)
    shapes, dtypes = [], []
    for name in sorted(wanted.keys() & stored.keys()):
        shape, dtype = stored[name]
        if shape != wanted[name].shape:
            shapes.append(f"{name} {list(shape)}, here {list(wanted[name].shape)}")
        if dtype != wanted[name].dtype:
            dtypes.append(f"{name} {dtype}, here {wanted[name].dtype}")
    kinds = {
        "missing in the checkpoint": missing,
        "only in the checkpoint": unexpected,
        "of another shape": shapes,
        "of another dtype": dtypes,
    }
    return [f"{len(names)} {kind}: {_listing(names)}" for kind, names in kinds.items() if names]


def read_tensors(path: Path, tensors: Mapping[str, Located], group: dist.ProcessGroup | None) -> None:
    """Fill tensors, plain or DTensor, in place. Collective over group; None: this process alone, whatever exists.

    Call `mismatches` first: what only the checkpoint has is ignored here, and dtypes are converted. Raises
    CheckpointError, on all ranks, when a file cannot be read; the tensors are then in an undefined state.
    """
    _read_into(tensors, _Reader(path, read_metadata(path)), group)


def _read_into(tensors: Mapping[str, Located], reader: _Reader, group: dist.ProcessGroup | None) -> None:
    planner = _RegionPlanner(tensors)
    here = {name: local_tensor(tensor) for name, tensor in tensors.items()}  # all that torch is told of them
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is what is meant
            dcp.load(here, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{reader.path} cannot be read and is now loaded in part only: {describe(error)}"
        ) from error


class TensorReader:
    """Whole tensors of one checkpoint, one at a time on the CPU, whatever layout wrote it; needs no process group.

    The metadata, which takes longer to read than a tensor does (0.3 s for ten thousand pieces), is read once.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the metadata is missing, damaged or not ours."""
        self._path = path
        self._metadata = read_metadata(path)
        self.shapes = _shapes(self._metadata)  # shape and dtype of every tensor, by name

    def read(self, name: str) -> torch.Tensor:
        """Raises CheckpointError when there is no such tensor or its file cannot be read."""
        if name not in self.shapes:
            near = get_close_matches(name, self.shapes, n=3) or sorted(self.shapes)[:3]
            raise CheckpointError(f"{self._path} holds no tensor {name}; it holds {', '.join(near)} and others")
        shape, dtype = self.shapes[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.fill({name: tensor})
        return tensor

    def fill(self, tensors: Mapping[str, Located]) -> None:
        """Tensors of any layout in place, of each the part that is here; dtypes are converted.

        Names and shapes are those of the checkpoint. Raises CheckpointError when a file cannot be read.
        """
        _read_into(tensors, _Reader(self._path, self._metadata), None)


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One whole tensor of a checkpoint; for several, make a TensorReader."""
    return TensorReader(path).read(name)


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
