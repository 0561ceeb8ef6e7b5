"""Where the time of a training step goes, from the trace that the run itself wrote.

    torchrun --nproc-per-node 4 launch/train.py +exp=llama3_8b train.steps=12 logging.profile_steps=3 run.dir=RUN_DIR
    python benchmarks/breakdown.py RUN_DIR --out benchmarks/results/profile_llama3_8b.json

Prints one JSON object of rank 0 (--rank R for another): milliseconds per step of each kind of kernel, of communication
that no computation hides, and of an idle GPU; and the kernels that take longest. Kinds run side by side on several
streams, so they may add up to more than the step; computed, communication_exposed and idle add up to it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STEP = "train_step"  # trainer/profiling.py
GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
COMMUNICATION = "communication"
# The first that is found in a kernel's name decides.
KINDS = {
    COMMUNICATION: re.compile("nccl", re.IGNORECASE),
    "copy": re.compile("^mem(cpy|set)", re.IGNORECASE),
    "attention": re.compile("attention|flash|fmha|sdpa|_attn", re.IGNORECASE),
    "matrix_products": re.compile("gemm|nvjet|cutlass|xmma|cublas|matmul|_mm_|_scaled_mm|grouped_mm", re.IGNORECASE),
    "optimizer": re.compile("adam|multi_tensor|optimi", re.IGNORECASE),
}
OTHER = "memory_bound"

Interval = tuple[float, float]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--top", type=int, default=20, help="kernels to list")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    args = parser.parse_args(argv)
    try:
        summary = profile_of(args.run_dir, rank=args.rank, top=args.top)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(summary, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


def trace_path(run_dir: Path, rank: int) -> Path:
    """Where a run with logging.profile_steps leaves the trace of a rank."""
    return run_dir / "profile" / f"rank_{rank}.json.gz"


def profile_of(run_dir: Path, *, rank: int = 0, top: int = 20) -> dict[str, Any]:
    """The JSON object as a dict. Raises ValueError or OSError with one line that says what is missing."""
    path = trace_path(run_dir, rank)
    if not path.is_file():
        raise ValueError(f"{path} is missing; train with logging.profile_steps=3")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    num_steps = sum(event["name"] == STEP and event.get("cat") == "user_annotation" for event in events)
    on_gpu = [event for event in events if event.get("cat") in GPU]
    if not on_gpu or not num_steps:
        raise ValueError(
            f"{path} has {num_steps} steps and {len(on_gpu)} kernels; only traces of a GPU say where time goes"
        )
    return {"rank": rank, "steps": num_steps, **_shares(on_gpu, num_steps), "kernels": _longest(on_gpu, num_steps, top)}


def _shares(events: Sequence[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    intervals: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        intervals[kind_of(event["name"])].append((event["ts"], event["ts"] + event["dur"]))
    everything = union(interval for some in intervals.values() for interval in some)
    computed = union(interval for kind, some in intervals.items() if kind != COMMUNICATION for interval in some)
    window = everything[-1][1] - everything[0][0]

    def per_step(microseconds: float) -> float:
        return microseconds / 1e3 / num_steps

    return {
        "step_ms": per_step(window),
        "computed_ms": per_step(length(computed)),
        "communication_exposed_ms": per_step(length(everything) - length(computed)),
        "idle_ms": per_step(window - length(everything)),
        "idle_share": 1.0 - length(everything) / window,
        "kinds_ms": {kind: per_step(length(union(some))) for kind, some in sorted(intervals.items())},
    }


def _longest(events: Sequence[dict[str, Any]], num_steps: int, top: int) -> list[dict[str, Any]]:
    total: dict[str, list[float]] = defaultdict(list)
    for event in events:
        total[event["name"]].append(event["dur"])
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:top]
    return [
        {
            "name": name[:120],
            "kind": kind_of(name),
            "ms_per_step": sum(durations) / 1e3 / num_steps,
            "calls_per_step": len(durations) / num_steps,
        }
        for name, durations in longest
    ]


def kind_of(kernel: str) -> str:
    """Of KINDS, or OTHER, by the kernel's name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), OTHER)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint and ascending, covering the same points."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    """Of disjoint intervals together."""
    return sum(end - begin for begin, end in intervals)


if __name__ == "__main__":
    sys.exit(main())
