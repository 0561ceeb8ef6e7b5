"""mode=bench: requests arrive, and what they would have seen is measured.

One JSON object goes to `out` or standard output, a table to stderr. Times in it are milliseconds where a name ends in
_ms, else seconds. The load is random tokens, or `prompts`; every request is continued by as many tokens as it asks for.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from inference.config import SamplingConfig, longest
from inference.engine import Engine, RequestError
from inference.load import Replay, Request, arrival_times, goodput, random_tokens, replay, summary_of
from inference.roofline import copy_bandwidth
from inference.speculation.counts import SpeculationCounts
from launch.lab_config import LabConfig, device_of, make_engine, open_served, sampling_of, say_what_computes
from launch.modes import break_even
from launch.modes.config import BenchConfig
from launch.modes.files import length_problems, out_problems, prompt_problems, token_prompts, write_json
from launch.open_model import OpenedModel, shape_problems
from trainer.config import ConfigError, configuration_errors

ARRIVALS = ("at_once", "fixed", "poisson", "file")
WARM_TOKENS = 32
"""The longest continuation while warming up: the shorter ones end earlier in proportion, so all batch sizes occur."""


def problems(config: LabConfig) -> list[str]:
    """Every reason why these settings cannot be used that no model is needed to see; one line each."""
    settings, found = config.bench, []
    if settings.random_weights is not None:
        found += shape_problems(settings.random_weights, name="bench.random_weights")
        if config.model.path is not None:
            found.append("bench.random_weights and model.path exclude each other; set one of them")
    if settings.num_requests < 1:
        found.append(f"bench.num_requests={settings.num_requests} must be at least 1")
    if settings.seed < 0:
        found.append(f"bench.seed={settings.seed} must be at least 0")
    found += length_problems("bench.prompt_tokens", settings.prompt_tokens)
    found += length_problems("bench.output_tokens", settings.output_tokens)
    for name in ("rate", "slo_ttft_ms", "slo_tpot_ms", "bandwidth"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            found.append(f"bench.{name}={value} must be above 0, or null")
    found += _arrival_problems(settings) + break_even.problems(config)
    if settings.lengths is not None:
        if not Path(settings.lengths).is_file():
            found.append(
                f"bench.lengths={settings.lengths} is no file; give JSON lines of "
                "{'prompt_tokens': N, 'output_tokens': N}"
            )
        if config.prompts is not None or config.prompt is not None:
            found.append("bench.lengths is for random prompts; leave prompts and prompt out, or bench.lengths")
    if config.sampling.max_tokens is not None:
        tokens = config.sampling.max_tokens
        found.append(f"sampling.max_tokens={tokens} is bench.output_tokens=[{tokens}] in mode=bench; set that")
    return found + prompt_problems(config, needed=False) + out_problems(config)


def _arrival_problems(settings: BenchConfig) -> list[str]:
    kind = settings.arrivals
    if kind not in ARRIVALS:
        return [f"bench.arrivals={kind} is unknown; use {', '.join(ARRIVALS)}"]
    if kind in ("fixed", "poisson") and settings.rate is None:
        return [f"bench.arrivals={kind} needs bench.rate, in requests a second"]
    if kind in ("at_once", "file") and settings.rate is not None:
        return [
            f"bench.rate={settings.rate} is not read with bench.arrivals={kind}; use fixed or poisson, or rate=null"
        ]
    if kind == "file" and settings.lengths is None:
        return ["bench.arrivals=file reads them from bench.lengths, which is missing"]
    return []


def bench(config: LabConfig) -> None:
    """Measure. Raises ConfigError before anything is computed for a load that cannot be served."""
    settings, device = config.bench, device_of(config.device)
    bandwidth = settings.bandwidth or copy_bandwidth(device)  # before the cache takes the memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    sampling = sampling_of(config)
    began = time.perf_counter()
    opened = open_served(config, settings.random_weights)
    requests = load_of(config, opened)
    if found := break_even.too_few(settings.drafting_batches, requests):
        raise ConfigError(found)
    opened_at = time.perf_counter()
    engine = make_engine(opened, config.engine, config.speculation)
    made_at = time.perf_counter()
    with configuration_errors(RequestError):
        engine.prepare(requests[0].prompt, sampling)  # settings that no request can have
        replay(engine, [Request(requests[0].prompt, 1)], sampling)
    first_at = time.perf_counter()
    start = {"model": opened_at - began, "engine": made_at - opened_at, "first_token": first_at - began}
    if settings.warmup:
        replay(engine, _shortened(requests, opened.model.config.vocab_size, settings.seed), sampling)
    engine.weights_changed()  # forgets prefixes that the load has as well
    names = ("recomputed", "swapped", "cached_tokens", "prompt_tokens")
    before = copy.deepcopy(engine.counts)
    measured = replay(engine, requests, sampling)
    counts = {name: getattr(engine.counts, name) - getattr(before, name) for name in names}
    say_what_computes(engine)
    report = _environment(engine, device) | {"start_seconds": start, "load": _load(config, requests), "counts": counts}
    report["speculation"] = _drafts(engine.counts.speculation, before.speculation)
    report |= report_of(measured, requests, settings, bandwidth)
    report["drafting"] = None
    if settings.drafting_batches:
        report["drafting"] = break_even.break_even(engine, requests, sampling, settings.drafting_batches)
    _print_table(report)
    write_json(config, report)


def load_of(config: LabConfig, opened: OpenedModel) -> list[Request]:
    """The requests. Raises ConfigError for a file that is none, and for requests that are too long for the engine."""
    settings, model = config.bench, opened.model.config
    chance = random.Random(settings.seed)
    given = token_prompts(config, opened)
    if settings.lengths is not None:
        lines = _read_lengths(Path(settings.lengths), arrivals=settings.arrivals == "file")
    else:
        count = settings.num_requests if given is None else len(given)
        prompts = [_drawn(settings.prompt_tokens, chance) for _ in range(count)] if given is None else map(len, given)
        lines = [(length, _drawn(settings.output_tokens, chance), 0.0) for length in prompts]
    room = longest(config.engine, model)
    for number, (prompt, output, _) in enumerate(lines):
        if prompt + output > room:
            raise ConfigError([
                f"request {number} of the load has {prompt} + {output} tokens, and engine.max_seq_len={room}; use a "
                "shorter prompt or output, or raise engine.max_seq_len"
            ])  # fmt: skip
    times = [arrival for _, _, arrival in lines]
    if settings.arrivals != "file":
        times = arrival_times(len(lines), kind=settings.arrivals, rate=settings.rate, seed=settings.seed)
    if given is None:
        given = [random_tokens(prompt, model.vocab_size, chance) for prompt, _, _ in lines]
    return [
        Request(prompt, output, arrival)
        for prompt, (_, output, _), arrival in zip(given, lines, times, strict=True)
    ]  # fmt: skip


def _drawn(bounds: Sequence[int], chance: random.Random) -> int:
    return chance.randint(bounds[0], bounds[-1])


def _read_lengths(path: Path, *, arrivals: bool) -> list[tuple[int, int, float]]:
    """(tokens of the prompt, of the continuation, arrival in seconds) of each line. Raises ConfigError."""
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            lengths = line["prompt_tokens"], line["output_tokens"]
            arrival = float(line["arrival"]) if arrivals else 0.0
        except (ValueError, TypeError, KeyError) as error:
            keys = "prompt_tokens, output_tokens" + (" and arrival" if arrivals else "")
            raise ConfigError([
                f"bench.lengths={path}, line {number} must be an object with {keys} ({type(error).__name__}: {error})"
            ]) from None  # fmt: skip
        if not all(type(length) is int and length >= 1 for length in lengths) or not 0 <= arrival < float("inf"):
            raise ConfigError([
                f"bench.lengths={path}, line {number}: lengths are whole numbers of at least 1, arrival is at least 0"
            ])  # fmt: skip
        found.append((*lengths, arrival))
    if not found:
        raise ConfigError([f"bench.lengths={path} has no lines"])
    return found


def _shortened(requests: Sequence[Request], vocab_size: int, seed: int) -> list[Request]:
    """The same load, all at once, with other tokens and shorter continuations."""
    chance = random.Random(seed + 1)
    most = max(request.max_tokens for request in requests)
    return [
        Request(
            random_tokens(len(request.prompt), vocab_size, chance),
            request.max_tokens if most <= WARM_TOKENS else max(1, request.max_tokens * WARM_TOKENS // most),
        )
        for request in requests
    ]


def report_of(measured: Replay, requests: Sequence[Request], settings: BenchConfig, bandwidth: float) -> dict[str, Any]:
    """What was measured, by name."""
    timings, seconds, decoding = measured.timings, measured.seconds, measured.decoding
    output = sum(len(timing.tokens) for timing in timings)
    prompts = sum(len(request.prompt) for request in requests)
    report: dict[str, Any] = {
        "seconds": seconds,
        "requests_per_second": len(timings) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompts + output) / seconds,
        "ttft_ms": _milliseconds([timing.ttft for timing in timings]),
        "tpot_ms": _milliseconds([timing.tpot for timing in timings if timing.tpot is not None]),
        "itl_ms": _milliseconds([gap for timing in timings for gap in timing.gaps]),
        "latency_ms": _milliseconds([timing.latency for timing in timings]),
        "slo": None,
        "decode": None,
        "bandwidth": {"bytes_per_second": bandwidth, "source": "copy" if settings.bandwidth is None else "given"},
    }
    ttft, tpot = settings.slo_ttft_ms, settings.slo_tpot_ms
    if ttft is not None or tpot is not None:
        bounds = {"ttft": None if ttft is None else ttft / 1e3, "tpot": None if tpot is None else tpot / 1e3}
        report["slo"] = {"ttft_ms": ttft, "tpot_ms": tpot} | dict(goodput(measured, **bounds))
    if decoding.steps:
        report["decode"] = {
            "steps": decoding.steps,
            "seconds": decoding.seconds,
            "sequences_per_step": decoding.sequences / decoding.steps,
            "bytes_per_step": decoding.bytes_read / decoding.steps,
            "of_bandwidth": decoding.bytes_read / decoding.seconds / bandwidth,
        }
    return report


def _milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    found = summary_of(seconds)
    return None if found is None else {name: value * 1e3 for name, value in found.items()}


def _environment(engine: Engine, device: torch.device) -> dict[str, Any]:
    model = engine.runner.model
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": engine.runner.attention,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _drafts(now: SpeculationCounts | None, before: SpeculationCounts | None) -> dict[str, Any] | None:
    """What became of the load's drafts; None: nobody drafts."""
    if now is None or before is None:
        return None
    counts = now.since(before)
    return asdict(counts) | {"acceptance": counts.acceptance, "mean_length": counts.mean_length}


def _load(config: LabConfig, requests: Sequence[Request]) -> dict[str, Any]:
    settings, sampling = config.bench, SamplingConfig()
    return {
        "model": settings.random_weights or config.model.path,
        "random_weights": settings.random_weights is not None,
        "requests": len(requests),
        "arrivals": settings.arrivals,
        "rate": settings.rate,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": sum(request.max_tokens for request in requests),
        "sampling": {k: v for k, v in vars(config.sampling).items() if v != getattr(sampling, k)},
        "engine": vars(config.engine),
        "speculation": config.speculation.method,
        "tp": config.parallel.tp,
        "seed": settings.seed,
    }


def _print_table(report: dict[str, Any]) -> None:
    """What was measured, for people."""
    load, start = report["load"], report["start_seconds"]
    lines = [
        f"{load['requests']} requests ({load['arrivals']}), {load['prompt_tokens']} -> {load['output_tokens']} tokens, "
        f"{report['dtype']} on {report['device']}; first token {start['first_token']:.1f} s after the beginning of "
        "opening the model",
        f"{report['seconds']:.2f} s: {report['requests_per_second']:.2f} requests/s, "
        f"{report['output_tokens_per_second']:.0f} output tokens/s, {report['total_tokens_per_second']:.0f} in all",
        f"{'milliseconds':14}" + "".join(f"{name:>10}" for name in report["ttft_ms"]),
    ]
    for name in ("ttft", "tpot", "itl", "latency"):
        if (values := report[f"{name}_ms"]) is not None:
            lines.append(f"{name:14}" + "".join(f"{value:10.2f}" for value in values.values()))
    if (slo := report["slo"]) is not None:
        bounds = ", ".join(f"{n} <= {slo[f'{n}_ms']:g} ms" for n in ("ttft", "tpot") if slo[f"{n}_ms"] is not None)
        lines.append(f"goodput ({bounds}): {slo['requests_per_second']:.2f} requests/s, {slo['met']:.1%} of all")
    if (decode := report["decode"]) is not None:
        bandwidth = report["bandwidth"]
        lines.append(
            f"decoding: {decode['steps']} steps of {decode['sequences_per_step']:.1f} sequences read "
            f"{decode['bytes_per_step'] / 1e9:.3f} GB each, {decode['of_bandwidth']:.1%} of "
            f"{bandwidth['bytes_per_second'] / 1e9:.0f} GB/s ({bandwidth['source']})"
        )
    if report["drafting"] is not None:
        lines += break_even.lines_of(report["drafting"])
    print("\n".join(lines), file=sys.stderr)
