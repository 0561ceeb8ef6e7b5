"""mode=compare: what is equal is called equal, and differences are those that are there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data.tokenizer import train_bpe
from inference.sequence import Completion
from launch.errors import exit_code_of
from launch.lab import lab
from launch.modes.compare import Outcome, differences, top_kl

SMALL = [
    "mode=compare", "compare.num_prompts=3", "compare.prompt_tokens=[2,9]", "compare.max_tokens=6", "compare.repeats=1",
    "sampling.temperature=0", "engine.block_size=4",
]  # fmt: skip


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert exit_code_of(lab, [*SMALL, f"out={out}", *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, weights that differ."""
    path = tmp_path_factory.mktemp("other") / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.4 * torch.randn_like(parameter))
    model.save_pretrained(path)
    for file in folder.iterdir():
        if not (path / file.name).exists():
            (path / file.name).write_bytes(file.read_bytes())
    return path


def test_settings_that_change_nothing_change_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sides that have other prompts or seeds; a side's settings that the other one gets; a comparison of nothing."""
    both = [f"model.path={folder}", "model.dtype=fp64", "compare.a=['engine.max_sequences=1']"]
    for temperature in (0, 1):
        setting = f"compare.b=['engine.block_size=16','speculation.method=ngram','sampling.temperature={temperature}']"
        arguments = [*both, f"sampling.temperature={temperature}", setting]
        report = run(tmp_path / "report.json", *arguments)
        tokens = report["tokens"]
        assert (tokens["generated"], tokens["equal"], tokens["prompts_equal"]) == (18, 18, 3)
        assert tokens["first_difference"] == [None, None, None]
        assert report["decode"]["tokens"] == report["top_kl"]["places"] == 18
        assert report["scored"]["tokens"] == report["prompt_tokens"] + 18 - 3
        assert max(report[name]["max_abs_delta"] for name in ("decode", "scored")) < 1e-10
        assert report["top_kl"]["max"] < 1e-6
    ratio = report["b"]["tokens_per_second"] / report["a"]["tokens_per_second"]
    assert report["speed_ratio"] == pytest.approx(ratio)
    assert (len(report["a"]["seconds"]), report["a"]["overrides"]) == (1, ["engine.max_sequences=1"])
    assert "tokens: 3 of 3 continuations equal, 18 of 18 tokens" in capsys.readouterr().err


def test_another_model_is_seen(folder: Path, other: Path, tmp_path: Path) -> None:
    """Negative control; and what is scored are a's sequences by b's weights, as transformers computes them."""
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "one two three"}\n{"prompt_ids": [3, 1, 4]}\n')
    models = [f"compare.a=['model.path={folder}']", f"compare.b=['model.path={other}','model.dtype=fp64']"]
    report = run(tmp_path / "report.json", *models, f"prompts={prompts}", "model.dtype=fp64")
    assert (report["prompts"], report["a"]["dtype"]) == (2, "float64")
    assert report["tokens"]["prompts_equal"] < 2
    assert report["tokens"]["largest_margin"] > 0
    assert report["top_kl"]["mean"] > 1e-4

    generated = tmp_path / "out.jsonl"
    first = ["mode=generate", f"model.path={folder}", f"prompts={prompts}", f"out={generated}", "model.dtype=fp64"]
    settings = ["sampling.temperature=0", "sampling.max_tokens=6", "sampling.ignore_eos=true"]
    assert exit_code_of(lab, [*first, *settings]) == 0
    lines = [json.loads(line) for line in generated.read_text().splitlines()]
    tokenizer_ids = [transformers.AutoTokenizer.from_pretrained(folder)("one two three", add_special_tokens=False)]
    starts = [tokenizer_ids[0]["input_ids"], [3, 1, 4]]
    deltas = []
    for start, line in zip(starts, lines, strict=True):
        ids = torch.tensor([start + line["token_ids"]])
        of_both = []
        for path in (folder, other):
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
            with torch.no_grad():
                table = model(ids).logits[0, :-1].log_softmax(-1)
            of_both.append(table.gather(1, ids[0, 1:, None])[:, 0])
        deltas += (of_both[1] - of_both[0]).tolist()
    assert report["scored"]["tokens"] == len(deltas)
    assert report["scored"]["max_abs_delta"] == pytest.approx(max(map(abs, deltas)), rel=1e-6)
    assert report["scored"]["mean_delta"] == pytest.approx(sum(deltas) / len(deltas), rel=1e-6)


def test_divergences_of_what_is_known() -> None:
    """A divergence above the true one, or below 0; one that differs from the true one where everything is known."""
    torch.manual_seed(0)
    for _ in range(50):
        p, q = (torch.randn(9, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2))
        true = float((p.exp() * (p - q)).sum())
        known = [dict(enumerate(x.tolist())) for x in (p, q)]
        assert top_kl(*known) == pytest.approx(true, abs=1e-6)
        top = [dict(sorted(x.items(), key=lambda item: -item[1])[:4]) for x in known]
        assert 0 <= top_kl(*top) <= true + 1e-6
        assert top_kl(top[0], top[0]) == 0.0
    half = {1: math.log(0.5)}
    quarter = {1: math.log(0.25)}
    assert top_kl(half, quarter) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert top_kl(half, {2: math.log(0.5)}) == 0.0  # nothing is known of both


def test_tokens_are_compared_up_to_where_they_part() -> None:
    """Probabilities behind other tokens compared; the place of the difference, or its distribution, left out."""

    def outcome(tokens: list[int], logprobs: list[float], tops: list[dict[int, float]]) -> Outcome:
        completion = Completion(tokens, logprobs, top_logprobs=tops)
        return Outcome([completion], [[-1.0, -2.0]], [2.0, 1.0, 4.0], "", "", None)

    even, uneven = {5: math.log(0.5), 6: math.log(0.25)}, {5: math.log(0.25), 6: math.log(0.5)}
    a = outcome([5, 5, 5], [-0.7, -0.7, -0.7], [even, even, even])
    b = outcome([5, 6, 5], [-0.9, -0.7, -9.0], [even, uneven, {5: -9.0, 6: -9.0}])
    b.scored = [[-1.5, -1.0]]
    found = differences(a, b)
    assert found["tokens"]["first_difference"] == [1]
    assert (found["tokens"]["equal"], found["tokens"]["prompts_equal"]) == (1, 0)
    assert found["tokens"]["largest_margin"] == pytest.approx(math.log(2))
    assert found["decode"]["max_abs_delta"] == pytest.approx(0.2)
    assert found["decode"]["mean_delta"] == pytest.approx(-0.2)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found["top_kl"] == {"places": 2, "max": pytest.approx(expected), "mean": pytest.approx(expected / 2)}
    assert found["scored"] == {"tokens": 2, "max_abs_delta": 1.0, "mean_abs_delta": 0.75, "mean_delta": 0.25}
    assert a.tokens_per_second == 1.5
    assert differences(a, outcome([5, 5], [-0.7, -0.7], [even, even]))["tokens"]["first_difference"] == [2]


MISTAKES = {
    "compare.b=[]": "compare.a and compare.b are empty; list what differs",
    "compare.b=['engine.blocksize=4']": "compare.b: there is no key engine.blocksize; did you mean engine.block_size?",
    "compare.b=['engine.block_size=x']": "compare.b: engine.block_size=x: engine.block_size must be a whole number",
    "compare.b=['mode=serve']": "compare.b: mode=serve is not of the form model.KEY=VALUE",
    "compare.a=['model']": "compare.a: model is not of the form model.KEY=VALUE",
    "compare.b=['model.path=/nowhere']": "compare.b: model.path=/nowhere does not exist",
    "compare.b=['sampling.top_p=2']": "compare.b: sampling.top_p=2.0 must be above 0",
    "compare.b=['engine.num_blocks=1']": "compare.b: engine.num_blocks=1 blocks of 4 tokens cannot hold one sequence",
    "compare.b=['engine.max_seq_len=9']": "compare.b: ",
    "compare.b=['model.path={tmp}/alien']": "its tokenizer is another one than that of compare.a",
    "compare.max_tokens=0": "compare.max_tokens=0 must be at least 1",
    "compare.top_logprobs=1": "compare.top_logprobs=1 must be at least 2",
    "compare.prompt_tokens=[9,2]": "compare.prompt_tokens=[9, 2] must be one length",
    "compare.max_tokens=40": "a sequence needs 50 tokens (a prompt of 9",
    "sampling.max_tokens=4": "sampling.max_tokens=4 is compare.max_tokens in mode=compare",
}


@pytest.mark.thorough
def test_whatever_cannot_be_compared_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or the comparison of something else."""
    alien = tmp_path / "alien"
    alien.mkdir()
    for file in folder.iterdir():
        (alien / file.name).write_bytes(file.read_bytes())
    train_bpe(iter(["three two one " * 9]), 280).save(alien)
    good = [*SMALL, f"model.path={folder}", "compare.b=['engine.block_size=8']", "compare.prompt_tokens=[9]"]
    for override, says in MISTAKES.items():
        assert exit_code_of(lab, [*good, override.format(tmp=tmp_path)]) == 2, override
        problems = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith(("attention over", "cache: "))
        ]
        assert len(problems) == 1, problems
        assert problems[0].startswith("configuration error: ")
        assert says in problems[0]
