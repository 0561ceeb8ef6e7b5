"""A teacher's likeliest words, kept on disk: written once for a data set, read beside its batches.

A row belongs to a token of the data as it lies in its array (`Sample.places`), as a label: so it is found wherever
packing, seed, layout and batch size put that token. What the teacher saw before the token has to be what a student sees
there: with conversations the example alone, with text and token arrays the sample's tokens before it. A folder has

    cache.json             what the rows are of: `Made`
    SPLIT-BLOCK.json       of a finished block of global batches: its files, and the rows in each
    SPLIT-BLOCK-RANK.safetensors
        places [n] int64, words [n, k] int32, logprobs [n, k + 1] fp32, the last of all other words
    rows.safetensors       number [N] int32 or int64: of the row of each place, through all files; -1: none
    index.json             the files in the order in which rows are numbered; there once all is complete

Files are mapped into memory, and nothing in them can run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.config import DataConfig, DataError, is_stream, parts

HEADER, INDEX, TABLE = "cache.json", "index.json", "rows.safetensors"
VERSION = 2
PLACE = "place"
"""The column of a batch that says where its labels lie in the data."""


@dataclass(frozen=True)
class Made:
    """What the rows of a folder are of. Filled by trainer/teach.py."""

    k: int
    temperature: float
    vocab_size: int
    teacher: str  # fingerprint of its weights
    tokenizer: str | None  # fingerprint; None: token arrays that come without one
    data: Mapping[str, Any]  # `data_identity`
    splits: Sequence[str]  # that have rows, each of them whole
    validation_fraction: float
    too_long: str | None  # data.conversations.too_long; None: of other data
    left_out: int  # examples without rows, because they were too long
    seq_len: int
    block: Sequence[int]  # sequences of a global batch, global batches of a block
    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> Made:
        """Raises DataError for a folder that has none."""
        found = _read_json(folder / HEADER, folder)
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != names or found["version"] != VERSION:
            raise DataError(f"{folder / HEADER} is none of this version; make the folder again by launch/teach.py")
        return cls(**found)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / HEADER, asdict(self))

    def without_rows(self, config: DataConfig, *, validates: bool) -> list[str]:
        """Why a run reads tokens that have none, one phrase each. The data is that of the rows, by `data_identity`."""
        found = []
        if "validation" not in self.splits and self.validation_fraction > 0:
            if validates:
                found.append("train.eval_interval was 0, so that held-out rows were left out, and is above 0")
            if config.source == "conversations" and config.validation_fraction < self.validation_fraction:
                found.append(
                    f"data.validation_fraction was {self.validation_fraction}, of which no rows were written, and is "
                    f"{config.validation_fraction}"
                )
        if config.source == "conversations" and self.left_out and config.conversations.too_long == "truncate":
            was = f"was {self.too_long}, which left out {self.left_out} examples,"
            found.append(f"data.conversations.too_long {was} and is truncate")
        return found

    def differs(self, other: Made) -> list[str]:
        """What is something else there, one phrase each."""
        return [
            f"{field.name} was {getattr(self, field.name)} and is {getattr(other, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


def data_identity(config: DataConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which tokens stand before one, in JSON values. identity: of a loader of this data."""
    found: dict[str, Any] = {"source": config.source, "content": identity["content"]}
    if config.source == "conversations":
        return found  # an example's own tokens, from its first on
    found |= {name: identity[name] for name in ("seq_len", "validation_fraction")}
    return found | {"mask_documents": config.mask_documents, "eos_id": config.eos_id}


def cacheable(config: DataConfig) -> str | None:
    """Why rows of this data cannot be found again, field and value first; None: they can."""
    if config.source in ("blend", "preferences", "unpaired_preferences", "prompts"):
        return f"data.source={config.source}"
    if any(is_stream(config, part) for part in parts(config)):
        return "data.streaming=true"
    if config.source not in ("conversations", "tokens") and config.shuffle:
        return "data.shuffle=true"
    return None


class TeacherCache:
    """A complete folder, opened."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for one that is missing, unfinished or damaged."""
        self.folder = folder
        self.made = Made.read(folder)
        if not (folder / INDEX).is_file():
            raise DataError(f"{folder} is not complete; go on with launch/teach.py and the same arguments")
        index = _read_json(folder / INDEX, folder)
        files = [(_name(folder, name), int(rows)) for name, rows in index["files"]]
        self._numbers = self._open(TABLE, "number")
        self._words, self._logprobs = (
            [self._open(name, tensor) for name, _ in files] for tensor in ("words", "logprobs")
        )
        k = self.made.k
        for (name, rows), words, logprobs in zip(files, self._words, self._logprobs, strict=True):
            if words.shape != (rows, k) or logprobs.shape != (rows, k + 1):
                raise DataError(f"{folder / name} does not hold {rows} rows of {k} words; make it again")
        self._begins = np.cumsum([0, *(rows for _, rows in files)])

    def _open(self, file: str, tensor: str) -> Tensor:
        try:
            with safe_open(self.folder / file, framework="pt", device="cpu") as opened:
                return opened.get_tensor(tensor)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.folder / file} is damaged or missing ({error}); make it again") from error

    def rows(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(found [n] bool, words [n, k] int32, logprobs [n, k + 1] fp32) of places [n] int64."""
        k = self.made.k
        inside = (places >= 0) & (places < len(self._numbers))
        numbers = torch.where(inside, self._numbers[torch.where(inside, places, 0)].long(), -1)
        words = torch.zeros(len(places), k, dtype=torch.int32)
        logprobs = torch.zeros(len(places), k + 1)
        file_of = np.searchsorted(self._begins, numbers.numpy(), side="right") - 1
        for file in np.unique(file_of[file_of >= 0]).tolist():
            here = torch.from_numpy(file_of == file)
            rows = numbers[here] - int(self._begins[file])
            words[here], logprobs[here] = self._words[file][rows], self._logprobs[file][rows]
        return numbers >= 0, words, logprobs

    def annotate(self, batch: Batch) -> Batch:
        """With columns teacher_words [B, T, k] int32 and teacher_logprobs [B, T, k + 1] in place of its places.

        Raises DataError where a label has no row.
        """
        places = batch.columns.pop(PLACE)
        labelled = batch.labels != IGNORE_INDEX
        found, words, logprobs = self.rows(places[labelled])
        if not found.all():
            raise DataError(
                f"{self.folder} has no rows for {int((~found).sum())} of {len(found)} tokens; make it anew by "
                "launch/teach.py with the arguments of this run"
            )
        k, shape = self.made.k, tuple(places.shape)
        of_words, of_logprobs = torch.zeros(*shape, k, dtype=torch.int32), torch.zeros(*shape, k + 1)
        of_words[labelled], of_logprobs[labelled] = words, logprobs
        return batch.with_columns(teacher_words=of_words, teacher_logprobs=of_logprobs)


def write_rows(folder: Path, name: str, places: Tensor, words: Tensor, logprobs: Tensor) -> int:
    """A file of rows, in the order of their places; how many. It appears when it is complete."""
    order = places.argsort()
    tensors = {
        "places": places[order].contiguous(),
        "words": words[order].to(torch.int32).contiguous(),
        "logprobs": logprobs[order].float().contiguous(),
    }
    _appear(folder / name, lambda scratch: save_file(tensors, scratch))
    return len(places)


def finish(folder: Path, blocks: Sequence[Path]) -> int:
    """Number the rows of all finished blocks, named by their .json files; how many rows there are."""
    files = [(_name(folder, name), rows) for block in blocks for name, rows in _read_json(block, folder)["files"]]
    places = []
    for name, rows in files:
        with safe_open(folder / name, framework="pt", device="cpu") as opened:
            places.append(opened.get_tensor("places").numpy())
        if len(places[-1]) != rows:
            raise DataError(f"{folder / name} does not hold {rows} rows; remove it and its block, and go on")
    joined = np.concatenate(places)
    kind = np.int32 if len(joined) < 2**31 else np.int64
    numbers = np.full(int(joined.max()) + 1, -1, dtype=kind)
    numbers[joined] = np.arange(len(joined), dtype=kind)
    _appear(folder / TABLE, lambda scratch: save_file({"number": torch.from_numpy(numbers)}, scratch))
    write_json(folder / INDEX, {"files": files, "rows": len(joined)})
    return len(joined)


def write_json(path: Path, value: Any) -> None:
    """It appears when it is complete."""
    _appear(path, lambda scratch: scratch.write_text(json.dumps(value, indent=2) + "\n"))


def _appear(path: Path, write: Callable[[Path], Any]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    write(scratch)
    with open(scratch, "rb") as file:
        os.fsync(file.fileno())
    scratch.rename(path)


def _name(folder: Path, name: Any) -> str:
    """A file's name, which must not lead out of the folder."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise DataError(f"{folder / INDEX} names {name!r}, which is no safetensors file in the same folder")
    return name


def _read_json(path: Path, folder: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no teacher's cache: {path.name} is missing; make one by launch/teach.py"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); make the folder again by launch/teach.py") from error
