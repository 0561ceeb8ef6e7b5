"""Tokenizer: text to token ids and back, loaded from Hugging Face files or trained here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.cache import cached, digest
from data.config import NO_TOKENIZER, DataConfig, DataError, has_conversations, is_stream, parts
from data.sources import HubStream, TextSource, open_text, sample_of

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 128 * 2**20
"""UTF-8 bytes of text a tokenizer is trained on at most; more changes it little and takes minutes."""

# What ends a document in well-known tokenizers. Asked only for a bare tokenizer.json, which cannot say so itself.
_KNOWN_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[EOS]", "[SEP]")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json")


class Tokenizer:
    """A fast tokenizer with its special tokens."""

    def __init__(
        self, core: tokenizers.Tokenizer, *, eos_token: str, bos_token: str | None, folder: Path | None = None
    ) -> None:
        """folder: where the Hugging Face files came from, if they did; `save` passes the settings in them on."""
        self._core = core
        self._core.no_padding()
        self._core.no_truncation()
        self._placing: tokenizers.Tokenizer | None = None
        self.folder = folder
        self._alphabet = _byte_alphabet() if "ByteLevel" in repr(core.decoder) else {}
        self._special = {token for token, added in core.get_added_tokens_decoder().items() if added.special}
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.eos_id: int = self._id(eos_token, "eos_token")
        self.bos_id: int | None = None if bos_token is None else self._id(bos_token, "bos_token")
        # Ids need not be dense, and added tokens may lie outside the model's vocabulary.
        self.vocab_size: int = max(core.get_vocab(with_added_tokens=True).values()) + 1

    def _id(self, token: str, name: str) -> int:
        number = self._core.token_to_id(token)
        if number is None:
            raise DataError(
                f"the tokenizer's {name} {token!r} is not in its vocabulary; "
                "set data.tokenizer.eos_token to one that is"
            )
        return number

    def encode(self, text: str) -> list[int]:
        """The ids of text. Nothing is added: no bos, no eos."""
        return self._core.encode(text, add_special_tokens=False).ids

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """Tokens that the tokenizer itself puts before a text that is to be continued: a bos, or none.

        By the post-processor of its tokenizer.json, as in transformers, which does not read add_bos_token beside one.
        What is put behind a text, as an eos, would end it, and is left out.
        """
        encoded = self._core.encode("a", add_special_tokens=True)
        added = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        return tuple(token for token, _ in takewhile(lambda one: one[1], added))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, over all cores where `parallel` allows."""
        return [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """`encode_batch`, and for each text where its n tokens stand in it: [n, 2] int64, first character and that
        behind the last. A character of several tokens stands at the place of each."""
        if self._placing is None:
            # Post-processors add special tokens, which is not wanted here, and cut blanks off places, which is wrong.
            self._placing = tokenizers.Tokenizer.from_str(
                json.dumps({**json.loads(self._core.to_str()), "post_processor": None})
            )
        encoded = self._placing.encode_batch(list(texts), add_special_tokens=False)
        return [(each.ids, np.asarray(each.offsets, np.int64).reshape(-1, 2)) for each in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become the replacement character."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves it out where special tokens are skipped."""
        return token in self._special

    def special_id(self, text: str) -> int | None:
        """The special token that is spelled so; None: there is none."""
        token = self._core.token_to_id(text)
        return token if token in self._special else None

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for within a text; a character's bytes may lie across tokens."""
        name = self._core.id_to_token(token)
        if name is None:
            return b""
        if self._alphabet and all(letter in self._alphabet for letter in name):
            return bytes(self._alphabet[letter] for letter in name)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if name.startswith("\u2581"):  # SentencePiece's blank, which a decoder leaves out at the beginning of a text
            return name.replace("\u2581", " ").encode()
        return self.decode([token]).encode()

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._core.to_str()

    def fingerprint(self) -> str:
        """Changes when any text may get other ids."""
        return digest(hashlib.sha256(self._core.to_str().encode()).hexdigest(), self.eos_id)

    def is_part_of(self, other: Tokenizer) -> bool:
        """Whether each of its tokens has the same id in another one, which may have more."""
        mine, theirs = (one._core.get_vocab(with_added_tokens=True) for one in (self, other))
        return mine.items() <= theirs.items()

    def save(self, folder: str | Path) -> None:
        """Write a folder that transformers' AutoTokenizer loads: tokenizer.json, tokenizer_config.json, companions."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _COMPANIONS if self.folder is not None else ():
            origin = Path(str(self.folder)) / name
            if origin.is_file() and origin.resolve() != (folder / name).resolve():
                shutil.copyfile(origin, folder / name)
        self._core.save(str(folder / "tokenizer.json"))
        config = _read_json(folder / "tokenizer_config.json")
        # Without a class, transformers picks one by the model's family, which may rebuild the tokenizer differently.
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        config["eos_token"] = self.eos_token
        if self.bos_token is not None:
            config["bos_token"] = self.bos_token
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def from_path(cls, path: str | Path, *, eos_token: str | None = None) -> Tokenizer:
        """Read a tokenizer.json, or a folder with one. eos_token overrides what the files say. Raises DataError."""
        given = Path(path).expanduser()
        folder = given if given.is_dir() else given.parent
        file = given / "tokenizer.json" if given.is_dir() else given
        if not file.is_file():
            raise DataError(
                f"data.tokenizer.path={path}: {file} does not exist; a folder without it is converted by "
                "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"data.tokenizer.path={path}: {file} is not a tokenizer ({error})") from error
        if not core.get_vocab_size():
            raise DataError(f"data.tokenizer.path={path}: {file} has an empty vocabulary")
        said = _special_tokens(folder)
        eos = (
            eos_token or said.get("eos_token") or next((t for t in _KNOWN_EOS if core.token_to_id(t) is not None), None)
        )
        if eos is None:
            raise DataError(
                f"data.tokenizer.path={path} does not say which token ends a document (eos_token in "
                "tokenizer_config.json); set data.tokenizer.eos_token to one of its tokens"
            )
        bos = said.get("bos_token")
        if bos is not None and core.token_to_id(bos) is None:
            bos = None  # some configurations name one that their vocabulary lacks, and never use it
        return cls(core, eos_token=eos, bos_token=bos, folder=folder)


def load_tokenizer(config: DataConfig, *, train: bool = True) -> Tokenizer:
    """The tokenizer of config.tokenizer.path, or one trained on the source (once, then from config.cache_dir).

    train: false: only one that is there already. Raises DataError when there is none, and what the source raises when
    it cannot be read.
    """
    if config.tokenizer.path is not None:
        return Tokenizer.from_path(config.tokenizer.path, eos_token=config.tokenizer.eos_token)
    if has_conversations(config):
        raise DataError(NO_TOKENIZER)
    if any(part.source == "tokens" for part in parts(config)):
        raise DataError(
            "data.tokenizer.path is missing: with data.source=tokens the tokenizer is the one that made the array, "
            "which the array does not say"
        )
    sources = _text_sources(config)
    size = config.tokenizer.vocab_size
    key = digest("bpe", 2, size, TRAINING_BYTES, tokenizers.__version__, [source.fingerprint() for source in sources])
    kept = Path(config.cache_dir).expanduser() / "tokenizers" / key
    if not train and not kept.is_dir():
        raise DataError(
            f"data.cache_dir={config.cache_dir} holds no tokenizer trained on this data as it is now: {kept} is missing"
        )

    def build(folder: Path) -> None:
        budget = TRAINING_BYTES // len(sources)
        texts = (text for source in sources for text in sample_of(source, budget))
        train_bpe(texts, size).save(folder)

    return Tokenizer.from_path(cached(kept, build), eos_token=config.tokenizer.eos_token)


def _text_sources(config: DataConfig) -> list[TextSource]:
    return [
        HubStream(part, config.stream_shards) if is_stream(config, part) else open_text(part) for part in parts(config)
    ]


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019, GPT-2) of at most vocab_size tokens.

    Among them `<|endoftext|>`, id 0, which ends a document, and all 256 bytes, so that any text has ids.
    The same texts give the same tokenizer. Raises DataError when texts holds nothing.
    """
    first = next(texts, None)
    if first is None:
        raise DataError("data: no document to train a tokenizer on; the source is empty")

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with parallel():
        core.train_from_iterator(all_texts(), trainer)
    return Tokenizer(core, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def parallel() -> Iterator[None]:
    """Inside, the tokenizers library uses all cores; afterwards one, because loader processes are forked from here.

    Its threads do not survive a fork. Undeclared, it notices in the child and prints a warning about this variable;
    declared "true", the child would wait for threads that are gone. So a forked process always uses one core.
    """
    variable = "TOKENIZERS_PARALLELISM"
    os.environ[variable] = "false" if _forked else "true"
    try:
        yield
    finally:
        os.environ[variable] = "false"


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each letter that byte-level tokens are spelled with (Radford et al. 2019, GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _special_tokens(folder: Path) -> dict[str, str]:
    """eos_token and bos_token as the files beside a tokenizer.json name them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter wins, as in transformers
        config = _read_json(folder / name)
        for key in ("eos_token", "bos_token"):
            value = config.get(key)
            if isinstance(value, dict):  # an AddedToken written out
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """The object in path; empty where there is no such file. Raises DataError when it is not JSON."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"data.tokenizer.path: {path} is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def eos_ids_of(folder: Path) -> list[int]:
    """What a Hugging Face folder says ends a document: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        said = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if said is not None:
            return [said] if isinstance(said, int) else list(said)
    return []
