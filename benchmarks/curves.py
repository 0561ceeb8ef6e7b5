"""Losses of one experiment under several settings, beside those of the first: does a precision train?

    python benchmarks/curves.py llama3_1b --gpus 4 --gpus-of-one 1 \\
        --run "precision=bf16" --run "precision=fp8" --run "precision=fp8 precision.fp8_recipe=rowwise" \\
        --out benchmarks/results/fp8_curves_llama3_1b_h200.json train.steps=600 data=stdlib

Runs start side by side, as many as the GPUs hold with --gpus-of-one each, with the same seed and the same data; further
arguments are overrides of all of them. Prints one JSON object: for each run its losses, validation losses,
loss_end (the mean of the last --window steps), end_deviation (relative to the first run's), and
largest_deviation (of means over --window steps, from the second window on). Exit code 1 when a run failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.launches import launch, torchrun
from benchmarks.train import summarize


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a file of configs/exp")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpus-of-one", type=int, default=1)
    parser.add_argument("--run", action="append", required=True, metavar="OVERRIDES", help="repeatable")
    parser.add_argument("--window", type=int, default=50, help="steps whose losses are averaged")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds of one run")
    parser.add_argument("--out", type=Path, help="also write the object to this file, after every run")
    args, overrides = parser.parse_known_args(argv)
    if min(args.gpus_of_one, args.window) < 1 or args.gpus < args.gpus_of_one:
        parser.error("--window and --gpus-of-one must be positive, --gpus at least --gpus-of-one")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.gpus)))).split(",")[: args.gpus]
    if len(visible) < args.gpus_of_one:
        parser.error(f"CUDA_VISIBLE_DEVICES names {len(visible)} GPUs, fewer than --gpus-of-one {args.gpus_of_one}")
    free: Queue[list[str]] = Queue()
    for first in range(0, len(visible) - args.gpus_of_one + 1, args.gpus_of_one):
        free.put(visible[first : first + args.gpus_of_one])
    runs: list[dict[str, Any] | None] = [None] * len(args.run)
    record: dict[str, Any] = {"experiment": args.experiment, "overrides": overrides, "window": args.window}
    writing = Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(free.qsize()) as pool:

        def train(number: int) -> None:
            gpus = free.get()
            try:
                run = _train(args, overrides, Path(folder) / str(number), args.run[number], gpus)
            finally:
                free.put(gpus)
            with writing:
                runs[number] = run
                record["runs"] = [run | _compared(run, runs[0], args.window) for run in runs if run is not None]
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(record, indent=1) + "\n")

        list(pool.map(train, range(len(args.run))))
    print(json.dumps(record, indent=1))
    return 1 if any(run["error"] for run in record["runs"]) else 0


def _train(
    args: argparse.Namespace, overrides: Sequence[str], run_dir: Path, settings: str, gpus: Sequence[str]
) -> dict[str, Any]:
    options = [*overrides, *shlex.split(settings), "checkpoint.at_end=false", "logging.console=false"]
    command = torchrun(len(gpus), "launch/train.py", f"+exp={args.experiment}", *options, f"run.dir={run_dir}")
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    error = launch(command, run_dir.with_suffix(".log"), limit=args.limit, environment=visible)
    run: dict[str, Any] = {"settings": settings, "error": error}
    if error is None:
        steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        summary = summarize(run_dir, skip=len(steps) // 10)
        run["losses"] = [round(step["loss"], 5) for step in steps]
        run["validation_losses"] = [
            [step["step"], round(step["validation_loss"], 5)]
            for step in steps
            if step.get("validation_loss") is not None
        ]
        kept = ("device", "world_size", "tokens_per_second_per_gpu", "precision", "kernels", "versions")
        run |= {key: summary[key] for key in kept}
    print(f"{settings}: {error or run['losses'][-1]}", file=sys.stderr, flush=True)
    return run


def _compared(run: dict[str, Any], first: dict[str, Any] | None, window: int) -> dict[str, Any]:
    """Means over windows, because the loss of one step is noise. Nothing while the first run is not there."""
    if run["error"] or first is None or first["error"]:
        return {}
    means, reference = (
        [statistics.fmean(r["losses"][i : i + window]) for i in range(0, len(r["losses"]) - window + 1, window)]
        for r in (run, first)
    )
    deviations = [abs(a / b - 1) for a, b in zip(means, reference, strict=True)][1:]
    end, end_reference = (statistics.fmean(r["losses"][-window:]) for r in (run, first))
    return {
        "loss_end": end,
        "end_deviation": end / end_reference - 1,
        # max() loses NaN unless it comes first.
        "largest_deviation": max(deviations, key=lambda x: (math.isnan(x), x), default=None),
    }


if __name__ == "__main__":
    sys.exit(main())
