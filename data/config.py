"""DataConfig: where tokens come from and how they become batches; and everything that can be wrong with one."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = (
    "stdlib",
    "text",
    "tokens",
    "hub",
    "conversations",
    "preferences",
    "unpaired_preferences",
    "prompts",
    "blend",
)
PAIRS = ("preferences", "unpaired_preferences")
ROWS = ("conversations", *PAIRS)  # sources of rows that people, or models, wrote to one another
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
ROW_SUFFIXES = (".jsonl", ".parquet")
LOSS_ON = ("assistant", "completion", "all")
TOO_LONG = ("truncate", "skip", "error")
UNUSABLE = ("error", "skip")

NO_TOKENIZER = (
    "data.tokenizer.path is missing: conversations need the tokenizer that the model was made for, and its chat "
    "template; give its folder"
)


class DataError(ValueError):
    """The data or its configuration is wrong; the message names the field, the value and the fix."""


@dataclass
class TokenizerConfig:
    # tokenizer.json or a Hugging Face folder; None: the one in model.path, or else a byte-level BPE trained on the text
    path: str | None = None
    vocab_size: int = 8192  # size of the tokenizer trained here
    eos_token: str | None = None  # token that ends a document; None: what the tokenizer's files say


@dataclass
class ConversationsConfig:
    """`data.conversations`: how the rows of source=conversations, or preferences, become examples."""

    template: str | None = None  # a Jinja file; None: the chat template of the tokenizer's folder
    # Tokens that carry a loss, one of LOSS_ON: of every assistant turn; of what follows the prompt (the column
    # completion, of messages the last turn); or all. Of preferences always what follows the prompt.
    loss_on: str = "assistant"
    system: str | None = None  # where a conversation has no system message, it begins with this one
    packing: bool = True  # several examples in a sequence, none of which sees another; false: one in each, padded
    # An example of more than train.seq_len tokens (of preferences: half as many), one of TOO_LONG.
    too_long: str = "truncate"
    unusable: str = "error"  # a row that is wrong, or has no token with a loss, one of UNUSABLE


@dataclass
class PromptsConfig:
    """`data.prompts`: how the rows of source=prompts become prompts; their other columns are for rewards."""

    field: str = "prompt"  # the column: text as it is, or messages that the chat template renders
    template: str | None = None  # a Jinja file; None: the chat template of the tokenizer's folder
    system: str | None = None  # where messages have no system message, they begin with this one
    too_long: str = "skip"  # a prompt that leaves no room for an answer in train.seq_len: skip or error
    # recipe=distill with recipe.on_policy below 1: the column with an answer, text or messages; None: not read
    completion: str | None = None


@dataclass
class BlendPart:
    """One source of a blend; the fields mean what they mean in DataConfig."""

    weight: float = 1.0  # share of samples, after normalisation over the blend
    source: str = "text"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"


@dataclass
class DataConfig:
    source: str = "stdlib"  # one of SOURCES
    # File, folder or glob (text: .txt .md .py .jsonl .parquet; rows: .jsonl .parquet), .npy (tokens), hub name
    path: str | None = None
    subset: str | None = None  # hub: configuration name
    split: str = "train"  # hub
    text_field: str = "text"  # jsonl, parquet, hub, rows of conversations that are text: the field that holds it
    streaming: bool = True  # hub, also in a blend: read as a stream, never whole
    stream_shards: int = 8  # hub streams: independent streams, must divide train.global_batch_size
    stream_block: int = 1024  # hub streams: documents are shuffled inside consecutive blocks of this many
    blend: list[BlendPart] = field(default_factory=list)  # blend: the parts
    conversations: ConversationsConfig = field(default_factory=ConversationsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    eos_id: int | None = None  # tokens: the id that ends a document (mask_documents); None: the tokenizer's
    shuffle: bool = True  # order of samples depends on (train.seed, epoch) only; false: in order
    mask_documents: bool = False  # attention and positions start anew at each document
    validation_fraction: float = 0.01  # of documents (of samples, from the end, for flat tokens) held out
    cache_dir: str = "~/.cache/lattice"  # tokenizers and token arrays made here
    num_workers: int = 1  # background loader processes per rank; 0: in the training process
    prefetch: int = 4  # micro-batches kept ready per worker


def parts(config: DataConfig) -> list[BlendPart]:
    """The sources to read: those of a blend, or the only one."""
    if config.source == "blend":
        return config.blend
    return [
        BlendPart(
            source=config.source,
            path=config.path,
            subset=config.subset,
            split=config.split,
            text_field=config.text_field,
        )
    ]


def is_stream(config: DataConfig, part: BlendPart) -> bool:
    """Whether a source is read without random access."""
    return part.source == "hub" and config.streaming


def has_stream(config: DataConfig) -> bool:
    """Whether any source is."""
    return any(is_stream(config, part) for part in parts(config))


def has_conversations(config: DataConfig) -> bool:
    """Whether any source holds conversations, or answers that are compared."""
    return any(part.source in ROWS for part in parts(config))


def expand(path: str, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Path]:
    """The files with one of these endings that a file, folder or glob stands for, in a fixed order (by path)."""
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.is_file() and p.suffix in suffixes]
    elif root.is_file():
        found = [root]
    else:
        found = [p for p in map(Path, glob.glob(str(root), recursive=True)) if p.is_file() and p.suffix in suffixes]
    return sorted(found, key=lambda p: p.as_posix())


def problems(config: DataConfig) -> list[str]:
    """Every reason why this configuration cannot work, one line each. Looks at file names, opens no data."""
    if config.source not in SOURCES:
        return [f"data.source={config.source} is unknown; use one of {', '.join(SOURCES)}"]
    found = _numbers(config)
    found += _blend(config) if config.source == "blend" else _path(parts(config)[0], "data.")
    if has_stream(config) and config.num_workers > 1:
        found.append(
            f"data.num_workers={config.num_workers}: a stream is read by one process per rank; use 1, or "
            "data.streaming=false"
        )
    if has_conversations(config):
        found += _conversations(config)
    if config.source == "prompts":
        found += _prompts(config)
    return found + _tokenizer(config)


def _numbers(config: DataConfig) -> list[str]:
    found = []
    if not 0.0 <= config.validation_fraction < 1.0:
        found.append(f"data.validation_fraction={config.validation_fraction} must be at least 0 and below 1")
    for name, least in (("num_workers", 0), ("prefetch", 1), ("stream_shards", 1), ("stream_block", 1)):
        if getattr(config, name) < least:
            found.append(f"data.{name}={getattr(config, name)} must be at least {least}")
    return found


def _path(part: BlendPart, where: str) -> list[str]:
    """Problems of one source's path. where is the prefix of its fields."""
    if part.source == "stdlib":
        return []
    if not part.path:
        return [f"{where}path is missing: {where}source={part.source} needs it"]
    path = Path(part.path).expanduser()
    if part.source == "tokens":
        if not path.is_file():
            return [f"{where}path={part.path}: no such file; give a .npy file with a 1-D integer array"]
        if path.suffix != ".npy":
            return [f"{where}path={part.path} is not a .npy file; {where}source=tokens reads a 1-D integer array"]
    if part.source in ("text", "prompts", *ROWS):
        suffixes = TEXT_SUFFIXES if part.source == "text" else ROW_SUFFIXES
        files = expand(part.path, suffixes)
        if not files:
            return [f"{where}path={part.path}: no file with one of the endings {' '.join(suffixes)} there"]
        if files[0].suffix not in suffixes:
            return [f"{where}path={part.path}: cannot read {files[0].suffix or 'this'} files; {' '.join(suffixes)}"]
        if not any(file.stat().st_size for file in files):
            return [f"{where}path={part.path} is empty: its {len(files)} files hold no bytes"]
    return []


def _blend(config: DataConfig) -> list[str]:
    if not config.blend:
        return ["data.blend is empty: data.source=blend needs at least one part, such as [{source: text, path: DIR}]"]
    found = []
    for i, part in enumerate(config.blend):
        where = f"data.blend[{i}]."
        if not 0.0 < part.weight < float("inf"):
            found.append(
                f"{where}weight={part.weight} must be positive and finite; leave out a part that is not wanted"
            )
        if part.source in ("blend", "prompts", *PAIRS) or part.source not in SOURCES:
            choices = ", ".join(s for s in SOURCES if s not in ("blend", "prompts", *PAIRS))
            found.append(f"{where}source={part.source} cannot be blended; use one of {choices}")
        else:
            found += _path(part, where)
    return found


def _conversations(config: DataConfig) -> list[str]:
    found = []
    chosen = config.conversations
    for name, legal in (("loss_on", LOSS_ON), ("too_long", TOO_LONG), ("unusable", UNUSABLE)):
        if getattr(chosen, name) not in legal:
            found.append(f"data.conversations.{name}={getattr(chosen, name)} is unknown; use one of {', '.join(legal)}")
    if chosen.template is not None and not Path(chosen.template).expanduser().is_file():
        found.append(
            f"data.conversations.template={chosen.template}: no such file; give a Jinja file, or null for the "
            "tokenizer's own"
        )
    if config.source in PAIRS and not config.mask_documents:
        found.append(
            f"data.mask_documents=false with data.source={config.source} lets an answer see the other one of its pair; "
            "use data.mask_documents=true"
        )
    elif chosen.packing and not config.mask_documents:
        found.append(
            "data.mask_documents=false with data.conversations.packing=true lets the examples of a sequence see one "
            "another; use data.mask_documents=true, or data.conversations.packing=false"
        )
    return found


def _prompts(config: DataConfig) -> list[str]:
    found, chosen = [], config.prompts
    if chosen.too_long not in ("skip", "error"):
        found.append(f"data.prompts.too_long={chosen.too_long} is unknown; use skip or error")
    if chosen.template is not None and not Path(chosen.template).expanduser().is_file():
        found.append(
            f"data.prompts.template={chosen.template}: no such file; give a Jinja file, or null for the tokenizer's own"
        )
    return found


def _tokenizer(config: DataConfig) -> list[str]:
    sources = {part.source for part in parts(config)}
    if config.tokenizer.path is not None:
        folder = Path(config.tokenizer.path).expanduser()
        file = folder / "tokenizer.json" if folder.is_dir() else folder
        if not file.is_file():
            return [
                f"data.tokenizer.path={config.tokenizer.path}: {file} does not exist; "
                "give a tokenizer.json or its folder"
            ]
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return [f"data.tokenizer.path={config.tokenizer.path}: {file} is not readable as JSON ({error})"]
        return []
    if sources & {*ROWS, "prompts"}:
        return []  # that of model.path, or missing: whoever knows the model says so
    if "tokens" in sources and len(sources) > 1:
        return [
            "data.tokenizer.path is missing: a blend of token arrays and text needs the tokenizer that made the "
            "arrays; a new one would number its tokens differently"
        ]
    if sources == {"tokens"}:
        if config.mask_documents and config.eos_id is None:
            return [
                "data.mask_documents=true with data.source=tokens needs the id that ends a document; "
                "set data.eos_id or data.tokenizer.path"
            ]
        return []
    if config.tokenizer.vocab_size < 257:
        return [
            f"data.tokenizer.vocab_size={config.tokenizer.vocab_size} is too small: a byte-level tokenizer needs the "
            "256 bytes and an end-of-document token; use 257 or more"
        ]
    return []
