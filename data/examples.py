"""Examples: conversations as tokens with the ones that are learned, kept on disk, and put into sequences."""

from __future__ import annotations

import array
import hashlib
import json
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import cached, digest
from data.chat import ChatTemplate, ChatTemplateError, Span, load_chat_template
from data.config import ROW_SUFFIXES, BlendPart, ConversationsConfig, DataError, expand
from data.conversations import MarkedText, RowAt, UnusableRow, conversation_of, marked_text, read_rows
from data.corpus import Corpus, dtype_of, how_far, open_corpus
from data.order import EpochOrder
from data.packing import Sample
from data.progress import Progress
from data.sources import Files
from data.tokenizer import Tokenizer, parallel

_BATCH_CHARACTERS = 2**20  # encoded at a time, over all cores


@dataclass(frozen=True)
class Examples:
    """Examples as ranges of a token array, in the order of their rows."""

    corpus: Corpus
    learned: np.ndarray  # [N] uint8, memory mapped: 1 for a token that carries a loss; never an example's first
    first: np.ndarray  # [D] int64: index in its example of the first token that is learned
    files: list[Path]  # that the rows stand in
    rows: np.ndarray  # [D, 2] int64: of its row, which of the files, and its number there (`RowAt`)
    unusable: dict[str, int]  # rows left out, by kind
    why: dict[str, str]  # of the first row of each kind, where it stands and what is wrong

    def split(self, fraction: float) -> tuple[Examples, Examples]:
        """(training, validation), as `Corpus.split`; a single example is not cut, and is for training."""
        if len(self.corpus.starts) == 1:
            fraction = 0.0
        training, validation = self.corpus.split(fraction)
        return self._with(training), self._with(validation)

    def _with(self, corpus: Corpus) -> Examples:
        chosen = np.searchsorted(self.corpus.starts, corpus.starts)
        return replace(self, corpus=corpus, first=self.first[chosen], rows=self.rows[chosen])


def open_examples(part: BlendPart, config: ConversationsConfig, tokenizer: Tokenizer, cache_dir: str) -> Examples:
    """The examples in the files of part.path; made once per (files, tokenizer, template, choices), kept in cache_dir.

    Raises DataError where config.unusable=error and a row is, where all are, and for what cannot be read.
    """
    return make_examples(part, config, tokenizer, cache_dir, kind="examples", writer=ExampleWriter)[0]


def make_examples(
    part: BlendPart,
    config: ConversationsConfig,
    tokenizer: Tokenizer,
    cache_dir: str,
    *,
    kind: str,
    writer: type[ExampleWriter],
) -> tuple[Examples, Path]:
    """`open_examples` of this kind, which that class writes; and the folder that holds all it wrote."""
    files = expand(str(part.path), ROW_SUFFIXES)
    if not files:
        raise DataError(f"data.path={part.path}: no file with one of the endings {' '.join(ROW_SUFFIXES)} there")
    source = Files(str(part.path), Path("/"), [file.resolve() for file in files], text_field=part.text_field)
    template = template_of(config, tokenizer)
    key = digest(
        kind,
        2,
        source.fingerprint(),
        tokenizer.fingerprint(),
        None if template is None else template.fingerprint(),
        config.loss_on,
        config.system,
    )
    make = writer(source, config, tokenizer, template, text_field=part.text_field)
    folder = cached(Path(cache_dir).expanduser() / kind / key, make.write)
    corpus = open_corpus(folder)
    meta = json.loads((folder / "meta.json").read_text())
    learned, first = np.memmap(folder / "learned.bin", np.uint8, mode="r"), np.load(folder / "first.npy")
    rows = np.load(folder / "rows.npy")
    if len(learned) != len(corpus.tokens) or not len(first) == len(rows) == len(corpus.starts):
        raise DataError(f"data.cache_dir: {folder} is damaged; delete that folder and start again")
    if config.unusable == "error" and meta["why"]:
        raise DataError(_complaint(meta["unusable"], meta["why"]))
    return Examples(corpus, learned, first, source.files, rows, meta["unusable"], meta["why"]), folder


def template_of(config: ConversationsConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """None where there is none: rows of text need none."""
    try:
        if config.template is not None:
            return load_chat_template(tokenizer.folder, file=Path(config.template).expanduser())
        folder = tokenizer.folder
        return load_chat_template(folder) if folder is not None and _has_template(folder) else None
    except ChatTemplateError as error:
        raise DataError(f"data.conversations.template: {error}") from None


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (config.is_file() and '"chat_template"' in config.read_text())


def _complaint(unusable: dict[str, int], why: dict[str, str]) -> str:
    kind = next(iter(why))
    others = sum(unusable.values()) - 1
    more = f" ({others} more rows are unusable)" if others else ""
    return f"{why[kind]}{more}; mend it, or leave such rows out by data.conversations.unusable=skip"


class ExampleWriter:
    """Makes what `open_examples` opens."""

    def __init__(
        self,
        source: Files,
        config: ConversationsConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        text_field: str,
    ) -> None:
        self._source = source
        self._config = config
        self._tokenizer = tokenizer
        self._template = template
        self._text_field = text_field
        self._unusable: Counter[str] = Counter()
        self._why: dict[str, str] = {}

    def write(self, folder: Path) -> None:
        """Fill folder with tokens.bin, learned.bin, ends.npy, first.npy, rows.npy and meta.json."""
        dtype = dtype_of(self._tokenizer)
        content, ends, first, total = hashlib.sha256(), array.array("q"), array.array("q"), 0
        rows, file_numbers = array.array("q"), {path: number for number, path in enumerate(self._source.files)}
        progress = Progress(f"tokenising {self._source.name}")
        with parallel(), open(folder / "tokens.bin", "wb") as tokens, open(folder / "learned.bin", "wb") as mask:
            for where, ids, learned in self._encoded():
                if not learned.any():
                    self._leave_out(where, UnusableRow("unlearned", "none of its tokens carries a loss"))
                    continue
                raw, marks = np.asarray(ids, dtype=dtype).tobytes(), learned.astype(np.uint8).tobytes()
                tokens.write(raw)
                mask.write(marks)
                content.update(raw)
                content.update(marks)
                total += len(ids)
                ends.append(total)
                first.append(int(learned.argmax()))
                rows.extend((file_numbers[where.path], where.number))
                progress.update(how_far(len(ends), total))
        progress.finish()
        if not ends:
            said = f": {'; '.join(self._why.values())}" if self._why else "; its files are empty"
            raise DataError(f"data.path={self._source.name} holds no row that an example can be made of{said}")
        content.update(np.asarray(ends, dtype="<i8").tobytes())
        np.save(folder / "ends.npy", np.asarray(ends, dtype=np.int64))
        np.save(folder / "first.npy", np.asarray(first, dtype=np.int64))
        np.save(folder / "rows.npy", np.asarray(rows, dtype=np.int64).reshape(-1, 2))
        meta = {"dtype": dtype.str, "tokens": total, "documents": len(ends), "content": content.hexdigest()[:32]}
        meta |= {"source": self._source.name, "unusable": dict(self._unusable), "why": self._why}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    def _leave_out(self, where: RowAt, row: UnusableRow) -> None:
        self._unusable[row.kind] += 1
        self._why.setdefault(row.kind, f"data.path: {where}: {row}")

    def _encoded(self) -> Iterator[tuple[RowAt, list[int], np.ndarray]]:
        """(where its row stands, ids, which are learned) of every example, encoded many at a time."""
        batch: list[tuple[RowAt, MarkedText]] = []
        size = 0
        for where, text in self._texts():
            batch.append((where, text))
            size += len(text.text)
            if size >= _BATCH_CHARACTERS:
                yield from self._encode(batch)
                batch, size = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[tuple[RowAt, MarkedText]]) -> Iterator[tuple[RowAt, list[int], np.ndarray]]:
        encoded = self._tokenizer.encode_with_places([text.text for _, text in batch])
        for (where, text), (ids, places) in zip(batch, encoded, strict=True):
            learned = learned_tokens(places, text.spans)
            if text.ends:
                ids, learned = [*ids, self._tokenizer.eos_id], np.append(learned, True)
            learned[:1] = False  # nothing comes before it that could predict it
            yield where, ids, learned

    def _texts_of(self, row: Any) -> list[MarkedText]:
        """Raises UnusableRow and DataError."""
        config = self._config
        conversation = conversation_of(row, text_field=self._text_field, loss_on=config.loss_on, system=config.system)
        return [marked_text(conversation, self._template, loss_on=config.loss_on)]

    def _texts(self) -> Iterator[tuple[RowAt, MarkedText]]:
        for path in self._source.files:
            for where, row in read_rows(path):
                try:
                    for text in self._texts_of(row):
                        yield where, text
                except UnusableRow as unusable:
                    self._leave_out(where, unusable)
                except DataError as error:
                    raise DataError(f"{error} (seen at {where})") from None


def learned_tokens(places: np.ndarray, spans: list[Span]) -> np.ndarray:
    """[n] bool: the tokens at places [n, 2] of which any character lies in a span."""
    learned = np.zeros(len(places), dtype=bool)
    for begin, end in spans:
        learned |= (places[:, 0] < end) & (places[:, 1] > begin)
    return learned


class ExampleSamples:
    """Examples as samples of seq_len + 1 tokens: several in each, or one, and what is left filled up without loss.

    Which examples share a sample depends on them and seq_len alone (best-fit decreasing: the longest first, each into
    the fullest sample that has room), so an epoch always has the same samples, shuffled anew, and each example once.
    An example begins a document, and so does the filling. A sample's last token is filling too: it is a label only.
    """

    def __init__(
        self,
        examples: Examples,
        config: ConversationsConfig,
        *,
        seq_len: int,
        key: tuple[int, ...] | None,
        fill: int,
        what: str,
    ) -> None:
        """key: of the permutations, (seed, ...), or None for samples in order. fill: the id to fill up with.

        Raises DataError where no example is left, and where config says that one is too long or loses all its labels.
        """
        self._examples = examples
        self._seq_len = seq_len
        self._fill = fill
        self.left_out = list(examples.why.values())
        lengths = examples.corpus.ends - examples.corpus.starts
        long, unlearned = lengths > seq_len, examples.first >= seq_len
        kept = ~long if config.too_long == "skip" else ~unlearned
        self.counts = {
            "examples": int(kept.sum()),
            "too_long": int(long.sum()),
            "cut_before_any_loss": 0 if config.too_long == "skip" else int(unlearned.sum()),
        }
        self._complain(config, lengths, what)
        if not kept.any():
            raise DataError(f"{what} holds no example that fits train.seq_len={seq_len}: {self.counts}")
        chosen = np.flatnonzero(kept)
        self._lengths = np.minimum(lengths, seq_len)
        rows = pack(self._lengths[chosen], seq_len) if config.packing else [[i] for i in range(len(chosen))]
        self._members = chosen[np.concatenate([np.asarray(row, np.int64) for row in rows])]
        self._row_ends = np.cumsum([len(row) for row in rows])
        self.samples_per_epoch = len(rows)
        self._order = EpochOrder(len(rows), key)
        self.counts |= {"samples": len(rows), "tokens": int(self._lengths[chosen].sum())}
        self.counts |= {f"unusable_{kind}": count for kind, count in examples.unusable.items()}

    def _complain(self, config: ConversationsConfig, lengths: np.ndarray, what: str) -> None:
        counts = self.counts
        if config.too_long == "error" and counts["too_long"]:
            raise DataError(
                f"{what}: {counts['too_long']} of {len(lengths)} examples have more than "
                f"train.seq_len={self._seq_len} tokens, the longest {lengths.max()}; raise train.seq_len, or use "
                "data.conversations.too_long=truncate or skip"
            )
        if config.unusable == "error" and counts["cut_before_any_loss"]:
            raise DataError(
                f"{what}: {counts['cut_before_any_loss']} of {len(lengths)} examples have no token with a loss among "
                f"their first train.seq_len={self._seq_len}; raise train.seq_len, or leave them out by "
                "data.conversations.unusable=skip"
            )

    def available(self, wanted: int) -> int:
        return min(wanted, self.samples_per_epoch)

    def __getitem__(self, number: int) -> Sample:
        row = self._order[number]
        tokens = np.full(self._seq_len + 1, self._fill, dtype=np.int64)
        places = np.full(self._seq_len + 1, -1, dtype=np.int64)
        learned = np.zeros(self._seq_len + 1, dtype=bool)
        starts, filled = [], 0
        for example in self._members[self._row_ends[row - 1] if row else 0 : self._row_ends[row]]:
            begin, length = int(self._examples.corpus.starts[example]), int(self._lengths[example])
            tokens[filled : filled + length] = self._examples.corpus.tokens[begin : begin + length]
            places[filled : filled + length] = np.arange(begin, begin + length)
            learned[filled : filled + length] = self._examples.learned[begin : begin + length]
            starts.append(filled)
            filled += length
        starts.append(filled)
        return Sample(tokens, np.asarray(starts, dtype=np.int64), learned, places=places)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Which of the lengths share a bin of this capacity, by best-fit decreasing (Johnson 1973: at most 11/9 of the
    fewest bins possible, and 6/9). Members ascend, and bins by their first member. No length is above capacity.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # bins by the room they have left
    rooms: list[int] = []  # its keys, ascending
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[chosen].append(item)
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return sorted(sorted(members) for members in bins)
