"""Adapters under recipes that sample: gkd, reward models, rollouts a batch ahead, ppo. What counts is the merged model.

Adapters are PEFT's own, begun with by adapter.path, and the same model with them merged by PEFT is trained as a plain
one beside it: tokens, rewards, log-probabilities and loss of the first step are the same, and the gradient of W + s B A
gives those of A and B by the chain rule: s B^T G and s G A^T.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from tests.parity.harness import Outcome, gradient_deviation, run_on
from tests.parity.test_on_policy_distill import answering
from tests.parity.test_preferences import tiny_llama
from tests.pool import RankPool
from tests.trainer.rl.ppo_runs import proximal
from tests.trainer.rl.rolling import rolling
from tests.trainer.rl.test_reward_models import reward_model, rolled
from trainer.config import TrainConfig
from trainer.convert import export_checkpoint
from trainer.trainer import Trainer
from trainer.validate import finalize

RANK, ALPHA = 3, 6.0
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OURS = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters for it, and both merged, by PEFT; a teacher; a reward model."""
    path = tmp_path_factory.mktemp("adapters")
    tiny_llama(path / "student", 0)
    tiny_llama(path / "teacher", 1)
    reward_model(path / "reward")
    base = transformers.AutoModelForCausalLM.from_pretrained(path / "student")
    torch.manual_seed(2)
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path / "adapters")
    model.merge_and_unload().save_pretrained(path / "merged")
    return path


def gkd(folder: Path, name: str, **changes: Any) -> TrainConfig:
    return answering(folder, name, **changes)


def rewarded(folder: Path, name: str, **changes: Any) -> TrainConfig:
    return rolled(folder / name, str(folder / "reward"), **changes)


def ahead(folder: Path, name: str, **changes: Any) -> TrainConfig:
    return rolling(folder / name, rl__rollout_lag=1, **changes)


def valued(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """Values by the adapters that the policy begins with too; the reference has none."""
    return proximal(folder / name, recipe__reference_path=str(folder / "student"), **changes)


RECIPES: dict[str, tuple[Callable[..., TrainConfig], tuple[str, ...]]] = {
    "gkd": (gkd, ("on_policy", "completion_tokens", "valid_tokens")),
    "reward model": (rewarded, ("reward", "reward_model", "reward_even", "entropy", "valid_tokens")),
    "a batch ahead": (ahead, ("reward", "ratio", "entropy", "valid_tokens")),
    "ppo": (valued, ("reward", "value_loss", "value_mean", "return_mean", "reference_kl", "valid_tokens")),
}


def running(folder: Path, recipe: str, name: str, *, merged: bool = False, **changes: Any) -> TrainConfig:
    sizes = {"train__steps": 1, "optim__lr": 1e-2, "schedule__name": "constant"}
    config = RECIPES[recipe][0](folder, f"{recipe}-{name}".replace(" ", "_"), **(sizes | changes))
    config.model = ModelConfig(family="hf", path=str(folder / ("merged" if merged else "student")))
    if not merged:
        config.adapter = AdapterConfig(name="lora", rank=RANK, alpha=ALPHA, path=str(folder / "adapters"))
    return config


def watched(config: TrainConfig) -> tuple[list[list[Any]], dict[str, bool]]:
    """The rollouts of each time that some were made, and of each parameter whether the run has changed it."""
    trainer = Trainer(finalize(config, world_size=1))
    recipe: Any = trainer.recipe
    made: list[list[Any]] = []
    maker, name = (recipe.student, "sampled") if config.recipe.name == "distill" else (recipe._collector, "collect")
    make = getattr(maker, name)

    def making(*args: Any, **kwargs: Any) -> Any:
        found = make(*args, **kwargs)
        made.append(found if name == "sampled" else [one for batch in found for one in batch])
        return found

    setattr(maker, name, making)
    before = {name: parameter.detach().clone() for name, parameter in trainer.state.model.named_parameters()}
    try:
        trainer.run()
        after = dict(trainer.state.model.named_parameters())
        return made, {name: not torch.equal(before[name], after[name]) for name in before}
    finally:
        trainer.close()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_step_is_that_of_the_merged_model(ranks: RankPool, folder: Path, recipe: str) -> None:
    """Rollouts by the base, a teacher or reward model with the adapters on it, gradients without the scale."""
    ((ours, changed),) = ranks.run(1, watched, running(folder, recipe, "watched"))
    ((theirs, _),) = ranks.run(1, watched, running(folder, recipe, "watched-merged", merged=True))
    assert [[one.tokens for one in made] for made in ours] == [[one.tokens for one in made] for made in theirs]
    assert sum(map(len, ours)) > 2
    for one, other in zip(chain.from_iterable(ours), chain.from_iterable(theirs), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.reward == pytest.approx(other.reward, abs=1e-4)
    assert {name.rpartition(".")[2] for name, moved in changed.items() if moved} == {"lora_a", "lora_b"}
    assert all(moved == ("lora_" in name) for name, moved in changed.items())

    found = run_on(ranks, 1, running(folder, recipe, "run"))
    wanted = run_on(ranks, 1, running(folder, recipe, "run-merged", merged=True))
    for name in ("loss", *RECIPES[recipe][1]):
        assert found.metrics[0][name] == pytest.approx(wanted.metrics[0][name], rel=1e-4, abs=1e-6), name
    for prefix in ("", "value/") if recipe == "ppo" else ("",):
        chain_rule(folder, found, wanted, prefix)
    base = running(folder, recipe, "base", merged=True)  # negative control
    base.model.path = str(folder / "student")
    line = run_on(ranks, 1, base).metrics[0]
    assert any(line[name] != pytest.approx(found.metrics[0][name], rel=1e-2) for name in ("loss", *RECIPES[recipe][1]))


def chain_rule(folder: Path, found: Outcome, wanted: Outcome, prefix: str) -> None:
    """The gradients of adapters are those of the whole weights, through the product."""
    adapters, scale = load_file(folder / "adapters" / "adapter_model.safetensors"), ALPHA / RANK
    for layer, name in OURS.items():
        group = "attention" if "attn" in name else "mlp"
        key = f"{prefix}blocks.1.{group}.{layer}"
        whole = wanted.first_gradients[f"{key}.weight"]
        a, b = (adapters[f"base_model.model.model.layers.1.{name}.lora_{which}.weight"] for which in "AB")
        for of, expected in (("a", scale * b.T @ whole), ("b", scale * whole @ a.T)):
            ours = found.first_gradients[f"{key}.lora_{of}"]
            assert (ours - expected).abs().max() < 1e-4 * expected.abs().max(), (key, of)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(ranks: RankPool, folder: Path, recipe: str) -> None:
    """Rollouts by the adapters that the run began with; moments or a batch made ahead that were lost."""
    whole = run_on(ranks, 1, running(folder, recipe, "whole", train__steps=3))
    config = running(folder, recipe, "cut", train__steps=2, checkpoint__at_end=True)
    run_on(ranks, 1, config)
    config.train.steps = 3
    again = run_on(ranks, 1, config)
    assert again.losses == whole.losses
    assert again.grad_norms == whole.grad_norms
    assert len(set(whole.losses)) == 3
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, folder: Path) -> dict[str, Outcome]:
    """By one process, two steps."""
    return {name: run_on(ranks, 1, running(folder, name, "alone", train__steps=2)) for name in RECIPES}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"parallel__tp": 2},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
}


@pytest.mark.some(4)
@pytest.mark.parametrize(("layout", "recipe"), [(layout, recipe) for layout in LAYOUTS for recipe in RECIPES])
def test_two_ranks_train_the_same_adapters(
    ranks: RankPool, folder: Path, alone: dict[str, Outcome], layout: str, recipe: str
) -> None:
    """Adapters of which a rank has a part, beside a frozen model that is sharded otherwise."""
    found = run_on(ranks, 2, running(folder, recipe, f"{layout[:5]}", train__steps=2, **LAYOUTS[layout]))
    for ours, theirs in zip(found.metrics, alone[recipe].metrics, strict=True):
        for name in ("loss", *RECIPES[recipe][1]):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert gradient_deviation(found, alone[recipe]) < 2e-5


@cache
def with_adapters(base: Path, adapters: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return peft.PeftModel.from_pretrained(model, str(adapters)).double()


@torch.no_grad()
def logprobs_by_peft(base: Path, adapters: Path, rollout: Any) -> torch.Tensor:
    """Of the generated tokens."""
    ((begin, end),) = rollout.spans
    every = with_adapters(base, adapters)(torch.tensor([rollout.tokens])).logits[0].log_softmax(-1)
    return every[torch.arange(begin - 1, end - 1), torch.tensor(rollout.tokens[begin:end])]


def test_a_batch_ahead_is_compared_with_the_adapters_that_made_it(ranks: RankPool, folder: Path) -> None:
    """Ratios against the base, or against the adapters of the update: those would be 1.

    Both batches are by the adapters that the run begins with; the second is learned from after an update.
    """
    config = running(folder, "a batch ahead", "ratio", train__steps=2, checkpoint__interval=1)
    (((first, second, _), _),) = ranks.run(1, watched, config)
    export_checkpoint(Path(config.run.dir) / "checkpoints" / "step_1", folder / "updated")
    base, start = folder / "student", folder / "adapters"
    for rollout in (*first, *second):
        assert rollout.old == pytest.approx(logprobs_by_peft(base, start, rollout).tolist(), abs=1e-4)
    ratios = torch.cat(
        [
            (logprobs_by_peft(base, folder / "updated", rollout) - logprobs_by_peft(base, start, rollout)).exp()
            for rollout in second
        ]
    )
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert lines[1]["ratio"] == pytest.approx(ratios.mean().item(), rel=1e-4)
    assert abs(lines[1]["ratio"] - 1) > 1e-3
