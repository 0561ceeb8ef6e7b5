"""recipe=kto: answers by themselves, by transformers' log-probabilities and the paper's formula, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data.config import parts
from data.preference import open_pairs
from data.tokenizer import load_tokenizer
from data.unpaired import UnpairedWriter
from tests.data.preferring import pairs, preference_config, said
from tests.parity.harness import Outcome, changed, gradient_deviation, loss_deviation, run_on
from tests.parity.test_preferences import LAYOUTS, preferring, tiny_llama
from tests.pool import RankPool
from trainer.config import RecipeConfig, TrainConfig
from trainer.validate import find_problems

BETA, GOOD, BAD = 0.5, 1.0, 1.5
ROWS: list[dict[str, Any]] = [
    *pairs(3),
    *({"prompt": f"{n} one", "completion": f" three {n}" * (n % 3 + 1), "label": n % 3 == 0} for n in range(3)),
    *(
        {"prompt": said("user", f"{n} two"), "completion": said("assistant", f"two {n}" * (n % 2 + 1)), "label": n > 4}
        for n in range(4, 6)
    ),
]
ANSWERS = len(ROWS) + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kto")
    tiny_llama(path / "policy", 0)
    tiny_llama(path / "reference", 1)
    return path


def judging(base: Path, name: str, *, packing: bool = False, **changes: Any) -> TrainConfig:
    config = preferring(base, name, packing=packing, **changes)
    config.data = preference_config(base / name, ROWS, packing=packing, too_long="error")
    config.data.source = "unpaired_preferences"
    if not packing:
        config.train.global_batch_size = config.train.micro_batch_size = ANSWERS
    config.recipe = RecipeConfig(
        name="kto", beta=BETA, desirable_weight=GOOD, undesirable_weight=BAD, reference_path=str(base / "reference")
    )
    return config


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path) -> Outcome:
    return run_on(ranks, 1, judging(folder, "one"))


def same(found: Outcome, wanted: Outcome) -> None:
    assert loss_deviation(found, wanted) < 1e-6
    assert gradient_deviation(found, wanted) < 1e-5
    for name in ("reward_chosen", "reward_rejected", "kl"):
        ours, theirs = ([line[name] for line in outcome.metrics] for outcome in (found, wanted))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name


def test_loss_and_gradients_are_those_of_the_paper(folder: Path, reference: Outcome) -> None:
    """A baseline of the answers themselves, or one that has a gradient; good and bad the wrong way round."""
    data = judging(folder, "one").data
    found = open_pairs(parts(data)[0], data.conversations, load_tokenizer(data), data.cache_dir, writer=UnpairedWriter)
    corpus, learned = found.examples.corpus, torch.tensor(found.examples.learned.astype(bool))
    tokens = torch.tensor(corpus.tokens.astype("int64"))
    policy, frozen = (transformers.AutoModelForCausalLM.from_pretrained(folder / n) for n in ("policy", "reference"))

    def gain(begin: int, end: int) -> torch.Tensor:
        ids, mask = tokens[begin:end], learned[begin:end]
        of_policy, of_frozen = (
            model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0][mask[1:]].sum()
            for model in (policy, frozen)
        )
        return of_policy - of_frozen.detach()

    starts = corpus.starts.tolist()
    middles = [start + length for start, length in zip(starts, found.halves[:, 0].tolist(), strict=True)]
    own = torch.stack([gain(start, middle) for start, middle in zip(starts, middles, strict=True)])
    others = torch.stack([gain(middle, end) for middle, end in zip(middles, corpus.ends.tolist(), strict=True)])
    good = torch.tensor(found.numbers[:, 0]) > 0
    assert len(own) == ANSWERS
    assert int(good.sum()) == 5
    baseline = others.mean().detach().clamp(min=0)
    assert baseline > 0.1  # else it would be lost in the clamp
    value = torch.where(good, own - baseline, baseline - own)
    loss = (torch.where(good, GOOD, BAD) * (1 - torch.sigmoid(BETA * value))).mean()
    loss.backward()
    assert reference.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert reference.metrics[0]["kl"] == pytest.approx(baseline.item(), rel=1e-5)
    assert reference.metrics[0]["reward_chosen"] == pytest.approx((BETA * own[good]).mean().item(), rel=1e-5)
    theirs = policy.model.layers[0].mlp.down_proj.weight.grad
    assert theirs is not None
    assert (reference.first_gradients["blocks.0.mlp.down.weight"] - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_nothing(ranks: RankPool, folder: Path, reference: Outcome, micro: int) -> None:
    """A baseline of each micro-batch."""
    config = judging(folder, f"micro-{micro}")
    config.train.micro_batch_size = micro
    same(run_on(ranks, 1, config), reference)


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", ["tp", "ring", "pp"])
def test_two_ranks_train_as_one(ranks: RankPool, folder: Path, reference: Outcome, layout: str) -> None:
    config = judging(folder, layout)
    same(run_on(ranks, 2, changed(config, folder / layout / "run", **LAYOUTS[layout])), reference)


def test_a_policy_that_is_its_reference_loses_half_of_each_weight(ranks: RankPool, folder: Path) -> None:
    config = judging(folder, "same", train__steps=1)
    config.recipe.reference_path = None
    found = run_on(ranks, 1, config)
    assert found.losses[0] == pytest.approx((5 * GOOD + (ANSWERS - 5) * BAD) / (2 * ANSWERS), rel=1e-6)
    assert found.metrics[0]["kl"] == 0.0


def test_bad_settings_are_one_line_each(folder: Path) -> None:
    config = judging(folder, "bad")
    assert find_problems(config, world_size=1) == []
    config.recipe.desirable_weight = -1.0
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.desirable_weight=-1.0 must be positive")
    config = judging(folder, "bad")
    config.recipe.loss = "hinge"
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.loss=hinge has no effect with recipe.name=kto")
