"""The roofline program, all of it but the GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import kernels
from benchmarks.roofline.problem import Problem, both_directions, forward_only

CPU = torch.device("cpu")
CEILINGS = {"copy_tb_per_s": 4.0, "bf16_tflops": 700.0}


def clock(function: Callable[[], Any]) -> list[float]:
    """A timer for the CPU."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def steady(times: dict[str, float]) -> Callable[[Callable[[], Any]], list[float]]:
    """A timer of functions that return their name, with chosen times."""
    return lambda function: [times[function()], 9e9, 0.0]


def test_a_floor_is_the_longer_of_moving_and_computing() -> None:
    """Units off by a thousand; the smaller of both."""
    memory = Problem("op", "forward", "1", "bf16", 4 * 10**9, {})
    assert kernels.floor_ms(memory, CEILINGS) == pytest.approx(1.0)
    compute = Problem("op", "forward", "1", "bf16", 4 * 10**9, {}, flops=14 * 10**11)
    assert kernels.floor_ms(compute, CEILINGS) == pytest.approx(2.0)
    assert kernels.floor_ms(Problem("op", "forward", "1", "bf16", 1, {}, 1, "fp8"), CEILINGS) is None


def test_the_ratio_is_against_the_best_peer_that_works() -> None:
    """A ratio the wrong way round, or against a candidate that failed."""

    def broken() -> str:
        raise RuntimeError("no such\nkernel")

    candidates = {name: (lambda name=name: name) for name in ("lattice", "eager", "compile")}
    problem = Problem("op", "forward", "7", "bf16", 4 * 10**9, candidates | {"liger": broken})
    record = kernels.measure(problem, CEILINGS, steady({"lattice": 2.0, "eager": 8.0, "compile": 3.0}))
    assert record["candidates"]["liger"] == {"error": "RuntimeError: no such"}
    assert record["candidates"]["lattice"]["share_of_floor"] == pytest.approx(0.5)
    assert record["candidates"]["lattice"]["tb_per_s"] == pytest.approx(2.0)
    assert (record["best_peer"], record["ratio"]) == ("compile", pytest.approx(1.5))
    assert "1.50" in kernels.row(record)


def test_a_result_that_is_not_finite_or_another_is_noted() -> None:
    """A kernel that is fast because it computes nothing."""
    x = torch.randn(50)
    candidates = {"lattice": lambda: (x * 1.5,), "eager": lambda: x, "liger": lambda: x / 0, "compile": lambda: x[:3]}
    record = kernels.measure(Problem("op", "forward", "50", "fp32", 400, candidates), CEILINGS, clock)["candidates"]
    assert record["lattice"]["difference"] == pytest.approx(0.5)
    assert record["compile"]["difference"] is None
    assert "not finite" in record["liger"]["error"]


def test_both_directions_give_every_candidate_its_own_inputs() -> None:
    """A peer that overwrites what it saved spoils the inputs of the next."""

    def greedy(x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        x.data.zero_()
        return y

    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    functions = {"eager": torch.mul, "liger": greedy, "lattice": lambda x, w: (x * w,)}
    for problem in both_directions("op", "4x3", functions, (x, w), bytes=(48, 72), tuned=("a:A", None)):
        record = kernels.measure(problem, CEILINGS, clock)
        assert record["candidates"]["lattice"]["difference"] == 0.0
        assert record["bytes"] == (48 if problem.direction == "forward" else 72)
    assert x.abs().min() > 0
    one = forward_only("op", "4x3", functions, (x, w), bytes=48)
    assert not one.candidates["eager"]().requires_grad


def test_ceilings_record_what_fails() -> None:
    """A GPU without fp8 that ends the whole program."""
    ceilings = kernels.measure_ceilings(CPU, clock, elements=1000, sizes=(32,))
    assert ceilings["copy_tb_per_s"] > 0
    assert ceilings["bf16_tflops"] == ceilings["measured"]["bf16 32"]
    assert set(ceilings["measured"]) == {"copy", "bf16 32", "fp8 by tensor 32", "fp8 by row 32"}


def test_a_file_is_measured_with_all_configurations_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run cut off at its time limit that leaves nothing; an error of a file that ends the others."""

    def problems(device: torch.device) -> Iterator[Problem]:
        candidates = {"lattice": lambda: torch.ones(3), "eager": lambda: torch.ones(3)}
        yield Problem("swiglu", "forward", "3", "fp32", 24, candidates, tuned="kernels.swiglu.kernel:BLOCKS")
        raise MemoryError("too large")

    module = importlib.import_module("benchmarks.roofline.swiglu")
    monkeypatch.setattr(module, "problems", problems)
    result: dict[str, Any] = kernels.about(CPU) | {"ceilings": CEILINGS, "problems": [], "errors": {}}
    args = argparse.Namespace(configs="size=4096", match=None, peers=None, out=tmp_path / "new" / "result.json")
    kernels.run("swiglu", CPU, clock, result, args)
    written = json.loads(args.out.read_text())
    assert written["errors"] == {"swiglu": "MemoryError: too large"}
    (problem,) = written["problems"]
    assert "Block(size=4096, num_warps=8)" in problem["configs"]
    assert all("size=4096" in name for name in problem["configs"])
    assert all(record["ms"] > 0 for record in problem["configs"].values())
    assert "swiglu forward" in capsys.readouterr().err


def test_problems_and_peers_are_selected() -> None:
    """A selection that leaves ours out, or takes what it does not name."""
    candidates = {name: (lambda: None) for name in ("lattice", "lattice rowwise", "eager", "compile")}
    problem = Problem("fp8", "forward", "1x128 512x512", "bf16", 24, candidates)
    assert kernels.selected(problem, "forward 1x128", None) is problem
    assert kernels.selected(problem, "backward", None) is None
    kept = kernels.selected(problem, None, ["eager"])
    assert kept is not None
    assert list(kept.candidates) == ["lattice", "lattice rowwise", "eager"]


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty result after ten minutes."""
    assert kernels.main(["--only", "swigul"]) == 2
    assert "no such op; use of" in capsys.readouterr().err
    assert "problem" not in kernels.modules(None)


@pytest.mark.parametrize("name", ["geglu", "layer_norm", "low_rank", "rms_norm", "rope", "softmax", "swiglu"])
def test_problems_are_calls_that_work(name: str) -> None:
    """A mistake in a problem that shows only on the GPU; here its tensors have shapes and no memory."""
    module = importlib.import_module(f"benchmarks.roofline.{name}")
    with FakeTensorMode():
        for problem in module.problems(CPU):
            results = [kernels._tensors(problem.candidates[who]()) for who in ("lattice", "eager")]
            shapes = [[y.shape for y in result] for result in results]
            assert shapes[0] == shapes[1], problem.shape
            assert shapes[0]
            if problem.tuned is not None:
                table = problem.tuned.split(":")
                assert getattr(importlib.import_module(table[0]), table[1]).configs
