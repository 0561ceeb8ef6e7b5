"""This project and others on the same shape, one after the other on the same GPUs, and the ratios between them.

    python benchmarks/compare.py llama3_8b --gpus 4 --micro-batch-size 2 --rounds 2 \\
        --lattice "parallel.zero_stage=3" --lattice "parallel.zero_stage=3 model.activation_checkpoint=selective" \\
        --peer "titan --checkpoint selective-op" --peer "hugging_face --checkpoint full --liger all" \\
        --out benchmarks/results/compare_llama3_8b_4xh200.json

Each contestant is a launch of its own with a time limit, in bf16 with fp32 masters, on random tokens; --lattice gives
overrides of launch/train.py, --peer a program of benchmarks/peers and its arguments. Every other round runs in reverse
order, so that a machine that warms up favours nobody. The JSON file is rewritten after every run; its form is `runs`, a
list of {contestant, round, command, seconds, result}, where `result` is the object of benchmarks/train.py, or null
beside an `error`. The table shows the best round of each; `ratio` is the first contestant's speed over that one's.
Exit code 1 when a run failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.launches import launch, shown, torchrun
from benchmarks.train import summarize
from launch.compose import compose_one
from models.registry import resolve_model

PEERS = ("titan", "hugging_face", "lora")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    record: dict[str, Any] = {
        "model": args.model,
        "gpus": args.gpus,
        "seq_len": args.seq_len,
        "micro_batch_size": args.micro_batch_size,
        "runs": [],
    }
    contestants = [f"lattice {overrides}".strip() for overrides in args.lattice] + args.peer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(args, folder / "tokens.npy")
        for number in range(args.rounds):
            for contestant in contestants if number % 2 == 0 else reversed(contestants):
                run_dir = folder / str(len(record["runs"]))
                record["runs"].append({"contestant": contestant, "round": number, **run(contestant, args, run_dir)})
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                print(table(record["runs"], contestants), file=sys.stderr, flush=True)
    print(json.dumps(record, indent=2))
    return 1 if any(entry["error"] for entry in record["runs"]) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file of configs/model")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences per GPU and step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, default=5, help="first steps that are not measured")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one run, compilation included")
    parser.add_argument("--lattice", action="append", default=[], metavar="OVERRIDES", help="repeatable; default: one")
    parser.add_argument("--peer", action="append", default=[], metavar="PROGRAM ARGUMENTS", help="repeatable")
    parser.add_argument("--out", type=Path, help="also write the object to this file, after every run")
    args = parser.parse_args(argv)
    args.lattice = args.lattice or [""]
    unknown = [peer for peer in args.peer if peer.split()[:1] not in ([name] for name in PEERS)]
    if unknown:
        parser.error(f"--peer {unknown[0]!r} is no program of benchmarks/peers; use {' or '.join(PEERS)}")
    if min(args.gpus, args.seq_len, args.micro_batch_size, args.rounds) < 1 or args.limit <= 0:
        parser.error("--gpus, --seq-len, --micro-batch-size, --rounds and --limit must be positive")
    if not 0 <= args.skip < args.steps:
        parser.error(f"--skip {args.skip} of --steps {args.steps} leaves nothing to measure")
    return args


def write_tokens(args: argparse.Namespace, path: Path) -> None:
    """As many tokens as the run reads, uniform over the model's vocabulary as those of peers (peers/measure.py)."""
    num_tokens = (args.steps * args.gpus * args.micro_batch_size + 1) * args.seq_len + 1
    vocab_size = resolve_model(compose_one([f"model={args.model}"]).model).vocab_size
    np.save(path, np.random.default_rng(0).integers(0, vocab_size, num_tokens, dtype=np.int32))


def command_of(contestant: str, args: argparse.Namespace, run_dir: Path) -> list[str]:
    """The launch of a contestant; a peer leaves run_dir/result.json, Lattice a run folder."""
    name, *rest = shlex.split(contestant)
    if name == "lattice":
        return torchrun(
            args.gpus,
            "launch/train.py",
            f"model={args.model}",
            "precision=bf16",
            "data=tokens",
            f"data.path={run_dir.parent / 'tokens.npy'}",
            f"train.seq_len={args.seq_len}",
            f"train.micro_batch_size={args.micro_batch_size}",
            f"train.global_batch_size={args.micro_batch_size * args.gpus}",
            f"train.steps={args.steps}",
            "train.compile=true",
            "train.eval_interval=0",
            "checkpoint.at_end=false",
            "logging.console=false",
            *rest,
            f"run.dir={run_dir}",
        )
    shape = {"--seq-len": args.seq_len, "--micro-batch-size": args.micro_batch_size}
    shape |= {"--steps": args.steps, "--skip": args.skip, "--out": run_dir / "result.json"}
    options = [part for pair in shape.items() for part in pair]
    return torchrun(args.gpus, f"benchmarks/peers/{name}.py", args.model, *options, *rest)


def run(contestant: str, args: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """Launch, wait, read. What it prints goes to a log, whose last lines are the error of one that fails."""
    command = command_of(contestant, args, run_dir)
    print(f"{contestant}: started", file=sys.stderr, flush=True)
    run_dir.mkdir()
    began = time.monotonic()
    error = launch(command, run_dir / "log", limit=args.limit)
    seconds = time.monotonic() - began
    result = None
    if error is None and contestant.split()[0] == "lattice":
        result = summarize(run_dir, skip=args.skip)
    elif error is None:
        result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    # Paths of this machine are in the overrides of a run as well.
    result = json.loads(json.dumps(result).replace(str(run_dir.parent), "RUNS"))
    return {"command": shown(command, run_dir.parent), "seconds": seconds, "result": result, "error": error}


def table(runs: Sequence[dict[str, Any]], contestants: Sequence[str]) -> str:
    """The best round of each contestant so far as a Markdown table, with ratios of the first one's speed to theirs."""
    best: dict[str, dict[str, Any]] = {}
    for entry in runs:
        result, name = entry["result"], entry["contestant"]
        if result is not None and (name not in best or _speed(result) > _speed(best[name])):
            best[name] = result
    rows = ["| run | tokens/s/GPU | MFU | peak memory | ratio |", "|---|---|---|---|---|"]
    first = best.get(contestants[0])
    for name in contestants:
        result = best.get(name)
        if result is None:
            failed = any(entry["contestant"] == name for entry in runs)
            rows += [f"| {name} | {'failed' if failed else '...'} | | | |"]
            continue
        mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
        memory = "" if result["peak_memory_gib"] is None else f"{result['peak_memory_gib']:.1f} GiB"
        ratio = "" if first is None else f"{_speed(first) / _speed(result):.3f}"
        rows += [f"| {name} | {_speed(result):,.0f} | {mfu} | {memory} | {ratio} |"]
    return "\n".join(rows)


def _speed(result: dict[str, Any]) -> float:
    return float(result["tokens_per_second_per_gpu"])


if __name__ == "__main__":
    sys.exit(main())
