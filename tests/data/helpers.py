"""Small corpora, and the obvious way to do what the pipeline does cleverly."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from data.batch import Batch
from data.config import DataConfig, TokenizerConfig
from data.loader import Loader, build_loader
from data.tokenizer import Tokenizer, train_bpe

WORDS = [f"{a}{b}" for a in ("al", "be", "cor", "du", "e") for b in ("ma", "ni", "po", "ra", "", "\n")]
VOCAB = 320


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """count documents of 1 to `longest` words, all different."""
    draw = random.Random(seed)
    return [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for i in range(count)]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents))
    return path


@functools.cache
def tokenizer() -> Tokenizer:
    return train_bpe(iter(texts(200, seed=99)), VOCAB)


def make_config(tmp_path: Path, **fields: Any) -> DataConfig:
    """A configuration with a ready tokenizer and a cache of its own; in this process unless num_workers is given."""
    folder = tmp_path / "tokenizer"
    if not folder.exists():
        tokenizer().save(folder)
    fields = {"tokenizer": TokenizerConfig(path=str(folder)), "num_workers": 0, "validation_fraction": 0.0} | fields
    return DataConfig(cache_dir=str(tmp_path / "cache"), **fields)


def make_loader(config: DataConfig, **fields: Any) -> Loader:
    defaults: dict[str, Any] = {
        "seq_len": 16,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "split": "train",
        "vocab_size": VOCAB,
        "device_type": "cpu",
    }
    return build_loader(config, **(defaults | fields))


def rows(batches: list[Batch]) -> list[tuple[int, list[int], list[int]]]:
    """(sample number, tokens, labels) of every sequence, in order."""
    return [
        (int(number), tokens.tolist(), labels.tolist())
        for batch in batches
        for number, tokens, labels in zip(batch.samples, batch.tokens, batch.labels, strict=True)
    ]


def run(
    config: DataConfig, steps: int, *, world_size: int = 1, state: dict | None = None, **fields: Any
) -> tuple[list, dict]:
    """The rows of `steps` global batches as world_size ranks read them, and the state after. Ranks take turns here."""
    loaders = [make_loader(config, rank=rank, world_size=world_size, **fields) for rank in range(world_size)]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
    read = [row for _ in range(steps) for loader in loaders for row in rows(loader.next_step())]
    state_of_all = states(loaders)
    for loader in loaders:
        loader.close()
    return read, state_of_all


def states(loaders: list[Loader]) -> dict:
    """The state that ranks which gather for real would all get."""
    own: list[object] = []

    def collect(cursors: object) -> list[Any]:
        own.append(cursors)
        return [cursors]

    for loader in loaders:
        loader.state_dict(collect)
    found = [loader.state_dict(lambda _: own) for loader in loaders]
    assert all(state == found[0] for state in found)
    return found[0]
