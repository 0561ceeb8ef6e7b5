"""A plan as a page of text."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def as_text(plan: dict[str, Any]) -> str:
    """The five axes of the cost: memory, bytes on the wire, FLOPs and their roofs, time, failure. plan: of
    planner.plan.make_plan."""
    sections = (head, _memory, _traffic, _operators, _time, _failure)
    return "\n\n".join(section(plan) for section in sections) + "\n"


def head(plan: dict[str, Any]) -> str:
    """The model, the GPUs and the layout, in a line."""
    layout = plan["layout"]
    degrees = [f"{name}={layout[name]}" for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")]
    shown = [degree for degree in degrees if not degree.endswith("=1")]
    shown += [f"ZeRO-{layout['zero_stage']}", f"{layout['micro_batches']} micro-batches"]
    shown += [f"activations: {layout['activation_checkpoint']}"]
    shown += [f"pipeline {layout['pipeline']}"] if "pipeline" in layout else []
    return (
        f"{plan['num_parameters'] / 1e9:.2f}B parameters on {plan['world_size']} x {plan['hardware']}: "
        f"{', '.join(shown)}"
    )


def _memory(plan: dict[str, Any]) -> str:
    columns = ("parameters", "gradients", "master", "optimizer", "buffers", "activations", "loss")
    columns += ("communication", "recomputation", "peak")  # type: ignore[assignment]
    rows = [["stage", "ranks", *columns]]
    for rank in plan["ranks"]:
        rows.append([str(rank["pp"]), str(rank["count"]), *(f"{rank[f'{c}_bytes'] / GIB:.2f}" for c in columns)])
    worst = max(rank["peak_bytes"] for rank in plan["ranks"])
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    return "\n".join(
        [
            "Memory of a rank, GiB (state and buffers are exact; activations and on are a model)",
            table(rows),
            f"{verdict}: at most {worst / GIB:.1f} of {plan['memory_bytes'] / GIB:.1f} GiB",
        ]
    )


def _traffic(plan: dict[str, Any]) -> str:
    rows = [["axis", "collective", "GB"]]
    for axis, collectives in plan["traffic_bytes_per_step"].items():
        rows += [[axis, name, f"{sent / 1e9:.3f}"] for name, sent in collectives.items()]
    total = sum(sum(collectives.values()) for collectives in plan["traffic_bytes_per_step"].values())
    plain = plan["plain_ddp_bytes_per_step"]
    ratio = f", {total / plain:.2f} times as much" if plain else ""
    return "\n".join(
        [
            "Sent by a rank in a step",
            table(rows),
            f"in all {total / 1e9:.3f} GB; plain DDP {plain / 1e9:.3f} GB{ratio}",
        ]
    )


def _operators(plan: dict[str, Any]) -> str:
    rows = [["stage", "operator", "TFLOP", "FLOP/byte", "roof", "forward ms", "backward ms"]]
    for operator in plan["operators"]:
        flops = operator["forward_flops"] + operator["backward_flops"]
        rows.append(
            [
                str(operator["stage"]),
                operator["name"],
                f"{flops / 1e12:.2f}",
                f"{operator['intensity']:.0f}",
                operator["binds"],
                f"{operator['forward_seconds'] * 1e3:.2f}",
                f"{operator['backward_seconds'] * 1e3:.2f}",
            ]
        )
    total = plan["flops_per_token"]
    shares = ", ".join(
        f"{n} {f / total:.1%}" for n, f in plan["flops_per_token_by_operator"].items() if f / total > 5e-4
    )
    return "\n".join(["Work of a rank on a micro-batch", table(rows), f"{total / 1e9:.3f} GFLOP a token: {shares}"])


def _time(plan: dict[str, Any]) -> str:
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.3f}" for name, seconds in plan["step_parts"].items())
    return "\n".join(
        [
            f"Step {plan['step_seconds']:.3f} s ({parts}; pipeline bubble {plan['bubble']:.1%})",
            f"{plan['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, MFU {plan['mfu']:.1%}",
            f"{plan['tokens'] / 1e9:,.3f} B tokens: {plan['days']:,.2f} days, {plan['dollars']:,.0f} dollars",
        ]
    )


def _failure(plan: dict[str, Any]) -> str:
    failure = plan["failure"]
    return (
        f"A failure every {failure['mtbf_seconds'] / 3600:,.1f} h; a checkpoint takes "
        f"{failure['checkpoint_seconds']:,.0f} s to write and holds training up for "
        f"{failure['held_up_seconds']:,.2f} s; best one every {failure['interval_seconds'] / 60:,.1f} min; "
        f"{failure['lost_fraction']:.2%} of the time is lost"
    )


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first being their names, as columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )
