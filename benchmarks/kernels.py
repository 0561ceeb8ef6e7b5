"""Every kernel against what the GPU at hand can do and against everybody else who computes the same.

    python benchmarks/kernels.py --out benchmarks/results/kernels_h200.json
    python benchmarks/kernels.py --only rms_norm rope --configs
    python benchmarks/kernels.py --only layer_norm --match "backward 8192" --peers eager --configs

First the ceilings: the rate of a large copy and of matrix products in bf16 and fp8. Then each problem of
benchmarks/roofline/: median milliseconds of each candidate, the share of its floor (the bytes that must move over the
copy rate, or the FLOPs over the matrix rate, whichever takes longer) that it reaches, and the ratio of the best peer's
time to ours: above 1 we are faster. Prints one JSON object, and a table on stderr.

Times are between CUDA events around one call, over the L2 cache flushed by a write of 256 MiB; the GPU is kept busy
until the host has launched the call, so that host time does not count unless the call waits for the GPU. `difference`
is the relative RMS distance from the result of the candidate called eager, or the first peer, at the first call. What
fails is recorded and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import pkgutil
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

import benchmarks.roofline
from benchmarks.roofline.problem import Problem

OURS = "lattice"
NOT_OPS = ("problem", "peers")
FLUSH_BYTES = 256 << 20  # several times the L2 cache
CYCLES_PER_SECOND = 2e9  # of a GPU at most: what it waits for is at least as long as meant
Record = dict[str, Any]


class Timer(Protocol):
    """Milliseconds of each of several calls, after a warm-up."""

    def __call__(self, function: Callable[[], Any]) -> list[float]: ...


class CudaTimer:
    """Of a GPU: see the head of this file."""

    def __init__(self, device: torch.device, *, seconds: float) -> None:
        self._seconds = seconds
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any]) -> list[float]:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        on_host = time.perf_counter() - start
        torch.cuda.synchronize()
        in_all = time.perf_counter() - start
        runs = min(100, max(10, int(self._seconds / (in_all + on_host))))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start_event, end_event in pairs:
            self._flush.zero_()
            torch.cuda._sleep(int((2 * on_host + 5e-5) * CYCLES_PER_SECOND))
            start_event.record()
            function()
            end_event.record()
        torch.cuda.synchronize()
        return [start_event.elapsed_time(end_event) for start_event, end_event in pairs]


def measure_ceilings(device: torch.device, timer: Timer, *, elements: int = 1 << 30, sizes: Sequence[int]) -> Record:
    """copy_tb_per_s of a bf16 tensor of this many elements; bf16_tflops and fp8_tflops, the best over square matrices
    of these sizes; of each the single measurements, or the error of one that failed."""
    result: Record = {"measured": {}}

    def note(name: str, ceiling: str, amount: float, make: Callable[[], Callable[[], Any]]) -> None:
        try:
            rate = amount / statistics.median(timer(make())) / 1e9  # per ms to tera per second
        except Exception as error:
            result["measured"][name] = {"error": _line(error)}
            return
        result["measured"][name] = rate
        result[ceiling] = max(rate, result.get(ceiling, 0.0))

    note("copy", "copy_tb_per_s", 4 * elements, partial(_copy, device, elements))
    for size in sizes:
        flops = 2 * size**3
        note(f"bf16 {size}", "bf16_tflops", flops, partial(_matmul, device, size))
        note(f"fp8 by tensor {size}", "fp8_tflops", flops, partial(_fp8_matmul, device, size, by_row=False))
        note(f"fp8 by row {size}", "fp8_tflops", flops, partial(_fp8_matmul, device, size, by_row=True))
    return result


def _copy(device: torch.device, elements: int) -> Callable[[], Any]:
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul(device: torch.device, size: int) -> Callable[[], Any]:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def _fp8_matmul(device: torch.device, size: int, *, by_row: bool) -> Callable[[], Any]:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale_a = torch.ones((size, 1) if by_row else (), device=device)
    scale_b = torch.ones((1, size) if by_row else (), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def floor_ms(problem: Problem, ceilings: Mapping[str, Any]) -> float | None:
    """What no candidate can beat; None where a ceiling that it needs could not be measured."""
    times = []
    for amount, ceiling in ((problem.bytes, "copy_tb_per_s"), (problem.flops, f"{problem.matrix}_tflops")):
        if amount:
            if ceiling not in ceilings:
                return None
            times.append(amount / ceilings[ceiling] / 1e9)
    return max(times)


def measure(problem: Problem, ceilings: Mapping[str, Any], timer: Timer, *, configs: str | None = None) -> Record:
    """One problem: its record in the result. configs: ours in every configuration of its table in which this pattern
    is found as well."""
    floor = floor_ms(problem, ceilings)
    result: Record = {name: getattr(problem, name) for name in ("op", "direction", "shape", "dtype", "bytes", "flops")}
    result |= {"floor_ms": floor, "candidates": {}}
    truth: list[Tensor] | None = None
    names = sorted(problem.candidates, key=lambda name: (name == OURS, name != "eager"))  # the truth before all others
    for name in names:
        try:
            outputs = _tensors(problem.candidates[name]())
            record: Record = {"difference": None if truth is None else _difference(outputs, truth)}
            if not all(_is_finite(y) for y in outputs):
                raise ArithmeticError("the result is not finite")
            truth = outputs if truth is None else truth
            record |= _speed(problem, timer(problem.candidates[name]), floor)
        except Exception as error:
            record = {"error": _line(error)}
        outputs = []
        result["candidates"][name] = record
    works = "ms" in result["candidates"].get(OURS, {})
    if configs is not None and problem.tuned is not None and works:
        result["configs"] = _measure_configs(problem, timer, floor, configs)
    times = {name: record["ms"] for name, record in result["candidates"].items() if "ms" in record}
    peers = {name: ms for name, ms in times.items() if name.partition(" ")[0] != OURS}
    result["best_peer"] = min(peers, key=peers.__getitem__) if peers else None
    result["ratio"] = peers[result["best_peer"]] / times[OURS] if peers and OURS in times else None
    return result


def _measure_configs(problem: Problem, timer: Timer, floor: float | None, pattern: str) -> dict[str, Record]:
    assert problem.tuned is not None
    module, name = problem.tuned.split(":")
    table = getattr(importlib.import_module(module), name)
    result: dict[str, Record] = {}
    for config in table.configs:
        if not re.search(pattern, str(config)):
            continue
        try:
            with table.forced(config):
                result[str(config)] = _speed(problem, timer(problem.candidates[OURS]), floor)
        except Exception as error:  # more shared memory or registers than there are, at this size
            result[str(config)] = {"error": _line(error)}
    return result


def _speed(problem: Problem, times: list[float], floor: float | None) -> Record:
    ms, ordered = statistics.median(times), sorted(times)
    record: Record = {"ms": ms, "ms_fastest": ordered[0], "ms_90_percent": ordered[int(0.9 * (len(ordered) - 1))]}
    record["tb_per_s"] = problem.bytes / ms / 1e9
    if problem.flops:
        record["tflops"] = problem.flops / ms / 1e9
    return record | {"share_of_floor": None if floor is None else floor / ms}


def _tensors(result: Any) -> list[Tensor]:
    """All tensors of a result of tuples, lists and dicts."""
    if isinstance(result, Tensor):
        return [result.detach()]
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _is_finite(y: Tensor) -> bool:
    return not y.is_floating_point() or bool((y.float() if y.itemsize == 1 else y).isfinite().all())


def _difference(outputs: list[Tensor], truth: list[Tensor]) -> float | None:
    """Relative RMS distance, the largest over the tensors; None where results are of other shapes."""
    if [y.shape for y in outputs] != [y.shape for y in truth]:
        return None
    distances = [0.0]
    for y, expected in zip(outputs, truth, strict=True):
        norm = float(expected.float().norm())
        distances.append(float((y.float() - expected.float()).norm()) / norm if norm else 0.0)
    return max(distances)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def modules(only: Sequence[str] | None) -> list[str]:
    """Names of the files of benchmarks/roofline/ to measure. Raises ValueError for one that is not there."""
    names = [m.name for m in pkgutil.iter_modules(benchmarks.roofline.__path__) if m.name not in NOT_OPS]
    if unknown := sorted(set(only or ()) - set(names)):
        raise ValueError(f"--only {' '.join(unknown)}: no such op; use of {', '.join(sorted(names))}")
    return sorted(only or names)


def problems_of(name: str, device: torch.device) -> Iterator[Problem | str]:
    """The problems of a file; at its end, if it ended so, the error of making one."""
    try:
        yield from importlib.import_module(f"benchmarks.roofline.{name}").problems(device)
    except Exception as error:
        yield _line(error)


def row(record: Mapping[str, Any]) -> str:
    """Of the table."""
    ours, peer = record["candidates"].get(OURS, {}), record["candidates"].get(record["best_peer"], {})

    def shown(value: float | None, form: str) -> str:
        return format(value, form) if value is not None else "-"

    return (
        f"{record['op'] + ' ' + record['direction']:<24} {record['shape']:<34} {shown(record['floor_ms'], '.4f'):>9} "
        f"{shown(ours.get('ms'), '.4f'):>9} {shown(ours.get('share_of_floor'), '.0%'):>6} "
        f"{(record['best_peer'] or '-'):>9} {shown(peer.get('ms'), '.4f'):>9} {shown(record['ratio'], '.2f'):>6}"
        + (f"  {ours['error']}" if "error" in ours else "")
    )


HEAD = f"{'op':<24} {'shape':<34} {'floor ms':>9} {'ours ms':>9} {'share':>6} {'peer':>9} {'peer ms':>9} {'ratio':>6}"


def best_configs(record: Mapping[str, Any], number: int = 3) -> list[str]:
    """The fastest configurations of a problem, a line each."""
    times = {name: config["ms"] for name, config in record.get("configs", {}).items() if "ms" in config}
    return [f"    {times[name]:.4f}  {name}" for name in sorted(times, key=times.__getitem__)[:number]]


def selected(problem: Problem, match: str | None, peers: Sequence[str] | None) -> Problem | None:
    """The problem with only these peers, all for None; None if the pattern is not in "op direction shape"."""
    if match is not None and not re.search(match, f"{problem.op} {problem.direction} {problem.shape}"):
        return None
    if peers is None:
        return problem
    kept = {name: f for name, f in problem.candidates.items() if name in peers or name.partition(" ")[0] == OURS}
    return replace(problem, candidates=kept)


def about(device: torch.device) -> Record:
    """Hardware and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "liger_kernel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    hardware: Record = {"device": str(device)}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        hardware |= {"name": known.name, "multiprocessors": known.multi_processor_count, "bytes": known.total_memory}
        versions["cuda"] = str(torch.version.cuda)
    return {"hardware": hardware, "versions": versions}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="OP", help="files of benchmarks/roofline/")
    parser.add_argument("--match", metavar="REGEX", help='only problems whose "op direction shape" has this')
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these, such as eager; none without a name")
    parser.add_argument("--out", type=Path, help="also write the object to this file, after every problem")
    parser.add_argument(
        "--configs", nargs="?", const="", metavar="REGEX", help="also ours in every configuration that has this"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="to measure a candidate for, about (default 0.2)")
    args = parser.parse_args(argv)
    try:
        names = modules(args.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: kernels are measured on a GPU, and torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch._dynamo.config.recompile_limit = 256  # one code object is compiled for every shape; beyond it runs eager
    timer = CudaTimer(device, seconds=args.seconds)
    ceilings = measure_ceilings(device, timer, sizes=(4096, 8192, 16384))
    result = about(device) | {"ceilings": ceilings, "problems": [], "errors": {}}
    print(json.dumps(ceilings) + "\n" + HEAD, file=sys.stderr, flush=True)
    for name in names:
        run(name, device, timer, result, args)
    print(json.dumps(result, indent=1))
    return 0


def run(name: str, device: torch.device, timer: Timer, result: Record, args: argparse.Namespace) -> None:
    """Measures the problems of one file into the result."""
    for problem in problems_of(name, device):
        if isinstance(problem, str):
            result["errors"][name] = problem
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
        elif (problem := selected(problem, args.match, args.peers)) is not None:
            record = measure(problem, result["ceilings"], timer, configs=args.configs)
            result["problems"].append(record)
            print("\n".join([row(record), *best_configs(record)]), file=sys.stderr, flush=True)
        del problem
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
