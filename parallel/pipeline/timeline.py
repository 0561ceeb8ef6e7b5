"""A picture of a pipelined step: what the schedule planned, and below it what ran."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from parallel.pipeline.actions import Kind, Reduce, Unshard
from parallel.pipeline.executor import Executed
from parallel.pipeline.schedules import Schedule
from parallel.pipeline.simulate import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {Kind.FORWARD: "#4c78a8", Kind.BACKWARD: "#59a14f", Kind.INPUT: "#76b7b2", Kind.WEIGHT: "#edc948"}
NAMES = {
    Kind.FORWARD: "F: forward",
    Kind.BACKWARD: "B: backward",
    Kind.INPUT: "I: gradients of inputs",
    Kind.WEIGHT: "W: gradients of weights",
}
MARKS = {Unshard: ("^", "#4c4c4c", "start to gather parameters"), Reduce: ("v", "#e15759", "start to sum gradients")}
"""Of collectives, which stand where they are started: marker, color, name."""
WIDTH, ROW = 14.0, 0.45  # inches: of a time line, and height of a rank
DIGIT = 0.09  # inches that a digit takes


def problems() -> list[str]:
    """Why nothing can be drawn here, for whoever asks for parallel.pp_trace."""
    if find_spec("matplotlib") is not None:
        return []
    return [
        "parallel.pp_trace=true draws pipeline_timeline.png with matplotlib, which is not installed; install it with "
        "pip install -e '.[plot]' in the folder of pyproject.toml, or use pp_trace=false"
    ]


def draw(schedule: Schedule, planned: Timeline, executed: Sequence[Sequence[Executed]]) -> Figure:
    """Two time lines with a row per rank; bars are numbered by micro-batch, a rank's later stages are paler.

    planned: the schedule simulated, in forwards of an average stage. executed: what each rank did, with clocks as in
    `trace.chrome_trace`.
    """
    from matplotlib.figure import Figure  # here, because most runs draw nothing
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ran = _timeline_of(executed)
    figure = Figure(figsize=(WIDTH + 3, 2 * (ROW * planned.num_ranks + 1)), layout="constrained")
    figure.suptitle(f"{schedule.name}: {planned.num_ranks} ranks, {schedule.num_microbatches} micro-batches")
    above, below = figure.subplots(2, 1)
    for axes, timeline, what, unit in (
        (above, planned, "planned", "forwards of an average stage (F = I = W)"),
        (below, ran, "executed", "milliseconds"),
    ):
        draw_rows(axes, timeline, schedule.owner)
        axes.set_title(f"{what}: {timeline.bubble:.0%} idle")
        axes.set_xlabel(unit)
    kinds = [kind for kind in Kind if any(action.kind is kind for _, action in planned.computations)]
    handles: list[Artist] = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in kinds]
    for kind, (marker, color, name) in MARKS.items():
        if any(isinstance(span.action, kind) for span in planned.spans):
            handles.append(Line2D([], [], marker=marker, color=color, linestyle="none", label=name))
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _timeline_of(executed: Sequence[Sequence[Executed]]) -> Timeline:
    """In milliseconds from the first start."""
    first = min(e.start for rank in executed for e in rank)
    spans = [
        Span(rank, e.action, (e.start - first) * 1e3, (e.end - first) * 1e3)
        for rank, actions in enumerate(executed)
        for e in actions
    ]
    return Timeline(tuple(sorted(spans, key=lambda span: span.end)), len(executed))


def draw_rows(axes: Axes, timeline: Timeline, owner: Sequence[int]) -> None:
    """A row per rank; owner: the rank of each stage."""
    from matplotlib.patches import Rectangle

    on_rank = [[stage for stage, rank in enumerate(owner) if rank == row] for row in range(timeline.num_ranks)]
    for span, action in timeline.computations:
        stages = on_rank[span.rank]
        alpha = 1 - 0.5 * stages.index(action.stage) / max(1, len(stages) - 1)
        corner, color = (span.start, span.rank - 0.45), COLORS[action.kind]
        axes.add_patch(Rectangle(corner, span.length, 0.9, facecolor=color, alpha=alpha, edgecolor="white", lw=0.5))
        number = str(action.microbatch)
        if WIDTH * span.length / timeline.makespan >= DIGIT * len(number):
            axes.text(span.start + span.length / 2, span.rank, number, ha="center", va="center", fontsize=8)
    for kind, (marker, color, _) in MARKS.items():
        started = [span for span in timeline.spans if isinstance(span.action, kind)]
        x, y = [span.start for span in started], [span.rank + 0.4 for span in started]
        axes.scatter(x, y, s=16, marker=marker, color=color, clip_on=False, zorder=3)
    axes.set(xlim=(0, timeline.makespan), ylim=(timeline.num_ranks - 0.5, -0.5))
    axes.set_yticks(range(timeline.num_ranks), [f"pp rank {rank}" for rank in range(timeline.num_ranks)])
