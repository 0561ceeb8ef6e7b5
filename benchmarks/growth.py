"""What growth costs: longer sequences, more GPUs, experts. Each run is a launch of the trainer, as in layouts.py.

    python benchmarks/growth.py llama3_1b sequence --out benchmarks/results/growth_sequence_llama3_1b_4xh200.json
    python benchmarks/growth.py llama3_1b weak
    python benchmarks/growth.py llama3_1b strong
    python benchmarks/growth.py llama3_1b experts

sequence: 2k to 128k tokens, the long ones cut over ranks by each method of context parallelism, at as many tokens per
step unless one sequence has more; a rank with more than 32k tokens of one recomputes its activations. weak: one to all
GPUs with the same work for each. strong: one to all GPUs with the same work for all. experts: the dense model and
mixtures of experts that compute as much per token, with experts on one rank or several.
Prints one JSON object: for each run the numbers that layouts.py gives; further arguments are overrides of all runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.layouts import Run, arguments, measure

TOKENS_PER_GPU = 32768
"""Of a step, and of one sequence what a rank keeps the activations of."""


def _batch(samples: int, micro_batch_size: int, *others: str) -> list[str]:
    return [f"train.global_batch_size={samples}", f"train.micro_batch_size={micro_batch_size}", *others]


def sequence(gpus: int) -> dict[str, Run]:
    tokens = gpus * TOKENS_PER_GPU
    runs = {}
    for length in (2048, 8192, 32768, 65536, 131072):
        changes = _batch(max(1, tokens // length), max(1, 16384 // length), f"train.seq_len={length}")
        changes += ["parallel.zero_stage=1", f"model.max_seq_len={max(length, 8192)}"]
        cp = min(gpus, max(1, length // TOKENS_PER_GPU))
        if length // cp > TOKENS_PER_GPU:
            changes.append("model.activation_checkpoint=full")
        for method in ("ring", "ulysses", "allgather") if cp > 1 else (None,):
            cut = [] if method is None else [f"parallel.cp={cp}", f"parallel.cp_method={method}"]
            runs[f"{length}" + (f"-cp{cp}-{method}" if method else "")] = Run(gpus, [*changes, *cut])
    return runs


def weak(gpus: int) -> dict[str, Run]:
    return {str(n): Run(n, [*_batch(4 * n, 2), "train.seq_len=8192"]) for n in _counts(gpus)}


def strong(gpus: int) -> dict[str, Run]:
    return {str(n): Run(n, [*_batch(4 * gpus, 2), "train.seq_len=8192"]) for n in _counts(gpus)}


def experts(gpus: int) -> dict[str, Run]:
    base = [*_batch(2 * gpus, 1), "train.seq_len=8192", "parallel.zero_stage=1"]
    # Two of eight experts of half the width compute what the dense layer does.
    mixture = ["model.moe.num_experts=8", "model.moe.top_k=2", "model.moe.intermediate_size=4096"]
    eager = "train.compile=false"  # blocks whose tokens travel do not compile: all are measured without, too
    runs = {"dense": Run(gpus, base), "experts": Run(gpus, [*base, *mixture]), "dense-eager": Run(gpus, [*base, eager])}
    for n in _counts(gpus):
        runs[f"experts-ep{n}-eager"] = Run(gpus, [*base, *mixture, f"parallel.ep={n}", eager])
    return runs


def _counts(gpus: int) -> list[int]:
    return [n for n in (1, 2, 4, 8) if n <= gpus]


KINDS: dict[str, Callable[[int], dict[str, Run]]] = {
    "sequence": sequence,
    "weak": weak,
    "strong": strong,
    "experts": experts,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("kind", choices=KINDS, help="what grows")
    parser.add_argument("--gpus", type=int, choices=(1, 2, 4, 8), default=4)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    args, overrides = parser.parse_known_args(argv)
    runs = KINDS[args.kind](args.gpus)
    if unknown := set(args.only) - set(runs):
        parser.error(f"--only {sorted(unknown)[0]!r} is none of {', '.join(runs)}")
    chosen = {name: run for name, run in runs.items() if not args.only or name in args.only}
    print(json.dumps(measure(args.kind, chosen, args, overrides), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
