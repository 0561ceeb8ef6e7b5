"""mode=bench: what is asked for is what is measured, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from inference.load import Request
from launch.compose import compose_for
from launch.errors import exit_code_of
from launch.lab import LAB, lab
from launch.modes.bench import WARM_TOKENS, _shortened, load_of, open_any

SMALL = ["mode=bench", "bench.num_requests=5", "bench.prompt_tokens=[3,9]", "bench.output_tokens=[2,6]"]
TINY = ["bench.random_weights=llama_tiny", "engine.max_seq_len=32"]


def test_a_load_over_a_model_from_a_folder_is_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that belong to another load; a table that hides the one for programs."""
    slo = ["bench.slo_ttft_ms=60000", "bench.slo_tpot_ms=1e-6"]
    out = tmp_path / "report.json"
    load = ["bench.arrivals=poisson", "bench.rate=500", "bench.bandwidth=1e10", f"model.path={folder}", f"out={out}"]
    assert exit_code_of(lab, [*SMALL, *load, *slo]) == 0
    report = json.loads(out.read_text())
    assert (report["load"]["requests"], report["load"]["arrivals"], report["load"]["rate"]) == (5, "poisson", 500.0)
    assert 15 <= report["load"]["prompt_tokens"] <= 45
    assert 10 <= report["load"]["output_tokens"] <= 30
    assert report["output_tokens_per_second"] * report["seconds"] == pytest.approx(report["load"]["output_tokens"])
    assert report["counts"]["prompt_tokens"] == report["load"]["prompt_tokens"]  # of the measured run alone
    assert report["slo"]["met"] == 0.0
    assert report["bandwidth"] == {"bytes_per_second": 1e10, "source": "given"}
    decode = report["decode"]
    assert decode["of_bandwidth"] == pytest.approx(
        decode["steps"] * decode["bytes_per_step"] / decode["seconds"] / 1e10
    )
    assert report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"] <= report["latency_ms"]["max"]
    assert report["start_seconds"]["first_token"] > report["start_seconds"]["model"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "goodput (ttft <= 60000 ms, tpot <= 1e-06 ms): 0.00 requests/s" in captured.err
    assert "% of 10 GB/s (given)" in captured.err


@pytest.mark.parametrize("name", ["llama_tiny", "{folder}", "{folder}/config.json"])
def test_weights_need_not_be_there(name: str, folder: Path, tmp_path: Path) -> None:
    """A shape that can be measured only by whoever has its files."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    config = compose_for(LAB, [*SMALL, f"bench.random_weights={name.format(folder=bare)}", "device=cpu"])
    opened = open_any(config, config.bench.random_weights)
    assert opened.model.config.hidden_size == (256 if name == "llama_tiny" else 24)
    weights = {name: parameter.float() for name, parameter in opened.model.named_parameters()}
    assert all(0.015 < weight.std() < 0.025 for name, weight in weights.items() if not name.endswith("norm.weight"))
    assert all((weight == 1).all() for name, weight in weights.items() if name.endswith("norm.weight"))


def requests_of(*settings: str) -> list[Request]:
    config = compose_for(LAB, [*SMALL, *TINY, *settings])
    return load_of(config, open_any(config, config.bench.random_weights))


def test_lengths_are_fixed_uniform_or_from_a_file(tmp_path: Path) -> None:
    """A load of other lengths; arrivals that are not the file's; one that cannot be made again."""
    fixed = requests_of("bench.prompt_tokens=[7]", "bench.output_tokens=[3]", "bench.num_requests=4")
    assert [(len(r.prompt), r.max_tokens, r.arrival) for r in fixed] == [(7, 3, 0.0)] * 4
    uniform = requests_of("bench.num_requests=200")
    assert {len(r.prompt) for r in uniform} == set(range(3, 10))
    assert {r.max_tokens for r in uniform} == set(range(2, 7))
    assert uniform == requests_of("bench.num_requests=200") != requests_of("bench.num_requests=200", "bench.seed=1")
    file = tmp_path / "lengths.jsonl"
    lines = [{"prompt_tokens": 4, "output_tokens": 2, "arrival": 0.5}, {"prompt_tokens": 8, "output_tokens": 1}]
    lines[1]["arrival"] = 0.25
    file.write_text("\n".join(map(json.dumps, lines)))
    found = requests_of(f"bench.lengths={file}", "bench.arrivals=file")
    assert [(len(r.prompt), r.max_tokens, r.arrival) for r in found] == [(4, 2, 0.5), (8, 1, 0.25)]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_ids": [3, 1, 4]}\n{"prompt_ids": [1]}\n')
    given = requests_of(f"prompts={prompts}", "bench.arrivals=fixed", "bench.rate=10")
    assert [(r.prompt, r.arrival) for r in given] == [([3, 1, 4], 0.0), ([1], 0.1)]


def test_warming_up_has_every_batch_size_of_the_load_and_none_of_its_tokens() -> None:
    """Graphs captured, or prefixes found, while the clock runs."""
    load = [Request([1, 2, 3], 10 * n) for n in range(1, 33)]
    warm = _shortened(load, 1000, seed=0)
    assert [len(request.prompt) for request in warm] == [3] * 32
    assert [request.max_tokens for request in warm] == list(range(1, WARM_TOKENS + 1))
    assert all(a.prompt != b.prompt for a, b in zip(load, warm, strict=True))
    assert _shortened([Request([1], 5)], 1000, seed=0)[0].max_tokens == 5


def test_the_benchmark_on_a_gpu_uses_the_same_pieces() -> None:
    """Two programs that count bytes or draw weights in ways of their own."""
    from inference.roofline import weight_bytes
    from launch.open_model import random_model

    assert (serving.weight_bytes, serving.random_model) == (weight_bytes, random_model)


MISTAKES: dict[str, Any] = {
    "bench.random_weights=lama": "bench.random_weights=lama is neither a folder or config.json of Hugging Face nor one",
    "bench.random_weights={tmp}": "is no config.json, and no folder with one",
    "model.path={folder}": "bench.random_weights and model.path exclude each other",
    "bench.num_requests=0": "bench.num_requests=0 must be at least 1",
    "bench.prompt_tokens=[]": "bench.prompt_tokens=[] must be one length, such as [128], or least and most",
    "bench.output_tokens=[9,3]": "bench.output_tokens=[9, 3] must be one length",
    "bench.prompt_tokens=[3,60]": "tokens, and engine.max_seq_len=32; use a shorter prompt",
    "bench.arrivals=posson": "bench.arrivals=posson is unknown; use at_once, fixed, poisson, file",
    "bench.arrivals=poisson": "bench.arrivals=poisson needs bench.rate, in requests a second",
    "bench.rate=3": "bench.rate=3.0 is not read with bench.arrivals=at_once",
    "bench.arrivals=file": "bench.arrivals=file reads them from bench.lengths, which is missing",
    "bench.slo_tpot_ms=0": "bench.slo_tpot_ms=0.0 must be above 0, or null",
    "bench.lengths=/nowhere": "bench.lengths=/nowhere is no file",
    "bench.lengths={tmp}/wrong.jsonl": "wrong.jsonl, line 2 must be an object with prompt_tokens, output_tokens",
    "bench.lengths={tmp}/zero.jsonl": "zero.jsonl, line 1: lengths are whole numbers of at least 1",
    "sampling.max_tokens=9": "sampling.max_tokens=9 is bench.output_tokens=[9] in mode=bench",
    "sampling.stop=[x]": "sampling.stop=['x'] needs a tokenizer",
    "out={tmp}": "is a folder; give a file",
}


def test_whatever_cannot_be_measured_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or the numbers of something else."""
    (tmp_path / "wrong.jsonl").write_text('{"prompt_tokens": 1, "output_tokens": 1}\n[]\n')
    (tmp_path / "zero.jsonl").write_text('{"prompt_tokens": 0, "output_tokens": 1}\n')
    fast = "bench.bandwidth=1e9"
    for override, says in MISTAKES.items():
        given = override.format(tmp=tmp_path, folder=folder)
        assert exit_code_of(lab, [*SMALL, *TINY, fast, given]) == 2, override
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("configuration error: ")
        assert says in line
    assert exit_code_of(lab, ["mode=bench"]) == 2
    assert "model.path is missing" in capsys.readouterr().err
