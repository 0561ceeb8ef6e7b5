"""mode=bench: what is asked for is what is measured, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import serving
from inference.layout import ServingLayout
from inference.load import Request
from inference.roofline import weight_bytes
from inference.speculation.counts import SpeculationCounts
from launch.compose import compose_for
from launch.errors import exit_code_of
from launch.lab import LAB, lab
from launch.lab_config import open_served
from launch.modes.bench import WARM_TOKENS, _shortened, load_of
from models.config import ModelConfig
from models.moe_config import MoEConfig
from models.registry import resolve_model
from tests.launch.on_ranks import drawn_part, lab_and_watch, serving_case
from tests.models.small import random_decoder, tiny
from tests.pool import RankPool

SMALL = ["mode=bench", "bench.num_requests=5", "bench.prompt_tokens=[3,9]", "bench.output_tokens=[2,6]"]
EXPERTS = tiny(num_heads=4, num_kv_heads=2, moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=12))
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
    opened = open_served(config, config.bench.random_weights)
    assert opened.model.config.hidden_size == (256 if name == "llama_tiny" else 24)
    weights = {name: parameter.float() for name, parameter in opened.model.named_parameters()}
    assert all(0.015 < weight.std() < 0.025 for name, weight in weights.items() if not name.endswith("norm.weight"))
    assert all((weight == 1).all() for name, weight in weights.items() if name.endswith("norm.weight"))


@pytest.mark.parametrize(
    ("config", "ep"),
    [(tiny(num_heads=4, num_kv_heads=2, intermediate_size=36, tie_embeddings=True), 1), (EXPERTS, 1), (EXPERTS, 2)],
    ids=["dense", "experts", "experts shared out"],
)
def test_weights_that_are_drawn_by_ranks_make_one_model_whatever_their_number(
    ranks: RankPool, config: ModelConfig, ep: int
) -> None:
    """The same numbers in every rank's part; a tensor that all ranks have, and that differs between them."""
    whole: dict[int, dict[str, torch.Tensor]] = {}
    for tp in (2, 4):
        tensors = whole[tp] = {
            name: torch.full(x.shape, 9.0) for name, x in random_decoder(config).state_dict().items()
        }
        for part in ranks.run(tp, drawn_part, resolve_model(config), ServingLayout(tp=tp, ep=ep)):
            assert part.keys() == tensors.keys()
            for name, (region, values) in part.items():
                there = tensors[name][region]
                assert ((there == 9.0) | (there == values)).all(), name
                there.copy_(values)
    assert all(torch.equal(whole[2][name], whole[4][name]) for name in whole[2])
    drawn = {name: x for name, x in whole[2].items() if name.endswith("weight") and not name.endswith("norm.weight")}
    assert all(x.unique().numel() > 0.99 * x.numel() and 0.012 < x.std() < 0.028 for x in drawn.values())
    assert all((x == 1).all() for name, x in whole[2].items() if name.endswith("norm.weight"))


def test_a_load_over_two_ranks_needs_no_weights(ranks: RankPool, tmp_path: Path) -> None:
    """Nothing that measures serving over tp without the weights of a large model; a rank that reports as well."""
    out = tmp_path / "report.json"
    arguments = [*SMALL, *TINY, "parallel.tp=2", "bench.bandwidth=1e10", f"out={out}", "device=cpu"]
    assert ranks.run(2, lab_and_watch, arguments) == [("", 0)] * 2
    report = json.loads(out.read_text())
    assert (report["load"]["tp"], report["load"]["random_weights"]) == (2, True)
    alone = open_served(compose_for(LAB, [*SMALL, *TINY, "device=cpu"]), "llama_tiny").model
    assert report["parameters"] == sum(parameter.numel() for parameter in alone.parameters())
    assert 0 < report["decode"]["bytes_per_step"] < 0.6 * weight_bytes(alone)
    assert exit_code_of(lab, [*SMALL, *TINY, "parallel.tp=3"]) == 2  # before there are any ranks


def test_the_benchmark_over_ranks_says_how_many_and_writes_once(ranks: RankPool, tmp_path: Path) -> None:
    """A program that draws and times one GPU's model, whatever it was started with."""
    out = tmp_path / "results.json"
    ranks.run(2, serving_case, out)
    report = json.loads(out.read_text())
    assert report["environment"]["tp"] == 2
    (result,) = report["results"]
    assert result["case"] == "batch3"
    assert result["tokens_per_second"] > 0


DRAFTING = ["speculation.method=ngram", "bench.prompt_tokens=[6]", "bench.output_tokens=[8]"]


def test_drafts_of_the_load_alone_are_counted(tmp_path: Path) -> None:
    """Acceptance of other tokens than those that were timed: the load that warms up drafts as well."""
    out = tmp_path / "report.json"
    load = [*SMALL, *TINY, *DRAFTING, "speculation.switch_off=false", "bench.bandwidth=1e10", f"out={out}"]
    assert exit_code_of(lab, [*load, "bench.num_requests=3", "engine.max_sequences=1", "sampling.temperature=0"]) == 0
    found = json.loads(out.read_text())["speculation"]
    assert found["steps_with"] + found["steps_without"] > 0
    given = 3 * 8 - 3  # tokens behind the prompts' own steps
    assert sum(found["accepted"]) + found["steps_with"] + found["steps_without"] == given
    assert found["drafted"][0] == found["steps"] <= found["steps_with"]
    now, before = SpeculationCounts(), SpeculationCounts()
    for drafted, accepted in ((2, 1), (3, 3)):
        before = copy.deepcopy(now)
        now.add(drafted, accepted)
    assert now.since(before) == SpeculationCounts(steps=1, drafted=[1] * 3, tried=[1] * 3, accepted=[1] * 3)


def test_drafting_is_timed_beside_no_drafting_by_the_number_of_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch size at which speculation stops paying that nobody can ask for; sides that are both the same."""
    out = tmp_path / "report.json"
    sweep = [*SMALL, *TINY, *DRAFTING, "bench.drafting_batches=[1,3]", "sampling.temperature=0", "bench.bandwidth=1e10"]
    assert exit_code_of(lab, [*sweep, f"out={out}"]) == 0
    found = json.loads(out.read_text())["drafting"]
    assert [row["requests"] for row in found["batches"]] == [1, 3]
    for row in found["batches"]:
        assert row["speed_up"] == pytest.approx(row["drafting_tokens_per_second"] / row["tokens_per_second"])
        assert row["mean_length"] >= 1
        assert all(0 <= share <= 1 for share in row["acceptance"])
    lost = [row["requests"] for row in found["batches"] if row["speed_up"] < 1]
    assert found["stops_paying_at"] == (lost[0] if lost else None)
    assert "drafting stops paying at" in (said := capsys.readouterr().err) or "drafting pays at all of these" in said
    for wrong, says in {
        "bench.drafting_batches=[3,1]": "must be numbers of requests that grow",
        "bench.drafting_batches=[1,9]": "needs a load of 9 requests, and it has 5",
        "speculation.method=none": "needs somebody who drafts",
        "engine.max_sequences=2": "has more requests than engine.max_sequences=2 run at a time",
    }.items():
        assert exit_code_of(lab, [*sweep, wrong]) == 2
        assert says in capsys.readouterr().err


def requests_of(*settings: str) -> list[Request]:
    config = compose_for(LAB, [*SMALL, *TINY, *settings])
    return load_of(config, open_served(config, config.bench.random_weights))


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


@pytest.mark.thorough
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
