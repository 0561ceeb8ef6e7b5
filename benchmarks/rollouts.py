"""What rollouts beside updates save (recipe.rl.overlap): one run of GRPO in three ways, by the trainer itself.

    python benchmarks/rollouts.py --gpus 1 --out rollouts.json model=llama3_1b precision=bf16

    in_turn   rollouts, then the update that learns from them
    ahead     recipe.rl.rollout_lag=1: rollouts of the next batch, then the update
    beside    the same with recipe.rl.overlap=true: at the same time

Word problems (benchmarks/word_problems.py) are answered by a model with random weights, rewarded for ending. Further
arguments are overrides for all three. Prints one JSON object: of each the medians over steps of step_seconds,
rollout_seconds and rollout_wait_seconds, peak memory and losses, which `ahead` and `beside` have alike to the bit where
kernels are deterministic (train.deterministic=true); and how many times as fast as `ahead` the steps of `beside` are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.launches import launch, torchrun
from benchmarks.train import summarize
from benchmarks.word_problems import make

WAYS: dict[str, list[str]] = {
    "in_turn": [],
    "ahead": ["recipe.rl.rollout_lag=1"],
    "beside": ["recipe.rl.rollout_lag=1", "recipe.rl.overlap=true"],
}
SKIP = 3  # the first batch made ahead is made with nothing beside it
SETTINGS = [
    "recipe=grpo",
    "recipe.rl.rewards=[{function: finished}]",
    "model.vocab_size=384",  # the tokenizer's
    "parallel.zero_stage=1",
    "train.eval_interval=0",
    "train.sample_tokens=0",
    "checkpoint.at_end=false",
    "logging.console=false",
]
KEPT = ("step_seconds_median", "step_seconds_mean", "peak_memory_gib", "device", "versions", "config")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="processes; without GPUs, on the CPU")
    parser.add_argument("--steps", type=int, default=12, help=f"of each run; the first {SKIP} are not measured")
    parser.add_argument("--completions", type=int, default=256, help="of a batch, on all GPUs")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one run")
    parser.add_argument("--out", type=Path, help="also write the object to this file, after every run")
    args, overrides = parser.parse_known_args(argv)
    result: dict[str, Any] = {"overrides": overrides, "completions": args.completions, "max_tokens": args.max_tokens}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), num_examples=1, num_pairs=1)
        for name, changes in WAYS.items():
            result[name] = _run(name, Path(folder), args, [*overrides, *changes])
            print(name, result[name], file=sys.stderr, flush=True)
            if all("step_seconds_median" in result.get(way, {}) for way in ("ahead", "beside")):
                ahead, beside = result["ahead"], result["beside"]
                result["speedup"] = ahead["step_seconds_median"] / beside["step_seconds_median"]
                result["same_losses"] = ahead["losses"] == beside["losses"]
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if any("error" in result[name] for name in WAYS) else 0


def _run(name: str, folder: Path, args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    run_dir = folder / name
    data = [f"data.path={folder / 'prompts.jsonl'}", f"data.tokenizer.path={folder / 'tokenizer'}"]
    sizes = [
        f"recipe.rl.max_tokens={args.max_tokens}",
        f"train.seq_len={args.max_tokens + 128}",
        f"train.global_batch_size={args.completions}",
        f"train.steps={args.steps}",
    ]
    settings = [*SETTINGS, *data, *sizes, *overrides, f"run.dir={run_dir}"]
    command = torchrun(args.gpus, "launch/train.py", *settings)
    if error := launch(command, folder / f"{name}.log", limit=args.limit):
        return {"error": error}
    summary = summarize(run_dir, skip=SKIP)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {key: summary[key] for key in KEPT}
    for field in ("rollout_seconds", "rollout_wait_seconds", "data_wait_seconds"):
        values = [line[field] for line in lines[SKIP:] if field in line]
        found |= {f"{field}_median": statistics.median(values)} if values else {}
    return found | {"losses": [line["loss"] for line in lines]}


if __name__ == "__main__":
    sys.exit(main())
