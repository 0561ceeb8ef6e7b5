"""A plan as a picture: roofline of the operators, memory of the ranks, and the step as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from parallel.pipeline.timeline import COLORS, NAMES, draw_rows
from planner.hardware import Hardware
from planner.job import Job
from planner.report import GIB, head
from planner.steptime import StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD = ("parameters", "gradients", "master", "optimizer", "activations", "loss", "communication", "recomputation")
PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")


def problems(path: str) -> list[str]:
    """Why no picture can be made, a line each."""
    found = []
    if not path.endswith((".png", ".pdf", ".svg")):
        found.append(f"plan.picture={path} must end in .png, .pdf or .svg")
    if find_spec("matplotlib") is None:
        found.append(
            "plan.picture draws with matplotlib, which is not installed; install it with pip install -e '.[plot]'"
        )
    return found


def draw(plan: dict[str, Any], job: Job, time: StepTime, hardware: Hardware) -> Figure:
    """plan: of planner.plan.make_plan, for this job."""
    from matplotlib.figure import Figure  # here, because most plans draw nothing

    rows = job.dims.pp if job.pipeline is not None else 1
    figure = Figure(figsize=(15, 6.5 + min(0.35 * rows, 12)), layout="constrained")
    figure.suptitle(head(plan))
    parts = figure.subfigures(2, 1, height_ratios=[5.5, 1.5 + min(0.35 * rows, 12)], squeeze=False)
    above, below = parts[0, 0], parts[1, 0]
    left, right = above.subplots(1, 2)
    _roofline(left, plan, job, hardware)
    _memory(right, plan)
    _step(below.subplots(), plan, job, time)
    return figure


def _roofline(axes: Axes, plan: dict[str, Any], job: Job, hardware: Hardware) -> None:
    """Operators of a micro-batch where intensity and predicted rate put them, forward and backward together."""
    bandwidth, rate = hardware.elementwise, hardware.matmul(job.precision.compute)
    operators: dict[str, dict[str, Any]] = {}
    for operator in plan["operators"]:
        operators.setdefault(operator["name"], operator)
    shown = {name: o for name, o in operators.items() if o["forward_flops"] > 0}
    ridge = rate / bandwidth
    lowest = min([ridge, *(o["intensity"] for o in shown.values())]) / 4
    highest = max([ridge, *(o["intensity"] for o in shown.values())]) * 4
    axes.loglog([lowest, ridge, highest], [lowest * bandwidth / 1e12, rate / 1e12, rate / 1e12], color="black")
    axes.axhline(hardware.peak_tflops, color="grey", linestyle="--", label="peak that MFU counts against")
    for (name, o), color in zip(shown.items(), PALETTE, strict=False):
        seconds = o["forward_seconds"] + o["backward_seconds"]
        reached = (o["forward_flops"] + o["backward_flops"]) / seconds / 1e12
        axes.scatter([o["intensity"]], [reached], color=color, s=60, zorder=3, label=f"{name}: {seconds * 1e3:.2f} ms")
    without = [(n, o) for n, o in operators.items() if n not in shown]
    for name, o in without:
        seconds = o["forward_seconds"] + o["backward_seconds"]
        axes.plot(
            [],
            [],
            " ",
            label=f"{name}: {seconds * 1e3:.2f} ms, {'memory' if o['binds'] == 'memory' else 'latency'} alone",
        )
    axes.set(
        xlabel="FLOP / byte", ylabel="TFLOP/s of a GPU", title="Roofline of measured rates, a micro-batch of a stage"
    )
    axes.legend(fontsize=8, loc="lower right")


def _memory(axes: Axes, plan: dict[str, Any]) -> None:
    """Of the rank of each pipeline stage that holds most."""
    ranks: dict[int, dict[str, Any]] = {}
    for rank in plan["ranks"]:
        ranks.setdefault(rank["pp"], rank)
    places = list(ranks)
    base = [0.0] * len(places)
    for kind, color in zip(HELD, PALETTE, strict=True):
        sizes = [ranks[pp][f"{kind}_bytes"] / GIB for pp in places]
        axes.bar(places, sizes, bottom=base, color=color, label=kind, width=0.8)
        base = [below + size for below, size in zip(base, sizes, strict=True)]
    peaks = [ranks[pp]["peak_bytes"] / GIB for pp in places]
    axes.scatter(
        places, peaks, marker="_", s=900 / len(places) + 60, color="black", zorder=3, label="peak (not all at once)"
    )
    axes.axhline(plan["memory_bytes"] / GIB, color="red", linestyle="--", label="memory of a GPU")
    axes.set(xlabel="pipeline rank", ylabel="GiB", title=f"Memory: {'fits' if plan['fits'] else 'DOES NOT FIT'}")
    axes.set_xticks(places)
    axes.set_xlim(min(places) - 1, max(places) + 1)
    axes.set_ylim(0, 1.35 * max([*base, plan["memory_bytes"] / GIB]))
    axes.legend(fontsize=8, ncols=3, loc="upper center")


def _step(axes: Axes, plan: dict[str, Any], job: Job, time: StepTime) -> None:
    if job.pipeline is None or time.timeline is None:
        _terms(axes, plan["step_terms"], plan["step_seconds"])
        return
    from matplotlib.patches import Patch

    draw_rows(axes, time.timeline, job.pipeline.owner)
    kinds = list(dict.fromkeys(action.kind for _, action in time.timeline.computations))
    handles = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in kinds]
    axes.legend(handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(handles))
    axes.set_xlabel("seconds")
    axes.set_title(
        f"Pipeline: {time.bubble:.1%} idle; step {time.step:.3f} s, of which optimizer {time.optimizer:.3f} s"
    )


def _terms(axes: Axes, terms: dict[str, float], step: float) -> None:
    start = 0.0
    names: Sequence[tuple[str, float]] = [(name, seconds) for name, seconds in terms.items() if seconds > 1e-3 * step]
    for (name, seconds), color in zip(names, PALETTE, strict=False):
        axes.barh([0], [seconds], left=start, color=color, label=f"{name} {seconds:.3f} s")
        start += seconds
    axes.set(xlim=(0, step), yticks=[], title=f"Step, in seconds: {step:.3f}")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3))
