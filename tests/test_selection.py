"""Which tests run when nobody names one (tests/conftest.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import _left_out


def _kept(marker: pytest.MarkDecorator, *options: str) -> list[int]:
    """The parameters that run, of 0 to 8 of a test with this marker."""
    config: Any = SimpleNamespace(
        args_source=pytest.Config.ArgsSource.TESTPATHS, getoption=lambda name: name in options
    )

    class Case(SimpleNamespace):
        __hash__ = object.__hash__

        def get_closest_marker(self, name: str) -> pytest.Mark | None:
            return marker.mark if marker.name == name else None

    items: list[Any] = [Case(nodeid=f"tests/test_it.py::test_it[{number}]") for number in range(9)]
    left_out = _left_out(config, items)
    return [number for number, item in enumerate(items) if item not in left_out]


def test_some_parameters_stand_for_the_others_unless_all_are_asked_for() -> None:
    """A control, or the one layout of a router, that CI never runs though it is there to run it."""
    few, all_in_ci = pytest.mark.some(3), pytest.mark.some(3, unless_thorough=True)
    assert _kept(few) == _kept(all_in_ci) == _kept(few, "--thorough") == [0, 4, 8]
    assert _kept(all_in_ci, "--thorough") == _kept(few, "--exhaustive") == list(range(9))
    assert _kept(pytest.mark.thorough) == []
    assert _kept(pytest.mark.thorough, "--thorough") == list(range(9))
