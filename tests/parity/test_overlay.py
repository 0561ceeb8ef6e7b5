"""The curves in the README are those of the layouts in the program, and keep its limit."""

from __future__ import annotations

import json

from tests.parity.harness import largest
from tests.parity.overlay import DOCS, LAYOUTS, LIMIT, ONE, STEPS, deviation


def test_stored_curves_are_one_curve() -> None:
    """A layout added or changed without its curve; a curve that leaves the others."""
    losses = json.loads((DOCS / "overlay.json").read_text())["losses"]
    assert list(losses) == [ONE, *LAYOUTS]
    assert {len(curve) for curve in losses.values()} == {STEPS}
    assert largest(deviation(curve, losses[ONE]) for curve in losses.values()) <= LIMIT
    assert losses[ONE][-1] < 0.8 * losses[ONE][0]
