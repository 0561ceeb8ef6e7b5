"""Measure this machine: `torchrun --nproc-per-node 8 launch/calibrate.py MINE.yaml`, then plan.hardware=MINE.yaml.

What cannot be measured here (prices, failures, storage, links that are not there) is taken from --like, a file of
configs/hardware or a path, and the file says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

import torch
import torch.distributed as dist

from launch.errors import exit_code_of
from parallel.mesh import init_distributed, pick_device
from planner.calibrate import Measured, measure
from planner.hardware_files import as_yaml, read_hardware
from trainer.config import ConfigError
from trainer.run_info import device_info, write_atomically
from trainer.throughput import peak_flops


def calibrate(arguments: list[str]) -> None:
    """Measure on all ranks; rank 0 writes the file."""
    parser = argparse.ArgumentParser(prog="launch/calibrate.py", description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file to write, MINE.yaml")
    parser.add_argument("--like", default="h200", help="where the rest comes from (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    asked = parser.parse_args(arguments)
    like, wrong = read_hardware(asked.like)
    if not asked.out.endswith(".yaml"):
        wrong.append(f"out={asked.out} must end in .yaml, by which plan.hardware knows a path")
    if wrong:
        raise ConfigError(wrong)
    device = pick_device(asked.device)
    init_distributed(device, 600.0)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = measure(device, local_world_size=local)
    _this_machine(found, device, local)
    if dist.get_rank() == 0:
        write_atomically(Path(asked.out).expanduser(), as_yaml(found.rates, found.tables, found.why, like, asked.like))
        print(f"wrote {asked.out}")
    dist.barrier()


def _this_machine(found: Measured, device: torch.device, local_world_size: int) -> None:
    """Name, memory, GPUs of a node and the peak of the data sheet."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    memory = torch.cuda.mem_get_info(device)[1] / 2**30 if device.type == "cuda" else device_info(device)["memory_gib"]
    node = max(local_world_size, torch.cuda.device_count() if device.type == "cuda" else 1)
    found.rates |= {"name": name, "memory_gib": memory, "gpus_per_node": node}  # type: ignore[dict-item]
    peak = peak_flops(name, "bf16")
    rates = found.rates["matmul_tflops"]
    assert isinstance(rates, dict)
    found.rates["peak_tflops"] = peak / 1e12 if peak is not None else max(rates["bf16"], rates["fp32"])
    if peak is None:
        found.why["peak_tflops"] = "no data sheet is known: the fastest product"


if __name__ == "__main__":
    sys.exit(exit_code_of(calibrate, sys.argv[1:]))
