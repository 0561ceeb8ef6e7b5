"""benchmarks/word_problems.py: what a reward would count as right is right, and nothing held out is told elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.word_problems import LESS, MORE, check, make


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def result(story: str) -> int:
    """What is left, by the story's words."""
    held = int(re.findall(r"has (\d+)", story)[0])
    for verb, number in re.findall(r", (\w+) (\d+)", story):
        held += int(number) * (1 if verb in MORE else -1 if verb in LESS else 99)
    return held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words")
    make(path, num_examples=200, num_pairs=50, num_prompts=100, num_worked=60)
    return path


def test_every_answer_is_the_storys(folder: Path) -> None:
    for name in ("prompts", "held_out"):
        assert all(int(row["answer"]) == result(row["prompt"]) for row in rows(folder, name))
    for name in ("sft", "worked"):
        assert all(int(row["completion"].split()[-1]) == result(row["prompt"]) for row in rows(folder, name))
    for row in rows(folder, "worked"):
        steps = re.findall(r"(\d+)([+-])(\d+)=(\d+)", row["completion"])
        assert len(steps) == 4
        assert all(int(a) + (int(b) if sign == "+" else -int(b)) == int(c) for a, sign, b, c in steps)
    for row in rows(folder, "preferences"):
        assert int(row["chosen"].split()[-1]) == result(row["prompt"]) != int(row["rejected"].split()[-1]) >= 0


def test_no_problem_is_told_twice(folder: Path) -> None:
    parts = [rows(folder, name) for name in ("sft", "worked", "preferences", "prompts", "held_out")]
    assert [len(part) for part in parts] == [200, 60, 50, 100, 500]
    assert len({row["prompt"] for part in parts for row in part}) == 910


def test_answers_are_counted_by_how_they_were_told(tmp_path: Path) -> None:
    said = [(" 1+2=3 3-1=2. 2", "2"), (" 2", "2"), (" 3", "2"), ("", "2"), (" 1+2=4. 4", "2")]
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps({"text": text, "answer": answer}) + "\n" for text, answer in said))
    expected = {"problems": 5, "exact_match": 0.4, "worked": 0.4}
    assert check(out) == expected | {"exact_match_worked": 0.5, "exact_match_at_once": pytest.approx(1 / 3)}
