"""mode=eval: perplexities as transformers would give them, tasks by the real lm-evaluation-harness if it is there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from data.tokenizer import Tokenizer
from launch.errors import exit_code_of
from launch.lab import lab

TEXT = "one two three\ntwo — one! " * 7
EXACT = ["mode=eval", "model.dtype=fp64", "engine.block_size=4", "eval.bos=false"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert exit_code_of(lab, [*EXACT, f"out={out}", *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@torch.no_grad()
def by_transformers(folder: Path, tokens: list[int], window: int, stride: int) -> tuple[float, int]:
    """Nats and tokens, by the loop that its documentation has for models of fixed length, weighted by tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids, total, count, before = torch.tensor([tokens]), 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        inputs, targets = ids[:, begin:end], ids[:, begin:end].clone()
        targets[:, : -(end - before)] = -100
        scored = int((targets[:, 1:] != -100).sum())
        total, count = total + float(model(inputs, labels=targets).loss) * scored, count + scored
        before = end
        if end == len(tokens):
            break
    return total, count


@pytest.mark.parametrize(
    ("settings", "window", "stride"),
    [([], 32, 16), (["eval.window=9", "eval.stride=4", "engine.max_sequences=2"], 9, 4), (["eval.stride=32"], 32, 32)],
)
def test_perplexity_is_that_of_transformers(
    folder: Path, text: Path, tmp_path: Path, settings: list[str], window: int, stride: int
) -> None:
    """Tokens that are weighted by their window, lost at its beginning, or scored twice; characters taken for bytes."""
    tokenizer = Tokenizer.from_path(folder)
    tokens = tokenizer.encode(TEXT)
    report = run(tmp_path / "report.json", f"model.path={folder}", f"eval.text={text}", *settings)
    nll, count = by_transformers(folder, tokens, window, stride)
    assert (report["tokens"], report["scored_tokens"]) == (len(tokens), count)
    assert (report["window"], report["stride"]) == (window, stride)
    assert report["nll"] == pytest.approx(nll, rel=1e-6)  # transformers computes the loss in fp32
    assert report["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-6)
    lost = len("one") if stride < window else len("one") + 1 + len("t")  # 1: of the three of a dash
    assert report["bytes"] == len(TEXT.encode()) - lost
    assert report["bits_per_byte"] == pytest.approx(nll / math.log(2) / report["bytes"], rel=1e-6)


def test_tokens_need_no_tokenizer_and_a_beginning_scores_the_first(folder: Path, text: Path, tmp_path: Path) -> None:
    """Another likelihood of the same tokens; a token of the tokenizer counted among the text's bytes."""
    tokenizer = Tokenizer.from_path(folder)
    tokens = tokenizer.encode(TEXT)
    np.save(tmp_path / "tokens.npy", np.array(tokens, dtype=np.uint16))
    out = tmp_path / "report.json"
    common = [f"model.path={folder}", "eval.window=9", "eval.stride=4"]
    expected = run(out, *common, f"eval.text={text}")
    report = run(out, *common, f"eval.text={tmp_path / 'tokens.npy'}")
    assert (report["nll"], report["bits_per_byte"]) == (expected["nll"], None)
    begun = run(out, *common, f"eval.text={text}", "eval.bos=true")
    assert (begun["scored_tokens"], begun["bytes"]) == (len(tokens), len(TEXT.encode()))
    nll, _ = by_transformers(folder, [Tokenizer.from_path(folder).bos_id or 0, *tokens], 9, 4)
    assert begun["nll"] == pytest.approx(nll, rel=1e-6)


MISTAKES = {
    "eval.text=null": "one of eval.text=FILE (perplexity) and eval.tasks=[NAME,...]",
    "eval.tasks=[arc_easy]": "one of eval.text=FILE (perplexity) and eval.tasks=[NAME,...]",
    "eval.text=/nowhere": "eval.text=/nowhere is no file; give a text in UTF-8, or tokens as .npy",
    "eval.text={tmp}/latin.txt": "latin.txt is not UTF-8",
    "eval.text={tmp}/empty.txt": "empty.txt has 0 tokens; the first has no context, so 2 are needed",
    "eval.text={tmp}/wrong.npy": "tokens are one dimension of whole numbers",
    "eval.text={tmp}/large.npy": "large.npy has the token 9999, outside of the model's vocabulary",
    "eval.window=1": "eval.window=1 must be at least 2, or null",
    "eval.stride=0": "eval.stride=0 must be at least 1, or null",
    "eval.stride=33": "eval.stride=33 leaves tokens out between windows of 32; use at most 32",
    "engine.max_seq_len=8 eval.window=9": "do not fit into engine.max_seq_len=8; use eval.window=7 or less",
    "eval.limit=3": "eval.limit is of eval.tasks, which are not there",
    "prompt=x": "prompt is of mode=generate; mode=eval reads eval.text or eval.tasks",
    "sampling.top_p=0.5": "sampling.top_p is set and has no effect with mode=eval; leave it out",
    "out={tmp}": "is a folder; give a file",
}


def test_whatever_cannot_be_evaluated_is_one_line(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or the perplexity of something else."""
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6")
    (tmp_path / "empty.txt").write_text("")
    np.save(tmp_path / "wrong.npy", np.zeros((2, 2)))
    np.save(tmp_path / "large.npy", np.array([1, 9999]))
    good = [*EXACT, f"model.path={folder}", f"eval.text={text}"]
    for override, says in MISTAKES.items():
        assert exit_code_of(lab, [*good, *override.format(tmp=tmp_path).split()]) == 2, override
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("configuration error: ")
        assert says in line


def test_tasks_without_the_harness_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import error after the model was read."""
    monkeypatch.setattr("launch.modes.eval.harness_is_there", lambda: False)
    assert exit_code_of(lab, [*EXACT, f"model.path={folder}", "eval.tasks=[arc_easy]"]) == 2
    assert "eval.tasks needs lm-eval; pip install 'lattice-train[eval]'" in capsys.readouterr().err


TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
""",
    "own_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
  - metric: word_perplexity
""",
    "own_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["!"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
""",
}
DOCUMENTS = [
    {"question": "one two", "choices": ["three", "two one", "!"], "answer": 1},
    {"question": "two three one", "choices": ["one", "three"], "answer": 0},
    {"question": "three", "choices": ["two", "one", "xyz xyz"], "answer": 2},
]


@pytest.mark.thorough  # it looks at all tasks there are
def test_the_real_harness_runs_against_the_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that fits another version; answers in another order. Choices are recomputed by transformers."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, content in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{source}{content}")
    names = f"eval.tasks=[{','.join(TASKS)}]"
    few = ["eval.bootstrap_iters=0", f"model.path={folder}"]
    report = run(tmp_path / "report.json", names, f"eval.tasks_path={tasks}", *few)
    assert report["n-samples"]["own_choice"]["effective"] == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = Tokenizer.from_path(folder)

    @torch.no_grad()
    def logprob(context: list[int], continuation: list[int]) -> float:
        table = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        return sum(float(table[len(context) - 1 + n, token]) for n, token in enumerate(continuation))

    right = 0
    for document in DOCUMENTS:
        context = tokenizer.encode(str(document["question"]))
        wholes = [tokenizer.encode(f"{document['question']} {choice}") for choice in document["choices"]]  # type: ignore
        scores = [logprob(context, whole[len(context) :]) for whole in wholes]
        right += int(np.argmax(scores)) == document["answer"]
    assert report["results"]["own_choice"]["acc,none"] == pytest.approx(right / 3)
    questions = [str(document["question"]) for document in DOCUMENTS]
    nll = -sum(logprob([tokenizer.eos_id], tokenizer.encode(question)) for question in questions)
    expected = nll / math.log(2) / sum(len(question) for question in questions)
    assert report["results"]["own_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)
    assert 0 <= report["results"]["own_answer"]["exact_match,none"] <= 1
    assert exit_code_of(lab, [*EXACT, *few, "eval.tasks=[no_such_task]"]) == 2
