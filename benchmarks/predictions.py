"""The planner's step time and peak memory beside what GPUs measured, over many configurations of the trainer.

    python benchmarks/predictions.py --gpus 1 --out ONE.json       every configuration of one GPU
    python benchmarks/predictions.py --gpus 4 --out FOUR.json      every one of four (2 and 8 as well)
    python benchmarks/predictions.py --table benchmarks/results/predictions_h200.json ONE.json FOUR.json \\
        --out benchmarks/results/predictions_h200.json

Each is a launch of the trainer, as in benchmarks/layouts.py; further arguments are overrides of all of them. --part 1/2
measures every second one, so that two GPUs share the work. Prints one JSON object. --table puts such objects together,
and tables of before, of which it keeps what was measured (of a configuration that several have, the last): it plans
each anew, on any machine, with the rates that configs/hardware has for its device; for each configuration predicted /
measured - 1 of both, and how many are within 10% (time) and 3% (memory).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.layouts import Run, arguments, common_overrides, measure
from launch.compose import compose_one
from planner.hardware_files import hardware_of
from trainer.predicted import job_of, predict
from trainer.validate import finalize

ALLOWED = {"step_seconds": 0.10, "peak_memory_gib": 0.03}
"""What predictions are held to, as a share of what was measured."""
EXPERIMENT = "llama3_1b"
STEPS = 8
SHAPE_3B = ["model.hidden_size=3072", "model.intermediate_size=8192", "model.num_layers=28", "model.num_heads=24"]
NARROW = ["model.hidden_size=1024", "model.intermediate_size=4096", "model.num_layers=24", "model.num_heads=16"]
LARGE = ["model=llama3_8b"]
EXPERTS = ["model.moe.num_experts=8", "model.moe.top_k=2", "model.moe.intermediate_size=4096"]


EAGER = ["train.compile=false", "train.loss_kernel=torch"]


def _batch(seq_len: int, micro_batch_size: int, micro_batches: int = 2, ranks: int = 1) -> list[str]:
    samples = micro_batch_size * micro_batches * ranks
    sizes = [f"train.seq_len={seq_len}", f"train.micro_batch_size={micro_batch_size}"]
    return [*sizes, f"train.global_batch_size={samples}", f"model.max_seq_len={max(seq_len, 8192)}"]


def alone() -> dict[str, list[str]]:
    """Of one GPU: lengths, micro-batches, what is computed again, precisions, shapes, without compilation."""
    recompute = "model.activation_checkpoint"
    return {
        "1b-8k": _batch(8192, 1),
        "1b-8k-2": _batch(8192, 2),
        "1b-2k-4": _batch(2048, 4),
        "1b-2k-16": _batch(2048, 16),
        "1b-32k": _batch(32768, 1, 1),
        "1b-8k-4-batches": _batch(8192, 1, 4),
        "1b-8k-full": [*_batch(8192, 2), f"{recompute}=full"],
        "1b-8k-selective": [*_batch(8192, 2), f"{recompute}=selective"],
        "1b-32k-full": [*_batch(32768, 1, 1), f"{recompute}=full"],
        "1b-64k-full": [*_batch(65536, 1, 1), f"{recompute}=full"],
        "1b-128k-full": [*_batch(131072, 1, 1), f"{recompute}=full"],
        "1b-8k-fp8": [*_batch(8192, 1), "precision=fp8"],
        "1b-8k-eager": [*_batch(8192, 1), *EAGER],
        "3b-8k-full": [*_batch(8192, 1), *SHAPE_3B, f"{recompute}=full"],
        "3b-2k": [*_batch(2048, 2), *SHAPE_3B],
        "narrow-2k": [*_batch(2048, 8), *NARROW],
        "experts-8k": [*_batch(8192, 1), *EXPERTS],
        "experts-4k-eager": [*_batch(4096, 1), *EXPERTS, *EAGER],
    }


def together(gpus: int) -> dict[str, list[str]]:
    """Of several GPUs: one axis at a time, and pairs of them on four or more."""
    sp = ["parallel.tp=2", "parallel.sequence_parallel=true"]
    zero = "parallel.zero_stage"
    batch = _batch(8192, 1, 2, gpus)
    runs = {
        "1b-zero1": [*batch, f"{zero}=1"],
        "1b-zero2": [*batch, f"{zero}=2"],
        "1b-zero3": [*batch, f"{zero}=3"],
        "1b-tp2+sp": [*batch, *sp, f"{zero}=1"],
        "1b-pp2": [*_batch(8192, 1, 4, gpus), "parallel.pp=2", f"{zero}=1"],
        "1b-cp2-ring": [*batch, "parallel.cp=2", f"{zero}=1"],
        "1b-cp2-ulysses": [*batch, "parallel.cp=2", "parallel.cp_method=ulysses", f"{zero}=1"],
        "8b-zero3-full": [
            *_batch(4096, 1, 1, gpus),
            "model=llama3_8b",
            f"{zero}=3",
            "model.activation_checkpoint=full",
        ],
        "8b-tp2+sp": [*_batch(2048, 1, 1, gpus), "model=llama3_8b", *sp, f"{zero}=1"],
    }
    if gpus >= 4:
        runs["1b-pp2-tp2+sp"] = [*_batch(8192, 1, 4, gpus), "parallel.pp=2", *sp, f"{zero}=1"]
        runs["1b-tp4+sp"] = [*batch, "parallel.tp=4", sp[1], f"{zero}=1"]
        runs["8b-zero2"] = [*_batch(8192, 1, 2, gpus), *LARGE, f"{zero}=2"]
        runs["8b-zero3"] = [*_batch(8192, 1, 2, gpus), *LARGE, f"{zero}=3"]
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, EXPERIMENT)
    parser.add_argument("--gpus", type=int, choices=(1, 2, 4, 8), default=1)
    parser.add_argument("--only", nargs="*", default=[], help="names of configurations")
    parser.add_argument("--part", default="1/1", help="K/N: of the configurations every Nth, from the Kth")
    parser.add_argument("--table", nargs="+", type=Path, help="objects to put together, of which nothing is measured")
    args, overrides = parser.parse_known_args(argv)
    if args.table:
        found = table([json.loads(file.read_text()) for file in args.table])
        if args.out:
            args.out.write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found, indent=2))
        return 0
    configurations = alone() if args.gpus == 1 else together(args.gpus)
    if unknown := set(args.only) - set(configurations):
        parser.error(f"--only {sorted(unknown)[0]!r} is none of {', '.join(configurations)}")
    part, _, of = args.part.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        parser.error(f"--part {args.part!r} must be K/N with K from 1 to N")
    names = [name for name in configurations if not args.only or name in args.only][int(part) - 1 :: int(of)]
    runs = {name: Run(args.gpus, configurations[name]) for name in names}
    print(json.dumps(measure("configurations", runs, args, overrides), indent=2))
    return 0


def table(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of `measure` and earlier tables, put together: each configuration beside its prediction of today (None
    where no hardware file is of its device), and how many are close enough. Errors stay as they are."""
    measured: dict[str, dict[str, Any]] = {}
    for result in results:
        measured |= _measured(result)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, np.zeros(10**6, dtype=np.int32))
        for name, row in measured.items():
            rows[name] = row if "error" in row else _beside_prediction(row, tokens)
    held = {}
    for what, allowed in ALLOWED.items():
        errors = [abs(row[f"{what}_error"]) for row in rows.values() if row.get(f"{what}_error") is not None]
        held[what] = {
            "configurations": len(errors),
            "allowed": allowed,
            "within": sum(error <= allowed for error in errors),
            "largest": max(errors, default=None),
        }
    return {"held": held, "configurations": rows}


def _measured(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, or an error, by name of the row."""
    if "held" in result:  # a table
        names = ("gpus", "changes", "error", *(f"{what}_measured" for what in ALLOWED), "device", "versions")
        return {name: {key: row[key] for key in names if key in row} for name, row in result["configurations"].items()}
    rows = {}
    for name, run in result["configurations"].items():
        row = {"gpus": run["gpus"], "changes": [*result["overrides"], *run["changes"]]}
        if "error" in run:
            row["error"] = run["error"]
        else:
            row |= {"step_seconds_measured": run["step_seconds_median"]}
            row |= {"peak_memory_gib_measured": run["peak_memory_gib"]} | {
                key: run[key] for key in ("device", "versions")
            }
        rows[f"{run['gpus']}x {name}"] = row
    return rows


def _beside_prediction(row: dict[str, Any], tokens: Path) -> dict[str, Any]:
    hardware, predicted = hardware_of(row["device"]), {}
    if hardware is not None:
        overrides = [*common_overrides(EXPERIMENT, tokens, steps=STEPS), *row["changes"]]
        config = finalize(compose_one(overrides), world_size=row["gpus"])
        predicted = predict(job_of(config, world_size=row["gpus"]), hardware)
    found = {"gpus": row["gpus"], "changes": row["changes"]}
    for what in ALLOWED:
        ours, theirs = predicted.get(what), row[f"{what}_measured"]
        found |= {f"{what}_predicted": ours, f"{what}_measured": theirs}
        found[f"{what}_error"] = None if ours is None else ours / theirs - 1
    return found | {"device": row["device"], "versions": row["versions"]}


if __name__ == "__main__":
    sys.exit(main())
