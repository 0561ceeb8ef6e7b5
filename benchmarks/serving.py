"""The engine with random weights, on one GPU or cut over several: four cases, tokens/s beside what memory and matrix
products of these allow.

    python benchmarks/serving.py --cases batch1 batch128 prefill qwen --out results.json
    torchrun --nproc-per-node 2 benchmarks/serving.py --cases batch1 batch128 prefill --out results_tp2.json

batch1: Llama 3.1 8B, one request, 512 -> 256 tokens; batch128: 128 requests, 32 -> 2048; prefill: 32 prompts of 4096;
qwen: the shape of Qwen3 0.6B, 256 requests of 100 to 1024 tokens, continued by 100 to 1024 at temperature 0.6. Prompts
are random, nothing ends early; the median of --repeats runs after one that is not counted (batch128: a short one).
Under torchrun every rank of tp runs the program and asks its engine for the same; rank 0 prints and writes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.layout import ServingLayout, serving_groups
from inference.roofline import weight_bytes
from inference.runner import num_ranks
from launch.compose import compose_one
from launch.lab_config import device_of
from launch.open_model import random_model
from models.decoder import Decoder
from models.registry import resolve_model
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.mesh import init_distributed, rank_from_env, world_size_from_env

BANDWIDTH = 4.27e12  # bytes/s that a copy reaches on an H200
MATMUL = 660e12  # FLOP/s that large products in bf16 reach there under its power limit

QWEN = [
    "model=qwen3_8b", "model.vocab_size=151936", "model.hidden_size=1024", "model.intermediate_size=3072",
    "model.num_layers=28", "model.num_heads=16", "model.num_kv_heads=8", "model.head_dim=128",
    "model.tie_embeddings=true",
]  # fmt: skip
LLAMA = ["model=llama3_8b"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", type=int, default=0, help="steps of a profile, printed to stderr")
    parser.add_argument("--out")
    args = parser.parse_args()
    groups, leads = serving_ranks(), rank_from_env() == 0
    results = []
    engine: Engine | None = None
    shape: list[str] = []
    for name in args.cases:
        overrides, config, run = CASES[name]
        if engine is None or overrides != shape:
            engine = None
            torch.cuda.empty_cache()
            started = time.perf_counter()
            engine, shape = Engine(random_shape(overrides, groups), config), overrides
            engine.generate([[1, 2, 3]] * 4, [_sampling(4)] * 4)
            _wait(engine)
            ready = time.perf_counter() - started
        result = {"case": name, "seconds_to_first_tokens": ready} | run(engine, args.repeats)
        results.append(result)
        if leads:
            print(json.dumps(result), flush=True)
        if args.profile:
            _profile(engine, name, args.profile)
    if args.out and leads:
        where = {"torch": torch.__version__, "device": _device_name(), "tp": world_size_from_env()}
        Path(args.out).write_text(json.dumps({"environment": where, "results": results}, indent=1) + "\n")


def serving_ranks() -> ModelParallel:
    """The ranks of torchrun that a model is cut over, if there are several."""
    world_size = world_size_from_env()
    if world_size == 1:
        return NO_GROUPS
    layout, device = ServingLayout(tp=world_size), device_of("auto")
    init_distributed(device, layout.timeout_seconds)
    return serving_groups(layout, device.type)


def random_shape(overrides: list[str], groups: ModelParallel = NO_GROUPS) -> Decoder:
    """bf16 weights on the device, drawn there, of a shape of configs/model; over ranks each has its part."""
    return random_model(resolve_model(compose_one(overrides).model), torch.bfloat16, device_of("auto"), groups)


def batch1(engine: Engine, repeats: int) -> dict[str, Any]:
    runs = [timed(engine, [512], [256], 0.0, seed=seed) for seed in range(repeats + 1)][1:]
    seconds = statistics.median(runs)
    first = statistics.median(timed(engine, [512], [1], 0.0, seed=20 + seed) for seed in range(3))
    decode = 255 / (seconds - first)
    return {
        "tokens_per_second": 256 / seconds,
        "decode_tokens_per_second": decode,
        "seconds_to_first_token": first,
        "of_bandwidth": decode * weight_bytes(engine.runner.model) / BANDWIDTH,
    }


def batch128(engine: Engine, repeats: int) -> dict[str, Any]:
    timed(engine, [32] * 128, [32] * 128, 0.0, seed=3)  # captures the graphs
    seconds = statistics.median(timed(engine, [32] * 128, [2048] * 128, 0.0, seed=s) for s in range(repeats))
    per_step = weight_bytes(engine.runner.model) + 128 * (32 + 1024) * engine.runner.cache_bytes_per_token
    return {
        "tokens_per_second": 128 * 2048 / seconds,
        "of_bandwidth": 2048 * per_step / BANDWIDTH / seconds,
    }


def prefill(engine: Engine, repeats: int) -> dict[str, Any]:
    runs = [timed(engine, [4096] * 32, [1] * 32, 0.0, seed=seed) for seed in range(repeats + 1)][1:]
    seconds = statistics.median(runs)
    config, ranks = engine.runner.model.config, num_ranks(engine.runner.model)
    head = config.vocab_size * config.hidden_size / ranks
    products = 2 * (weight_bytes(engine.runner.model) / 2 - head) * 32 * 4096  # of each rank, as the weights
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * 4096**2 * 32  # type: ignore[operator]
    return {
        "tokens_per_second": 32 * 4096 / seconds,
        "of_matrix_products": (products + attention / ranks) / MATMUL / seconds,
    }


def qwen(engine: Engine, repeats: int) -> dict[str, Any]:
    chance = random.Random(0)
    lengths = [chance.randint(100, 1024) for _ in range(256)]
    new = [chance.randint(100, 1024) for _ in range(256)]
    runs = [timed(engine, lengths, new, 0.6, seed=seed) for seed in range(repeats + 1)][1:]
    return {"tokens_per_second": sum(new) / statistics.median(runs)}


def timed(engine: Engine, lengths: list[int], new: list[int], temperature: float, *, seed: int) -> float:
    """Seconds of a whole `generate`."""
    chance = random.Random(seed)
    words = min(100_000, engine.vocab_size)
    prompts = [[chance.randrange(words) for _ in range(length)] for length in lengths]
    _wait(engine)
    started = time.perf_counter()
    completions = engine.generate(prompts, [_sampling(count, temperature) for count in new])
    seconds = time.perf_counter() - started
    assert [len(completion.token_ids) for completion in completions] == new
    return seconds


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _device_name() -> str:
    device = device_of("auto")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _sampling(count: int, temperature: float = 0.0) -> SamplingConfig:
    return SamplingConfig(temperature=temperature, max_tokens=count, ignore_eos=True)


def _profile(engine: Engine, name: str, steps: int) -> None:
    """Time by kernel of steps in the middle of a case."""
    chance = random.Random(0)
    batch, length, new = {"batch1": (1, 512, 64), "batch128": (128, 1024, 40), "prefill": (8, 4096, 1)}.get(
        name, (256, 500, 40)
    )
    for _ in range(batch):
        engine.add([chance.randrange(100_000) for _ in range(length)], _sampling(new, 0.6 if name == "qwen" else 0.0))
    if name != "prefill":
        while any(sequence.num_behind > 1 for sequence in engine._sequences.values()):
            engine.step()
        for _ in range(4):
            engine.step()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    for request in list(engine._sequences):
        engine.abort(request)
    kernels: dict[str, list[float]] = {}
    spans = []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.device_time)
            spans.append((event.time_range.start, event.time_range.end))
    busy, end = 0.0, 0.0
    for begin, until in sorted(spans):
        busy, end = busy + max(until - max(begin, end), 0.0), max(end, until)
    print(f"{name}: {seconds / steps * 1e3:.3f} ms a step with the profiler; GPU, us a step, number:", file=sys.stderr)
    for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:22]:
        print(f"  {sum(times) / steps:9.1f} {len(times) / steps:7.1f}  {kernel[:110]}", file=sys.stderr)
    print(f"  {sum(map(sum, kernels.values())) / steps:9.1f} in all, {busy / steps:.1f} busy", file=sys.stderr)
    print(f"  {(end - min(spans)[0]) / steps:9.1f} from the first to the last", file=sys.stderr)


def _settings(max_seq_len: int, max_sequences: int) -> EngineConfig:
    return EngineConfig(
        max_seq_len=max_seq_len, max_sequences=max_sequences, max_batch_tokens=16384, prefix_cache=False
    )


CASES = {
    "batch1": (LLAMA, _settings(4352, 128), batch1),
    "batch128": (LLAMA, _settings(4352, 128), batch128),
    "prefill": (LLAMA, _settings(4352, 128), prefill),
    "qwen": (QWEN, _settings(4096, 256), qwen),
}


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
