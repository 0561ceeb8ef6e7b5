"""What the programs of benchmarks/peers share: arguments, shape, tokens, clock, and the JSON object."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.train import speed_of
from launch.compose import compose_one
from models.config import ModelConfig
from models.flops import causal_flops_per_token, flops_per_token, num_parameters
from models.registry import resolve_model
from trainer.config import ConfigError
from trainer.run_info import device_info, software_versions
from trainer.throughput import StepClock, Throughput, mfu_peak

NUM_BATCHES = 4
"""Different ones that a run goes round: speed does not depend on tokens, but one batch would be learnt by heart."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every peer has. Those after them say how the peer is set."""
    shared = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_argument("model", help="a file of configs/model, of the llama family")
    shared.add_argument("--seq-len", type=int, default=8192)
    shared.add_argument("--micro-batch-size", type=int, default=1, help="sequences per GPU and step")
    shared.add_argument("--steps", type=int, default=20)
    shared.add_argument("--skip", type=int, default=5, help="first steps that are not measured")
    shared.add_argument(
        "--zero-stage", type=int, default=3, choices=(2, 3), help="2: weights stay gathered; 3: they do not"
    )
    shared.add_argument(
        "--precision",
        default="fsdp",
        choices=("fsdp", "autocast"),
        help="fp32 masters computed in bf16 by FSDP2's mixed precision, or (one GPU) by autocast",
    )
    shared.add_argument("--no-compile", dest="compile", action="store_false")
    shared.add_argument("--out", type=Path, help="also write the object to this file")
    return shared


def parse(shared: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, ModelConfig]:
    """The arguments, and the resolved shape. Exits with 2 and one line for what cannot be run."""
    args = shared.parse_args(argv)
    if "RANK" not in os.environ:
        shared.error("start this program with torchrun --nproc-per-node N")
    if min(args.seq_len, args.micro_batch_size) < 1 or not 0 <= args.skip < args.steps:
        shared.error(f"--steps {args.steps} --skip {args.skip} leave nothing to measure, or a size is below 1")
    if args.precision == "autocast" and int(os.environ["WORLD_SIZE"]) > 1:
        shared.error(f"--precision autocast is for one GPU, not {os.environ['WORLD_SIZE']}; use --precision fsdp")
    try:
        config = resolve_model(compose_one([f"model={args.model}"]).model)
    except (ConfigError, ValueError) as error:
        shared.error(str(error))
    if config.family != "llama":
        shared.error(f"{args.model} is of family {config.family}; the peers are set up for llama")
    return args, config


def random_batches(args: argparse.Namespace, config: ModelConfig, rank: int) -> list[Tensor]:
    """NUM_BATCHES tensors [B, T + 1] int64 of uniform tokens on the host, pinned where there is a GPU."""
    generator = torch.Generator().manual_seed(rank)
    size = (NUM_BATCHES, args.micro_batch_size, args.seq_len + 1)
    tokens = torch.randint(config.vocab_size, size, generator=generator)
    return list(tokens.pin_memory() if torch.cuda.is_available() else tokens)


def check_size(config: ModelConfig, num_found: int) -> None:
    """Raises ValueError unless the peer built as many parameters as the shape has: else speeds do not compare."""
    if num_found != num_parameters(config):
        raise ValueError(f"the peer's model has {num_found:,} parameters, the shape {num_parameters(config):,}")


def measured_steps(
    step: Callable[[], Tensor], args: argparse.Namespace, config: ModelConfig, device: torch.device
) -> list[dict[str, Any]]:
    """Run args.steps steps; a record for each, with the fields of metrics.jsonl that speed is read from.

    step: one optimizer step; returns this rank's summand 0-d of the global loss, without waiting for it. As in the
    trainer garbage is not collected meanwhile, and the host runs ahead: time is that between events on the GPU.
    """
    on_gpu = device.type == "cuda"
    world_size = dist.get_world_size()
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    flops = flops_per_token(config, args.seq_len)
    throughput = Throughput(world_size=world_size, flops_per_token=flops, peak=mfu_peak(name, None))
    gc.collect()
    gc.disable()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    dist.barrier()
    clock = StepClock(device)
    losses, ends = [], []
    for _ in range(args.steps):
        losses.append(step().detach().float())
        ends.append(clock.mark())
    seconds = [clock.seconds_to(end) for end in ends]
    gc.enable()
    total = torch.stack(losses)
    dist.all_reduce(total)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    tokens = world_size * args.micro_batch_size * args.seq_len
    return [
        {"step": number, "loss": loss, "peak_memory_gib": peak, **throughput.of_step(tokens, duration)}
        for number, (loss, duration) in enumerate(zip(total.tolist(), seconds, strict=True), start=1)
    ]


def summary(
    name: str,
    steps: list[dict[str, Any]],
    args: argparse.Namespace,
    config: ModelConfig,
    device: torch.device,
    *,
    kernels: dict[str, str],
    precision: dict[str, str],
    versions: dict[str, str],
) -> dict[str, Any]:
    """The object that benchmarks/train.py prints, of a peer; step_seconds has every step that was measured."""
    world_size = dist.get_world_size()
    device_name = device_info(device)["name"]
    return {
        "run": name,
        "device": device_name,
        "world_size": world_size,
        "mesh": {"dp_shard": world_size},
        **speed_of(
            steps,
            skip=args.skip,
            flops_per_token=flops_per_token(config, args.seq_len),
            flops_per_token_causal=causal_flops_per_token(config, args.seq_len),
            peak_flops=mfu_peak(device_name, None),
        ),
        "step_seconds": [step["step_seconds"] for step in steps[args.skip :]],
        "profile": None,
        "kernels": kernels,
        "precision": precision,
        "versions": software_versions() | versions,
        "config": {
            "train.seq_len": args.seq_len,
            "train.global_batch_size": args.micro_batch_size * world_size,
            "train.micro_batch_size": args.micro_batch_size,
            "train.compile": args.compile,
            "parallel.zero_stage": args.zero_stage if args.precision == "fsdp" else 0,
            "model.family": config.family,
        },
        "overrides": sys.argv[1:],
    }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print and write the object, on rank 0."""
    if dist.get_rank() != 0:
        return
    text = json.dumps(result, indent=2)
    print(text, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
