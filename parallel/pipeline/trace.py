"""The planned and the executed time line of a step, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel.pipeline.actions import Action, Collective
from parallel.pipeline.executor import Executed
from parallel.pipeline.simulate import Timeline


def chrome_trace(planned: Timeline, executed: Sequence[Sequence[Executed]]) -> dict[str, Any]:
    """One process "planned" and one "executed", a thread per rank each; of a collective, the moment it is started.

    executed: of each rank. Clocks are perf_counter's, the same for all ranks of a host and not between hosts; times
    start at the earliest. A unit of the plan is drawn so that both time lines have the same length.
    """
    first = min(e.start for rank in executed for e in rank)
    length = max(e.end for rank in executed for e in rank) - first
    unit = length / planned.makespan
    events: list[dict[str, Any]] = []
    for process, name in enumerate(("planned", "executed")):
        events.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}})
        for rank in range(len(executed)):
            row = {"ph": "M", "pid": process, "tid": rank, "name": "thread_name", "args": {"name": f"pp rank {rank}"}}
            events.append(row)
    events += [_event(0, span.rank, span.action, span.start * unit, span.end * unit) for span in planned.spans]
    for rank, actions in enumerate(executed):
        events += [_event(1, rank, e.action, e.start - first, e.end - first) for e in actions]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(process: int, rank: int, action: Action | Collective, start: float, end: float) -> dict[str, Any]:
    if not isinstance(action, Action):
        instant = {"ph": "i", "s": "t", "cat": type(action).__name__.lower(), "args": {"stage": action.stage}}
        return instant | {"pid": process, "tid": rank, "name": str(action), "ts": start * 1e6}
    return {
        "ph": "X",
        "pid": process,
        "tid": rank,
        "name": f"{action.kind}{action.microbatch}",
        "cat": action.kind.name.lower(),
        "ts": start * 1e6,  # microseconds
        "dur": (end - start) * 1e6,
        "args": {"stage": action.stage, "microbatch": action.microbatch},
    }
