"""SFT, DPO, GRPO and QLoRA of one model by the trainer, each beside TRL + PEFT on the same rows and shapes.

    python benchmarks/post_training.py llama3_1b --out benchmarks/results/post_training_llama3_1b_h200.json

Texts are those of benchmarks/word_problems.py. The model is first fine-tuned on them from scratch (`sft`, which is a
run with a curve); what follows begins with that, here and there. With two GPUs TRL runs on the second meanwhile.

Prints one JSON object: for each run seconds of a step and of its parts, tokens/s or completions/s, peak memory, curves;
and how many times as long TRL takes for a step. Further arguments are overrides of all of our runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.launches import launch, torchrun
from benchmarks.word_problems import make
from models.config import ModelConfig
from trainer.run_info import software_versions

SEQ_LEN, ROWS, PAIRS, COMPLETIONS = 128, 64, 64, 256
"""Tokens of a packed row, and what a step of sft, dpo and grpo has, here and there."""
SKIP = 3
CURVES = (
    "loss", "validation_loss", "reward", "validation_reward", "validation_exact_match", "reward_accuracy",
    "completion_tokens", "sampler_kl", "sampler_max_delta",
)  # fmt: skip
PARTS = (
    "step_seconds", "rollout_seconds", "rollout_gather_seconds", "rollout_tokens_per_second", "reward_seconds",
    "logprob_seconds", "data_wait_seconds", "tokens_per_second_per_gpu", "mfu", "pairs", "completion_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A run of ours, and TRL's of as much work."""

    steps: int
    changes: list[str]
    peer: list[str] = field(default_factory=list)
    peer_steps: int = 10


def pairs(model: str, words: Path, folder: Path, steps: int, after: int) -> dict[str, Pair]:
    """In the order in which they run. folder: what `sft` has made, as Hugging Face's."""
    shape = [
        f"model.{name}={value}"
        for name, value in vars(_shape(model)).items()
        if name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    ]
    rows = [f"train.global_batch_size={ROWS}", f"train.micro_batch_size={ROWS}"]
    begun = ["model=hf", f"model.path={folder}", f"train.seq_len={SEQ_LEN}", "parallel.zero_stage=1"]
    texts = ["data.path=" + str(words / "sft.jsonl"), "data.validation_fraction=0.05"]
    data = ["--model", str(folder), "--data"]
    return {
        "sft": Pair(
            steps,
            [
                "+exp=words_sft",
                "recipe.answers.prompts=0",
                "train.compile=true",
                f"model={model}",
                *shape,
                f"model.max_seq_len={SEQ_LEN}",
                *rows,
                *texts,
                f"data.tokenizer.path={words / 'tokenizer'}",
                "optim.lr=3e-4",
            ],
            ["sft", *data, str(words / "sft.jsonl"), "--batch", str(ROWS), "--micro-batch", str(ROWS)],
        ),
        "dpo": Pair(
            after,
            [
                "recipe=dpo",
                "train.compile=true",
                *begun,
                "data.path=" + str(words / "preferences.jsonl"),
                "data.conversations.packing=false",
                f"train.global_batch_size={PAIRS}",
                f"train.micro_batch_size={PAIRS}",
            ],
            ["dpo", *data, str(words / "preferences.jsonl"), "--batch", str(PAIRS), "--micro-batch", str(PAIRS)],
        ),
        "grpo": Pair(
            after,
            [
                "+exp=words_grpo",
                *begun,
                "data.path=" + str(words / "prompts.jsonl"),
                "optim.lr=1e-5",
                "recipe.rl.temperature=1.0",
                "recipe.rl.normalization=sequence",
                f"train.global_batch_size={COMPLETIONS}",
                "train.micro_batch_size=128",
            ],
            ["grpo", *data, str(words / "prompts.jsonl"), "--batch", str(COMPLETIONS), "--micro-batch", "128"],
            peer_steps=8,
        ),
        "qlora": Pair(
            after,
            ["recipe=sft", "adapter=qlora", "train.compile=true", *begun, *rows, *texts, "optim.lr=2e-4"],
            [
                "sft",
                *data,
                str(words / "sft.jsonl"),
                "--batch",
                str(ROWS),
                "--micro-batch",
                str(ROWS),
                "--lora",
                "16",
                "--nf4",
            ],
        ),
    }


def _shape(model: str) -> ModelConfig:
    from launch.compose import compose_one
    from models.registry import resolve_model

    return resolve_model(compose_one([f"model={model}"]).model)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file of configs/model")
    parser.add_argument("--steps", type=int, default=300, help="of sft, at least 8")
    parser.add_argument("--steps-after", type=int, default=60, help="of each other run, at least 8")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one run")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--keep", type=Path, help="leave metrics.jsonl of our runs in this folder")
    parser.add_argument("--out", type=Path, help="also write the object to this file, after every run")
    args, overrides = parser.parse_known_args(argv)
    found: dict[str, Any] = {"model": args.model, "overrides": overrides, "runs": {}}
    found |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    found |= {"versions": software_versions()}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as beside:
        work = Path(name)
        make(work / "words")
        every = pairs(args.model, work / "words", work / "hf", args.steps, args.steps_after)
        two = torch.cuda.device_count() > 1
        waiting = []
        for recipe, pair in every.items():
            record = found["runs"][recipe] = {"ours": _ours(recipe, pair, work, overrides, args.limit)}
            _write(found, args.out)
            if recipe == "sft":
                _export(work, record["ours"])
            if args.keep and (work / recipe / "metrics.jsonl").exists():
                args.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(work / recipe / "metrics.jsonl", args.keep / f"{recipe}.jsonl")
            if args.peers and pair.peer:
                task = beside.submit(_peer, recipe, pair, work, args.limit, "1" if two else "0")
                waiting.append((record, task))
                if not two:
                    task.result()
        for record, task in waiting:
            record["trl"] = task.result()
            ours, theirs = (record[who].get("step_seconds_median") for who in ("ours", "trl"))
            record["ratio"] = theirs / ours if ours and theirs else None
            _write(found, args.out)
    print(json.dumps(found, indent=2))
    return 0


def _ours(recipe: str, pair: Pair, work: Path, overrides: Sequence[str], limit: float) -> dict[str, Any]:
    common = ["precision=bf16", f"train.steps={pair.steps}", "logging.console=false"]
    # Nothing goes on with a later run than sft.
    saved = (
        [f"checkpoint.interval={pair.steps}"]
        if recipe == "sft"
        else ["checkpoint.interval=0", "checkpoint.at_end=false"]
    )
    common += [*saved, f"run.dir={work / recipe}"]
    common += [f"train.eval_interval={pair.steps // 6}", f"schedule.warmup_steps={pair.steps // 8}"]
    command = torchrun(1, "launch/train.py", *pair.changes, *common, *overrides)
    error = launch(command, work / f"{recipe}.log", limit=limit, environment={"CUDA_VISIBLE_DEVICES": "0"})
    lines = work / recipe / "metrics.jsonl"
    if error and not lines.exists():
        return {"error": error}
    steps = [json.loads(line) for line in lines.read_text().splitlines()]
    measured = steps[SKIP:]
    medians = {
        f"{key}_median": statistics.median(values)
        for key in PARTS
        if (values := [s[key] for s in measured if key in s])
    }
    curves = {key: [[s["step"], s[key]] for s in steps if s.get(key) is not None] for key in CURVES}
    kernels = json.loads((work / recipe / "run.json").read_text()).get("kernels")
    record = medians | {"steps": len(steps), "kernels": kernels, "curves": {k: v for k, v in curves.items() if v}}
    record["peak_memory_gib"] = max((s["peak_memory_gib"] for s in steps if s.get("peak_memory_gib")), default=None)
    return record | ({"error": error} if error else {})


def _export(work: Path, made: dict[str, Any]) -> None:
    if "error" in made:
        raise SystemExit(f"error: there is no model to go on with: {made['error']}")
    command = [sys.executable, str(Path(__file__).resolve().parent.parent / "launch/convert.py"), "export"]
    if error := launch([*command, str(work / "sft"), str(work / "hf")], work / "export.log", limit=300):
        raise SystemExit(f"error: the fine-tuned model could not be exported: {error}")


def _peer(recipe: str, pair: Pair, work: Path, limit: float, gpu: str) -> dict[str, Any]:
    out = work / f"trl_{recipe}.json"
    program = str(Path(__file__).resolve().parent / "peers/hf_trl.py")
    command = [sys.executable, program, *pair.peer, "--steps", str(pair.peer_steps), "--out", str(out)]
    error = launch(command, work / f"trl_{recipe}.log", limit=limit, environment={"CUDA_VISIBLE_DEVICES": gpu})
    found: dict[str, Any] = {"error": error} if error else json.loads(out.read_text())
    return found


def _write(found: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
