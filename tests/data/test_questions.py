"""Held-out rows as questions: the rows that training leaves out, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data.config import BlendPart, DataConfig, DataError
from data.questions import Questions, read_questions
from data.tokenizer import load_tokenizer
from tests.data.conversing import CHATML, FORGETS, chat_config, write_rows


def asked(config: DataConfig, **changes: Any) -> Questions:
    settings: dict[str, Any] = {"count": 99, "max_prompt": 63, "found_in": str.strip} | changes
    return read_questions(config, load_tokenizer(config), **settings)


def turn(n: int, *, says: str = "three") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"one {n}"}, {"role": "assistant", "content": f"{says} {n}"}]}


def numbers(found: Questions) -> list[int]:
    """Of the rows, by their questions; each has its own row's answer."""
    for prompt in found.prompts:
        assert prompt.row["answer"].split()[-1] == prompt.text.split("<|im_end|>")[0].split()[-1]
    return [int(prompt.row["answer"].split()[-1]) for prompt in found.prompts]


def test_questions_are_found_behind_rows_that_are_no_examples(tmp_path: Path) -> None:
    """A question one row off: behind a row that was left out, an empty line, or in the next file."""
    bad = {"messages": []}
    rows = [bad if n % 7 == 3 else turn(n) for n in range(24)]
    config = chat_config(tmp_path, rows, unusable="skip", data={"validation_fraction": 0.4})
    whole = numbers(asked(config))
    assert len(whole) == 8
    assert whole == sorted(whole)
    folder = tmp_path / "parts"
    folder.mkdir()
    first = "\n".join(json.dumps(row) for row in rows[:10])
    (folder / "a.jsonl").write_text(first.replace("\n", "\n\n", 4) + "\nno JSON\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[10:]), folder / "b.parquet")
    config.path = str(folder)
    assert numbers(asked(config)) == whole
    assert numbers(asked(config, count=3)) == whole[:3]


def test_parts_of_a_blend_are_asked_in_turn(tmp_path: Path) -> None:
    """Questions of the first part alone."""
    config = chat_config(tmp_path, [turn(n) for n in range(20)], data={"validation_fraction": 0.2})
    other = write_rows(tmp_path / "other.jsonl", [turn(n) for n in range(100, 110)])
    paths = (str(config.path), str(other))
    config.blend = [BlendPart(source="conversations", path=path) for path in paths]
    config.source, config.path = "blend", None
    found = numbers(asked(config))
    assert [n >= 100 for n in found] == [False, True, False, True, False, False]
    assert len(found) == 6


def test_only_the_last_answer_is_asked_for(tmp_path: Path) -> None:
    """What a user says behind it, or an answer that stands in the question."""
    first, last = turn(1)["messages"], turn(2)["messages"]
    behind = {"role": "user", "content": "two"}
    rows = [{"messages": [*first, *last, behind]}] * 2
    (prompt,) = asked(chat_config(tmp_path, rows, data={"validation_fraction": 0.5})).prompts
    assert prompt.text == (
        "<|im_start|>user\none 1<|im_end|>\n<|im_start|>assistant\nthree 1<|im_end|>\n"
        "<|im_start|>user\none 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.row["answer"] == "three 2"


def test_answers_end_where_the_template_or_a_document_does(tmp_path: Path) -> None:
    """A special token within an answer that ends all of them."""
    config = chat_config(
        tmp_path, [turn(n, says="<|im_start|> so") for n in range(8)], data={"validation_fraction": 0.5}
    )
    tokenizer = load_tokenizer(config)
    assert asked(config).ends == {tokenizer.eos_id, tokenizer.encode("<|im_end|>")[0]}
    texts = [{"prompt": f"one {n}", "completion": f" {n} <|im_start|>"} for n in range(8)]
    config = chat_config(tmp_path / "texts", texts, data={"validation_fraction": 0.5})
    assert asked(config).ends == {tokenizer.eos_id}


def test_a_template_that_rewrites_a_question_is_refused(tmp_path: Path) -> None:
    """An answer cut where the question would have ended."""
    drops = CHATML.replace("{%- if add_generation_prompt %}", "{%- if add_generation_prompt %}{{ 'Answer:' }}")
    config = chat_config(tmp_path, [turn(n) for n in range(8)], template=drops, loss_on="all")
    config.validation_fraction = 0.5
    with pytest.raises(DataError, match=r"not written as it was asked for.*\(seen at .*rows.jsonl, line \d\)"):
        asked(config)
    config = chat_config(tmp_path / "forgets", [turn(n) for n in range(8)], template=FORGETS, loss_on="all")
    config.validation_fraction = 0.5
    with pytest.raises(DataError, match="no special token ends an answer"):
        asked(config)


def test_rows_without_an_answer_are_one_error_or_counted(tmp_path: Path) -> None:
    """A share of fewer questions than it says."""
    silent = [{"messages": [{"role": "user", "content": f"one {n}"}]} if n % 2 else turn(n) for n in range(12)]
    config = chat_config(tmp_path, silent, loss_on="all", data={"validation_fraction": 0.5})
    with pytest.raises(DataError, match=r"line \d+: no message in it is an answer .*\.unusable=skip"):
        asked(config)
    config.conversations.unusable = "skip"
    found = asked(config)
    assert len(found.prompts) + len(found.left_out) == 6
    assert found.left_out
    with pytest.raises(DataError, match=r"no held-out row of data.path=.* can be answered: data.path: .* line"):
        asked(config, found_in=lambda text: None)
    short = asked(config, max_prompt=len(found.prompts[0].ids))
    assert all("leaves no room" in why for why in short.left_out[len(found.left_out) :])
