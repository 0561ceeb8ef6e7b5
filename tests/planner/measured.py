"""Runs that were measured on H200 (benchmarks/results), as the planner's command lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launch.compose import compose_for
from launch.plan import PLAN, plan_of

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMPILED_LOSS = "train.loss_kernel=torch"
"""Beside train.compile: what train.loss_kernel=auto was when these ran."""


class Run(NamedTuple):
    name: str
    overrides: list[str]
    num_gpus: int
    peak_gib: float | None  # None: not of this run alone
    seconds: float


class Held(NamedTuple):
    """A run and its prediction."""

    run: Run
    peak_gib: float
    seconds: float


def runs() -> Iterator[Run]:
    """Those with a committed measurement whose configuration can be composed from what the file says."""
    for file, more in (
        ("llama3_1b_1xh200", []),
        ("llama3_8b_4xh200", ["parallel.zero_stage=3"]),
        ("zero3_13b_4xh200", []),
    ):
        result = _read(file)
        yield _run(file, [*result["overrides"], *more], result["world_size"], result)
    for file in ("layouts_llama3_1b_4xh200", "layouts_llama3_8b_4xh200"):
        found = _read(file)
        for name, result in found["layouts"].items():
            run = _run(f"{found['experiment']} {name}", [f"+exp={found['experiment']}", *found["overrides"]], 4, result)
            run.overrides.extend(result["changes"])
            # Peaks of the older file grow from one layout to the next, in the order in which they ran, to 56 GiB.
            yield run if found["experiment"] != "llama3_1b" or name == "zero1" else run._replace(peak_gib=None)
    for run in _read("compare_llama3_8b_fp8_4xh200")["runs"] + _read("compare_llama3_8b_fused_zero2_4xh200")["runs"]:
        if run["contestant"].startswith("lattice") and run["round"] == 0:
            words = run["command"].split("launch/train.py ")[1].split()
            overrides = [word for word in words if not word.startswith(("run.dir=", "data"))]
            fp8 = next((word.partition("=")[2] for word in words if word.startswith("precision.fp8_recipe")), "")
            kind = f"fp8 {fp8 or 'tensorwise'}" if "precision=fp8" in words else "bf16"
            yield _run(f"llama3_8b zero2, micro-batch 2, {kind}", overrides, 4, run["result"])


def predictions() -> list[Held]:
    """Those of benchmarks/predictions.py, as its table has them (tests/planner/test_predictions.py plans them anew)."""
    return [
        Held(
            Run(name, row["changes"], row["gpus"], row["peak_memory_gib_measured"], row["step_seconds_measured"]),
            row["peak_memory_gib_predicted"],
            row["step_seconds_predicted"],
        )
        for name, row in _read("predictions_h200")["configurations"].items()
        if "error" not in row
    ]


def held() -> list[Held]:
    """Every run beside its prediction, each name once."""
    found: dict[str, Held] = {}
    for run in runs():
        if run.name not in found:
            plan = plan_of(compose_for(PLAN, [*run.overrides, f"plan.gpus={run.num_gpus}"]))
            peak = max(rank["peak_bytes"] for rank in plan["ranks"]) / 2**30
            found[run.name] = Held(run, peak, plan["step_seconds"])
    return list(found.values())


def table(rows: list[Held]) -> str:
    """As docs/PLANNER.md has it."""
    lines = ["| run | peak GiB | predicted | | step s | predicted | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        run = row.run
        peak = (
            f"{run.peak_gib:.1f} | {row.peak_gib:.1f} | {row.peak_gib / run.peak_gib - 1:+.1%}"
            if run.peak_gib
            else "- | - | -"
        )
        time = f"{run.seconds:.3f} | {row.seconds:.3f} | {row.seconds / run.seconds - 1:+.1%}"
        lines.append(f"| {run.name} | {peak} | {time} |")
    return "\n".join(lines)


def _read(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{file}.json").read_text())


def _run(name: str, overrides: list[str], num_gpus: int, result: dict[str, Any]) -> Run:
    return Run(name, [*overrides, COMPILED_LOSS], num_gpus, result["peak_memory_gib"], result["step_seconds_median"])
