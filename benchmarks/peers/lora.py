"""Low-rank adapters by PEFT on a model of Hugging Face transformers, with Liger kernels and bitsandbytes' NF4.

    torchrun --nproc-per-node 1 benchmarks/peers/lora.py llama3_8b --seq-len 2048 --micro-batch-size 4 --nf4

One GPU. Weights in bf16, or in 4 bits with double quantization; adapters of every linear layer of the blocks in fp32,
computed in bf16 by autocast, as PEFT's own examples do. Prints the JSON object of benchmarks/train.py. Written for
transformers 5.17, PEFT 0.18, Liger 0.8.5, bitsandbytes 0.50 and torch 2.11.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone, installed or not

from benchmarks.peers.measure import check_size, measured_steps, parse, parser, random_batches, report, summary
from models.config import ModelConfig
from models.registry import hf_config
from parallel.mesh import init_distributed, pick_device


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.set_defaults(precision="autocast")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--nf4", action="store_true", help="weights in 4 bits, by bitsandbytes")
    options.add_argument("--liger", action=argparse.BooleanOptionalAction, default=True, help="all of its kernels")
    options.add_argument("--checkpoint", default="none", choices=("none", "full"), help="activations of a layer")
    args, config = parse(options, argv)
    if int(os.environ["WORLD_SIZE"]) > 1 or args.precision != "autocast":
        options.error("this peer is set up for one GPU and --precision autocast")
    device = pick_device("auto")
    init_distributed(device, timeout_seconds=300)
    model = build(args, config, device)
    steps = measured_steps(step_of(model, args, config, device), args, config, device)
    packages = ["transformers", "peft", *["liger-kernel"] * args.liger, *["bitsandbytes"] * args.nf4]
    result = summary(
        "lora",
        steps,
        args,
        config,
        device,
        kernels={
            "attention": "sdpa",
            "layers": "liger" if args.liger else "transformers",
            "weights": "nf4, double quantized" if args.nf4 else "bf16",
            "activation_checkpoint": args.checkpoint,
            "optimizer": "adamw, fused",
        },
        precision={"compute": "bf16", "master": "fp32"},
        versions={package: version(package) for package in packages},
    )
    report(result, args.out)
    dist.destroy_process_group()
    return 0


def build(args: argparse.Namespace, config: ModelConfig, device: torch.device) -> nn.Module:
    """The model on its device, with adapters that alone are trained."""
    if args.liger:  # replaces classes, so before any is instantiated
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(**hf_config(config), use_cache=False, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shape).bfloat16().train()
    check_size(config, sum(parameter.numel() for parameter in model.parameters()))
    if args.nf4:
        for layer in model.model.layers:
            quantize(layer, device)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.checkpoint == "full":
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.enable_input_require_grads()
    if args.compile:
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward)
    made: nn.Module = adapted.train()
    return made


def quantize(module: nn.Module, device: torch.device) -> None:
    """Linear layers below this module become bitsandbytes' of 4 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"compress_statistics": True, "quant_type": "nf4"}
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Linear):
            quantize(child, device)
            continue
        made = Linear4bit(
            child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **options
        )
        made.weight = Params4bit(child.weight.data.cpu(), requires_grad=False, **options).to(device)
        setattr(module, name, made)


def step_of(
    model: nn.Module, args: argparse.Namespace, config: ModelConfig, device: torch.device
) -> Callable[[], Tensor]:
    """One step: forward, backward, clipping to 1, AdamW. transformers shifts the labels itself."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda")
    batches = itertools.cycle(random_batches(args, config, dist.get_rank()))

    def step() -> Tensor:
        tokens = next(batches)[:, :-1].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()  # type: ignore[no-any-return]

    return step


if __name__ == "__main__":
    sys.exit(main())
