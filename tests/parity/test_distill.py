"""recipe=distill: a student's loss and gradients as transformers and plain PyTorch have them, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data.config import DataConfig
from data.loader import build_loader
from models.config import ModelConfig
from tests.data.conversing import chat_folder
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    norm_deviation,
    run_on,
    text_corpus,
    tiny_config,
)
from tests.parity.test_preferences import LAYOUTS, tiny_llama
from tests.pool import RankPool
from trainer.config import RecipeConfig, TrainConfig
from trainer.validate import find_problems

DIVERGENCE, TEMPERATURE, NLL = 0.3, 2.0, 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill")
    tiny_llama(path / "student", 0)
    tiny_llama(path / "teacher", 1)
    return path


@pytest.fixture(scope="module")
def corpus(folder: Path) -> DataConfig:
    config = text_corpus(folder)
    config.tokenizer.path = str(chat_folder(folder / "tokenizer"))
    return config


def distilling(base: Path, corpus: DataConfig, name: str, **changes: Any) -> TrainConfig:
    """Of four sequences in a step."""
    sizes = {"train__global_batch_size": 4, "train__micro_batch_size": 4, "train__steps": 3}
    config = tiny_config(base / name, corpus, **(sizes | {"data__mask_documents": True} | changes))
    config.model = ModelConfig(family="hf", path=str(base / "student"))
    config.recipe = RecipeConfig(
        name="distill",
        teacher_path=str(base / "teacher"),
        divergence=DIVERGENCE,
        temperature=TEMPERATURE,
        nll_weight=NLL,
    )
    return config


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path, corpus: DataConfig) -> Outcome:
    return run_on(ranks, 1, distilling(folder, corpus, "one"))


def same(found: Outcome, wanted: Outcome) -> None:
    assert loss_deviation(found, wanted) < 1e-6
    assert gradient_deviation(found, wanted) < 1e-5
    assert norm_deviation(found, wanted) < 1e-4
    ours, theirs = ([line["nll"] for line in outcome.metrics] for outcome in (found, wanted))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_loss_and_gradients_are_those_of_transformers(folder: Path, corpus: DataConfig, reference: Outcome) -> None:
    """A teacher without its temperature, or one that sees another text."""
    config = distilling(folder, corpus, "one")
    loader = build_loader(
        config.data,
        seq_len=config.train.seq_len,
        global_batch_size=4,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        split="train",
        vocab_size=300,
        device_type="cpu",
    )
    (batch,) = loader.next_step()
    student, teacher = (transformers.AutoModelForCausalLM.from_pretrained(folder / n) for n in ("student", "teacher"))
    assert batch.documents is not None
    mask = batch.documents[:, None, :, None] == batch.documents[:, None, None, :]
    mask &= torch.ones(24, 24, dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits, wanted = (
        m(batch.tokens, attention_mask=bias, position_ids=batch.positions).logits for m in (student, teacher)
    )
    s, t = (x.div(TEMPERATURE).softmax(-1) for x in (logits, wanted.detach()))
    m = DIVERGENCE * t + (1 - DIVERGENCE) * s
    each = DIVERGENCE * (t * (t / m).log()).sum(-1) + (1 - DIVERGENCE) * (s * (s / m).log()).sum(-1)
    divergence = each[batch.labels != -100].mean() * TEMPERATURE**2
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels)
    (divergence + NLL * nll).backward()
    assert reference.losses[0] == pytest.approx(divergence.item(), rel=1e-5)
    assert reference.metrics[0]["nll"] == pytest.approx(nll.item(), rel=1e-5)
    theirs = student.model.layers[0].mlp.down_proj.weight.grad
    assert theirs is not None
    assert (reference.first_gradients["blocks.0.mlp.down.weight"] - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", ["ddp", "zero3", "tp", "ring", "pp"])
def test_two_ranks_train_as_one(
    ranks: RankPool, folder: Path, corpus: DataConfig, reference: Outcome, layout: str
) -> None:
    """A teacher's states of other tokens, or half of its words."""
    changes = {"train__micro_batch_size": 1} | LAYOUTS[layout]
    same(run_on(ranks, 2, changed(distilling(folder, corpus, layout), folder / layout / "run", **changes)), reference)


def test_a_teacher_that_does_not_fit_is_one_line(folder: Path, corpus: DataConfig) -> None:
    config = distilling(folder, corpus, "bad")
    assert find_problems(config, world_size=1) == []
    config.recipe.teacher_path = None
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.teacher_path is missing")
    config.recipe.teacher_path = str(folder / "nowhere")
    (line,) = find_problems(config, world_size=1)
    assert "nowhere does not exist" in line
    config.recipe = RecipeConfig(name="pretrain", temperature=2.0)
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.temperature=2.0 has no effect with recipe.name=pretrain")
