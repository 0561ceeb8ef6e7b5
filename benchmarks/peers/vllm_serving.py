"""What benchmarks/serving.py measures, by vLLM: the same four cases, shapes, lengths and settings, random weights.

    python benchmarks/peers/vllm_serving.py --cases batch1 prefill batch128 qwen --out vllm.json

vLLM is no dependency of this project: run it where it is installed. This program has not run with vLLM yet: the numbers
beside ours in benchmarks/results/serving_h200.json were made before it was written, by another one that is not kept.
That was with vLLM 0.22.1 (torch 2.11, one H200), `LLM.generate` on the same cases, FlashAttention, no prefix cache, its
default compilation and CUDA graphs, as here. The file this writes has the form of that file's `vllm`. Nothing is
fetched: weights are dummies, prompts are token ids, and there is no tokenizer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "0.22.1"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True, "bos_token_id": 151643,
    "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}
"""Of vLLM's environment, as the committed numbers had them; one that is set already stays."""


@dataclass(frozen=True)
class Case:
    """What is asked, as benchmarks/serving.py asks it."""

    shape: dict[str, Any]
    max_seq_len: int
    max_sequences: int
    lengths: list[int]  # of prompts
    new: list[int]  # tokens behind each
    temperature: float = 0.0
    warm_up: int | None = None  # tokens behind each in the run that is not counted; None: as many
    of_prompts: bool = False  # tokens/s are those of prompts


def _cases() -> dict[str, Case]:
    chance = random.Random(0)
    lengths, new = ([chance.randint(100, 1024) for _ in range(256)] for _ in range(2))
    return {
        "batch1": Case(LLAMA, 4352, 128, [512], [256]),
        "batch128": Case(LLAMA, 4352, 128, [32] * 128, [2048] * 128, warm_up=32),
        "prefill": Case(LLAMA, 4352, 128, [4096] * 32, [1] * 32, of_prompts=True),
        "qwen": Case(QWEN, 4096, 256, lengths, new, temperature=0.6),
    }


CASES = _cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory-fraction", type=float, default=0.85, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        parser.exit(2, f"vLLM cannot be imported ({error}); the committed numbers are of vllm=={VERSION}\n")
    results: dict[str, Any] = {}
    server, shape, load = None, None, 0.0
    for name in sorted(args.cases, key=lambda name: CASES[name].shape is QWEN):  # each model is loaded once
        case = CASES[name]
        if server is None or case.shape is not shape:
            del server  # before the next one asks for memory
            started = time.perf_counter()
            server, shape = _load(vllm, case, args.memory_fraction), case.shape
            load = time.perf_counter() - started
        results[name] = _measure(vllm, server, case, args.repeats) | {"load_s": round(load, 1)}
        print(json.dumps({"case": name, "version": vllm.__version__} | results[name]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def _load(vllm: Any, case: Case, memory_fraction: float) -> Any:
    folder = Path(tempfile.mkdtemp(prefix="vllm_serving_"))
    (folder / "config.json").write_text(json.dumps(case.shape))
    return vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        seed=0,
        gpu_memory_utilization=memory_fraction,
        enable_prefix_caching=False,
        attention_config={"backend": "FLASH_ATTN"},
        max_model_len=case.max_seq_len,
        max_num_seqs=case.max_sequences,
        max_num_batched_tokens=16384,
        disable_log_stats=True,
    )


def _measure(vllm: Any, server: Any, case: Case, repeats: int) -> dict[str, Any]:
    """Median of whole calls, after one that is not counted."""

    def timed(seed: int, new: list[int]) -> float:
        chance = random.Random(seed)
        prompts = [{"prompt_token_ids": [chance.randrange(100_000) for _ in range(n)]} for n in case.lengths]
        how = [
            vllm.SamplingParams(temperature=case.temperature, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in new
        ]
        started = time.perf_counter()
        outputs = server.generate(prompts, how, use_tqdm=False)
        seconds = time.perf_counter() - started
        found = [len(output.outputs[0].token_ids) for output in outputs]
        if found != new:
            raise RuntimeError(f"vLLM made {sum(found)} tokens of {sum(new)} that were asked for")
        return seconds

    timed(0, case.new if case.warm_up is None else [case.warm_up] * len(case.new))
    runs = [timed(seed, case.new) for seed in range(1, repeats + 1)]
    seconds = statistics.median(runs)
    tokens = sum(case.lengths) if case.of_prompts else sum(case.new)
    found: dict[str, Any] = {"tokens_per_s": round(tokens / seconds, 2), "seconds": round(seconds, 4)}
    if case.lengths == [512]:
        first = statistics.median(timed(20 + seed, [1]) for seed in range(3))
        found |= {"ttft_s": round(first, 4), "decode_tokens_per_s": round((tokens - 1) / (seconds - first), 2)}
    return found | {"all_s": [round(run, 4) for run in runs]}


if __name__ == "__main__":
    main()
