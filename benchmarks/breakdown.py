"""Where the time of a training step goes, from the trace that the run itself wrote.

    torchrun --nproc-per-node 4 launch/train.py +exp=llama3_8b train.steps=12 train.profile.steps=[6,7,8] run.dir=RUN
    python benchmarks/breakdown.py RUN --out benchmarks/results/profile_llama3_8b.json

Prints one JSON object of rank 0 (--rank R for another), of the newest traced steps (--step N: of those that begin with
N), as trainer/breakdown.py defines it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from trainer.breakdown import profile_of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--step", type=int, help="first of the traced steps; default: the newest trace")
    parser.add_argument("--top", type=int, default=20, help="kernels to list")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    args = parser.parse_args(argv)
    try:
        summary = profile_of(args.run_dir, rank=args.rank, step=args.step, top=args.top)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(summary, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
