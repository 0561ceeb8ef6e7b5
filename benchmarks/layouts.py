"""Speed of one model in many layouts on the GPUs of a node, each trained for a few steps by the trainer itself.

    python benchmarks/layouts.py llama3_1b --gpus 4 --out benchmarks/results/layouts_llama3_1b_4xh200.json

Each layout is a launch of its own, so that none inherits memory of the one before. Prints one JSON object: for each
layout of LAYOUTS tokens_per_second_per_gpu, mfu, peak_memory_gib, what the planner predicted, and the losses, which say
whether the layouts trained the same model; or the error of one that does not run. Further arguments are overrides for
all of them. Tokens are drawn at random (Zipf): speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.launches import launch, torchrun
from benchmarks.train import summarize

LAYOUTS: dict[str, list[str]] = {
    "zero1": ["parallel.zero_stage=1"],
    "zero2": ["parallel.zero_stage=2"],
    "zero3": ["parallel.zero_stage=3"],
    "zero3-replicas2": ["parallel.zero_stage=3", "parallel.dp_replicate=2"],
    "tp2+sp-zero1": ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=1"],
    "tp4+sp": ["parallel.tp=4", "parallel.sequence_parallel=true", "parallel.zero_stage=1"],
    "pp2-1f1b-zero1": ["parallel.pp=2", "parallel.zero_stage=1"],
    "pp2-interleaved-zero1": ["parallel.pp=2", "parallel.pp_schedule=interleaved_1f1b", "parallel.zero_stage=1"],
    "pp2-zbv-zero1-eager": [
        "parallel.pp=2", "parallel.pp_schedule=zbv", "parallel.zero_stage=1", "train.compile=false",
    ],
    "pp4-1f1b": ["parallel.pp=4", "parallel.zero_stage=1"],
    "pp2-tp2+sp": ["parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=1"],
    "cp2-ulysses-zero1": ["parallel.cp=2", "parallel.cp_method=ulysses", "parallel.zero_stage=1"],
    "cp2-ring-zero1": ["parallel.cp=2", "parallel.zero_stage=1"],
}  # fmt: skip
SKIP = 3
KEPT = ("tokens_per_second_per_gpu", "mfu", "peak_memory_gib", "step_seconds_median", "loss_first", "loss_last")


@dataclass(frozen=True)
class Run:
    """One launch: on so many GPUs, with these overrides of the experiment."""

    gpus: int
    changes: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--only", nargs="*", choices=LAYOUTS, help="names of layouts")
    args, overrides = parser.parse_known_args(argv)
    runs = {name: Run(args.gpus, LAYOUTS[name]) for name in args.only or LAYOUTS}
    print(json.dumps(measure("layouts", runs, args, overrides), indent=2))
    return 0


def arguments(description: str | None, experiment: str | None = None) -> argparse.ArgumentParser:
    """What this program, growth.py and predictions.py take alike. experiment: the one and only, so no argument."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if experiment is None:
        parser.add_argument("experiment", help="a file of configs/exp")
    else:
        parser.set_defaults(experiment=experiment)
    parser.add_argument("--steps", type=int, default=8, help=f"of each run; the first {SKIP} are not measured")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one run, compilation included")
    parser.add_argument("--out", type=Path, help="also write the object to this file, after every run")
    return parser


def measure(kind: str, runs: Mapping[str, Run], args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """One launch after the other: {experiment, overrides, kind: {name: its numbers, or an error}}."""
    result: dict[str, Any] = {"experiment": args.experiment, "overrides": list(overrides), kind: {}}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, (np.random.default_rng(0).zipf(1.3, 8_000_000) % 32000).astype(np.int32))
        common = [*common_overrides(args.experiment, tokens, steps=args.steps), *overrides]
        for name, run in runs.items():
            run_dir = Path(folder) / name
            command = torchrun(run.gpus, "launch/train.py", *common, *run.changes, f"run.dir={run_dir}")
            error = launch(command, Path(folder) / f"{name}.log", limit=args.limit)
            measured = {"error": error} if error else _measured(run_dir)
            result[kind][name] = {"gpus": run.gpus, "changes": run.changes} | measured
            print(name, error or {key: measured[key] for key in KEPT}, file=sys.stderr, flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def common_overrides(experiment: str, tokens: Path, *, steps: int) -> list[str]:
    """Of every run, before those of all runs that the command line has and those of the run itself."""
    common = [f"+exp={experiment}", "data=tokens", f"data.path={tokens}", "data.validation_fraction=0"]
    common += [f"train.steps={steps}", "train.eval_interval=0", "train.sample_tokens=0"]
    # Losses of the same model differ by rounding alone while the learning rate is small.
    return [*common, f"schedule.warmup_steps={steps}", "checkpoint.at_end=false", "logging.console=false"]


def _measured(run_dir: Path) -> dict[str, Any]:
    summary = summarize(run_dir, skip=SKIP)
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    predicted = json.loads((run_dir / "run.json").read_text()).get("predicted", {})
    found = {key: summary[key] for key in (*KEPT, "kernels", "config", "device", "versions")}
    return found | {"losses": losses, "predicted": predicted}


if __name__ == "__main__":
    sys.exit(main())
