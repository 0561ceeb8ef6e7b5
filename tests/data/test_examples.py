"""Examples in sequences: every one once an epoch, none of which sees another, at a position that is exact."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.batch import IGNORE_INDEX, Batch
from data.config import BlendPart, DataConfig, DataError
from data.examples import pack
from tests.data.conversing import TURNS, chat_config
from tests.data.helpers import make_loader, run
from tests.data.test_conversations import ROWS, listed, opened

LONG = 160  # tokens; the longest example has fewer


def examples_in(batch: Batch, *, fill: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of every document of a batch but the filling behind the last, which carries no loss."""
    found = []
    assert batch.documents is not None
    for row in range(len(batch.tokens)):
        tokens, labels, places = batch.tokens[row], batch.labels[row], batch.positions[row]
        for document in batch.documents[row].unique().tolist():
            here = batch.documents[row] == document
            assert places[here].tolist() == list(range(int(here.sum())))
            if (labels[here] != IGNORE_INDEX).any():
                found.append((tuple(tokens[here].tolist()), tuple(labels[here].tolist())))
            else:
                assert set(tokens[here].tolist()) == {fill}
    return found


def wanted_of(config: DataConfig) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The same from the examples themselves."""
    return [
        (
            tuple(ids),
            (*(t if mark else IGNORE_INDEX for t, mark in zip(ids[1:], learned[1:], strict=True)), IGNORE_INDEX),
        )
        for ids, learned in listed(opened(config))
    ]


def whole_epoch(config: DataConfig, **fields: Any) -> list[Batch]:
    """One batch of all samples."""
    samples = make_loader(config, global_batch_size=1, **fields).counts["samples"]
    loader = make_loader(config, global_batch_size=samples, micro_batch_size=samples, **fields)
    return loader.next_step()


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_example_once_as_a_document_of_its_own(packing: bool, tmp_path: Path) -> None:
    """An example that is lost, cut or joined to another; a label over a boundary; positions that go on."""
    config = chat_config(tmp_path, ROWS, packing=packing, data={"mask_documents": True})
    (batch,) = whole_epoch(config, seq_len=LONG)
    assert sorted(examples_in(batch, fill=0)) == sorted(wanted_of(config))
    assert (len(batch.tokens) < len(ROWS)) == packing
    plain = chat_config(tmp_path, ROWS, packing=False)
    (unmasked,) = whole_epoch(plain, seq_len=LONG)
    assert unmasked.documents is None
    assert int((unmasked.labels != IGNORE_INDEX).sum()) == int((batch.labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("seed", range(20))
def test_packing_fills_bins_as_the_obvious_search_does(seed: int) -> None:
    """A bin that overflows, an item twice, or a bin that is not the fullest with room."""
    draw = random.Random(seed)
    capacity = draw.randint(1, 60)
    lengths = np.asarray([draw.randint(1, capacity) for _ in range(draw.randint(1, 80))])
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        place = min((i for i, room in enumerate(rooms) if room >= length), key=lambda i: rooms[i], default=None)
        if place is None:
            place = len(rooms)
            rooms.append(capacity)
        rooms[place] -= length
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert sorted(capacity - sum(lengths[members]) for members in bins) == sorted(rooms)
    assert bins == sorted(sorted(members) for members in bins)


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_continues_exactly_on_other_ranks(packing: bool, tmp_path: Path) -> None:
    """A sample twice, or never, after a restart; an epoch that depends on the number of ranks."""
    config = chat_config(tmp_path, ROWS, packing=packing)
    wanted, _ = run(config, 6, seq_len=LONG, global_batch_size=4)
    first, state = run(config, 3, world_size=2, seq_len=LONG, global_batch_size=4)
    rest, _ = run(config, 3, world_size=4, state=state, seq_len=LONG, global_batch_size=4, micro_batch_size=1)
    assert first + rest == wanted
    other = chat_config(tmp_path, ROWS, packing=not packing)
    with pytest.raises(DataError, match=f"packing was {packing} and is {not packing}"):
        run(other, 1, state=state, seq_len=LONG, global_batch_size=4)
    other = chat_config(tmp_path, ROWS, packing=packing, loss_on="all")
    with pytest.raises(DataError, match="content was"):
        run(other, 1, state=state, seq_len=LONG, global_batch_size=4)


def test_epochs_have_the_same_samples_in_another_order(tmp_path: Path) -> None:
    """An epoch that is not shuffled, or not the whole of the data."""
    config = chat_config(tmp_path, ROWS, packing=False)
    count = len(ROWS)
    found, _ = run(config, 2, seq_len=LONG, global_batch_size=count, micro_batch_size=count)
    rows = [(tokens, labels) for _, tokens, labels in found]
    assert rows[:count] != rows[count:]
    assert sorted(rows[:count]) == sorted(rows[count:])
    config.shuffle = False
    found, _ = run(config, 1, seq_len=LONG, global_batch_size=count, micro_batch_size=count)
    firsts = [ids[:LONG] for ids, _ in listed(opened(config))]
    assert [tokens[: len(first)] for (_, tokens, _), first in zip(found, firsts, strict=True)] == firsts


def test_examples_that_are_too_long_are_cut_or_left_out_and_counted(tmp_path: Path) -> None:
    """Answers that lost their end, or all that was to be learned, without a word."""
    lengths = [len(ids) for ids, _ in listed(opened(chat_config(tmp_path, ROWS)))]
    first = [learned.index(True) for _, learned in listed(opened(chat_config(tmp_path, ROWS)))]
    seq_len = sorted(lengths)[-3] - 1
    cut = sum(length > seq_len for length in lengths)
    unlearned = sum(place >= seq_len for place in first)
    assert (cut, unlearned) == (3, 1)

    def counts(**fields: Any) -> dict[str, int]:
        return make_loader(chat_config(tmp_path, ROWS, **fields), seq_len=seq_len).counts

    found = counts(too_long="truncate", unusable="skip")
    assert (found["examples"], found["too_long"], found["cut_before_any_loss"]) == (len(ROWS) - unlearned, cut, 1)
    found = counts(too_long="skip")
    assert (found["examples"], found["too_long"], found["cut_before_any_loss"]) == (len(ROWS) - cut, cut, 0)
    with pytest.raises(DataError, match=f"3 of {len(ROWS)} examples have more than train.seq_len={seq_len} tokens"):
        counts(too_long="error")
    with pytest.raises(DataError, match=f"1 of {len(ROWS)} examples have no token with a loss among their first"):
        counts(too_long="truncate")
    config = chat_config(tmp_path, ROWS, unusable="skip", data={"shuffle": False})
    (batch,) = whole_epoch(config, seq_len=seq_len)
    kept = [(ids[:seq_len], labels[:seq_len]) for ids, labels in wanted_of(config)]
    kept = [(ids, (*labels[: len(ids) - 1], IGNORE_INDEX)) for ids, labels in kept]
    kept = [(ids, labels) for ids, labels in kept if set(labels) != {IGNORE_INDEX}]
    assert sorted(examples_in(batch, fill=0)) == sorted(kept)
    with pytest.raises(DataError, match=r"holds no example that fits train.seq_len=2"):
        make_loader(config, seq_len=2)


def test_held_out_examples_are_not_trained_on(tmp_path: Path) -> None:
    """Validation on what was seen, or on half an example."""
    config = chat_config(tmp_path, ROWS, packing=False, data={"validation_fraction": 0.25})
    sides = {}
    for split in ("train", "validation"):
        loader = make_loader(config, split=split, seq_len=LONG, global_batch_size=1)
        sides[split] = loader.counts["samples"]
    assert sides == {"train": len(ROWS) - 3, "validation": 3}
    config = chat_config(tmp_path / "one", ROWS[:1], data={"validation_fraction": 0.25})
    assert make_loader(config, seq_len=LONG).counts["examples"] == 1
    with pytest.raises(DataError, match=r"the validation split of .* holds no example"):
        make_loader(config, seq_len=LONG, split="validation")


def test_conversations_are_blended_with_text(tmp_path: Path) -> None:
    """Labels of one source in the other's samples."""
    config = chat_config(tmp_path, ROWS)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "one two " * 30}) + "\n" for _ in range(9)))
    config.blend = [
        BlendPart(source="conversations", path=config.path, weight=0.5),
        BlendPart(source="text", path=str(texts), weight=0.5),
    ]
    config.source, config.path = "blend", None
    loader = make_loader(config, seq_len=LONG, global_batch_size=4, micro_batch_size=4)
    (batch,) = loader.next_step()
    learned = (batch.labels != IGNORE_INDEX).float().mean(dim=1)
    assert (learned > 0.9).tolist() == [not odd for odd in (learned < 0.7).tolist()]
    assert 0 < int((learned > 0.9).sum()) < 4
    assert loader.counts["examples"] == len(TURNS)
