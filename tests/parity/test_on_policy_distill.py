"""recipe=gkd: a student taught on its own answers, as TRL and transformers have it, on every layout that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data.config import DataConfig, DataError
from data.prompts import read_prompts
from data.tokenizer import load_tokenizer
from models.config import ModelConfig
from tests.data.conversing import chat_folder, write_rows
from tests.parity.harness import Outcome, gradient_deviation, run_on
from tests.parity.test_preferences import tiny_llama
from tests.pool import RankPool
from tests.trainer.rl.rolling import rolling
from trainer.config import RecipeConfig, TrainConfig
from trainer.rl.config import RLConfig
from trainer.rl.student import is_own
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems

DIVERGENCE, TEMPERATURE, SEQ_LEN = 0.3, 2.0, 24
WORDS = ["one", "two", "three", "user", "assistant"]
ROWS = [
    {"prompt": " ".join(WORDS[: n % 3 + 1]), "completion": f" {n} {' '.join(WORDS[n % 4 :])}", "answer": str(n)}
    for n in range(21)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gkd")
    tiny_llama(path / "student", 0)
    tiny_llama(path / "teacher", 1)
    return path


def answering(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """8 prompts a step, half of them answered by the student."""
    rl = {key: changes.pop(key) for key in list(changes) if key.startswith("rl__")}
    share = changes.pop("on_policy", 0.5)
    sizes = {"train__seq_len": SEQ_LEN, "train__global_batch_size": 8, "train__micro_batch_size": 2}
    config = rolling(folder / name, **(sizes | {"rows": ROWS} | changes))
    config.model = ModelConfig(family="hf", path=str(folder / "student"))
    config.data.prompts.completion = "completion" if share < 1 else None
    config.recipe = RecipeConfig(
        name="distill",
        teacher_path=str(folder / "teacher"),
        divergence=DIVERGENCE,
        temperature=TEMPERATURE,
        on_policy=share,
        rl=RLConfig(**({"max_tokens": 8} | {key.removeprefix("rl__"): value for key, value in rl.items()})),
    )
    return config


def _first_step(config: TrainConfig) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each completion with its prompt, of the first step's micro-batches."""
    trainer = Trainer(finalize(config, world_size=1))
    try:
        found = []
        for batch in trainer.recipe.collect(trainer.train_data):
            assert batch.documents is not None
            for tokens, labels, documents in zip(batch.tokens, batch.labels, batch.documents, strict=True):
                for document in documents.unique():
                    here = documents == document
                    if (labels[here] != -100).any():
                        found.append((tokens[here].tolist(), labels[here].tolist()))
        return found
    finally:
        trainer.close()


def by_hand(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the labelled tokens, from the definition (2306.13649, eq. 1), times temperature squared."""
    s, t = (x.div(TEMPERATURE).softmax(-1) for x in (student, teacher))
    m = DIVERGENCE * t + (1 - DIVERGENCE) * s
    each = DIVERGENCE * (t * (t / m).log()).sum(-1) + (1 - DIVERGENCE) * (s * (s / m).log()).sum(-1)
    return each[labels != -100].sum() * TEMPERATURE**2


def by_trl(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """TRL has no temperature squared."""
    loss = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    kept = {"beta": DIVERGENCE, "temperature": TEMPERATURE, "reduction": "sum"}
    return loss(student, teacher, labels, **kept) * TEMPERATURE**2


@pytest.mark.parametrize("divergence", [by_hand, pytest.param(by_trl, marks=pytest.mark.thorough)])
def test_the_first_step_is_that_of_transformers_on_the_same_tokens(
    ranks: RankPool, folder: Path, divergence: Any
) -> None:
    """Prompts that are learned, a label one place off, a teacher that reads another completion, means of means."""
    config = answering(folder, divergence.__name__, train__steps=1)
    completions = ranks.run(1, _first_step, config)[0]
    assert len(completions) == 8
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name).double() for name in ("student", "teacher")
    )
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, labels in completions:
        with torch.no_grad():
            wanted = teacher(torch.tensor([tokens])).logits
        expected = torch.tensor([labels])
        total = total + divergence(student(torch.tensor([tokens])).logits, wanted, expected)
        count += int((expected != -100).sum())
    (total / count).backward()
    found = run_on(ranks, 1, config)
    (line,) = found.metrics
    assert line["loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert line["valid_tokens"] == count
    theirs = student.model.layers[0].mlp.down_proj.weight.grad
    ours = found.first_gradients["blocks.0.mlp.down.weight"]
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_rows_answer_the_prompts_that_the_student_does_not(ranks: RankPool, folder: Path) -> None:
    """A share that is not kept; the student's tokens in place of the row's, or a completion without its end."""
    config = answering(folder, "who", train__global_batch_size=18, data__shuffle=False)
    completions = ranks.run(1, _first_step, config)[0]
    prompts = read_prompts(config.data, load_tokenizer(config.data), max_prompt=SEQ_LEN - 1, vocab_size=300)[0]
    of_rows = [[*prompt.ids, *prompt.completion_ids][:SEQ_LEN] for prompt in prompts]
    whole = {(*tokens, labels[-1]) for tokens, labels in completions}
    own = [is_own(config.train.seed, number, 0.5) for number in range(18)]
    assert 4 < sum(own) < 14
    assert [tuple(tokens) in whole for tokens in of_rows[:18]] == [not mine for mine in own]
    assert abs(sum(is_own(3, number, 0.3) for number in range(10_000)) / 10_000 - 0.3) < 0.02


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path) -> Outcome:
    """One process, rows of one completion each, with validation."""
    return run_on(ranks, 1, answering(folder, "one", train__micro_batch_size=1, train__eval_interval=2))


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"parallel__zero_stage": 1},
    "zero3, gathered once": {"parallel__zero_stage": 3, "rl__weights": "gather"},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "compiled": {"train__compile": True, "train__compile_backend": "aot_eager"},
    "tp": {"parallel__tp": 2},
    "sp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "pp": {"parallel__pp": 2},
    "cp": {"parallel__cp": 2},
}
SAMPLED = ("on_policy", "valid_tokens", "tokens", "completion_tokens", "completion_tokens_max", "truncated")


def same(found: Outcome, wanted: Outcome) -> None:
    for ours, theirs in zip(found.metrics, wanted.metrics, strict=True):
        assert [ours[name] for name in SAMPLED] == [theirs[name] for name in SAMPLED]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name in ("validation_loss", "validation_exact_match"):
        assert found.metrics[-1][name] == pytest.approx(wanted.metrics[-1][name], rel=1e-5)
    assert gradient_deviation(found, wanted) < 2e-5


@pytest.mark.some(2, unless_thorough=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one(ranks: RankPool, folder: Path, reference: Outcome, layout: str) -> None:
    """Answers by rank; a rank with fewer micro-batches that leaves another waiting; packing that shows."""
    assert 0 < reference.metrics[0]["on_policy"] < 1
    changes = {"train__micro_batch_size": 3, "train__eval_interval": 2} | LAYOUTS[layout]
    same(run_on(ranks, 2, answering(folder, layout, **changes)), reference)


@pytest.mark.some(1)
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(ranks: RankPool, folder: Path, size: int) -> None:
    """Other prompts, or other choices of who answers, after a restart."""
    changes = {"train__steps": 4, "schedule__name": "constant", "on_policy": 0.7}
    whole = run_on(ranks, size, answering(folder, f"whole-{size}", **changes))
    config = answering(folder, f"cut-{size}", **changes | {"train__steps": 2})
    config.checkpoint.at_end = True
    run_on(ranks, size, config)
    config.train.steps = 4
    again = run_on(ranks, size, config)
    numbers = ("loss", "grad_norm", *SAMPLED)
    assert [[line[n] for n in numbers] for line in again.metrics] == [
        [line[n] for n in numbers] for line in whole.metrics
    ]
    assert len(again.metrics) == 4
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)


def test_a_student_learns_from_its_own_answers(ranks: RankPool, folder: Path) -> None:
    """A gradient of the wrong sign, or rollouts by the weights of the first step for ever."""
    changes = {"train__steps": 30, "schedule__name": "constant", "optim__lr": 1e-2, "on_policy": 1.0}
    losses = run_on(ranks, 1, answering(folder, "learns", **changes)).losses
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"on_policy": 1.5}, "recipe.on_policy=1.5 must lie between 0 and 1"),
        ({"on_policy": 0.0}, "recipe.on_policy=0.0 with data.source=prompts: nobody answers them"),
        ({"rl__group_size": 4}, "recipe.rl.group_size is set and has no effect with recipe.name=distill"),
        ({"rl__weights": "here"}, "recipe.rl.weights=here is unknown"),
        ({"rl__max_tokens": 24}, "recipe.rl.max_tokens=24 must be at least 1 and leave room for a prompt"),
        ({"data__mask_documents": False}, "data.mask_documents=false lets the completions of a row see one another"),
    ],
)
def test_what_does_not_work_is_refused_in_a_line(folder: Path, changes: dict[str, Any], says: str) -> None:
    lines = find_problems(answering(folder, "refused", **changes), world_size=2)
    assert any(says in line for line in lines), lines


def test_fields_without_effect_are_refused_in_a_line(folder: Path) -> None:
    config = answering(folder, "unread")
    config.recipe.teacher_cache, config.recipe.nll_weight = "somewhere", 0.1
    config.data.prompts.completion = None
    lines = find_problems(config, world_size=1)
    assert [line.split(" ")[0] for line in lines] == [
        "data.prompts.completion",
        "recipe.teacher_cache=somewhere",
        "recipe.nll_weight=0.1",
    ]
    config = answering(folder, "unread", on_policy=1.0)
    config.data.prompts.completion = "completion"
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("data.prompts.completion=completion has no effect with recipe.on_policy=1.0")
    config.recipe = RecipeConfig(name="grpo")
    assert any(
        "data.prompts.completion=completion has no effect" in line for line in find_problems(config, world_size=1)
    )


def prompts_of(folder: Path, row: dict[str, Any]) -> Any:
    data = DataConfig(source="prompts", path=str(write_rows(folder / "rows.jsonl", [row])))
    data.tokenizer.path = str(chat_folder(folder / "tokenizer"))
    data.prompts.completion = "completion"
    tokenizer = load_tokenizer(data)
    (prompt,) = read_prompts(data, tokenizer, max_prompt=99, vocab_size=300)[0]
    return tokenizer.decode(prompt.completion_ids)


def test_answers_of_rows_are_text_or_messages(tmp_path: Path) -> None:
    """A turn that the template does not end, or that eos ends twice; an answer that is not there."""
    asked = [{"role": "user", "content": "one"}]
    said = "two<|im_end|>\n"
    assert prompts_of(tmp_path, {"prompt": "one", "completion": " two"}).startswith(" two<")
    assert prompts_of(tmp_path, {"prompt": asked, "completion": "two"}) == said
    assert prompts_of(tmp_path, {"prompt": asked, "completion": [{"role": "assistant", "content": "two"}]}) == said
    for row in ({"prompt": "one"}, {"prompt": "one", "completion": ""}, {"prompt": "one", "completion": asked}):
        with pytest.raises(DataError, match="is no answer to that prompt"):
            prompts_of(tmp_path, row)
