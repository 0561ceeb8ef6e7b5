"""Text sources: an ordered collection of documents with a fingerprint of its content."""

from __future__ import annotations

import hashlib
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data.cache import digest
from data.config import BlendPart, DataError, expand

# Folders of the standard library that are no part of it as a text: tests, what was installed on top, and tables and
# pages that a program wrote (a sixth of all characters, and little like code).
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_NOT_STDLIB |= {"encodings", "pydoc_data"}
_SAMPLE_CHARACTERS = 2**16  # what a sample of a corpus takes or leaves: one file may be all there is


class TextSource(Protocol):
    """Documents in a fixed order."""

    name: str  # as people know it, for messages

    def fingerprint(self) -> str:
        """Changes when the documents may have changed."""
        ...

    def documents(self) -> Iterator[str]:
        """Every document, in order; each call starts again. Raises DataError for what cannot be read."""
        ...


class Files:
    """Local files: .txt .md .py are one document each, .jsonl and .parquet one per row."""

    def __init__(
        self, name: str, root: Path, files: list[Path], *, text_field: str = "text", strict: bool = True
    ) -> None:
        """root: what file names are relative to. strict: a file that is not UTF-8 is an error; otherwise left out."""
        self.name = name
        self.files = files
        self._root = root
        self._text_field = text_field
        self._strict = strict

    def fingerprint(self) -> str:
        """From names, sizes and modification times: no file is read."""
        stats = [(path, path.stat()) for path in self.files]
        entries = [(path.relative_to(self._root).as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats]
        return digest("files", entries, self._text_field, self._strict)

    def documents(self) -> Iterator[str]:
        for path in self.files:
            if path.suffix in (".jsonl", ".parquet"):
                yield from _rows(path, self._text_field)
                continue
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                if self._strict:
                    raise DataError(
                        f"data.path: {path} is not UTF-8 text ({error}); convert it, or leave it out"
                    ) from error


class HubDataset:
    """A dataset of the Hugging Face hub (or a local dataset folder), read whole."""

    def __init__(self, part: BlendPart) -> None:
        self.name = str(part.path)
        self._text_field = part.text_field
        self._dataset = load_hub(part, streaming=False)

    def fingerprint(self) -> str:
        return digest("hub", self._dataset._fingerprint, self._text_field)

    def documents(self) -> Iterator[str]:
        return texts(self._dataset, self._text_field, f"data.path={self.name}")


def open_text(part: BlendPart) -> TextSource:
    """The text source that a part of the configuration names. Raises DataError when it is not there."""
    if part.source == "stdlib":
        return stdlib()
    if part.source == "text":
        root = Path(str(part.path)).expanduser()
        files = expand(str(part.path))
        if not files:
            raise DataError(f"data.path={part.path}: no text file there")
        return Files(str(part.path), root if root.is_dir() else _parent(files), files, text_field=part.text_field)
    if part.source == "hub":
        return HubDataset(part)
    raise DataError(f"data.source={part.source} holds no text")


def stdlib() -> Files:
    """The .py files of Python's own standard library, without its tests: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if _NOT_STDLIB.isdisjoint(p.relative_to(root).parts)]
    files.sort(key=lambda p: p.relative_to(root).as_posix())
    if not files:
        raise DataError(f"data.source=stdlib: no .py file below {root}; use data.source=text")
    return Files("Python's standard library", root, files, strict=False)


def load_hub(part: BlendPart, *, streaming: bool) -> Any:
    """`datasets.load_dataset`, with its many errors as one. Returns a Dataset, or an IterableDataset when streaming."""
    import datasets  # takes a second, and most sources do without it

    try:
        return datasets.load_dataset(str(part.path), part.subset, split=part.split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"data.path={part.path} (subset {part.subset}, split {part.split}) cannot be opened as a dataset: "
            f"{type(error).__name__}: {error}"
        ) from error


def texts(rows: Any, text_field: str, where: str) -> Iterator[str]:
    """The text field of every row. Raises DataError naming the row and the fields there are."""
    for number, row in enumerate(rows):
        text = row.get(text_field)
        if not isinstance(text, str):
            raise DataError(
                f"{where}: row {number} has no text in the field data.text_field={text_field}; "
                f"its fields: {', '.join(f'{k} ({type(v).__name__})' for k, v in row.items())}"
            )
        yield text


def _rows(path: Path, text_field: str) -> Iterator[str]:
    import datasets

    kind = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from texts(rows, text_field, f"data.path: {path}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data.path: {path} cannot be read as {kind}: {type(error).__name__}: {error}") from error


def _parent(files: list[Path]) -> Path:
    """The deepest folder that holds all files: their names relative to it do not change when the tree moves."""
    common = files[0].parent
    while not all(file.is_relative_to(common) for file in files):
        common = common.parent
    return common


def pieces(text: str, size: int) -> Iterator[tuple[str, bool]]:
    """text in pieces of at most size characters, each ending with a line where it can, and whether it is the last one.

    Nothing for an empty text.
    """
    begin = 0
    while len(text) - begin > size:
        line_end = text.rfind("\n", begin, begin + size) + 1
        end = line_end if line_end > begin else begin + size
        yield text[begin:end], False
        begin = end
    if text:
        yield text[begin:], True


def sample_of(source: TextSource, num_bytes: int) -> Iterator[str]:
    """Documents, or pieces of long ones, of about num_bytes of UTF-8 in all.

    From the whole of the source where its size is known, from its beginning where it is not. A piece is taken by a hash
    of its number, so the choice is the same everywhere.
    """
    share = 1.0
    if isinstance(source, Files):
        share = min(1.0, num_bytes / max(1, sum(path.stat().st_size for path in source.files)))
    taken = 0
    documents = source.documents()
    if share < 1.0:
        documents = (piece for text in documents for piece, _ in pieces(text, _SAMPLE_CHARACTERS))
    for number, text in enumerate(documents):
        if share < 1.0 and _unit_hash(number) >= share:
            continue
        yield text
        taken += len(text.encode("utf-8", "surrogatepass"))
        if taken >= num_bytes:
            return


def _unit_hash(number: int) -> float:
    """A number in [0, 1) that depends on number only."""
    return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=7).digest()) / 2**56


class HubStream:
    """A streamed dataset cut into num_streams parts, each with its own order; a property of the dataset, not of ranks.

    A part is every num_streams-th file where there are enough files. With fewer, it is every num_streams-th document:
    each part then reads (but does not tokenise) the whole dataset, which costs little beside tokenising.
    """

    def __init__(self, part: BlendPart, num_streams: int) -> None:
        self.name = str(part.path)
        self._part = part
        self._num_streams = num_streams
        self._opened: Any = None

    @property
    def _dataset(self) -> Any:
        if self._opened is None:
            self._opened = load_hub(self._part, streaming=True)
        return self._opened

    def fingerprint(self) -> str:
        """The name: a stream's content cannot be known without reading it all."""
        part = self._part
        return digest("stream", part.path, part.subset, part.split, part.text_field, self._num_streams)

    def documents(self) -> Iterator[str]:
        """All documents, in the dataset's order."""
        return texts(self._dataset, self._part.text_field, f"data.path={self.name}")

    def stream(self, index: int, skip: int) -> Iterator[str]:
        """The documents of part index, without its first `skip`."""
        where = f"data.path={self.name} (stream {index} of {self._num_streams})"
        if self._dataset.num_shards >= self._num_streams:
            rows = self._dataset.shard(num_shards=self._num_streams, index=index, contiguous=False)
            return texts(rows.skip(skip), self._part.text_field, where)
        rows = itertools.islice(self._dataset, index + skip * self._num_streams, None, self._num_streams)
        return texts(rows, self._part.text_field, where)
