"""Post-training by TRL on a model of Hugging Face transformers: SFT, DPO and GRPO, of all weights or of adapters.

    python benchmarks/peers/hf_trl.py grpo --model HF_DIR --data WORDS/prompts.jsonl --steps 8

One GPU. Files are those of benchmarks/word_problems.py. Weights in fp32 computed in bf16 by autocast; with --lora
(PEFT) frozen ones in bf16, with --nf4 in bitsandbytes' 4 bits. GRPO samples by transformers (TRL can also use vLLM) and
its reward is this repository's. Prints one JSON object: seconds of each step, between synchronisations, rewards and
tokens, peak memory. Written for TRL 1.16, transformers 5.17, PEFT 0.18 and torch 2.11.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone, installed or not

from trainer.rl.maths import final_answer, same_answer


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each optimizer step, from its beginning to what the GPU has done at its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.logs: list[dict[str, Any]] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self._began)

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        self.logs.append(dict(logs or {}))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments().parse_args(argv)
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    model = _model(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapters = None
    if args.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(args, model, tokenizer, rows, adapters, clock, folder)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    seconds = clock.seconds[args.skip :]
    packages = ("trl", "transformers", "torch", "accelerate") + (("peft",) if args.lora else ())
    found = {
        "run": f"trl {args.recipe}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "step_seconds_median": statistics.median(seconds),
        "step_seconds": clock.seconds,
        "rows_per_step": args.batch,
        "peak_memory_gib": peak,
        "logs": [entry for entry in clock.logs if "loss" in entry],
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("model", "data", "out")},
        "versions": {package: version(package) for package in packages},
    }
    text = json.dumps(found, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("sft", "dpo", "grpo"))
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="jsonl")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=3, help="first steps that are not measured")
    parser.add_argument(
        "--batch", type=int, default=64, help="sft: packed rows; dpo: pairs; grpo: completions of a step"
    )
    parser.add_argument("--micro-batch", type=int, default=64, help="of these, at a time")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48, help="of a completion")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters of all linear layers; 0: all weights")
    parser.add_argument("--nf4", action="store_true", help="with --lora: frozen weights in 4 bits")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    return parser


def _model(args: argparse.Namespace) -> Any:
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    dtype = torch.bfloat16 if args.lora else torch.float32
    more: dict[str, Any] = {"quantization_config": four_bits, "device_map": {"": 0}} if args.nf4 else {}
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa", **more)


def _trainer(
    args: argparse.Namespace, model: Any, tokenizer: Any, rows: list[Any], adapters: Any, clock: Clock, folder: str
) -> Any:
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.batch // args.micro_batch,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "optim": "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
    }
    given: dict[str, Any] = {"processing_class": tokenizer, "peft_config": adapters, "callbacks": [clock]}
    if args.recipe == "sft":
        from trl import SFTConfig, SFTTrainer

        settings = SFTConfig(**common, max_length=args.seq_len, packing=True, completion_only_loss=True)
        return SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), **given)
    if args.recipe == "dpo":
        from trl import DPOConfig, DPOTrainer

        settings = DPOConfig(**common, max_length=args.seq_len, beta=0.1)
        return DPOTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), **given)
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [float(same_answer(final_answer(text) or "", right)) for text, right in pairs]

    settings = GRPOConfig(
        **common,
        num_generations=args.group_size,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
    )
    return GRPOTrainer(model=model, reward_funcs=reward, args=settings, train_dataset=Dataset.from_list(rows), **given)


if __name__ == "__main__":
    sys.exit(main())
