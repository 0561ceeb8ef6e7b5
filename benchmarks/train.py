"""Speed of a training run, read from what the run itself wrote: the program measured is the product.

    torchrun --nproc-per-node 8 launch/train.py +exp=llama3_8b train.steps=30 run.dir=RUN_DIR
    python benchmarks/train.py RUN_DIR --out benchmarks/results/llama3_8b.json

Prints one JSON object over the steps of the newest start of the run, without the first --skip ones (compilation,
caches, allocator): tokens_per_second_per_gpu and mfu are means over time (all tokens over all seconds),
step_seconds_median and _mean over steps, data_wait_fraction the share of time spent waiting for data; peak_memory_gib
and the losses are over all steps of that start. mfu counts attention over the whole sequence, mfu_causal over what a
token may see. A run with train.profile.steps also gives `profile` (benchmarks/breakdown.py); the traced steps, which
tracing slows, are better left out by --skip. docs/METRICS.md defines the fields.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from trainer.breakdown import profile_of, trace_path

_CONFIG_KEYS = {
    "train": ("seq_len", "global_batch_size", "micro_batch_size", "compile"),
    "parallel": ("dp_replicate", "dp_shard", "zero_stage", "cpu_offload"),
    "model": ("family", "attention", "activation_checkpoint"),
}
"""What decides speed and is repeated in the result, from config.yaml."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Summarise the speed of a finished training run as one JSON object.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--skip", type=int, default=5, help="warm-up steps left out (default 5)")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    args = parser.parse_args(argv)
    try:
        summary = summarize(args.run_dir, skip=args.skip)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(summary, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


def summarize(run_dir: Path, *, skip: int) -> dict[str, Any]:
    """The JSON object as a dict. Raises ValueError or OSError with one line that says what is missing."""
    if skip < 0:
        raise ValueError(f"--skip {skip} must not be negative")
    info = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # Every start warms up anew, perhaps on other devices: only the newest one is measured.
    first_step = info["starts"][-1]["resume_step"] + 1
    steps = [step for step in map(json.loads, lines) if step["step"] >= first_step]
    if not steps[skip:]:
        raise ValueError(
            f"{run_dir} has {len(steps)} steps since its newest start; --skip {skip} leaves none to measure"
        )
    return {
        "run": config["run"]["name"],
        "device": info["device"]["name"],
        "world_size": info["world_size"],
        "mesh": info["mesh"],
        **speed_of(
            steps,
            skip=skip,
            flops_per_token=info["flops_per_token"],
            flops_per_token_causal=info["flops_per_token_causal"],
            peak_flops=info["peak_flops"],
        ),
        "profile": profile_of(run_dir, top=0) if trace_path(run_dir, 0).is_file() else None,
        "kernels": info["kernels"],
        "precision": info["precision"],
        "versions": info["versions"],
        "config": {f"{group}.{key}": config[group].get(key) for group, keys in _CONFIG_KEYS.items() for key in keys},
        "overrides": _overrides(info["command"]),
    }


def speed_of(
    steps: list[dict[str, Any]],
    *,
    skip: int,
    flops_per_token: float,
    flops_per_token_causal: float,
    peak_flops: float | None,
) -> dict[str, Any]:
    """The numbers of a run from its records in the form of metrics.jsonl, more than `skip` of them."""
    measured = steps[skip:]
    seconds = [step["step_seconds"] for step in measured]
    return {
        "steps_measured": len(measured),
        "steps_skipped": skip,
        "tokens_per_second_per_gpu": _mean_over_time(measured, "tokens_per_second_per_gpu"),
        "mfu": _mean_over_time(measured, "mfu"),
        "mfu_causal": _mean_over_time(measured, "mfu", scale=flops_per_token_causal / flops_per_token),
        "flops_per_token": flops_per_token,
        "flops_per_token_causal": flops_per_token_causal,
        "peak_flops": peak_flops,
        "peak_memory_gib": _largest(steps, "peak_memory_gib"),
        "step_seconds_median": statistics.median(seconds),
        "step_seconds_mean": statistics.fmean(seconds),
        "data_wait_fraction": sum(step.get("data_wait_seconds") or 0.0 for step in measured) / sum(seconds),
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
    }


def _mean_over_time(steps: list[dict[str, Any]], field: str, *, scale: float = 1.0) -> float | None:
    """Mean of a rate times scale, each step weighted by its duration; None when the run has no such number (mfu on a
    CPU)."""
    pairs = [(step[field], step["step_seconds"]) for step in steps if step.get(field) is not None]
    if not pairs:
        return None
    return scale * sum(rate * seconds for rate, seconds in pairs) / sum(seconds for _, seconds in pairs)


def _largest(steps: list[dict[str, Any]], field: str) -> float | None:
    return max((step[field] for step in steps if step.get(field) is not None), default=None)


def _overrides(command: list[str]) -> list[str]:
    """The arguments of the run; its folder is left out, results of equal runs in two folders are to be equal."""
    return [argument for argument in command[1:] if not argument.startswith("run.dir=")]


if __name__ == "__main__":
    sys.exit(main())
