"""The picture of a pipelined step."""

from __future__ import annotations

from collections import Counter

import pytest
from matplotlib.colors import to_hex

from parallel.dims import ParallelConfig
from parallel.pipeline import timeline
from parallel.pipeline.actions import Reduce, Unshard
from parallel.pipeline.executor import Executed
from parallel.pipeline.layout import problems
from parallel.pipeline.schedules import SCHEDULES, Schedule, make_schedule
from parallel.pipeline.simulate import simulate
from parallel.pipeline.timeline import COLORS, draw


def _executed(schedule: Schedule, *, seconds: float) -> list[list[Executed]]:
    """A run that took `seconds` per unit of the plan, on a clock that does not begin at zero."""
    ranks: list[list[Executed]] = [[] for _ in schedule.ranks]
    for span in simulate(schedule).spans:
        ranks[span.rank].append(Executed(span.action, 70 + seconds * span.start, 70 + seconds * span.end))
    return ranks


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_is_a_bar_of_its_kind_at_its_time_in_both_time_lines(name: str) -> None:
    """Bars of another rank or kind, and a time line in another unit than its axis says."""
    schedule = make_schedule(name, num_ranks=2, num_microbatches=12, chosen=2, unshards=name == "zbv")
    planned = simulate(schedule)
    above, below = draw(schedule, planned, _executed(schedule, seconds=0.25)).axes
    kinds = Counter(COLORS[action.kind] for _, action in planned.computations)
    marks = [sum(isinstance(s.action, kind) for s in planned.spans) for kind in (Unshard, Reduce)]
    for axes, unit in ((above, 1.0), (below, 250.0)):
        assert Counter(to_hex(bar.get_facecolor()) for bar in axes.patches) == kinds
        drawn = sorted((round(bar.get_y() + 0.45), bar.get_x() / unit, bar.get_width() / unit) for bar in axes.patches)
        expected = sorted((span.rank, span.start, span.end - span.start) for span, _ in planned.computations)
        assert [pytest.approx(bar) for bar in expected] == drawn
        assert [len(collection.get_offsets()) for collection in axes.collections] == marks
        assert f"{planned.bubble:.0%} idle" in axes.get_title()
        assert [label.get_text() for label in axes.get_yticklabels()] == ["pp rank 0", "pp rank 1"]
    assert len(above.texts) == len(above.patches)


def test_numbers_that_do_not_fit_are_left_out() -> None:
    """A picture of many micro-batches that is black with digits."""
    schedule = make_schedule("gpipe", num_ranks=2, num_microbatches=90, chosen=1)
    above, _ = draw(schedule, simulate(schedule), _executed(schedule, seconds=0.1)).axes
    assert {text.get_text() for text in above.texts} == {str(number) for number in range(10)}  # of whole backwards


def test_a_missing_matplotlib_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import error after hours of training."""
    monkeypatch.setattr(timeline, "find_spec", lambda name: None)
    (line,) = problems(ParallelConfig(pp=2, pp_trace=True), num_layers=4)
    assert "parallel.pp_trace=true" in line
    assert "pip install -e '.[plot]'" in line
    assert problems(ParallelConfig(pp=2), num_layers=4) == []
