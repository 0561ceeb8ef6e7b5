"""DataConfig: where tokens come from and how they become batches."""

from __future__ import annotations

from dataclasses import dataclass, field

SOURCES = ("stdlib", "text", "tokens", "hub", "blend")


@dataclass
class TokenizerConfig:
    path: str | None = None  # tokenizer.json or a Hugging Face folder; None: a byte-level BPE is trained on the source
    vocab_size: int = 8192  # size of the tokenizer trained here


@dataclass
class BlendPart:
    """One source of a blend."""

    weight: float = 1.0  # share of samples, after normalisation over the blend
    source: str = "text"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"


@dataclass
class DataConfig:
    source: str = "stdlib"  # one of SOURCES
    path: str | None = None  # file, folder or glob (text: .txt .md .py .jsonl .parquet), .npy (tokens), hub name (hub)
    subset: str | None = None  # hub: configuration name
    split: str = "train"  # hub
    text_field: str = "text"  # jsonl, parquet, hub: the field that holds the text
    streaming: bool = True  # hub: read as a stream, never whole
    blend: list[BlendPart] = field(default_factory=list)  # blend: the parts
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    shuffle: bool = True  # order of samples depends on (train.seed, epoch) only; false: in order
    mask_documents: bool = False  # attention and positions start anew at each document
    validation_fraction: float = 0.01  # of documents (of samples for flat tokens), held out by hash
    cache_dir: str = "~/.cache/lattice"  # tokenizers and token arrays made here
    num_workers: int = 1  # background loader processes per rank; 0: in the training process
    prefetch: int = 4  # micro-batches kept ready per worker
