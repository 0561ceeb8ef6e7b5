"""A search of layouts as text and as JSON: the ranking, and why its first place is first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.hardware import Hardware
from planner.limits import limits
from planner.plan import room
from planner.report import GIB, table
from planner.search import Difference, Layout, Neighbour, Ranking, differences

NOT_SEARCHED = (
    "cp_method, cp_ulysses, sp_chunks, ep_buffer, other pipeline schedules, stages per rank and splits, ZeRO-0 (ZeRO-1 "
    "sends as much and holds less), offloading, budgets of activations, tp over more than a node, precision, "
    "optimizer, batch size"
)
SMALLEST = 0.002
"""Part of the step that a term must make a difference of, to be named."""


def as_object(ranking: Ranking, others: Sequence[Neighbour], command: str, hardware: Hardware) -> dict[str, Any]:
    """For JSON. `layouts`: the best of each split, the fastest first; `why`: seconds that the winner saves (negative:
    pays) against the second, by term; `alternatives`: the winner with one field changed."""
    winner = ranking.layouts[0]
    return {
        "hardware": hardware.name,
        "world_size": winner.job.dims.world_size,
        "num_legal": ranking.num_legal,
        "num_costed": ranking.num_costed,
        "layouts": [_layout(layout) for layout in ranking.layouts],
        "why": {d.term: d.seconds for layout in ranking.layouts[1:2] for d in differences(winner, layout)},
        "alternatives": [
            {"field": other.field, "value": other.value, "fits": other.fits} | _cost(other.layout) for other in others
        ],
        "command": command,
        "not_modelled": limits(winner.job, hardware),
        "not_searched": NOT_SEARCHED,
    }


def as_page(ranking: Ranking, others: Sequence[Neighbour], command: str, hardware: Hardware) -> str:
    """For a person."""
    winner = ranking.layouts[0]
    parts = [
        f"{winner.job.dims.world_size} x {hardware.name}: {ranking.num_legal:,} legal layouts, each with more and "
        f"less recomputation; {ranking.num_costed:,} worked out in full, the others do not fit or cannot be below",
        f"The best layout of each split\n{_table(ranking.layouts)}",
    ]
    if len(ranking.layouts) > 1:
        second = ranking.layouts[1]
        longer = second.time.step - winner.time.step
        parts.append(
            f"Why: against the second its step is {longer:.3f} s ({longer / second.time.step:.1%}) shorter\n"
            f"{_why(winner, second)}"
        )
    if others:
        parts.append(f"The first with one thing changed\n{_alternatives(winner, others, hardware)}")
    parts.append(f"To run it\n  {command}")
    left_out = [*limits(winner.job, hardware), f"not searched: {NOT_SEARCHED}"]
    parts.append("Left out\n" + "\n".join(f"  {line}" for line in left_out))
    return "\n\n".join(parts) + "\n"


def _cost(layout: Layout) -> dict[str, Any]:
    return {"step_seconds": layout.time.step, "peak_bytes": round(layout.peak)}


def _layout(layout: Layout) -> dict[str, Any]:
    cost = _cost(layout) | {"tokens_per_second_per_gpu": layout.tokens_per_second_per_gpu, "bubble": layout.time.bubble}
    return {"changes": dict(layout.changes)} | cost | {"terms": dict(layout.time.terms)}


def _table(layouts: Sequence[Layout]) -> str:
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    rows = [["", *axes, "ZeRO", "micro-batch", "recompute", "schedule", "step s", "tokens/s/GPU", "bubble", "peak GiB"]]
    for place, layout in enumerate(layouts, start=1):
        job = layout.job
        rows.append(
            [
                str(place),
                *(str(getattr(job.dims, axis)) for axis in axes),
                str(job.parallel.zero_stage),
                f"{len(job.sequences)} x {job.micro_batch_size}",
                job.model.activation_checkpoint,
                job.parallel.pp_schedule if job.pipeline is not None else "-",
                f"{layout.time.step:.3f}",
                f"{layout.tokens_per_second_per_gpu:,.0f}",
                f"{layout.time.bubble:.1%}",
                f"{layout.peak / GIB:.1f}",
            ]
        )
    return table(rows)


def _why(winner: Layout, second: Layout) -> str:
    named = [d for d in differences(winner, second) if abs(d.seconds) >= SMALLEST * winner.time.step]
    lines = [
        f"  {_verb(d)} {abs(d.seconds):.3f} s of {d.term} ({winner.time.terms.get(d.term, 0.0):.3f} against "
        f"{second.time.terms.get(d.term, 0.0):.3f})"
        for d in named
    ]
    memory = (second.peak - winner.peak) / GIB
    lines.append(f"  {'saves' if memory > 0 else 'pays'} {abs(memory):.1f} GiB at the peak")
    return "\n".join(lines)


def _verb(difference: Difference) -> str:
    return "saves" if difference.seconds > 0 else "pays "


def _alternatives(winner: Layout, others: Sequence[Neighbour], hardware: Hardware) -> str:
    lines = []
    for other in others:
        setting = f"{other.field}={other.value}"
        if not other.fits:
            excess = (other.layout.peak - room(hardware)) / GIB
            lines.append(f"  {setting}: does not fit, {excess:.1f} GiB too many")
            continue
        found = differences(winner, other.layout)
        longer = other.layout.time.step - winner.time.step
        why = f", most of it {found[0].term}" if found and abs(longer) > SMALLEST * winner.time.step else ""
        lines.append(f"  {setting}: {longer:+.3f} s{why}; {other.layout.peak / GIB:.1f} GiB")
    return "\n".join(lines)
