"""Folders of safetensors files: reading slices of tensors by name, and writing a file one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorFolder:
    """The tensors of a Hugging Face folder, in one file or in several with an index. Files are opened when needed.

    Raises ValueError, naming file and tensor, for what is missing, damaged or leads out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self.file_of = self._read_index()
        elif (folder / SINGLE).is_file():
            self.file_of = {name: SINGLE for name in self._open(SINGLE).keys()}  # noqa: SIM118 (not a dict)
        else:
            hint = ""
            if list(folder.glob("*.bin")):
                hint = "; .bin files are pickles, which can run code: save the model again as safetensors"
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            file_of = json.loads(path.read_text())["weight_map"]
            entries = [(str(name), str(file)) for name, file in file_of.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an index of tensors ({error!r}); the folder is damaged") from error
        for file in sorted({file for _, file in entries}):
            # The index is data from elsewhere: a name such as ../../x must not make us read outside the folder.
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                raise ValueError(f"{path} names {file!r}, which is not a safetensors file in the same folder")
            if not (self.folder / file).is_file():
                raise ValueError(f"{path} names {file}, which is missing; the download is incomplete")
            named = {name for name, there in entries if there == file}
            held = set(self._open(file).keys())
            if named != held:
                raise ValueError(
                    f"{self.folder / file} does not hold the tensors {INDEX} says: missing {_some(named - held)}, "
                    f"not in the index {_some(held - named)}"
                )
        return dict(entries)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.folder / file
            try:
                self._handles[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged or cut short ({error}); copy or download it again") from error
        return self._handles[file]

    def tensor(self, name: str) -> Any:
        """The tensor as an object with get_shape, get_dtype and [slices], which reads just those."""
        return self._open(self.file_of[name]).get_slice(name)

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """A region of a tensor."""
        try:
            return self.tensor(name)[region]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.where(name)} cannot be read ({error}); copy or download the file again") from error

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError unless the tensor has this shape and a dtype of DTYPES."""
        found = self.tensor(name)
        if list(found.get_shape()) != list(shape):
            raise ValueError(
                f"{self.where(name)} has shape {list(found.get_shape())}, but config.json asks for {list(shape)}"
            )
        if found.get_dtype() not in DTYPES.values():
            raise ValueError(
                f"{self.where(name)} has dtype {found.get_dtype()}; quantised weights are not supported, "
                f"use {', '.join(DTYPES.values())}"
            )

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self.folder / self.file_of[name]}: tensor {name}"


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, make: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file of tensors of one dtype, made in order and one at a time: `make(name)`, on the CPU.

    Format: the header's length (8 bytes, little endian), the header (JSON: dtype, shape and byte range of each
    tensor), the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = make(name)
            if list(tensor.shape) != list(shape) or tensor.dtype != dtype:
                raise ValueError(f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _some(names: set[str]) -> str:
    listing = sorted(names)
    return (
        "nothing" if not names else ", ".join(listing[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    )
