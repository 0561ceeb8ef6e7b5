"""recipe.answers: what a validation generates, and its share of right answers, are transformers' on every layout."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from data.config import DataError
from inference.config import EngineConfig
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from tests.data.conversing import MARKED, chat_config
from tests.models.oracle import pair
from tests.parity.harness import Outcome, gradient_deviation, run_and_count_graphs, run_on, tiny_config
from tests.parity.test_preferences import tiny_llama
from tests.pool import RankPool
from trainer.config import RecipeConfig, TrainConfig
from trainer.convert import export_checkpoint
from trainer.recipes.sft import SupervisedFineTuning
from trainer.rl.answers_config import AnswersConfig
from trainer.rl.config import RLConfig
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems

SEQ_LEN, MAX_TOKENS = 64, 12
WORDS = ["one", "two", "three", "user", "assistant"]


def row(number: int) -> dict[str, Any]:
    """A conversation, of two turns every third time; the answer says the word asked for, or another."""
    word = WORDS[number % 5]
    said = word if number % 7 else "two"
    turns = [("user", f"{word} {number}?"), ("assistant", f" {said}  {3 * (number % 5)}")]
    if number % 3 == 0:
        turns = [("user", "one?"), ("assistant", "two 1"), *turns]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROWS = [row(number) for number in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers")
    tiny_llama(path / "model", 0)
    return path


def answering(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """A run that learns to answer, and validates twice. changes: as of tiny_config, answers__NAME and rl__NAME."""
    answers = {key.partition("__")[2]: changes.pop(key) for key in list(changes) if key.startswith("answers__")}
    rl = {key.partition("__")[2]: changes.pop(key) for key in list(changes) if key.startswith("rl__")}
    rows = changes.pop("rows", ROWS)
    fields = changes.pop("conversations", {})
    data = chat_config(folder / name, rows, **({"template": MARKED, "data": {"validation_fraction": 0.25}} | fields))
    sizes = {"train__seq_len": SEQ_LEN, "train__global_batch_size": 8, "train__micro_batch_size": 4}
    sizes |= {"train__steps": 40, "train__eval_interval": 20, "optim__lr": 2e-2, "schedule__warmup_steps": 0}
    config = tiny_config(folder / f"{name}-run", data, **(sizes | changes))
    config.model = ModelConfig(family="hf", path=str(folder / "model"))
    wanted = {"prompts": 13, "max_tokens": MAX_TOKENS} | answers
    config.recipe = RecipeConfig("sft", answers=AnswersConfig(**wanted), rl=RLConfig(**rl))
    return config


def answered(config: TrainConfig) -> list[str]:
    """The answers of the last validation of a run in this process, in the order of its questions."""
    trainer = Trainer(finalize(config, world_size=1))
    try:
        trainer.run()
        answers: Any = trainer.recipe.answers  # type: ignore[attr-defined]
        found: list[str] = []
        judged = answers._judged
        answers._judged = lambda rollout: found.append((one := judged(rollout)).text) or one
        answers.validate()
        return found
    finally:
        trainer.close()


def metrics_of(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "validation_loss" in line]


def held_out(config: TrainConfig) -> list[dict[str, Any]]:
    """The rows that no sequence of the training split has, by its tokens."""
    recipe = SupervisedFineTuning()
    data = recipe.open_data(finalize(config, world_size=1), split="train", rank=0, world_size=1, device_type="cpu")
    assert data.tokenizer is not None
    trained = "".join(data.tokenizer.decode(row) for step in data.batches(None) for b in step for row in b.tokens)
    rows = map(json.loads, Path(str(config.data.path)).read_text().splitlines())
    return [row for row in rows if not re.search(rf"(?<!\d){re.escape(question(row))}", trained)]


def question(row: dict[str, Any]) -> str:
    """Text that no other row has."""
    return row["prompt"] if "prompt" in row else row["messages"][-2]["content"].split()[1]


@cache
def model_in(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )


@torch.no_grad()
def by_transformers(folder: Path, ids: list[int], ends: list[int]) -> list[int]:
    model = model_in(folder)
    found = model.generate(
        torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    return found[0, len(ids) :].tolist()


def theirs(folder: Path) -> Any:
    """The tokenizer of a folder that a run was exported to, as transformers has it."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_answers_and_their_share_are_those_of_transformers(ranks: RankPool, folder: Path) -> None:
    """Questions that were trained on; another turn's answer; one that goes on behind its end; the first of two turns.

    Of the 13 first questions some are answered rightly and some are not.
    """
    config = answering(folder, "oracle", checkpoint__at_end=True)
    (found,) = ranks.run(1, answered, config)
    exported = folder / "exported"
    export_checkpoint(Path(config.run.dir), exported)
    tokenizer = theirs(exported)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    rows = held_out(config)
    assert len(rows) == 15
    expected, right = [], 0
    for one in rows[:13]:
        *asked, answer = one["messages"]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        text = tokenizer.decode(by_transformers(exported, ids, ends), skip_special_tokens=True)
        expected.append(text)
        right += text.split() == answer["content"].split()
    assert found == expected
    assert 0 < right < 13
    first, last = metrics_of(config)
    assert last["validation_exact_match"] == right / 13 != first["validation_exact_match"]
    assert last["validation_completions"] == 13
    said = [event for event in events_of(config) if event["kind"] == "answers"]
    assert [event["step"] for event in said] == [20, 40]
    assert said[-1]["text"] == f"{right} of 13 held-out prompts answered as their rows are"
    assert said[-1]["sample"] == found[0]
    assert said[-1]["prompt"].endswith("<|im_start|>assistant\n")


def events_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "events.jsonl").read_text().splitlines()]


SUMS = [{"prompt": f"{n} one two", "completion": f" so {n % 4}\nthat is {n % 3}.0"} for n in range(10, 70)]


def test_final_answers_of_rows_of_text_are_compared_as_numbers(ranks: RankPool, folder: Path) -> None:
    """An answer that ends at another token than eos, or that has to be the row's word for word; all questions."""
    changes = {"answers__compare": "final", "answers__prompts": 99, "rows": SUMS, "checkpoint__at_end": True}
    config = answering(folder, "final", **changes)
    (found,) = ranks.run(1, answered, config)
    exported = folder / "final-exported"
    export_checkpoint(Path(config.run.dir), exported)
    tokenizer, rows, right = theirs(exported), held_out(config), []
    for text, one in zip(found, rows, strict=True):
        ids = tokenizer(one["prompt"], add_special_tokens=False)["input_ids"]
        assert text == tokenizer.decode(by_transformers(exported, ids, [0]), skip_special_tokens=True)
        numbers = re.findall(r"\d+(?:\.\d+)?", text)
        right.append(bool(numbers) and float(numbers[-1]) == float(one["completion"].split()[-1]))
    assert len(rows) == 15
    last = metrics_of(config)[-1]
    assert 0 < last["validation_exact_match"] == sum(right) / 15 < 1
    assert last["validation_completions"] == 15


@pytest.fixture(scope="module")
def taught(ranks: RankPool, folder: Path) -> Path:
    """A model that answers some of the questions, and not by a hair."""
    config = answering(folder, "taught", checkpoint__at_end=True, answers__prompts=0)
    run_on(ranks, 1, config)
    export_checkpoint(Path(config.run.dir), folder / "model-taught")
    return folder / "model-taught"


def going_on(folder: Path, taught: Path, name: str, **changes: Any) -> TrainConfig:
    config = answering(folder, name, **({"train__steps": 2, "train__eval_interval": 1, "optim__lr": 1e-4} | changes))
    config.model.path = str(taught)
    return config


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path, taught: Path) -> Outcome:
    return run_on(ranks, 1, going_on(folder, taught, "one"))


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"parallel__zero_stage": 1},
    "zero3, gathered once": {"parallel__zero_stage": 3},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "tp": {"parallel__tp": 2},
    "sp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "cp": {"parallel__cp": 2, "parallel__zero_stage": 3},
    "pp": {"parallel__pp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_answer_as_one(ranks: RankPool, folder: Path, taught: Path, reference: Outcome, layout: str) -> None:
    """Shares of shares: one rank has a question more; questions that two ranks answer, or none; weights that are gone
    when training goes on."""
    found = run_on(ranks, 2, going_on(folder, taught, layout, **LAYOUTS[layout]))
    for ours, wanted in zip(found.metrics, reference.metrics, strict=True):
        assert 0 < ours["validation_exact_match"] == wanted["validation_exact_match"] < 1
        assert ours["validation_completions"] == 13
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert ours["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-5)


def test_training_has_the_same_bits_with_and_without_answers(
    ranks: RankPool, folder: Path, taught: Path, reference: Outcome
) -> None:
    """Random numbers or weights that an engine leaves changed. Fields of answers that are off change nothing."""
    found = run_on(ranks, 1, going_on(folder, taught, "off", answers__prompts=0))
    assert found.losses == reference.losses
    assert all(torch.equal(found.weights[name], reference.weights[name]) for name in reference.weights)
    assert not any("exact_match" in name for line in found.metrics for name in line)


def test_compiled_blocks_train_and_their_weights_answer_eagerly(
    ranks: RankPool, folder: Path, taught: Path, reference: Outcome
) -> None:
    """A graph for every step of the engine, as each has a number of tokens of its own; blocks that stay eager after a
    validation."""
    config = going_on(folder, taught, "compiled", train__compile=True, train__compile_backend="aot_eager")
    config.model.fused_projections = False  # for which an engine has launches of its own
    ((found, graphs),) = ranks.run(1, run_and_count_graphs, config)
    # Training and validation, each also for a last micro-batch of fewer rows; the two layers share them.
    assert 2 <= graphs <= 4
    for ours, wanted in zip(found.metrics, reference.metrics, strict=True):
        assert ours["validation_exact_match"] == wanted["validation_exact_match"]
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert ours["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-6)
    assert gradient_deviation(found, reference) < 1e-5


def test_adapters_answer_with_what_they_learned(ranks: RankPool, folder: Path, taught: Path) -> None:
    """An engine that serves the base: the share of the model without adapters would stay."""
    changes = {"train__steps": 30, "train__eval_interval": 15, "optim__lr": 2e-2}
    config = going_on(folder, taught, "adapters", **changes)
    config.model.path, config.adapter = str(folder / "model"), AdapterConfig(name="lora", rank=8, alpha=16.0)
    config.checkpoint.at_end = True
    (found,) = ranks.run(1, answered, config)
    export_checkpoint(Path(config.run.dir), folder / "adapters-exported")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    merged = peft.PeftModel.from_pretrained(base, str(folder / "adapters-exported")).double().merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tokenizer = theirs(folder / "model-taught")
    ends = [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for text, one in zip(found[:5], held_out(config), strict=False):
        asked = one["messages"][:-1]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert text == tokenizer.decode(by_transformers(folder / "merged", ids, ends), skip_special_tokens=True)


def mixture(path: Path) -> Path:
    """Like tiny_llama, of experts."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=SEQ_LEN, initializer_range=0.2, bos_token_id=None,
        eos_token_id=0, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.thorough
def test_models_that_cannot_learn_from_rollouts_answer_as_transformers_says(ranks: RankPool, folder: Path) -> None:
    """Dropout, or a capacity of experts, in answers; experts of ZeRO-3 that are not gathered."""
    config = answering(folder, "mixture", train__eval_interval=20, checkpoint__at_end=True)
    config.model.path, config.model.dropout = str(mixture(folder / "mixture-model")), 0.05
    config.model.routing.capacity_factor = 1.5
    (found,) = ranks.run(1, answered, config)
    exported = folder / "mixture-exported"
    export_checkpoint(Path(config.run.dir), exported)
    tokenizer = theirs(exported)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    for text, one in zip(found, held_out(config), strict=False):
        asked = one["messages"][:-1]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert text == tokenizer.decode(by_transformers(exported, ids, ends), skip_special_tokens=True)

    sharded = answering(folder, "mixture-zero3", parallel__zero_stage=3)
    sharded.model = config.model
    run_on(ranks, 2, sharded)
    for ours, wanted in zip(metrics_of(sharded), metrics_of(config), strict=True):
        assert ours["validation_exact_match"] == wanted["validation_exact_match"]
        assert ours["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-5)
    assert any(line["validation_exact_match"] > 0 for line in metrics_of(config))


def test_a_student_is_asked_as_well(ranks: RankPool, folder: Path, taught: Path, reference: Outcome) -> None:
    """recipe=distill on conversations: the same questions, before a step of any size."""
    config = going_on(folder, taught, "student", train__steps=1, optim__lr=0.0)
    config.recipe.name, config.recipe.teacher_path = "distill", str(folder / "model")
    (line,) = run_on(ranks, 1, config).metrics
    still = run_on(ranks, 1, going_on(folder, taught, "still", train__steps=1, optim__lr=0.0)).metrics[0]
    assert 0 < line["validation_exact_match"] == still["validation_exact_match"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answers__prompts": -1}, "recipe.answers.prompts=-1 must not be negative"),
        ({"answers__compare": "near"}, "recipe.answers.compare=near is unknown; use recipe.answers.compare=text or"),
        ({"answers__max_tokens": 0}, "recipe.answers.max_tokens=0 must be at least 1"),
        ({"answers__max_tokens": 64}, "recipe.answers.max_tokens=64 must be at least 1 and leave room for a prompt"),
        ({"train__eval_interval": 0}, "recipe.answers.prompts=13 with train.eval_interval=0: answers are part of"),
        (
            {"parallel__pp": 2, "rl__weights": "stream"},
            "recipe.rl.weights=stream with parallel.pp=2: the blocks of other stages do not run here",
        ),
        ({"rl__engine": EngineConfig(block_size=0)}, "recipe.rl.engine.block_size=0 must be at least 1"),
        (
            {"rl__engine": EngineConfig(preemption="swap")},
            "recipe.rl.engine.preemption=swap has nowhere to swap to; set recipe.rl.engine.host_blocks",
        ),
        ({"rl__engine": EngineConfig(max_seq_len=9)}, "recipe.rl.engine.max_seq_len=9 has no effect: train.seq_len"),
        ({"rl__weights": "here"}, "recipe.rl.weights=here is unknown"),
        ({"rl__weights": "stream"}, "recipe.rl.weights=stream with parallel.zero_stage=0"),
        ({"rl__group_size": 4}, "recipe.rl.group_size is set and has no effect with recipe.name=sft"),
        ({"rl__weights": "gather", "answers__prompts": 0}, "recipe.rl is set and has no effect with recipe.answers"),
    ],
)
def test_what_does_not_work_is_refused_in_a_line(folder: Path, changes: dict[str, Any], says: str) -> None:
    config = answering(folder, "refused", **changes)
    lines = find_problems(config, world_size=2 if "parallel__pp" in changes else 1)
    assert [line for line in lines if line.startswith(says)], lines
    assert len(lines) == 1


def test_latent_attention_is_refused_where_its_matrix_is_adapted(tmp_path: Path, folder: Path) -> None:
    """An engine that reads the weight of a layer and not its adapter."""
    config = answering(folder, "latent")
    pair("deepseek_v2", tmp_path / "latent")
    config.model.path, config.adapter = str(tmp_path / "latent"), AdapterConfig(name="lora", rank=3)
    says = "recipe.answers.prompts=13 does not work with adapter.name=lora: answers attend through pages"
    assert any(line.startswith(says) for line in find_problems(config, world_size=1))
    config.adapter.targets = ["o"]
    assert not any(line.startswith(says) for line in find_problems(config, world_size=1))


def test_students_that_answer_and_other_recipes_have_no_use_for_it(folder: Path) -> None:
    config = answering(folder, "unread")
    config.recipe.name = "pretrain"
    lines = find_problems(config, world_size=1)
    assert "recipe.answers is set and has no effect with recipe.name=pretrain; leave it out" in lines
    config.recipe.name, config.recipe.teacher_path = "distill", str(folder / "model")
    assert find_problems(config, world_size=1) == []
    config.data.source, config.recipe.on_policy = "prompts", 1.0
    (line,) = (line for line in find_problems(config, world_size=1) if "answers" in line)
    assert line.startswith("recipe.answers.prompts=13 has no effect with recipe.on_policy=1.0")


TEXTS = [{"text": f"one two {n}"} for n in range(40)]
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LONG = [
    {"messages": [*row(1)["messages"], {"role": "user", "content": f"{n}" * 40}, row(2)["messages"][1]]}
    for n in range(40)
]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"rows": TEXTS, "conversations": {"loss_on": "all"}}, "nothing in it stands apart as its answer"),
    "words": (
        {
            "rows": [
                {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "one"}]}
                for n in range(40)
            ],
            "answers__compare": "final",
        },
        "has nothing that recipe.answers.compare finds",
    ),
    "template": ({"conversations": {"template": PLAIN}}, "no special token ends an answer"),
    "long": ({"rows": LONG, "train__seq_len": 48}, "leaves no room for an answer in train.seq_len=48"),
}


@pytest.mark.parametrize("what", WRONG)
def test_rows_that_cannot_be_asked_or_answered_are_one_error(folder: Path, what: str) -> None:
    """A share of nothing, or of questions that were dropped without a word."""
    changes, says = WRONG[what]
    config = finalize(answering(folder, f"wrong-{what}", **changes), world_size=1)
    with pytest.raises(DataError, match=re.escape(says)):
        SupervisedFineTuning().open_data(config, split="validation", rank=0, world_size=1, device_type="cpu")
