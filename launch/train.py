"""Train: `torchrun --nproc-per-node 8 launch/train.py +exp=llama3_8b optim.lr=1e-4`.

Exit codes: 0 done; 2 configuration error; PREEMPTED_EXIT_CODE saved and stopped on a signal, start again to continue;
HUNG_EXIT_CODE no progress for train.timeout_seconds, start again to continue; 1 anything else.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from launch.compose import run_jobs
from launch.errors import exit_code_of
from parallel.mesh import rank_from_env, world_size_from_env
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize


def train(arguments: list[str]) -> None:
    """Run what the command line asks for: one job, or one after the other under --multirun."""
    run_jobs(arguments, train_one)


def train_one(config: TrainConfig) -> None:
    """Validate, train, report."""
    trainer = Trainer(finalize(config, world_size=world_size_from_env()))
    try:
        result = trainer.run()
    finally:
        trainer.close()
    if rank_from_env() == 0:
        report(config.run.dir, result)


def report(run_dir: str, result: dict) -> None:
    """What a person wants to see when a run has ended."""
    print(f"\ndone: step {result['step']}", end="")
    if result["loss"] is not None:
        print(f", loss {result['loss']:.4f}", end="")
    if result["validation_loss"] is not None:
        print(f", validation loss {result['validation_loss']:.4f}", end="")
    print(f"\nrun:  {run_dir} (metrics.jsonl, config.yaml, run.json, checkpoints/)")
    if result["sample"] is not None:
        print(f"\nsample:\n{result['sample']}\n")
        folder = "" if shutil.which("torchrun") else f"{os.path.relpath(Path(sys.executable).parent)}/"
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        overrides = [a for a in sys.argv[1:] if not a.startswith("train.steps=")]
        overrides += [f"train.steps={2 * result['step']}"]
        print("next: train longer, from where this stopped:")
        print(f"  {folder}torchrun --nproc-per-node {processes} launch/train.py {shlex.join(overrides)}")
        print("or look at the run:")
        print(f"  {folder}python launch/report.py {run_dir}")
        print("or give the weights to transformers:")
        print(f"  {folder}python launch/convert.py export {run_dir}/checkpoints/step_{result['step']} {run_dir}/hf")


if __name__ == "__main__":
    sys.exit(exit_code_of(train, sys.argv[1:]))
