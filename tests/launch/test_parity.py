"""mode=parity: all ways agree, and one that does not ends the program with 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.config import EngineConfig
from inference.engine import Engine
from inference.runner import ModelRunner
from launch.errors import exit_code_of
from launch.lab import lab
from launch.modes.parity import Outcome, compare
from tests.launch.conftest import small_llama
from tests.launch.on_ranks import parity_verdict
from tests.models.small import random_decoder, tiny
from tests.pool import RankPool

SMALL = [
    "mode=parity",
    "parity.num_prompts=3",
    "parity.prompt_tokens=[1,12]",
    "parity.max_tokens=5",
    "parity.page_sizes=[1,8]",
]
WAYS = {
    "trainer",
    "trainer, alone",
    "decode",
    "prefill",
    "token by token",
    "chunked",
    "prefill, batched",
    "batched",
    "batched, chunked",
    "pages of 1",
    "pages of 8",
    "prefix cached",
    "preempted, recomputed",
    "preempted, swapped",
}


def run(folder: Path, out: Path, *settings: str) -> tuple[int, dict[str, Any]]:
    code = exit_code_of(lab, [*SMALL, f"model.path={folder}", f"out={out}", *settings])
    return code, json.loads(out.read_text())


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        (["model.dtype=fp64"], 1e-5),
        (["model.dtype=bf16"], 0.5),
        (["model.dtype=bf16", "engine.deterministic=true"], 0.0),
    ],
)
def test_all_ways_are_compared_and_agree(folder: Path, tmp_path: Path, settings: list[str], bound: float) -> None:
    """A way that is forgotten, or that compared nothing; preemptions and cached prefixes that did not happen."""
    code, report = run(folder, tmp_path / "report.json", *settings)
    assert code == 0
    assert (report["bound"], report["kept"], report["prompts"]) == (bound, True, 3)
    ways = {way["name"]: way for way in report["paths"]}
    assert ways.keys() == WAYS
    assert ways["prefix cached"]["cached_tokens"] > 0
    assert ways["preempted, recomputed"]["recomputed"] > 0
    assert ways["preempted, swapped"]["swapped"] > 0
    assert len(report["pairs"]) == len(WAYS) * (len(WAYS) - 1) / 2
    everything = report["tokens"] - report["prompts"]
    for pair in report["pairs"]:
        assert pair["compared"] == (15 if "prefix cached" in (pair["a"], pair["b"]) else everything)
        assert pair["max_abs_delta"] <= bound
        assert pair["tokens_equal"] is not False or bound == 0.5


def test_without_determinism_the_bits_differ(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Negative control: a bound of 0 that ordinary products keep as well."""
    code, report = run(folder, tmp_path / "report.json", "model.dtype=fp32", "parity.bound=0")
    assert (code, report["kept"]) == (1, False)
    err = capsys.readouterr().err
    assert "pairs break the bound of 0" in err
    assert "of all 91 pairs at most" in err


def test_an_engine_that_is_wrong_breaks_the_bound(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A comparison of a thing with itself. One token of every page is read as 0 where there are pages of 8."""
    real = ModelRunner._copy

    def damage(runner: ModelRunner, copies: Any) -> None:
        real(runner, copies)
        if runner.block_size == 8:
            runner._keys[:, :, 3] = 0.0

    monkeypatch.setattr(ModelRunner, "_copy", damage)
    code, report = run(folder, tmp_path / "report.json", "model.dtype=fp64")
    assert code == 1
    broken = {name for pair in report["pairs"] if pair["max_abs_delta"] > 1e-5 for name in (pair["a"], pair["b"])}
    assert all("pages of 8" in (pair["a"], pair["b"]) for pair in report["pairs"] if pair["max_abs_delta"] > 1e-5)
    assert "pages of 8" in broken


def test_over_two_ranks_all_ways_agree_with_the_trainer_of_one_process(ranks: RankPool, tmp_path: Path) -> None:
    """Tensor-parallel serving held against itself alone; a rank that is left waiting once the verdict is there.

    Negative control: one number of one rank's part of one weight is another one.
    """
    folder, out = small_llama(tmp_path / "model", heads=4, inner=36), tmp_path / "report.json"
    arguments = [*SMALL, f"model.path={folder}", f"out={out}", "model.dtype=fp32", "parallel.tp=2", "device=cpu"]
    assert ranks.run(2, parity_verdict, arguments) == ["", ""]
    report = json.loads(out.read_text())
    assert (report["tp"], report["bound"], report["kept"]) == (2, 1e-5, True)
    assert {way["name"] for way in report["paths"]} == WAYS | {"trainer, tp=2"}
    ways = {way["name"]: way for way in report["paths"]}
    assert min(ways["prefix cached"]["cached_tokens"], ways["preempted, swapped"]["swapped"]) > 0
    for pair in report["pairs"]:
        assert pair["tokens_equal"] is not False
    verdict, others = ranks.run(2, parity_verdict, arguments, damaged=1)
    assert "break the bound of 1e-05" in verdict
    assert others == ""
    broken = {(pair["a"], pair["b"]) for pair in json.loads(out.read_text())["pairs"] if pair["max_abs_delta"] > 1e-5}
    whole = {"trainer", "trainer, alone"}
    assert broken == {(one, other) for one in whole for other in WAYS - whole | {"trainer, tp=2"}}


def test_given_prompts_are_what_is_compared(folder: Path, tmp_path: Path) -> None:
    """Random tokens in place of those that somebody asked about."""
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "one two three"}\n{"prompt_ids": [3, 1, 4]}\n')
    code, report = run(folder, tmp_path / "report.json", f"prompts={prompts}", "model.dtype=fp64")
    assert (code, report["prompts"]) == (0, 2)


def test_tokens_are_compared_where_they_differ_and_no_further() -> None:
    """Log-probabilities of other contexts against one another; a difference that nobody is told of."""

    def outcome(tokens: list[int], logprobs: list[float | None], margins: list[float]) -> Outcome:
        return Outcome("x", [tokens], [logprobs], [tokens], [margins])

    a = outcome([5, 6, 7], [-1.0, -2.0, -3.0, -4.0], [1.0, 0.25, 1.0])
    b = outcome([5, 9, 7], [-1.0, -2.5, -9.0, -9.0], [1.0, 0.125, 1.0])
    pair = compare(a, b, [[1, 2]])
    assert (pair.compared, pair.max_abs_delta, pair.tokens_equal, pair.margin) == (2, 0.5, False, 0.25)
    assert pair.keeps(0.5, half=True)
    assert not pair.keeps(0.5, half=False)
    assert not pair.keeps(0.2, half=True)
    nothing = compare(a, outcome([5, 6, 7], [None, float("nan"), -3.0, -4.0], [1.0, 1.0, 1.0]), [[1, 2]])
    assert nothing.compared == 3
    assert not nothing.keeps(1e9, half=True)


MISTAKES = {
    "parity.num_prompts=0": "parity.num_prompts=0 must be at least 1",
    "parity.prompt_tokens=[5]": "parity.prompt_tokens=[5] must be least and most",
    "parity.prompt_tokens=[9,4]": "parity.prompt_tokens=[9, 4] must be least and most",
    "parity.page_sizes=[0]": "parity.page_sizes=[0] must be numbers of tokens",
    "parity.bound=-1": "parity.bound=-1.0 must be at least 0",
    "parity.max_tokens=40": "parity needs 53 tokens of a sequence",
}


def test_whatever_cannot_be_done_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or a comparison of something else than was asked for."""
    for override, says in MISTAKES.items():
        assert exit_code_of(lab, [*SMALL, f"model.path={folder}", override]) == 2, override
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_an_engine_does_not_promise_what_its_model_cannot_keep() -> None:
    """engine.deterministic=true on an ordinary model, without a word."""
    with pytest.raises(ValueError, match=r"engine\.deterministic=true needs a batch-invariant model"):
        Engine(random_decoder(tiny()).to(torch.bfloat16), EngineConfig(deterministic=True))
