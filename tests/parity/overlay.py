"""Eight layouts of eight ranks on one curve: the model of `make train`, trained in each of them and in one process.

`python -m tests.parity.overlay` writes docs/overlay.json and docs/overlay.png; it takes half an hour on two cores, and
started again with the same Python (whose library is the text) and torch goes on after the last layout that is in the
file (--anew: from the beginning). Exits 1 if the losses of a layout leave those of one process by more than LIMIT.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

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
    path = DOCS / "overlay.json"
    record: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "losses": {}}
    if path.exists() and not parser.parse_args().anew:
        before = json.loads(path.read_text())
        if all(before[key] == record[key] for key in ("python", "torch")):
            record = before
    losses: dict[str, list[float]] = record["losses"]
    ranks = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, changes) in enumerate(({ONE: []} | LAYOUTS).items()):
            if name not in losses:
                losses[name] = _losses(ranks, 1 if name == ONE else 8, changes, Path(folder) / str(index))
                path.write_text(json.dumps(record) + "\n")
            print(f"{name}: {deviation(losses[name], losses[ONE]):.1e}", flush=True)
    ranks.close()
    draw(losses, DOCS / "overlay.png")
    return 0 if largest(deviation(curve, losses[ONE]) for curve in losses.values()) <= LIMIT else 1


def _losses(ranks: RankPool, num_ranks: int, changes: list[str], run_dir: Path) -> list[float]:
    # Eight sequences a step, because eight ranks share these cores.
    arguments = ["+exp=stdlib", "optim=adamw", f"optim.lr={LR}", f"train.steps={STEPS}", "train.eval_interval=0"]
    arguments += ["train.sample_tokens=0", "train.global_batch_size=8", "train.micro_batch_size=1"]
    arguments += ["checkpoint.at_end=false", "logging.console=false", "train.device=cpu", f"run.dir={run_dir}"]
    config = compose_one([*arguments, *changes])
    return run_on(ranks, num_ranks, config, timeout=1800).losses


def deviation(curve: list[float], reference: list[float]) -> float:
    return largest(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Nine curves above, and below them how far each layout is from one process."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(2, 1))
    reference = losses[ONE]
    steps = range(1, len(reference) + 1)
    above.plot(steps, reference, label=ONE, lw=6, color="0.8")
    layouts = {name: curve for name, curve in losses.items() if name != ONE}
    for i, (name, curve) in enumerate(layouts.items()):
        # One behind the other they would hide: each shows its own dashes.
        above.plot(steps, curve, color=f"C{i}", lw=1.5, ls=(3 * i, (3, 3 * len(layouts) - 3)))
        above.plot([], [], color=f"C{i}", label=name)
        differences = [(a - b) / b * 1e7 for a, b in zip(curve, reference, strict=True)]
        below.plot(steps, differences, ".", ms=4, color=f"C{i}")
    above.set_ylabel("loss")
    above.legend(fontsize=8)
    below.set_ylabel("relative difference, 1e-7")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
