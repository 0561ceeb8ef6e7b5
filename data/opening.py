"""From configuration to a Reader: opens every source that it names, whole or as streams."""

from __future__ import annotations

from itertools import islice
from typing import Any

from data.config import PAIRS, BlendPart, DataConfig, DataError, has_conversations, has_stream, is_stream, parts
from data.corpus import open_tokens, tokenise
from data.examples import ExampleSamples, open_examples
from data.packing import Blend, FlatTokens, PackedDocuments, Proportions, Samples, split_tokens
from data.preference import PairSamples, PairWriter, open_pairs
from data.reader import Annotate, RandomAccessReader, Reader, Slice, StreamReader
from data.sources import HubStream, open_text
from data.streams import BlendedStream, Cursor, SampleStream, Stream, StreamValidation
from data.tokenizer import Tokenizer
from data.unpaired import UnpairedWriter


def open_reader(
    config: DataConfig,
    part: Slice,
    tokenizer: Tokenizer | None,
    *,
    seq_len: int,
    seed: int,
    split: str,
    vocab_size: int,
    annotate: Annotate | None = None,
) -> tuple[Reader, dict[str, Any]]:
    """The reader of one rank, and the identity of its data: all that decides what sample n is, in JSON values."""
    training = split == "train"
    sources: list[Samples | HubStream] = []
    contents = []
    for index, named in enumerate(parts(config)):
        if is_stream(config, named):
            stream = HubStream(named, config.stream_shards)
            sources.append(stream)
            contents.append(stream.fingerprint())
            continue
        key = (seed, index) if config.shuffle and training else None
        samples, content = _open_samples(config, named, tokenizer, seq_len=seq_len, key=key, split=split)
        sources.append(samples)
        contents.append(content)
    weights = [source.weight for source in parts(config)]
    identity: dict[str, Any] = {
        "seq_len": seq_len,
        "seed": seed if config.shuffle else None,
        "validation_fraction": config.validation_fraction,
        "content": contents,
    }
    if len(sources) > 1:
        identity["weights"] = weights
    if has_conversations(config):
        identity["packing"] = config.conversations.packing
        identity["too_long"] = config.conversations.too_long
    if has_stream(config):
        if tokenizer is None:
            raise DataError("data.tokenizer.path is missing: a stream is text")
        contents.append(tokenizer.fingerprint())
        identity["stream_shards"] = config.stream_shards
        identity["stream_block"] = config.stream_block if config.shuffle else None
        if training:
            streams = _Streams(config, sources, weights, tokenizer, seq_len=seq_len, seed=seed)
            reader: Reader = StreamReader(
                streams.open,
                config.stream_shards,
                part,
                mask_documents=config.mask_documents,
                vocab_size=vocab_size,
            )
            return _counted(reader, sources), identity
    by_number: list[Samples] = []
    for source in sources:
        if isinstance(source, HubStream):
            assert tokenizer is not None
            source = StreamValidation(source, tokenizer, seq_len=seq_len, fraction=config.validation_fraction)
        by_number.append(source)
    samples = Blend(by_number, weights) if len(by_number) > 1 else by_number[0]
    reader = RandomAccessReader(samples, part, mask_documents=config.mask_documents, vocab_size=vocab_size)
    reader.annotate = annotate
    return _counted(reader, sources), identity


def _counted(reader: Reader, sources: list[Samples | HubStream]) -> Reader:
    """With the counts of the examples among the sources."""
    for source in sources:
        if isinstance(source, ExampleSamples | PairSamples):
            reader.counts.update(source.counts)
            reader.left_out += source.left_out
    return reader


def _open_samples(
    config: DataConfig,
    source: BlendPart,
    tokenizer: Tokenizer | None,
    *,
    seq_len: int,
    key: tuple[int, ...] | None,
    split: str,
) -> tuple[Samples, str]:
    """The samples of one source, and the hash of its content."""
    what = (
        f"the {split} split of data.path={source.path}" if source.path else f"the {split} split of data.source=stdlib"
    )
    which = 0 if split == "train" else 1
    if source.source == "prompts":
        raise DataError("data.source=prompts has nothing to predict: it is read by recipe=grpo and its family")
    if source.source == "tokens":
        array, content = open_tokens(str(source.path))
        eos_id = None
        if config.mask_documents:
            eos_id = config.eos_id if config.eos_id is not None else tokenizer.eos_id if tokenizer else None
        mine = split_tokens(array, seq_len, config.validation_fraction)[which]
        first = len(array) - len(mine) if which else 0
        return FlatTokens(mine, seq_len=seq_len, key=key, what=what, eos_id=eos_id, first=first), content
    if tokenizer is None:
        raise DataError(f"data.tokenizer.path is missing: {what} is text")
    if source.source == "conversations":
        examples = open_examples(source, config.conversations, tokenizer, config.cache_dir)
        return ExampleSamples(
            examples.split(config.validation_fraction)[which],
            config.conversations,
            seq_len=seq_len,
            key=key,
            fill=tokenizer.eos_id,
            what=what,
        ), examples.corpus.content
    if source.source in PAIRS:
        writer = PairWriter if source.source == "preferences" else UnpairedWriter
        pairs = open_pairs(source, config.conversations, tokenizer, config.cache_dir, writer=writer)
        return PairSamples(
            pairs.split(config.validation_fraction)[which],
            config.conversations,
            seq_len=seq_len,
            key=key,
            fill=tokenizer.eos_id,
            what=what,
        ), pairs.content
    corpus = tokenise(open_text(source), tokenizer, config.cache_dir)
    return PackedDocuments(
        corpus.split(config.validation_fraction)[which], seq_len=seq_len, key=key, what=what
    ), corpus.content


class _Streams:
    """Opens the streams of a source that streams, or of a blend in which one does."""

    def __init__(
        self,
        config: DataConfig,
        sources: list[Samples | HubStream],
        weights: list[float],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        seed: int,
    ) -> None:
        self._config = config
        self._sources = sources
        self._proportions = Proportions(weights)
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._seed = seed if config.shuffle else None

    def open(self, index: int, cursor: list[int] | None) -> SampleStream:
        """Stream `index` at a cursor, or at its beginning."""
        values = iter(cursor or ())
        if len(self._sources) == 1:
            assert isinstance(self._sources[0], HubStream)
            return self._stream(self._sources[0], index, Cursor(*values))
        taken = next(values, 0)
        opened = [
            self._stream(source, index, Cursor(*islice(values, len(Cursor._fields))))
            if isinstance(source, HubStream)
            else source
            for source in self._sources
        ]
        return BlendedStream(
            opened,
            self._proportions,
            index=index,
            num_streams=self._config.stream_shards,
            seed=self._seed or 0,
            taken=taken,
        )

    def _stream(self, source: HubStream, index: int, cursor: Cursor) -> Stream:
        return Stream(
            source,
            index,
            self._tokenizer,
            seq_len=self._seq_len,
            seed=self._seed,
            block=self._config.stream_block,
            validation_fraction=self._config.validation_fraction,
            cursor=cursor,
        )
