"""Streams: samples without random access, against reading everything first."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from data.config import BlendPart, DataError, TokenizerConfig
from data.order import permutation
from data.streams import held_out
from tests.data.helpers import VOCAB, make_config, make_loader, rows, run, texts, tokenizer, write_jsonl

BLOCK = 5


def dataset(tmp_path: Path, num_files: int, documents: list[str]) -> Path:
    """A local dataset folder, which the hub library streams like one of the hub."""
    folder = tmp_path / f"dataset{num_files}"
    folder.mkdir()
    size = -(-len(documents) // num_files)
    for i in range(num_files):
        write_jsonl(folder / f"train-{i:02}.jsonl", documents[i * size : (i + 1) * size])
    return folder


def stream_config(tmp_path: Path, num_files: int, **fields):
    folder = dataset(tmp_path, num_files, texts(64, longest=20))
    defaults = {"source": "hub", "path": str(folder), "stream_shards": 4, "stream_block": BLOCK}
    return make_config(tmp_path, **(defaults | fields))


def reference(num_files: int, *, steps: int, shuffle: bool, fraction: float) -> list[list[int]]:
    """Tokens of every sample of `steps` batches of 8, from whole epochs in memory: 4 streams, 2 samples each."""
    documents = texts(64, longest=20)
    size = -(-64 // num_files)
    files = [documents[i : i + size] for i in range(0, 64, size)]
    streams = []
    for v in range(4):
        mine = [d for f in files[v::4] for d in f] if num_files >= 4 else documents[v::4]
        ids: list[int] = []
        for epoch in range(50):
            blocks = [mine[i : i + BLOCK] for i in range(0, len(mine), BLOCK)]
            for b, block in enumerate(blocks):
                order = permutation(len(block), 3, v, epoch, b) if shuffle else range(len(block))
                for i in order:
                    if not held_out(block[i], fraction):
                        ids += [*tokenizer().encode(block[i]), tokenizer().eos_id]
        streams.append([ids[i * 16 : i * 16 + 17] for i in range(2 * steps)])
    return [streams[j // 2][2 * s + j % 2] for s in range(steps) for j in range(8)]


@pytest.mark.parametrize(("num_files", "shuffle", "fraction"), [(8, True, 0.2), (1, True, 0.0), (6, False, 0.2)])
def test_streams_give_what_reading_everything_first_gives(num_files, shuffle, fraction, tmp_path):
    """Documents lost at the end of a block, a file or an epoch; more files than streams, and fewer."""
    config = stream_config(tmp_path, num_files, shuffle=shuffle, validation_fraction=fraction)
    read, _ = run(config, 40)
    expected = reference(num_files, steps=40, shuffle=shuffle, fraction=fraction)
    assert [[*tokens, labels[-1]] for _, tokens, labels in read] == expected
    assert [number for number, _, _ in read] == list(range(320))


@pytest.mark.some(1)
@pytest.mark.parametrize("num_files", [8, 1])
def test_a_stream_stopped_anywhere_goes_on_as_if_it_had_not_on_any_layout(num_files, tmp_path):
    """A document repeated or skipped on resuming with other ranks; also when two ranks share a stream."""
    config = stream_config(tmp_path, num_files, validation_fraction=0.1, mask_documents=True)
    whole, end = run(config, 30)
    layouts = [(1, 3), (2, 1), (4, 2), (8, 1)]
    for (before, after), stop in zip(
        itertools.permutations(layouts, 2), [0, 1, 2, 3, 5, 8, 13, 21, 29, 30, 11, 17], strict=True
    ):
        first, state = run(config, stop, world_size=before[0], micro_batch_size=before[1])
        rest, last = run(config, 30 - stop, world_size=after[0], micro_batch_size=after[1], state=state)
        assert first + rest == whole
        assert last == end
    assert max(epoch for epoch, _, _ in end["streams"].values()) >= 2  # the runs did cross epochs


def test_a_background_stream_has_the_cursor_of_what_was_taken(tmp_path):
    """A cursor read from the worker, which is ahead."""
    expected, _ = run(stream_config(tmp_path, 8), 9)
    config = make_config(tmp_path, source="hub", path=str(tmp_path / "dataset8"), stream_shards=4, stream_block=BLOCK)
    config.num_workers, config.prefetch = 1, 6
    first, state = run(config, 4)
    rest, _ = run(config, 5, state=state)
    assert first + rest == expected


def test_stream_validation_is_repeatable_and_never_trained_on(tmp_path):
    """A held-out document that another stream, epoch or file trains on."""
    config = stream_config(tmp_path, 8, validation_fraction=0.2)
    loader = make_loader(config, split="validation")
    first = [row for step in loader.batches(3) for row in rows(step)]
    assert first == [row for step in loader.batches(3) for row in rows(step)]
    expected = [d for d in texts(64, longest=20) if held_out(d, 0.2)]
    ids = [i for d in expected for i in [*tokenizer().encode(d), tokenizer().eos_id]]
    assert len(expected) > 3
    filled = [row for row in first if set(row[2]) != {-100}]
    assert [row[1] for row in filled] == [ids[i * 16 : i * 16 + 16] for i in range(len(filled))]
    trained, _ = run(config, 40)
    text = tokenizer().decode([token for _, row, _ in trained for token in row])
    assert not any(f"<|endoftext|>{d}<|endoftext|>" in text for d in expected)


def test_streams_on_several_ranks_need_to_gather(tmp_path):
    """A checkpoint with the cursors of rank 0 only, found out when resuming."""
    config = stream_config(tmp_path, 8)
    loader = make_loader(config, world_size=2)
    loader.next_step()
    with pytest.raises(ValueError, match="need all_gather"):
        loader.state_dict()
    partial = loader.state_dict(lambda own: [own])
    with pytest.raises(DataError, match=r"no position for the streams \[2, 3\]"):
        make_loader(config, world_size=2, rank=1).load_state_dict(json.loads(json.dumps(partial)))


def test_a_stream_without_a_tokenizer_trains_one_and_gives_the_same_samples_again(tmp_path):
    """A tokenizer that depends on which part of the stream a rank happened to read."""
    config = stream_config(tmp_path, 8, tokenizer=TokenizerConfig(vocab_size=300), num_workers=1)
    first, _ = run(config, 3)
    config.cache_dir = str(tmp_path / "other")
    assert run(config, 3, world_size=2)[0] == first


def blended_config(tmp_path: Path, **fields):
    """A stream of 8 files, one of a single file, and an array whose tokens no text has in that order."""
    config = stream_config(tmp_path, 8, **fields)
    np.save(tmp_path / "array.npy", np.full(4000, 7))
    single = dataset(tmp_path, 1, texts(50, longest=30, seed=5))
    config.source, config.path, config.blend = (
        "blend",
        None,
        [
            BlendPart(weight=0.5, source="hub", path=str(tmp_path / "dataset8")),
            BlendPart(weight=0.3, source="hub", path=str(single)),
            BlendPart(weight=0.2, source="tokens", path=str(tmp_path / "array.npy")),
        ],
    )
    return config


def test_a_blend_of_streams_has_its_proportions_in_every_batch_and_each_streams_samples_in_order(tmp_path):
    """Batches of one source at a time; a source of which some streams never get a turn; a sample lost in between."""
    blend, _ = run(blended_config(tmp_path), 50)
    tokens = [tuple(row[1]) for row in blend]
    assert tokens.count((7,) * 16) == 80
    assert all((7,) * 16 in tokens[n : n + 16] for n in range(0, 400, 16))
    for name, count in (("dataset8", 200), ("dataset1", 120)):
        config = make_config(tmp_path, source="hub", path=str(tmp_path / name), stream_shards=4, stream_block=BLOCK)
        alone, _ = run(config, 50)
        lanes = [[tuple(row[1]) for n, row in enumerate(alone) if n % 8 // 2 == stream] for stream in range(4)]
        mixed = [
            [row for n, row in enumerate(tokens) if n % 8 // 2 == stream and row in lane]
            for stream, lane in enumerate(lanes)
        ]
        assert sum(map(len, mixed)) == count
        for stream in range(4):
            assert len(mixed[stream]) > count / 8
            assert mixed[stream] == lanes[stream][: len(mixed[stream])]


def test_a_blend_of_streams_stopped_anywhere_goes_on_as_if_it_had_not_on_any_layout(tmp_path):
    """A cursor that forgets whose turn it was, or mixes up the parts' cursors."""
    config = blended_config(tmp_path, validation_fraction=0.1, mask_documents=True)
    whole, end = run(config, 20)
    for before, after, stop in ((1, 4, 7), (4, 2, 1), (2, 8, 13), (8, 1, 19)):
        first, state = run(config, stop, world_size=before)
        rest, last = run(config, 20 - stop, world_size=after, state=state)
        assert first + rest == whole
        assert last == end
    config.blend[0].weight = 0.6
    with pytest.raises(DataError, match="weights was"):
        run(config, 1, state=end)


def test_a_blend_of_streams_is_validated_on_the_held_out_documents_of_all_its_parts(tmp_path):
    """Validation on one part only."""
    config = blended_config(tmp_path, validation_fraction=0.2)
    loader = make_loader(config, split="validation")
    read = [row[1] for step in loader.batches(2) for row in rows(step)]
    assert read.count([7] * 16) in range(2, 5)
    assert read == [row[1] for step in loader.batches(2) for row in rows(step)]


def test_a_hub_dataset_can_be_read_whole(tmp_path):
    """streaming=false that streams, or loses documents: an epoch holds each once."""
    config = stream_config(tmp_path, 6, streaming=False, shuffle=False)
    read, state = run(config, 6)
    ids = [i for d in texts(64, longest=20) for i in [*tokenizer().encode(d), tokenizer().eos_id]]
    assert [tokens for _, tokens, _ in read] == [ids[i * 16 : i * 16 + 16] for i in range(48)]
    assert "streams" not in state


def test_streams_say_what_does_not_fit(tmp_path):
    """A hang or an opaque error for a wrong number of streams, a missing field, nothing to train on."""
    config = stream_config(tmp_path, 8)
    with pytest.raises(
        DataError, match=r"data.stream_shards=4 does not divide train.global_batch_size=6; use 1, 2, 3, 6"
    ):
        make_loader(config, global_batch_size=6)
    config.num_workers = 2
    with pytest.raises(DataError, match=r"data.num_workers=2: a stream is read by one process"):
        make_loader(config)
    config.num_workers, config.text_field = 1, "body"
    with pytest.raises(
        DataError, match=r"^data.path=.* row 0 has no text in the field data.text_field=body; .* text \(str\)"
    ):
        make_loader(config).next_step()
    config.text_field, config.validation_fraction = "text", 0.99
    with pytest.raises(DataError, match="holds no document to train on"):
        run(config, 60, vocab_size=VOCAB)
    config.path = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nowhere"):
        make_loader(config).next_step()
