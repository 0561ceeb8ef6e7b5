"""Eight layouts of eight ranks on one curve: the model of `make train`, trained in each of them and in one process.

`python -m tests.parity.overlay` writes docs/overlay.json and docs/overlay.png; it takes half an hour on two cores, and
started again goes on after the last layout that is in the file (--anew: from the beginning). Exits 1 if the losses of a
layout leave those of one process by more than LIMIT.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.compose import compose_one
from tests.parity.harness import largest, run_on
from tests.pool import RankPool

STEPS = 200
LIMIT = 1e-5
"""Relative. Rounding grows with the steps, and faster the higher the learning rate: at 1e-3 two runs of one process
that differ in the micro-batches part by 2e-3 within these steps, at LR by 1e-7."""
LR = 3e-4
ONE = "one process"
DOCS = Path(__file__).resolve().parents[2] / "docs"
LAYOUTS: dict[str, list[str]] = {
    "ZeRO-3": ["parallel.zero_stage=3"],
    "ZeRO-1, 2 replicas": ["parallel.zero_stage=1", "parallel.dp_replicate=2"],
    "tp 2, sequence parallel, ZeRO-2": ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=2"],
    "cp 4, ring over Ulysses, ZeRO-1": ["parallel.cp=4", "parallel.cp_ulysses=2", "parallel.zero_stage=1"],
    "pp 4, 1F1B, ZeRO-3": ["parallel.pp=4", "parallel.zero_stage=3"],
    "pp 2, ZB-V, tp 2, ZeRO-1": ["parallel.pp=2", "parallel.pp_schedule=zbv", "parallel.tp=2", "parallel.zero_stage=1"],
    "pp 2, DualPipe-V, cp 2, ZeRO-2": [
        "parallel.pp=2", "parallel.pp_schedule=dualpipev", "parallel.cp=2", "parallel.zero_stage=2",
    ],
    "pp 2, tp 2, cp 2, sequence parallel": [
        "parallel.pp=2", "parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=0",
    ],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true")
    record = DOCS / "overlay.json"
    losses: dict[str, list[float]] = {}
    if record.exists() and not parser.parse_args().anew:
        losses = json.loads(record.read_text())
    ranks = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, changes) in enumerate(({ONE: []} | LAYOUTS).items()):
            if name not in losses:
                losses[name] = _losses(ranks, 1 if name == ONE else 8, changes, Path(folder) / str(index))
                record.write_text(json.dumps(losses) + "\n")
            print(f"{name}: {deviation(losses[name], losses[ONE]):.1e}", flush=True)
    ranks.close()
    _draw(losses, DOCS / "overlay.png")
    return 0 if largest(deviation(curve, losses[ONE]) for curve in losses.values()) <= LIMIT else 1


def _losses(ranks: RankPool, num_ranks: int, changes: list[str], run_dir: Path) -> list[float]:
    # AdamW, because Muon does not run under tp; eight sequences a step, because eight ranks share these cores.
    arguments = ["+exp=stdlib", "optim=adamw", f"optim.lr={LR}", f"train.steps={STEPS}", "train.eval_interval=0"]
    arguments += ["train.sample_tokens=0", "train.global_batch_size=8", "train.micro_batch_size=1"]
    arguments += ["checkpoint.at_end=false", "logging.console=false", "train.device=cpu", f"run.dir={run_dir}"]
    config = compose_one([*arguments, *changes])
    return run_on(ranks, num_ranks, config, timeout=1800).losses


def deviation(curve: list[float], reference: list[float]) -> float:
    return largest(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))


def _draw(losses: dict[str, list[float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=(2, 1))
    reference = losses[ONE]
    steps = range(1, len(reference) + 1)
    for i, (name, curve) in enumerate(losses.items()):
        style: dict[str, Any] = {"lw": 5, "color": "0.8"} if i == 0 else {"lw": 1, "ls": (0, (2, 7), i)}
        above.plot(steps, curve, label=name, **style)
        if i:
            below.semilogy(steps, [abs(a - b) / b + 1e-12 for a, b in zip(curve, reference, strict=True)], lw=0.8)
    above.set_ylabel("loss")
    above.legend(fontsize=8)
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
