"""Speed of one model in many layouts on the GPUs of a node, each trained for a few steps by the trainer itself.

    torchrun --nproc-per-node 4 benchmarks/layouts.py llama3_1b --out benchmarks/results/layouts_llama3_1b_4xh200.json

Prints one JSON object: for each layout of LAYOUTS tokens_per_second_per_gpu, mfu, peak_memory_gib, and the losses,
which say whether the layouts trained the same model; or the error of one that does not
run. Further arguments are overrides for all of them. Tokens are drawn at random (Zipf): speed does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.train import summarize
from launch.compose import compose_one
from parallel.mesh import init_distributed, pick_device
from trainer.trainer import Trainer
from trainer.validate import finalize

LAYOUTS: dict[str, list[str]] = {
    "zero1": ["parallel.zero_stage=1"],
    "zero3": ["parallel.zero_stage=3"],
    "zero3-replicas2": ["parallel.zero_stage=3", "parallel.dp_replicate=2"],
    "tp2+sp-zero1": ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=1"],
    "tp4+sp": ["parallel.tp=4", "parallel.sequence_parallel=true", "parallel.zero_stage=1"],
    "pp2-1f1b-zero1": ["parallel.pp=2", "parallel.zero_stage=1"],
    "pp2-interleaved-zero1": ["parallel.pp=2", "parallel.pp_schedule=interleaved_1f1b", "parallel.zero_stage=1"],
    "pp2-zbv-zero1-eager": [
        "parallel.pp=2", "parallel.pp_schedule=zbv", "parallel.zero_stage=1", "train.compile=false",
    ],
    "pp4-1f1b": ["parallel.pp=4", "parallel.zero_stage=1"],
    "pp2-tp2+sp": ["parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=1"],
    "cp2-ulysses-zero1": ["parallel.cp=2", "parallel.cp_method=ulysses", "parallel.zero_stage=1"],
    "cp2-ring-zero1": ["parallel.cp=2", "parallel.zero_stage=1"],
}  # fmt: skip
SKIP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a file of configs/exp")
    parser.add_argument("--steps", type=int, default=8, help=f"of each layout; the first {SKIP} are not measured")
    parser.add_argument("--only", nargs="*", help="names of layouts")
    parser.add_argument("--out", type=Path, help="also write the object to this file, after every layout")
    args, overrides = parser.parse_known_args()
    init_distributed(pick_device("auto"), timeout_seconds=300)
    names: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    folder = Path(names[0])
    if dist.get_rank() == 0:
        np.save(folder / "tokens.npy", np.random.default_rng(0).zipf(1.3, 8_000_000) % 32000)
    dist.barrier()
    common = [f"+exp={args.experiment}", "data=tokens", f"data.path={folder}/tokens.npy", "checkpoint.at_end=false"]
    common += [
        f"train.steps={args.steps}",
        "train.eval_interval=0",
        "data.validation_fraction=0",
        "schedule.warmup_steps=0",
        *overrides,
    ]
    result: dict[str, Any] = {"experiment": args.experiment, "overrides": overrides, "layouts": {}}
    for name in args.only or LAYOUTS:
        measured = _measure([*common, *LAYOUTS[name], f"run.dir={folder}/{name}"])
        if dist.get_rank() != 0:
            continue
        result["layouts"][name] = {"changes": LAYOUTS[name]} | measured
        shown = {key: measured.get(key) for key in ("tokens_per_second_per_gpu", "mfu", "peak_memory_gib", "loss_last")}
        print(name, measured.get("error") or shown, file=sys.stderr, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=2))
    dist.destroy_process_group()
    return 0


def _measure(arguments: list[str]) -> dict[str, Any]:
    """One layout, on all ranks; rank 0's numbers. Out of memory on all ranks alike is a result too."""
    torch.cuda.reset_peak_memory_stats()
    config = compose_one(arguments)
    config.logging.console = False
    error, trainer = None, None
    try:
        trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
        trainer.run()
    except (ValueError, torch.OutOfMemoryError) as failure:
        error = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
        traceback.clear_frames(failure.__traceback__)
    if trainer is not None:
        trainer.close()
    del trainer
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    if error is not None:
        return {"error": error}
    if dist.get_rank() != 0:
        return {}
    summary = summarize(Path(config.run.dir), skip=SKIP)
    kept = ("tokens_per_second_per_gpu", "mfu", "peak_memory_gib", "step_seconds_median", "loss_first", "loss_last")
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    losses = {"losses": [json.loads(line)["loss"] for line in lines]}
    return {key: summary[key] for key in (*kept, "kernels", "config", "device", "versions")} | losses


if __name__ == "__main__":
    sys.exit(main())
