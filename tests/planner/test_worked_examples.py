"""The page of worked examples is what the planner gives."""

from __future__ import annotations

from pathlib import Path

from tests.planner.worked_examples import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "WORKED_EXAMPLES.md"


def test_every_result_of_the_worked_examples_is_what_the_planner_says() -> None:
    """A page that was true once. Made anew by `python -m tests.planner.worked_examples > docs/WORKED_EXAMPLES.md`."""
    assert PAGE.read_text() == page()
