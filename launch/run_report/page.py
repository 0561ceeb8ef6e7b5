"""The page: one HTML file that needs nothing beside it, neither files nor a network.

Everything that comes from a run is escaped: names, texts of events, samples and settings are data, never markup.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from launch.run_report import charts
from launch.run_report.record import RunRecord
from trainer.faults import ENDS, FAULTS

MAX_EVENTS, MAX_SAMPLES = 500, 20
"""Shown of a run: the newest."""
OVER_STEPS: tuple[charts.Chart, ...] = (
    charts.loss,
    charts.gradient_norm,
    charts.throughput,
    charts.step_time,
    charts.utilisation,
    charts.memory,
    charts.learning_rate,
    charts.loss_scale,
)

OF_RANKS = (charts.rank_step_times, charts.rank_lateness)

_ENDS = {"preempted": "preempted; start it again"} | {kind: f"ended: {kind.replace('_', ' ')}" for kind in ENDS}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem 1.5rem; color: #1f2328 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #d0d7de }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: left; vertical-align: top }
tr:nth-child(even) td { background: #f6f8fa } th { border-bottom: 1px solid #d0d7de }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: .5rem }
.wide { grid-template-columns: minmax(0, 1fr) }
.scroll { max-height: 26rem; overflow: auto; border: 1px solid #d0d7de }
pre { background: #f6f8fa; padding: .7rem; overflow: auto; white-space: pre-wrap } img { max-width: 100% }
.note { color: #59636e }
"""


def page(runs: Sequence[RunRecord]) -> str:
    """The HTML of one run, or of several beside each other in the order given."""
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    parts = [
        f"<h1>{_text(title)}</h1><p class='note'>made {now}</p>",
        _section("Summary", _table([""] + [run.name for run in runs], _summary(runs))),
        _section("Curves", _charts([figure for chart in OVER_STEPS if (figure := chart(runs)) is not None])),
        _section("Further metrics", _charts(charts.further(runs))),
        _section("Experts", _wide([charts.expert_load(run) for run in runs])),
        _section("Ranks", _wide([chart(run) for run in runs for chart in OF_RANKS])),
        *(_timeline(run) for run in runs),
        *(_traced(run) for run in runs),
        *(_samples(run) for run in runs),
        *(_faults(run) for run in runs),
        *(_events(run) for run in runs),
        _section("Settings", _settings(runs)),
        *(_starts(run) for run in runs),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        # No request to anywhere, whatever a text on the page may hold.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _wide(figures: Sequence[go.Figure | None]) -> str:
    return _charts([figure for figure in figures if figure is not None], "charts wide")


def _charts(figures: Sequence[go.Figure], kind: str = "charts") -> str:
    """Plotly writes <, > and & of its data as \\u escapes, so that no text ends the script."""
    drawn = [
        figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
        for figure in figures
    ]
    return f"<div class='{kind}'>{''.join(f'<div>{text}</div>' for text in drawn)}</div>" if drawn else ""


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _summary(runs: Sequence[RunRecord]) -> list[list[object]]:
    """Rows that any run has something to say about."""
    rows: list[tuple[str, list[Any]]] = [
        ("folder", [run.folder for run in runs]),
        ("state", [_state(run) for run in runs]),
        ("steps", [_of_all(run.steps[-1] if run.steps else 0, run.config.get("train.steps")) for run in runs]),
        ("device", [_device(run) for run in runs]),
        ("mesh", [_mesh(run) for run in runs]),
        ("precision", [_pairs(run.info.get("precision")) for run in runs]),
        ("kernels", [_pairs(run.info.get("kernels")) for run in runs]),
        ("loss, last", [_number(run.last("loss")) for run in runs]),
        ("validation loss, last", [_number(run.last("validation_loss")) for run in runs]),
        ("tokens/s/GPU, median", [_number(_median(run, "tokens_per_second_per_gpu")) for run in runs]),
        ("MFU, median", [_number(_median(run, "mfu")) for run in runs]),
        ("step, median s", [_beside(run, "step_seconds", _median(run, "step_seconds")) for run in runs]),
        ("peak memory, GiB", [_beside(run, "peak_memory_gib", run.last("peak_memory_gib")) for run in runs]),
        ("goodput", [_number(run.last("goodput")) for run in runs]),
        ("skipped steps", [_number(run.last("skipped_steps")) for run in runs]),
        ("damaged lines, left out", [_pairs(run.damaged) for run in runs]),
        ("starts", [len(run.info.get("starts", [])) or "" for run in runs]),
        ("commit", [(run.info.get("versions") or {}).get("git_commit") or "" for run in runs]),
        ("torch", [(run.info.get("versions") or {}).get("torch") or "" for run in runs]),
    ]
    return [[name, *values] for name, values in rows if any(value not in ("", None) for value in values)]


def _state(run: RunRecord) -> str:
    """As far as the files tell."""
    wanted = run.config.get("train.steps")
    if run.steps and isinstance(wanted, int) and run.steps[-1] >= wanted:
        return "done"
    if run.hangs:
        return "hung; start it again"
    starts_and_ends = [kind for event in run.events if (kind := event.get("kind")) in ("resume", "start", *_ENDS)]
    end = starts_and_ends[-1] if starts_and_ends else None
    return _ENDS.get(str(end), "under way, or ended before its end")


def _of_all(done: int, wanted: object) -> str:
    return f"{done:,} of {wanted:,}" if isinstance(wanted, int) else f"{done:,}"


def _device(run: RunRecord) -> str:
    device = run.info.get("device") or {}
    return f"{run.info.get('world_size', '?')} x {device.get('name', '?')}" if device else ""


def _mesh(run: RunRecord) -> str:
    mesh = run.info.get("mesh") or {}
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size != 1) or ("one rank" if mesh else "")


def _pairs(value: object) -> str:
    return "; ".join(f"{key}: {what}" for key, what in value.items()) if isinstance(value, Mapping) else ""


def _median(run: RunRecord, field: str) -> float | None:
    """Of the second half of the steps of a run: the first ones compile and warm up."""
    values = [value for value in run.metrics.get(field, []) if value is not None]
    later = sorted(values[len(values) // 2 :])
    return later[len(later) // 2] if later else None


def _beside(run: RunRecord, field: str, measured: float | None) -> str:
    """A number, and what the planner predicted (run.json)."""
    predicted = (run.info.get("predicted") or {}).get(field)
    if measured is None or not isinstance(predicted, int | float) or predicted <= 0:
        return _number(measured)
    return f"{_number(measured)} (predicted {_number(predicted)}, {measured / predicted - 1:+.1%})"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10000 or value == int(value) else f"{value:.5g}"


def _timeline(run: RunRecord) -> str:
    if run.timeline is None:
        return ""
    image = base64.b64encode(run.timeline).decode()
    note = "planned above, executed below; pipeline_trace.json in the run's folder opens in ui.perfetto.dev"
    return _section(
        f"Pipeline of {run.name}",
        f"<img alt='time line of the newest step' src='data:image/png;base64,{image}'><p class='note'>{note}</p>",
    )


def _traced(run: RunRecord) -> str:
    """Where traced steps went: of each trace its kinds of work, and the newest one's kernels."""
    traced = [
        event for event in run.events if event.get("kind") == "profile" and isinstance(event.get("kinds_ms"), dict)
    ]
    if not traced:
        return ""
    parts = ("communication_exposed", "python", "idle")
    rows = [
        [
            event.get("step", ""),
            _number(event.get("step_ms")),
            _pairs({k: _number(v) for k, v in event["kinds_ms"].items()}),
        ]
        + [_number(event.get(f"{part}_ms")) for part in parts]
        for event in traced
    ]
    shares = _table(
        ["traced to step", "ms a step", "of which, by kind", *(part.replace("_", " ") for part in parts)], rows
    )
    kernels = [
        [row.get("name", ""), row.get("kind", ""), _number(row.get("ms_per_step")), _number(row.get("calls_per_step"))]
        for row in traced[-1].get("kernels", [])
    ]
    longest = _table(["longest at the newest trace", "kind", "ms a step", "calls a step"], kernels)
    return _section(f"Where steps of {run.name} went", f"{shares}<div class='scroll'>{longest}</div>")


def _samples(run: RunRecord) -> str:
    shown = [event for event in run.events if event.get("kind") in ("sample", "answers") and "sample" in event]
    blocks = []
    for event in shown[-MAX_SAMPLES:]:
        asked, expected = event.get("prompt"), event.get("expected")
        note = f"step {event.get('step', '?')}" + ("" if expected is None else f"; its row has: {expected}")
        asked = "" if asked is None else f"<pre>{_text(asked)}</pre>"
        blocks.append(f"<p class='note'>{_text(note)}</p>{asked}<pre>{_text(event['sample'])}</pre>")
    return _section(f"Samples of {run.name}", "".join(blocks))


def _faults(run: RunRecord) -> str:
    """What went wrong, in the order in which it was told."""
    faults = [
        [event.get("at", event.get("time", "")), event["kind"], event.get("step", ""), event.get("text", "")]
        for event in run.events
        if event.get("kind") in FAULTS
    ]
    faults += [[hang.at, "hang", hang.step, hang.text] for hang in run.hangs]
    shown = _table(["time (UTC)", "kind", "step", ""], faults[-MAX_EVENTS:])
    return _section(f"Faults of {run.name}", f"<div class='scroll'>{shown}</div>" if shown else "")


def _events(run: RunRecord) -> str:
    shown = run.events[-MAX_EVENTS:]
    rows = [
        [event.get("time", ""), event.get("kind", ""), event.get("step", ""), event.get("text", "")] for event in shown
    ]
    table = _table(["time (UTC)", "kind", "step", ""], rows)
    left_out = len(run.events) - len(shown)
    note = f"<p class='note'>the newest {MAX_EVENTS} of {len(run.events)}; events.jsonl has all</p>" if left_out else ""
    return _section(f"Events of {run.name}", f"{note}<div class='scroll'>{table}</div>" if table else "")


def _settings(runs: Sequence[RunRecord]) -> str:
    """Of one run all of them; of several, first where they differ."""
    names = sorted({name for run in runs for name in run.config})
    if not names:
        return ""
    values = {name: [run.config.get(name, "") for run in runs] for name in names}
    different = [name for name in names if any(value != values[name][0] for value in values[name])]
    head = ["", *(run.name for run in runs)]
    everything = _table(head, [[name, *values[name]] for name in names])
    if len(runs) == 1:
        return f"<div class='scroll'>{everything}</div>"
    rows = [[name, *values[name]] for name in different]
    first = _table(head, rows) if rows else "<p>The settings are the same.</p>"
    return f"{first}<details><summary>all settings</summary><div class='scroll'>{everything}</div></details>"


def _starts(run: RunRecord) -> str:
    rows = [
        [
            start.get("time", ""),
            start.get("resume_step", ""),
            start.get("world_size", ""),
            " ".join(start.get("command", [])),
        ]
        for start in run.info.get("starts", [])
    ]
    return _section(f"Starts of {run.name}", _table(["time (UTC)", "from step", "processes", "command"], rows))
