"""Charts of one or several runs (plotly). Each function gives a figure, or None where no run has anything to show.

Plotly reads labels as markup of its own, with links: what comes from a run goes through `label`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from launch.run_report.record import RunRecord, Values

COLOURS = ("#1f6feb", "#d1570c", "#2d8a4e", "#8250df", "#c2255c", "#0b7285", "#946c00", "#495057")
MARKED = {"resume": "dot", "preempted": "dash", "skipped_step": "dashdot"}
"""Kinds of events that stand on every chart over steps, and how their lines are drawn."""
MAX_MARKS = 100
"""Of one run: more would hide the curve. The table of events has all."""
LOAD = re.compile(r"moe_load_(\d+)$")
SHOWN = frozenset({
    "loss", "validation_loss", "validation_perplexity", "grad_norm", "lr", "tokens", "step_seconds",
    "tokens_per_second_per_gpu", "mfu", "peak_memory_gib", "valid_tokens", "data_wait_seconds", "skipped_steps",
    "loss_scale",
})  # fmt: skip
"""Fields that have a chart of their own, or need none; others each get one, `further`."""

Chart = Callable[[Sequence[RunRecord]], go.Figure | None]


def loss(runs: Sequence[RunRecord]) -> go.Figure | None:
    """Of training, and as points of validation."""
    figure = curves(runs, "loss", "loss before the update (nats per token, or the recipe's)")
    for run, colour in _coloured(runs):
        if run.has("validation_loss"):
            steps, values = _points(run, "validation_loss")
            figure = figure or _empty("loss")
            line = {"color": colour, "dash": "dot"}
            figure.add_scatter(
                x=steps, y=values, name=label(f"{run.name}: validation"), mode="lines+markers", line=line
            )
            figure.update_layout(showlegend=True)
    return figure


def throughput(runs: Sequence[RunRecord]) -> go.Figure | None:
    return curves(runs, "tokens_per_second_per_gpu", "tokens per second and GPU")


def utilisation(runs: Sequence[RunRecord]) -> go.Figure | None:
    return curves(runs, "mfu", "MFU: model FLOPs per second over the device's peak")


def step_time(runs: Sequence[RunRecord]) -> go.Figure | None:
    """With the part in which rank 0 waited for data."""
    figure = curves(runs, "step_seconds", "seconds of a step (dotted: waiting for data)")
    for run, colour in _coloured(runs):
        if figure is not None and run.has("data_wait_seconds"):
            steps, values = _points(run, "data_wait_seconds")
            line = {"color": colour, "dash": "dot"}
            figure.add_scatter(x=steps, y=values, name=label(f"{run.name}: data"), mode="lines", line=line)
    return figure


def memory(runs: Sequence[RunRecord]) -> go.Figure | None:
    """With the device's memory where it is within sight of what is used, and what was predicted."""
    figure = curves(runs, "peak_memory_gib", "most memory held so far on rank 0, GiB")
    if figure is None:
        return None
    for run, colour in _coloured(runs):
        device, used = run.info.get("device") or {}, run.last("peak_memory_gib") or 0.0
        whole = device.get("memory_gib")
        if device.get("type") == "cuda" and isinstance(whole, int | float) and used > whole / 4:
            figure.add_hline(y=whole, line={"color": colour, "dash": "dash"}, annotation_text=label(device.get("name")))
        predicted = (run.info.get("predicted") or {}).get("peak_memory_gib")
        if isinstance(predicted, int | float):
            figure.add_hline(y=predicted, line={"color": colour, "dash": "dot"}, annotation_text="predicted")
    return figure


def gradient_norm(runs: Sequence[RunRecord]) -> go.Figure | None:
    return curves(runs, "grad_norm", "gradient norm before clipping", logarithmic=True)


def learning_rate(runs: Sequence[RunRecord]) -> go.Figure | None:
    return curves(runs, "lr", "learning rate")


def loss_scale(runs: Sequence[RunRecord]) -> go.Figure | None:
    return curves(runs, "loss_scale", "loss scale (fp16)", logarithmic=True)


def further(runs: Sequence[RunRecord]) -> list[go.Figure]:
    """A chart of each other field, in the order in which the runs have them."""
    fields = dict.fromkeys(field for run in runs for field in run.metrics)
    chosen = [field for field in fields if field not in SHOWN and not LOAD.match(field)]
    return [figure for field in chosen if (figure := curves(runs, field, field)) is not None]


def expert_load(run: RunRecord) -> go.Figure | None:
    """Tokens of each expert over the mean of all, step by step."""
    experts = sorted((int(found[1]), name) for name in run.metrics if (found := LOAD.match(name)))
    if not experts:
        return None
    figure = _empty(f"{run.name}: tokens of each expert over the mean of all")
    figure.add_heatmap(
        x=run.steps,
        y=[number for number, _ in experts],
        z=[run.metrics[name] for _, name in experts],
        colorscale="RdBu_r",
        zmid=1.0,
        colorbar={"title": "load"},
    )
    figure.update_yaxes(title="expert", dtick=1 if len(experts) <= 16 else None)
    return figure


def rank_step_times(run: RunRecord) -> go.Figure | None:
    """How long each rank's steps took: alike where ranks wait for each other in every step, whoever is slow."""
    return _of_ranks(run, "step_seconds", "seconds of a step on each rank")


def rank_lateness(run: RunRecord) -> go.Figure | None:
    """How late each rank was for its steps: a row that stays bright keeps the others waiting."""
    return _of_ranks(run, "late_seconds", "seconds from the end of a step until each rank is ready for the next")


def _of_ranks(run: RunRecord, field: str, title: str) -> go.Figure | None:
    """A heat map of steps by ranks. Restarts with other numbers of ranks, and lines without the field, leave gaps."""
    lines = [line for line in run.ranks if isinstance(line.get("step"), int) and _is_numbers(line.get(field))]
    if not lines:
        return None
    num_ranks = max(len(line[field]) for line in lines)
    seconds = [[_of(line[field], rank) for line in lines] for rank in range(num_ranks)]
    figure = _empty(f"{run.name}: {title}")
    figure.add_heatmap(
        x=[line["step"] for line in lines], y=list(range(num_ranks)), z=seconds, colorscale="Viridis",
        colorbar={"title": "s"},
    )  # fmt: skip
    figure.update_yaxes(title="rank", dtick=1 if num_ranks <= 16 else None)
    return figure


def _is_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def curves(runs: Sequence[RunRecord], field: str, title: str, *, logarithmic: bool = False) -> go.Figure | None:
    """One metric over the steps of every run that has it."""
    shown = [(run, colour) for run, colour in _coloured(runs) if run.has(field)]
    if not shown:
        return None
    figure = _empty(title)
    for run, colour in shown:
        steps, values = _points(run, field)
        mode = "lines" if len(steps) > 1 else "markers"
        figure.add_scatter(
            x=steps, y=values, name=label(run.name), mode=mode, line={"color": colour}, connectgaps=False
        )
        _mark_events(figure, run, colour)
    figure.update_layout(showlegend=len(shown) > 1)
    if logarithmic:
        figure.update_yaxes(type="log")
    return figure


def _points(run: RunRecord, field: str) -> tuple[list[int], Values]:
    """Steps with a value. A metric of every step keeps its gaps, such as those of steps that were not finite."""
    values = run.metrics[field]
    if sum(value is not None for value in values) > len(values) / 2:
        return run.steps, values
    chosen = [i for i, value in enumerate(values) if value is not None]
    return [run.steps[i] for i in chosen], [values[i] for i in chosen]


def _mark_events(figure: go.Figure, run: RunRecord, colour: str) -> None:
    marks = [event for event in run.events if event.get("kind") in MARKED and isinstance(event.get("step"), int)]
    for event in marks[-MAX_MARKS:]:
        figure.add_vline(
            x=event["step"], line={"color": colour, "dash": MARKED[event["kind"]], "width": 1}, opacity=0.6
        )


def _coloured(runs: Sequence[RunRecord]) -> list[tuple[RunRecord, str]]:
    return [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]


def _of(values: Sequence[float], index: int) -> float | None:
    return values[index] if index < len(values) else None


def label(text: object) -> str:
    """A text of a run's as plotly shows it: as it is."""
    return html.escape(str(text), quote=False)


def _empty(title: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": label(title), "font": {"size": 14}},
        template="plotly_white",
        height=330,
        margin={"l": 60, "r": 20, "t": 45, "b": 40},
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_xaxes(title="step")
    return figure
