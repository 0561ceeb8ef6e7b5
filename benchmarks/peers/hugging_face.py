"""Hugging Face transformers, with Liger kernels, torch.compile and FSDP2, trained for a few steps.

    torchrun --nproc-per-node 4 benchmarks/peers/hugging_face.py llama3_8b --micro-batch-size 2 --checkpoint full

Prints the JSON object of benchmarks/train.py. --liger loss replaces the loss alone (fused with the output layer, in
chunks, so that logits never exist as a whole); all replaces norms, rotary embedding and SwiGLU too, which a compiled
layer otherwise fuses itself: measure both. Written for transformers 5.17, Liger 0.8.5 and torch 2.11.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone, installed or not

from benchmarks.peers.measure import check_size, measured_steps, parse, parser, random_batches, report, summary
from models.config import ModelConfig
from models.registry import hf_config
from parallel.mesh import init_distributed, pick_device

CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--liger", default="loss", choices=("none", "loss", "all"))
    options.add_argument("--checkpoint", default="none", choices=("none", "full"), help="activations of a layer")
    options.add_argument(
        "--attention", default="cudnn", choices=("cudnn", "sdpa", "eager"), help="cudnn: sdpa that prefers cuDNN"
    )
    args, config = parse(options, argv)
    device = pick_device("auto")
    init_distributed(device, timeout_seconds=300)
    result = run(args, config, device)
    report(result, args.out)
    dist.destroy_process_group()
    return 0


def run(args: argparse.Namespace, config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Build, train, measure. Collective."""
    model = build(args, config, device)
    steps = measured_steps(step_of(model, args, config, device), args, config, device)
    return summary(
        "hugging_face",
        steps,
        args,
        config,
        device,
        kernels={
            "attention": args.attention,
            "loss": "torch" if args.liger == "none" else "liger",
            "layers": "liger" if args.liger == "all" else "transformers",
            "blocks": "torch.compile(inductor)" if args.compile else "eager",
            "activation_checkpoint": args.checkpoint,
            "optimizer": "adamw, fused",
            "data_parallel": f"fsdp2, zero{args.zero_stage}" if args.precision == "fsdp" else "none",
        },
        precision={"compute": "bf16", "master": "fp32", "reduce": "fp32"},
        versions={
            "transformers": version("transformers"),
            **({"liger": version("liger-kernel")} if args.liger != "none" else {}),
        },
    )


def build(args: argparse.Namespace, config: ModelConfig, device: torch.device) -> nn.Module:
    """The model on its device: checkpointing inside compilation inside FSDP2, one group per layer."""
    if args.liger != "none":  # replaces classes, so before any is instantiated
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        layers = args.liger == "all"
        apply_liger_kernel_to_llama(rope=layers, rms_norm=layers, swiglu=layers, fused_linear_cross_entropy=True)
    from transformers import LlamaConfig, LlamaForCausalLM

    implementation = "eager" if args.attention == "eager" else "sdpa"
    shape = LlamaConfig(**hf_config(config), use_cache=False, attn_implementation=implementation)
    torch.manual_seed(0)
    with torch.device(device):  # whole on every GPU for a moment: fp32 of an 8B model is 30 GiB
        model = LlamaForCausalLM(shape).float().train()
    check_size(config, sum(parameter.numel() for parameter in model.parameters()))
    for layer in model.model.layers:
        if args.checkpoint == "full":
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        if args.compile:
            layer.forward = torch.compile(layer.forward)
    if args.precision == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=args.zero_stage == 3)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def step_of(
    model: nn.Module, args: argparse.Namespace, config: ModelConfig, device: torch.device
) -> Callable[[], Tensor]:
    """One step: forward, backward, clipping to 1, AdamW. transformers shifts the labels itself."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = itertools.cycle(random_batches(args, config, dist.get_rank()))

    def step() -> Tensor:
        tokens = next(batches)[:, :-1].to(device, non_blocking=True)
        autocast = torch.autocast(device.type, torch.bfloat16) if args.precision == "autocast" else nullcontext()
        kernel = sdpa_kernel(CUDNN_FIRST, set_priority=True) if args.attention == "cudnn" else nullcontext()
        with kernel:  # also in backward, where a checkpointed layer runs again
            with autocast:
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach() / dist.get_world_size()

    return step


if __name__ == "__main__":
    sys.exit(main())
