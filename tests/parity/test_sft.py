"""recipe=sft: the loss of the answers' tokens alone, as plain PyTorch has it, whatever the packing and the layout."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from data.batch import IGNORE_INDEX
from models.config import ModelConfig
from tests.data.conversing import MARKED, TURNS, chat_config
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    norm_deviation,
    run_on,
    tiny_config,
)
from tests.pool import RankPool
from trainer.config import RecipeConfig, TrainConfig
from trainer.recipes import problems
from trainer.validate import find_problems

SEQ_LEN = 128
ROWS = [{"messages": turns} for turns in TURNS]
SAMPLES = {True: 4, False: len(ROWS)}  # of an epoch, packed or not


def tuning(folder: Path, *, packing: bool = True, **changes: Any) -> TrainConfig:
    """A run over all examples in every step."""
    data = chat_config(folder, ROWS, template=MARKED, packing=packing, too_long="error")
    sizes = {
        "train__seq_len": SEQ_LEN,
        "train__global_batch_size": SAMPLES[packing],
        "train__steps": 3,
        "schedule__warmup_steps": 0,
    }
    sizes |= {"model__max_seq_len": SEQ_LEN, "train__micro_batch_size": SAMPLES[packing]}
    config = tiny_config(folder / "run", data, **(sizes | changes))
    config.recipe = RecipeConfig("sft")
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path) -> Outcome:
    """One process, one micro-batch, packed."""
    return run_on(ranks, 1, tuning(folder))


def same(found: Outcome, wanted: Outcome) -> None:
    assert [line["valid_tokens"] for line in found.metrics] == [line["valid_tokens"] for line in wanted.metrics]
    assert loss_deviation(found, wanted) < 1e-6
    assert gradient_deviation(found, wanted) < 1e-5
    assert norm_deviation(found, wanted) < 1e-4


def test_loss_and_gradients_are_those_of_transformers_on_each_example_alone(ranks: RankPool, folder: Path) -> None:
    """A prompt with a loss, a mean of means, an example that sees its neighbour."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path = folder / "hf"
    config = tuning(path, train__steps=1, train__micro_batch_size=1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=24,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=SEQ_LEN,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    weights = path / "tokenizer"  # a model's folder has both
    model.save_pretrained(weights)
    config.model = ModelConfig(family="hf", path=str(weights))
    config.data.tokenizer.path = None
    found = run_on(ranks, 1, config)

    file = weights / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    theirs = transformers.AutoTokenizer.from_pretrained(weights)
    total, count = torch.zeros(()), 0
    for turns in TURNS:
        encoded = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([encoded["input_ids"]])
        labels = ids.masked_fill(~torch.tensor([encoded["assistant_masks"]]).bool(), IGNORE_INDEX)[0, 1:]
        logits = model(ids).logits[0, :-1]
        total = total + functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        count += int((labels != IGNORE_INDEX).sum())
    loss = total / count
    loss.backward()
    assert found.metrics[0]["valid_tokens"] == count
    assert found.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    assert found.grad_norms[0] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("micro", [1, 5])
def test_packing_and_micro_batches_change_nothing(
    ranks: RankPool, folder: Path, reference: Outcome, micro: int
) -> None:
    """Weights of examples that depend on what stands beside them."""
    same(run_on(ranks, 1, tuning(folder / f"alone-{micro}", packing=False, train__micro_batch_size=micro)), reference)
    config = tuning(folder / f"packed-{micro}", train__micro_batch_size=min(micro, 3))
    same(run_on(ranks, 1, config), reference)


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel__zero_stage": 0},
    "zero3": {"parallel__zero_stage": 3},
    "tp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "cp": {"parallel__cp": 2},
    "pp": {"parallel__pp": 2, "train__micro_batch_size": 1},
}


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_two_ranks_train_as_one(ranks: RankPool, folder: Path, reference: Outcome, layout: str) -> None:
    """A rank's mean instead of the global one: ranks hold different numbers of answers' tokens."""
    same(run_on(ranks, 2, changed(tuning(folder), folder / layout, **LAYOUTS[layout])), reference)


def test_a_run_resumes_to_the_same_bits(ranks: RankPool, folder: Path) -> None:
    """Examples that come twice or never after a restart, in the middle of an epoch."""
    setting = {"train__global_batch_size": 3, "train__micro_batch_size": 1, "schedule__name": "constant"}
    whole = run_on(ranks, 1, tuning(folder / "whole", **setting, train__steps=4))
    half = tuning(folder / "half", **setting, train__steps=2)
    half.checkpoint.at_end = True
    run_on(ranks, 1, half)
    half.train.steps = 4
    assert run_on(ranks, 1, half).losses == whole.losses


def test_the_run_says_what_its_data_holds(ranks: RankPool, folder: Path) -> None:
    """Rows that were left out silently."""
    config = tuning(folder / "counted")
    path = Path(str(config.data.path))
    path.write_text(path.read_text() + '{"messages": []}\n')
    config.data.conversations.unusable = "skip"
    run_on(ranks, 1, config)
    events = [json.loads(line) for line in (Path(config.run.dir) / "events.jsonl").read_text().splitlines()]
    (said,) = [event for event in events if event["kind"] == "data"]
    assert (said["examples"], said["samples"], said["unusable_empty"]) == (len(ROWS), SAMPLES[True], 1)
    assert f"line {len(ROWS) + 1}: its messages holds no message" in said["text"]


def test_recipes_and_data_that_do_not_fit_are_one_line(folder: Path) -> None:
    """A run that trains on something else than it says."""
    config = tuning(folder)
    assert find_problems(config, world_size=1) == []
    config.data.tokenizer.path = None
    (missing,) = find_problems(config, world_size=1)
    assert missing.startswith("data.tokenizer.path is missing: conversations need the tokenizer")
    config.recipe.name = "pretrain"
    assert problems(config) == ["recipe.name=pretrain does not read data.source=conversations; use recipe=sft"]
    config.recipe.name = "tune"
    assert [str(each) for each in problems(config)] == [
        "recipe.name=tune is unknown; use recipe.name=pretrain, sft, dpo, kto, reward, distill, grpo or ppo"
    ]
    config.recipe.name, config.data.source = "sft", "stdlib"
    assert problems(config) == ["recipe.name=sft with data.source=stdlib has nothing to answer; use data=conversations"]
    config.recipe.name = "pretrain"
    config.data.conversations.too_long = "skip"
    found = find_problems(config, world_size=1)
    assert any(line.startswith("data.conversations.too_long=skip has no effect") for line in found)
