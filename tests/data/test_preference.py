"""Preference pairs: every shape of a row, both answers in one sequence, and what is wrong with a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.batch import IGNORE_INDEX, Batch
from data.config import DataConfig, DataError
from data.loader import Loader
from tests.data.helpers import make_loader
from tests.data.preferring import pairs, preference_config, said

ASKED, GOOD, BAD = said("user", "one two"), said("assistant", "three"), said("assistant", "two two")


def loader_of(config: DataConfig, *, seq_len: int = 128, **fields: Any) -> Loader:
    return make_loader(config, seq_len=seq_len, global_batch_size=1, micro_batch_size=1, **fields)


def answers_in(batch: Batch) -> dict[int, list[int]]:
    """Labels of each answer of a batch of one row, by its number."""
    found: dict[int, list[int]] = {}
    for number, label in zip(batch.columns["completion"][0].tolist(), batch.labels[0].tolist(), strict=True):
        if number >= 0:
            found.setdefault(number, []).append(label)
        else:
            assert label == IGNORE_INDEX
    return found


def test_every_shape_of_a_row_gives_the_same_pair(tmp_path: Path) -> None:
    """A prompt that is learned; one that both answers carry and that is taken for a part of them."""
    shapes = [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    ]
    texts = [
        {"prompt": "one two", "chosen": " three", "rejected": " two two"},
        {"chosen": "one two three", "rejected": "one two two two"},
    ]
    for number, rows in enumerate((shapes, texts)):
        batches = []
        for i, row in enumerate(rows):
            config = preference_config(tmp_path / f"{number}-{i}", [row])
            batches.append(loader_of(config).next_step()[0])
        first, second = batches
        assert answers_in(first) == answers_in(second)
        assert set(answers_in(first)) == {0, 1}
        assert first.tokens.tolist() == second.tokens.tolist()


def test_a_pair_is_whole_and_its_columns_stand_where_they_belong(tmp_path: Path) -> None:
    """An answer without its rival; a reward of the token before or behind the last one."""
    rows = pairs(7)
    config = preference_config(tmp_path, rows)
    loader = loader_of(config, seq_len=160)
    counts = loader.counts
    assert counts["pairs"] == len(rows)
    seen = 0
    for _ in range(counts["samples"]):
        (batch,) = loader.next_step()
        answers = answers_in(batch)
        assert len(answers) % 2 == 0
        seen += len(answers) // 2
        assert batch.documents is not None
        columns = {name: column[0] for name, column in batch.columns.items()}
        for number in answers:
            (last,) = (columns["last_input"] == number).nonzero()[:, 0].tolist()
            of_answer = (columns["completion"] == number).nonzero()[:, 0]
            assert last == of_answer[-1] + 1  # the last label is its input
            assert batch.documents[0, last] == batch.documents[0, of_answer[0]]
        ends = (columns["pair"] >= 0).nonzero()[:, 0]
        assert columns["pair"][ends].tolist() == list(range(len(answers) // 2))
        assert columns["completion"][ends].tolist() == [2 * p + 1 for p in range(len(answers) // 2)]
        assert not columns["margin"][columns["pair"] < 0].any()
    assert seen == len(rows)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "columns", "has the columns prompt, chosen and not rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "alike", "are the same, and teach nothing"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty", "its chosen answer is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": BAD}, "malformed", "prompt and chosen is text and rejected is not"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": said("assistant", "")}, "empty", "an answer in it is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "malformed", "its margin='x' is no finite"),
        ({"chosen": ASKED, "rejected": ASKED + BAD}, "empty", "nothing of its chosen differs"),
    ],
)
def test_a_bad_row_is_named_or_left_out_and_counted(row: Any, kind: str, message: str, tmp_path: Path) -> None:
    rows = [*pairs(3), row]
    config = preference_config(tmp_path, rows)
    with pytest.raises(DataError, match=message) as error:
        loader_of(config)
    assert "line 4" in str(error.value)
    config.conversations.unusable = "skip"
    loader = loader_of(config)
    assert (loader.counts["pairs"], loader.counts[f"unusable_{kind}"]) == (3, 1)
    assert message in loader.left_out[0]


def test_long_examples_are_cut_left_out_or_refused(tmp_path: Path) -> None:
    """A pair of which one half was cut away; one that is half there."""
    rows = [*pairs(2), {"prompt": "one ", "chosen": "two" * 70, "rejected": "x"}]
    config = preference_config(tmp_path, rows, too_long="error")
    with pytest.raises(DataError, match=r"1 of 3 pairs have an example of more than train.seq_len // 2 = 48 tokens"):
        loader_of(config, seq_len=96)
    config.conversations.too_long = "skip"
    assert loader_of(config, seq_len=96).counts["pairs"] == 2
    config.conversations.too_long = "truncate"
    loader = loader_of(config, seq_len=96)
    assert loader.counts["pairs"] == 3
    lengths = [len(labels) for _ in range(3) for labels in answers_in(loader.next_step()[0]).values()]
    assert max(lengths) in range(40, 48)
    config.conversations.too_long, config.conversations.unusable = "truncate", "skip"
    Path(str(config.path)).write_text('{"prompt": "' + "one two " * 40 + '", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DataError, match="holds no pair that fits"):
        loader_of(config, seq_len=48)


def test_numbers_of_a_reference_stand_at_the_last_label(tmp_path: Path) -> None:
    """The rejected answer's number at the chosen one."""
    rows = [row | {"ref_chosen_logps": -float(n + 1), "ref_rejected_logps": -10.0} for n, row in enumerate(pairs(3))]
    loader = loader_of(preference_config(tmp_path, rows), seq_len=256, seed=0)
    assert loader.counts["with_reference"] == 3
    columns = {name: column[0] for name, column in loader.next_step()[0].columns.items()}
    sums = [columns["reference"][columns["completion"] == number].sum().item() for number in range(6)]
    assert sums == [-1.0, -10.0, -2.0, -10.0, -3.0, -10.0]
    del rows[0]["ref_chosen_logps"]
    loader = loader_of(preference_config(tmp_path / "some", rows), seq_len=256)
    assert loader.counts["with_reference"] == 0
    assert "reference" not in loader.next_step()[0].columns
