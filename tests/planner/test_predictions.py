"""benchmarks/results/predictions_h200.json: the planner of today beside what was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.predictions import ALLOWED, table
from tests.planner.measured import RESULTS

FOUND: dict[str, Any] = json.loads((RESULTS / "predictions_h200.json").read_text())
ROWS = {name: row for name, row in FOUND["configurations"].items() if "error" not in row}
TOO_SHORT = {"2x 1b-cp2-ring", "2x 1b-cp2-ulysses"}
"""Of which the planner knows too little (docs/PLANNER.md)."""


@pytest.mark.some(5)
@pytest.mark.parametrize("name", ROWS)
def test_predictions_of_the_table_are_those_of_the_planner(name: str) -> None:
    """A formula or rate that changed after the table was written, or a row that was written by hand."""
    fresh = table([{"held": {}, "configurations": {name: ROWS[name]}}])["configurations"][name]
    for what in ALLOWED:
        for kind in ("predicted", "error"):
            assert fresh[f"{what}_{kind}"] == pytest.approx(ROWS[name][f"{what}_{kind}"], rel=1e-6)


def test_the_table_says_how_many_are_close_enough() -> None:
    """Memory within 3 % of all, time within 10 % of twenty and more, and what misses it is named."""
    for what, allowed in ALLOWED.items():
        errors = {name: abs(row[f"{what}_error"]) for name, row in ROWS.items()}
        missed = {name for name, error in errors.items() if error > allowed}
        within = len(errors) - len(missed)
        held = {"configurations": len(errors), "allowed": allowed, "within": within, "largest": max(errors.values())}
        assert FOUND["held"][what] == pytest.approx(held)
        assert missed == (TOO_SHORT if what == "step_seconds" else set())
        assert within >= 20
    for row in ROWS.values():
        for what in ALLOWED:
            ours, theirs = row[f"{what}_predicted"], row[f"{what}_measured"]
            assert row[f"{what}_error"] == pytest.approx(ours / theirs - 1)
    assert FOUND["configurations"].keys() == ROWS.keys()
