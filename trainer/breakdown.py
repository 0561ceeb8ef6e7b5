"""Where the time of traced steps went, from the trace that the run wrote (trainer/profiling.py).

Of a GPU: kinds of kernels, communication that no computation hides, and idling. Kinds run side by side on several
streams, so they may add up to more than the step; computed, communication_exposed and idle add up to it. Of a CPU:
operations without those that they call, and what lies between them, which is Python.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.profiling import STEP

GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
COMMUNICATION = "communication"
OTHER = "memory_bound"
# The first that is found in the name of a kernel, or of an operation, decides. Inductor names a kernel after all that
# it fuses, among it views of what an attention or a product made; those of kernels/ are named for what they are.
KINDS = {
    OTHER: re.compile("^triton_(poi|per|red)_fused_"),
    COMMUNICATION: re.compile("nccl|gloo|c10d", re.IGNORECASE),
    "copy": re.compile("^mem(cpy|set)|^aten::(copy_|_to_copy|clone|cat)$", re.IGNORECASE),
    "attention": re.compile(
        "attention|flash|fmha|sdpa|_attn|cudnn::fusion::(compute_dot_do_o|convert_dq)", re.IGNORECASE
    ),
    "matrix_products": re.compile(
        "gemm|nvjet|cutlass|xmma|cublas|matmul|_mm_|_scaled_mm|grouped_mm|^aten::(mm|bmm|addmm|linear)$", re.IGNORECASE
    ),
    "optimizer": re.compile("adam|multi_tensor|optimi|_foreach_|global_norm", re.IGNORECASE),
}

Interval = tuple[float, float]
Event = dict[str, Any]


def trace_path(run_dir: Path, rank: int, *, step: int | None = None) -> Path:
    """The trace of a rank that begins with a step, or the newest there is (step=None). It may not exist."""
    profiles = run_dir / "profile"
    if step is None:
        traced = sorted(int(path.parent.name[5:]) for path in profiles.glob(f"step_*/rank_{rank}.json.gz"))
        step = traced[-1] if traced else 0
    return profiles / f"step_{step}" / f"rank_{rank}.json.gz"


def profile_of(run_dir: Path, *, rank: int = 0, step: int | None = None, top: int = 20) -> dict[str, Any]:
    """Milliseconds per step, and the `top` kernels or operations that take longest.

    Raises ValueError or OSError with one line that says what is missing.
    """
    path = trace_path(run_dir, rank, step=step)
    if not path.is_file():
        raise ValueError(f"{path} is missing; train with train.profile.steps=[6,7,8]")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation"]
    on_gpu = [event for event in events if event.get("cat") in GPU]
    if not steps or not (on_gpu or any(event.get("cat") == "cpu_op" for event in events)):
        raise ValueError(f"{path} has {len(steps)} steps and {len(on_gpu)} kernels: nothing to account for")
    shares = _of_gpu(on_gpu, len(steps)) if on_gpu else _of_cpu(steps, events)
    work = on_gpu or _self_times([event for event in events if event.get("cat") == "cpu_op"])
    return {"rank": rank, "steps": len(steps), **shares, "kernels": _longest(work, len(steps), top)}


def sentence(profile: dict[str, Any]) -> str:
    """The shares of a step, the largest first, in one line."""
    kinds = {kind.replace("_", " "): value for kind, value in profile["kinds_ms"].items()}
    for name in ("communication_exposed", "python", "idle"):
        if f"{name}_ms" in profile:
            kinds[name.replace("_", " ")] = profile[f"{name}_ms"]
    kinds.pop(COMMUNICATION, None) if "communication_exposed_ms" in profile else None
    largest = sorted(((value, kind) for kind, value in kinds.items() if value > 0), reverse=True)
    total = profile["step_ms"]
    return f"{total:.1f} ms a step: " + ", ".join(f"{kind} {value / total:.0%}" for value, kind in largest)


def _of_gpu(events: Sequence[Event], num_steps: int) -> dict[str, Any]:
    intervals: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        intervals[kind_of(event["name"])].append(_interval(event))
    everything = union(interval for some in intervals.values() for interval in some)
    computed = union(interval for kind, some in intervals.items() if kind != COMMUNICATION for interval in some)
    window = everything[-1][1] - everything[0][0]

    def per_step(microseconds: float) -> float:
        return microseconds / 1e3 / num_steps

    return {
        "step_ms": per_step(window),
        "computed_ms": per_step(length(computed)),
        "communication_exposed_ms": per_step(length(everything) - length(computed)),
        "idle_ms": per_step(window - length(everything)),
        "idle_share": 1.0 - length(everything) / window,
        "kinds_ms": {kind: per_step(length(union(some))) for kind, some in sorted(intervals.items())},
    }


def _of_cpu(steps: Sequence[Event], events: Sequence[Event]) -> dict[str, Any]:
    """Of the thread that runs the steps: on the CPU it computes forward and backward itself."""
    thread = steps[0]["tid"]
    within = union(map(_interval, steps))
    operations = [e for e in events if e.get("cat") == "cpu_op" and e["tid"] == thread and _inside(e, within)]
    kinds: dict[str, float] = defaultdict(float)
    for event in _self_times(operations):
        kinds[kind_of(event["name"])] += event["dur"] / 1e3 / len(steps)
    step = length(within) / 1e3 / len(steps)
    return {"step_ms": step, "python_ms": step - sum(kinds.values()), "kinds_ms": dict(sorted(kinds.items()))}


def _inside(event: Event, within: Sequence[Interval]) -> bool:
    return any(begin <= event["ts"] < end for begin, end in within)


def _self_times(events: Iterable[Event]) -> list[Event]:
    """The same events, each without the time of those that it encloses on its thread."""
    found: list[Event] = []
    enclosing: dict[Any, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = enclosing[event["tid"]]
        while stack and stack[-1]["end"] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1]["dur"] -= event["dur"]
        own = {"name": event["name"], "dur": event["dur"], "end": event["ts"] + event["dur"]}
        stack.append(own)
        found.append(own)
    return found


def _longest(events: Sequence[Event], num_steps: int, top: int) -> list[dict[str, Any]]:
    total: dict[str, list[float]] = defaultdict(list)
    for event in events:
        total[event["name"]].append(event["dur"])
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:top]
    return [
        {
            "name": name[:120],
            "kind": kind_of(name),
            "ms_per_step": sum(durations) / 1e3 / num_steps,
            "calls_per_step": len(durations) / num_steps,
        }
        for name, durations in longest
    ]


def kind_of(kernel: str) -> str:
    """Of KINDS, or OTHER, by the kernel's or operation's name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), OTHER)


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint and ascending, covering the same points."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    """Of disjoint intervals together."""
    return sum(end - begin for begin, end in intervals)
