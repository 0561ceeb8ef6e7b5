"""launch/lab.py: a folder or a checkpoint in, completions out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from data.tokenizer import Tokenizer
from inference.engine import Engine
from kernels.paged_attention import implementation
from launch.convert import convert
from launch.errors import exit_code_of
from launch.lab import lab
from launch.lab_config import LabConfig
from launch.modes.files import token_prompts
from launch.open_model import OpenedModel
from tests.models.small import random_decoder, tiny
from tests.pool import RankPool

PROMPTS: list[dict[str, Any]] = [{"prompt": "one two", "id": "a"}, {"prompt_ids": [3, 1, 4, 1, 5]}, {"prompt": "three"}]
SETTINGS = ["sampling.temperature=0", "sampling.max_tokens=7", "engine.block_size=4"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in PROMPTS))
    return path


def by_transformers(folder: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = Tokenizer.from_path(folder)
    found = []
    for line in PROMPTS:
        inputs = torch.tensor([line.get("prompt_ids") or tokenizer.encode(line["prompt"])])
        outputs = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=7, do_sample=False, pad_token_id=0
        )
        found.append(outputs[0, inputs.shape[1] :].tolist())
    return found


def run(*arguments: str) -> None:
    assert exit_code_of(lab, list(arguments)) == 0


def test_a_folder_and_a_checkpoint_give_the_tokens_of_transformers(
    ranks: RankPool, folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """Weights in the wrong place, prompts out of order, text of other tokens, a checkpoint without its tokenizer."""
    ranks.run(1, convert, ["import", str(folder), str(tmp_path / "imported")])
    expected = by_transformers(folder)
    for model in (folder, tmp_path / "imported" / "step_0", tmp_path / "imported"):
        out = tmp_path / "new" / "out.jsonl"
        run("mode=generate", f"model.path={model}", f"prompts={prompts}", f"out={out}", *SETTINGS)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["token_ids"] for line in lines] == expected
        tokenizer = Tokenizer.from_path(folder)
        for line, prompt in zip(lines, PROMPTS, strict=True):
            assert prompt.items() <= line.items()
            kept = [token for token in line["token_ids"] if token != tokenizer.eos_id]
            assert line["text"] == tokenizer.decode(kept)
            assert len(line["logprobs"]) == len(line["token_ids"])
            assert all(logprob <= 0 for logprob in line["logprobs"])


def test_prompts_of_text_begin_alike_in_every_mode(folder: Path) -> None:
    """Modes that compare or measure on other tokens than mode=generate continues: without a bos."""
    core = tokenizers.Tokenizer.from_str(Tokenizer.from_path(folder).to_json())
    special = [("<|endoftext|>", 0)]
    core.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, special)
    tokenizer = Tokenizer(core, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    opened = OpenedModel(random_decoder(tiny(vocab_size=tokenizer.vocab_size)), tokenizer, None, [])
    config = LabConfig(prompt="one two")
    assert token_prompts(config, opened) == [[0, *tokenizer.encode("one two")]]
    assert token_prompts(config, opened) == [Engine(opened.model, tokenizer=tokenizer).prepare("one two").tokens]
    config.sampling.add_special_tokens = False
    assert token_prompts(config, opened) == [tokenizer.encode("one two")]


def test_one_prompt_goes_to_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file needed to try something out; or lines between the results."""
    run(f"model.path={folder}", "prompt=one two", "sampling.prompt_logprobs=true", "sampling.top_logprobs=2", *SETTINGS)
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert "attention over the cache: reference (on cpu)" in captured.err
    found = json.loads(line)
    assert found["finish_reason"] in ("length", "stop")
    assert found["prompt_logprobs"][0] is None
    assert all(len(top) == 2 for top in found["top_logprobs"])


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.bfloat16, "reference (on cpu)"),
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "reference (triton has no fp64)"),
    ],
)
def test_what_computes_attention_is_said(device: str, dtype: torch.dtype, expected: str) -> None:
    """A reference that runs in place of a kernel, and nobody is told."""
    assert implementation(torch.device(device), dtype) == expected


MISTAKES = {
    "model.path=/nowhere": "model.path=/nowhere does not exist; give a Hugging Face folder or a checkpoint",
    "model.path={tmp}": "model.path={tmp} holds no checkpoint",
    "prompts=/nowhere.jsonl": "prompts=/nowhere.jsonl is no file",
    "prompts={tmp}/wrong.jsonl": "wrong.jsonl, line 2 must be an object with either prompt or prompt_ids",
    "prompts={tmp}/long.jsonl": "prompts[1]: the prompt has 40 tokens; engine.max_seq_len=32 leaves room",
    "prompts={tmp}/large.jsonl": "prompts[0]: the prompt has the token id 9999, outside of the model's vocabulary",
    "sampling.max_tokens=0": "sampling.max_tokens=0 must be at least 1, or null",
    "sampling.temperatur=0": "there is no key sampling.temperatur; did you mean sampling.temperature?",
    "model=llama_tiny": "model is not a value; set model.path, model.dtype, model.tokenizer",
    "mode=sevre": "mode=sevre is unknown; use generate, chat, serve",
    "sampling.regex='[a'": "prompts[0]: sampling.regex is wrong",
    "sampling.grammar=@/nowhere": "sampling.grammar=@/nowhere: the file cannot be read",
    "prompt=x": "one of prompts=IN.jsonl and prompt=TEXT is needed",
    "out={tmp}": "is a folder; give a file",
    "speculation.method=drft": "speculation.method=drft is unknown; use none, ngram",
    "speculation.draft_path=/nowhere": "speculation.draft_path=/nowhere does not exist",
    "speculation.method=eagle": "speculation.method=eagle needs model.speculator_path=DIR",
    "model.speculator_path={tmp}": "model.speculator_path={tmp} has no effect with speculation.method=none",
    "speculation.method=mtp": "speculation.method=mtp needs the folder's block of multi-token prediction",
    "model.mtp_depth=1": "model.mtp.depth=1, but",
}


def test_whatever_cannot_be_done_is_one_line(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, a run that begins and fails at the last prompt, or a file of results that is half there."""
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    (tmp_path / "long.jsonl").write_text(f'{{"prompt": "x"}}\n{{"prompt_ids": {[1] * 40}}}\n')
    (tmp_path / "large.jsonl").write_text('{"prompt_ids": [9999]}\n')
    good = [f"model.path={folder}", f"prompts={prompts}", f"out={tmp_path / 'out.jsonl'}", *SETTINGS]
    for override, says in MISTAKES.items():
        assert exit_code_of(lab, [*good, override.format(tmp=tmp_path)]) == 2, override
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("configuration error: ")
        assert says.format(tmp=tmp_path) in line
    assert not (tmp_path / "out.jsonl").exists()


def test_a_tokenizer_of_another_model_is_refused(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text of tokens that mean something else; a document that cannot end."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "<end>": 4000}, unk_token="one"))
    Tokenizer(core, eos_token="<end>", bos_token=None).save(tmp_path)
    arguments = [f"model.path={folder}", f"prompts={prompts}", f"model.tokenizer={tmp_path}", *SETTINGS]
    assert exit_code_of(lab, arguments) == 2
    assert "they do not belong together" in capsys.readouterr().err


def test_drafts_change_nothing_but_what_is_said_of_them(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A drafter that the lab does not hand to the engine, or says nothing about."""
    plain, drafted = tmp_path / "plain.jsonl", tmp_path / "drafted.jsonl"
    common = ["mode=generate", f"model.path={folder}", f"prompts={prompts}", *SETTINGS]
    run(*common, f"out={plain}")
    run(*common, f"out={drafted}", "speculation.method=draft", f"speculation.draft_path={folder}")
    assert "speculation by draft model llama of 2 layers x 24: " in capsys.readouterr().err
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in (plain, drafted)]
    for before, after in zip(*lines, strict=True):
        assert after["token_ids"] == before["token_ids"]
        assert after["speculation"]["acceptance"] == [1.0] * len(after["speculation"]["drafted"])
