"""Corpus: tokenised documents in one flat array on disk."""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import cached, digest
from data.config import DataError
from data.progress import Progress
from data.sources import TextSource, pieces
from data.tokenizer import Tokenizer, parallel

_BATCH_CHARACTERS = 4 * 2**20  # encoded at a time, over all cores
_PIECE_CHARACTERS = 2**20  # a longer document is encoded in pieces that end with a line: encoding takes ~100 B a token


@dataclass(frozen=True)
class Corpus:
    """Documents as ranges of a token array. Every document ends with the tokenizer's eos."""

    tokens: np.ndarray  # [N] uint16 or uint32, memory mapped
    starts: np.ndarray  # [D] int64
    ends: np.ndarray  # [D] int64, past the last token
    content: str  # hash of tokens and boundaries: the same wherever and whenever it was made

    @property
    def num_tokens(self) -> int:
        return int((self.ends - self.starts).sum())

    def split(self, fraction: float) -> tuple[Corpus, Corpus]:
        """(training, validation): about `fraction` of the documents are held out, at least one; 0: none.

        Which ones depends on the number of documents only. Of a single document its last `fraction` is held out.
        """
        count = len(self.starts)
        if fraction == 0.0:
            return self, Corpus(self.tokens, self.starts[:0], self.ends[:0], self.content)
        if count == 1:
            cut = self.ends - max(1, round(fraction * self.num_tokens))
            return self._with(self.starts, cut), self._with(cut, self.ends)
        held_out = np.zeros(count, dtype=bool)
        held_out[np.argsort(_mix(count), kind="stable")[: min(count - 1, max(1, round(fraction * count)))]] = True
        return (
            self._with(self.starts[~held_out], self.ends[~held_out]),
            self._with(self.starts[held_out], self.ends[held_out]),
        )

    def _with(self, starts: np.ndarray, ends: np.ndarray) -> Corpus:
        return Corpus(self.tokens, starts, ends, self.content)


def _mix(count: int) -> np.ndarray:
    """[count] uint64: a fixed hash of 0 .. count-1 (splitmix64, Steele et al. 2014)."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def tokenise(source: TextSource, tokenizer: Tokenizer, cache_dir: str) -> Corpus:
    """The source's documents as tokens; made once per (source, tokenizer) and kept in cache_dir.

    Raises DataError when the source is empty or unreadable, or what was kept has been damaged.
    """
    key = digest("tokens", 1, source.fingerprint(), tokenizer.fingerprint())
    folder = Path(cache_dir).expanduser() / "tokens" / key
    return open_corpus(cached(folder, lambda scratch: _write(scratch, source, tokenizer)))


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """What holds its ids on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _write(folder: Path, source: TextSource, tokenizer: Tokenizer) -> None:
    """Fill folder with tokens.bin, ends.npy and meta.json."""
    dtype = dtype_of(tokenizer)
    content, ends, total = hashlib.sha256(), array.array("q"), 0
    progress = Progress(f"tokenising {source.name}")
    with parallel(), open(folder / "tokens.bin", "wb") as out:
        for ids, is_last in _encoded(source.documents(), tokenizer):
            if is_last:
                ids.append(tokenizer.eos_id)
            raw = np.asarray(ids, dtype=dtype).tobytes()
            out.write(raw)
            content.update(raw)
            total += len(ids)
            if is_last:
                ends.append(total)
            progress.update(how_far(len(ends), total))
    progress.finish()
    if not ends:
        raise DataError(f"the dataset is empty: {source.name} holds no document with text; check data.path")
    content.update(np.asarray(ends, dtype="<i8").tobytes())
    np.save(folder / "ends.npy", np.asarray(ends, dtype=np.int64))
    meta = {"dtype": dtype.str, "tokens": total, "documents": len(ends), "content": content.hexdigest()[:32]}
    (folder / "meta.json").write_text(json.dumps({**meta, "source": source.name}, indent=2) + "\n")


def open_corpus(folder: Path) -> Corpus:
    """From tokens.bin, ends.npy and meta.json. Raises DataError where they are damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        ends = np.load(folder / "ends.npy", mmap_mode="r", allow_pickle=False)
        if len(tokens) != meta["tokens"] or len(ends) != meta["documents"] or ends[-1] != meta["tokens"]:
            raise ValueError(f"{len(tokens)} tokens and {len(ends)} documents where meta.json says {meta}")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"data.cache_dir: {folder} is damaged ({error}); delete that folder and start again") from error
    ends = np.asarray(ends)
    return Corpus(tokens, np.concatenate([np.zeros(1, np.int64), ends[:-1]]), ends, meta["content"])


def _encoded(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """The ids of every document that is not empty, encoded many at a time; of a long one, piece after piece.

    Yields (ids, whether the document ends with them). However long a document, only _BATCH_CHARACTERS or so of it are
    encoded at once.
    """
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in documents:
        for piece, is_last in pieces(text, _PIECE_CHARACTERS):
            batch.append((piece, is_last))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield from _encode(batch, tokenizer)
                batch, size = [], 0
    yield from _encode(batch, tokenizer)


def _encode(batch: list[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    encoded = tokenizer.encode_batch([piece for piece, _ in batch])
    yield from zip(encoded, (is_last for _, is_last in batch), strict=True)


def how_far(documents: int, tokens: int) -> str:
    """Of tokenising, for Progress."""
    return f"{documents:,} documents, {tokens / 1e6:.1f} M tokens"


def open_tokens(path: str) -> tuple[np.ndarray, str]:
    """A flat token array from a .npy file, memory mapped, and the hash of its content.

    The hash reads 64 places of the array, so that opening takes no time at any size. Raises DataError for a file that
    is damaged or holds anything but a 1-D array of integers.
    """
    file = Path(path).expanduser()
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"data.path={path} is not a readable .npy file: {error}") from error
    if not isinstance(tokens, np.ndarray):
        raise DataError(f"data.path={path} holds several arrays (.npz); save one with numpy.save")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(
            f"data.path={path} holds a {tokens.ndim}-D array of {tokens.dtype}; data.source=tokens needs a 1-D "
            "array of integers, such as uint16 or uint32"
        )
    content = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)}".encode())
    for place in np.linspace(0, max(0, len(tokens) - 4096), num=64, dtype=np.int64):
        content.update(tokens[place : place + 4096].tobytes())
    return tokens, content.hexdigest()[:32]
