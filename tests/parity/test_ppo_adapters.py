"""recipe=ppo with adapters: those of the policy and those of the value model, each beside a model that stays.

That their gradients are those of the merged models: test_adapter_rollouts.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.adapter_config import AdapterConfig
from parallel.data import state_bytes
from tests.models.oracle import pair
from tests.parity.adapting import run_adapted
from tests.parity.harness import Outcome, gradient_deviation, run_on
from tests.parity.test_ppo import same
from tests.pool import RankError, RankPool
from tests.trainer.rl.ppo_runs import proximal
from tests.trainer.rl.rolling import adapting
from tests.trainer.rl.test_grpo import without_times
from tests.trainer.rl.test_reward_models import reward_model
from trainer.checkpoint import read_extra, tensor_shapes
from trainer.config import TrainConfig
from trainer.convert import export_checkpoint
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems

SEVERAL = {"rl__minibatches": 2, "train__steps": 2}
FIRST = ("loss", "reward", "valid_tokens", "value_loss", "value_mean", "return_mean", "advantage_std", "reference_kl")
HEAD = "value/head.weight"


def adapted(folder: Path, *, adapter: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    return adapting(proximal(folder, **changes), folder, **(adapter or {}))


def plain(folder: Path, **changes: Any) -> TrainConfig:
    """The same without adapters."""
    config = adapted(folder, **changes)
    config.adapter = AdapterConfig()
    return config


@pytest.mark.parametrize("own", [False, True], ids=["policys folder", "its own"])
def test_a_first_step_is_that_of_the_whole_models(ranks: RankPool, tmp_path: Path, own: bool) -> None:
    """Values by another folder, without its head or with another one; adapters that are not 0 to begin with."""
    path = reward_model(tmp_path / "scored", seed=3) if own else None
    changes = {"ppo__value_path": path, "train__steps": 1}
    (found,) = run_on(ranks, 1, adapted(tmp_path / "adapted", **changes)).metrics
    (wanted,) = run_on(ranks, 1, plain(tmp_path / "plain", **changes)).metrics
    assert {name: found[name] for name in FIRST} == {name: wanted[name] for name in FIRST}
    assert found["grad_norm"] != wanted["grad_norm"]
    assert found["value_grad_norm"] != wanted["value_grad_norm"]
    (other,) = run_adapted(ranks, 1, adapted(tmp_path / "other", **changes)).metrics  # negative control
    assert all(abs(other[name] - found[name]) > 1e-4 for name in ("value_loss", "value_mean"))


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, rows of one rollout each, adapters none of which is 0."""
    return run_adapted(ranks, 1, adapted(tmp_path_factory.mktemp("ppo"), train__micro_batch_size=1, **SEVERAL))


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"parallel__zero_stage": 1},
    "zero2": {"parallel__zero_stage": 2},
    "zero3, gathered once": {"parallel__zero_stage": 3, "rl__weights": "gather"},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "zero3 and tp": {"parallel__tp": 2, "parallel__zero_stage": 3, "rl__weights": "stream"},
    "tp": {"parallel__tp": 2},
    "compiled": {"train__compile": True, "train__compile_backend": "aot_eager"},
}


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_ranks_train_the_same_adapters(
    ranks: RankPool, tmp_path: Path, reference: Outcome, layout: str
) -> None:
    """A gradient of the value model's A, B or head that is one rank's summand, or a base that is cut otherwise."""
    size = 4 if "and tp" in layout else 2
    same(run_adapted(ranks, size, adapted(tmp_path, **SEVERAL, **LAYOUTS[layout])), reference)
    ours = {name for name in reference.first_gradients if name.startswith("value/")}
    assert {name.rpartition(".")[2] for name in ours - {HEAD}} == {"lora_a", "lora_b"}
    assert reference.first_gradients[HEAD].abs().max() > 0


def test_values_without_their_adapters_would_be_seen(ranks: RankPool, tmp_path: Path, reference: Outcome) -> None:
    """The negative control of the one above."""
    other = run_adapted(ranks, 1, adapted(tmp_path, adapter={"targets": ["q", "v"]}, **SEVERAL))
    assert other.metrics[0]["value_loss"] != pytest.approx(reference.metrics[0]["value_loss"], rel=1e-2)
    shared = other.first_gradients.keys() & reference.first_gradients.keys()
    cut = Outcome([], [], {name: reference.first_gradients[name] for name in shared}, {}, [])
    assert gradient_deviation(Outcome([], [], {n: other.first_gradients[n] for n in shared}, {}, []), cut) > 1e-2


RESUMED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "lora": (1, {}, {}),
    "zero3, a batch ahead": (2, {}, {"parallel__zero_stage": 3, "rl__rollout_lag": 1}),
    "qlora": (1, {"quantize": "nf4"}, {}),
    "pissa": (1, {"init": "pissa"}, {}),
    "dora": (1, {"dora": True}, {}),
}


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(ranks: RankPool, tmp_path: Path, case: str) -> None:
    """A base that is not read again, or another for values; of PiSSA, weights that lose another part than before."""
    size, adapter, changes = RESUMED[case]
    # In 4 bits one of the policy's sizes, which have whole blocks; else one that nothing of the policy fits.
    path = str(tmp_path / "whole" / "tokenizer") if case == "qlora" else reward_model(tmp_path / "scored")
    several = SEVERAL | {"train__steps": 4, "optim__lr": 1e-2, "schedule__name": "constant", "ppo__kl_target": 1e-4}
    changes = several | changes | {"ppo__value_path": path}
    whole = run_on(ranks, size, adapted(tmp_path / "whole", adapter=adapter, **changes))
    config = adapted(tmp_path / "cut", adapter=adapter, **changes | {"train__steps": 2})
    config.checkpoint.at_end = True
    run_on(ranks, size, config)
    config.train.steps = 4
    again = run_on(ranks, size, config)
    assert without_times(again) == without_times(whole)
    assert len({line["value_loss"] for line in whole.metrics}) == 4
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_a_checkpoint_has_adapters_and_heads_alone(ranks: RankPool, tmp_path: Path) -> None:
    """A base in a checkpoint, of which the value model's would be as large again; a policy that does not go out."""
    config = adapted(tmp_path, ppo__value_path=reward_model(tmp_path / "scored"), train__steps=1)
    config.checkpoint.at_end = True
    run_on(ranks, 1, config)
    path = Path(config.run.dir) / "checkpoints" / "step_1"
    names = tensor_shapes(path)
    models = {name for name in names if "model/" in name}
    assert {name.rpartition(".")[2] for name in models - {"value/model/head.weight"}} == {"lora_a", "lora_b"}
    assert names["value/model/head.weight"][0] == (1, 16)
    assert "model/head.weight" not in names
    moments = {name for name in names if "optim/" in name and not name.endswith("/step")}
    assert len(moments) == 2 * len(models)
    export_checkpoint(path, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"] is None
    beside = read_extra(path)["adapter"]["beside"]["recipe.ppo.value_path"]
    assert beside["path"] == str(tmp_path / "scored")


@pytest.mark.parametrize("own", [False, True], ids=["policys folder", "its own"])
def test_adapters_of_a_folder_are_the_value_models_where_its_base_is_the_policys(
    ranks: RankPool, tmp_path: Path, own: bool
) -> None:
    """Adapters for one model on another; values that begin beside the policy's base when the policy has moved on."""
    first = adapted(tmp_path / "first", train__steps=1)
    first.checkpoint.at_end = True
    run_adapted(ranks, 1, first)
    export_checkpoint(Path(first.run.dir), tmp_path / "peft")
    path = reward_model(tmp_path / "scored") if own else None
    changes = {"recipe__reference": "adapter", "optim__lr": 0.0, "train__steps": 1, "ppo__value_path": path}
    config = adapted(tmp_path / "second", adapter={"path": str(tmp_path / "peft")}, **changes)
    found = run_on(ranks, 1, config).weights
    assert all(tensor.abs().max() > 0 for name, tensor in found.items() if not name.startswith("value/"))
    of_values = {name: tensor for name, tensor in found.items() if name.startswith("value/") and name != HEAD}
    if own:
        assert all((tensor.abs().max() > 0) == name.endswith("lora_a") for name, tensor in of_values.items())
    else:
        assert all(torch.equal(tensor, found[name.removeprefix("value/")]) for name, tensor in of_values.items())


def test_values_of_another_base_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    """Adapters that go on beside weights they were not trained for, of the same shape, and so without an error."""
    first, other = (reward_model(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    config = adapted(tmp_path, ppo__value_path=first, train__steps=1)
    config.checkpoint.at_end = True
    run_on(ranks, 1, config)
    config.train.steps, config.recipe.ppo.value_path = 2, other
    says = rf"recipe.ppo.value_path={other} is not the model that the adapters in .* were trained for.*{first}; give"
    with pytest.raises(RankError, match=says):
        run_on(ranks, 1, config)
    config.recipe.ppo.value_path = None  # the policy's folder, which is another one
    with pytest.raises(RankError, match=r"recipe.ppo.value_path=.*tokenizer is not the model that the adapters"):
        run_on(ranks, 1, config)
    Path(first).rename(tmp_path / "moved")  # a place is no identity
    config.recipe.ppo.value_path = str(tmp_path / "moved")
    run_on(ranks, 1, config)


def costs(config: TrainConfig) -> dict[str, Any]:
    """What the value model holds behind a step, on one rank."""
    trainer = Trainer(finalize(config, world_size=torch.distributed.get_world_size()))
    try:
        trainer.run()
        state = trainer.state.beside["value"]
        parameters = dict(state.model.named_parameters())
        return {
            "bytes": state_bytes(state.data_parallel, state.optimizer.state_tensors()),
            "trained": sum(p.numel() for p in parameters.values() if p.requires_grad),
            "all": sum(p.numel() for p in parameters.values()),
            "with_gradient": [name for name, p in parameters.items() if p.grad is not None and not p.requires_grad],
            "masters": sorted(state.data_parallel.masters),
        }
    finally:
        trainer.close()


@pytest.mark.parametrize("name", ["lora", "none"])
def test_the_value_models_frozen_weights_have_neither_gradient_nor_moments(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    """A wide copy of the whole value model, or moments for it. Without adapters (the control) it has them."""
    config = adapted(tmp_path, train__steps=1, precision__compute="bf16")
    config.adapter = config.adapter if name == "lora" else AdapterConfig()
    found = ranks.run(1, costs, config)[0]
    kinds = {master.rpartition(".")[2] for master in found["masters"] if master != "head.weight"}
    assert (kinds == {"lora_a", "lora_b"}) == (name == "lora")
    assert (found["trained"] < found["all"] / 2) == (name == "lora")
    assert found["with_gradient"] == []
    held, trained = found["bytes"], found["trained"]
    assert held["optimizer"] == 8 * trained + 4  # two moments in fp32, and the count of steps
    assert held["master"] == 4 * trained
    assert held["parameters"] == 2 * found["all"]


def test_the_reference_is_the_policy_without_its_adapters(ranks: RankPool, tmp_path: Path) -> None:
    """A penalty against something else than the model beside the policy: the policy itself would have none."""
    lines = []
    for name in ("model", "adapter"):
        config = adapted(tmp_path / name, recipe__reference=name, **SEVERAL | {"rl__minibatches": 1})
        lines.append(run_adapted(ranks, 1, config).metrics)
    for ours, theirs in zip(*lines, strict=True):
        assert ours["reference_kl"] == theirs["reference_kl"] != 0
        assert (ours["loss"], ours["value_loss"]) == (theirs["loss"], theirs["value_loss"])


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_rollouts_beside_updates_have_the_same_bits(ranks: RankPool, tmp_path: Path, quantize: str) -> None:
    """Values by adapters or a head of another update than the rollouts; a copy that lacks either."""
    changes = SEVERAL | {"rl__rollout_lag": 1, "train__steps": 6, "optim__lr": 1e-2, "schedule__name": "constant"}
    adapter = {"quantize": quantize}
    ahead = run_on(ranks, 1, adapted(tmp_path / "ahead", adapter=adapter, **changes))
    beside = run_on(ranks, 1, adapted(tmp_path / "beside", adapter=adapter, rl__overlap=True, **changes))
    assert without_times(beside) == without_times(ahead)
    assert all(torch.equal(beside.weights[name], weight) for name, weight in ahead.weights.items())


def test_a_value_model_that_cannot_have_the_adapters_is_refused_in_a_line(tmp_path: Path) -> None:
    """An error on a cluster, or blocks of 4 bits that lie over the ends of rows."""
    config = adapted(tmp_path, adapter={"quantize": "nf4"})
    assert find_problems(config, world_size=1) == []
    config.recipe.ppo.value_path = reward_model(tmp_path / "narrow")
    lines = find_problems(config, world_size=1)
    assert f"recipe.ppo.value_path={tmp_path / 'narrow'}: adapter.quantize=nf4 quantizes blocks of 64" in lines[0]
    assert lines[0].endswith("use adapter.quantize=none, or give another model")
    config.adapter.quantize = "none"
    assert find_problems(config, world_size=1) == []
    pair("deepseek_v2", tmp_path / "latent")
    config.recipe.ppo.value_path, config.adapter.targets = str(tmp_path / "latent"), ["q"]
    assert any("value_path=" in line and "adapter.targets=q" in line for line in find_problems(config, world_size=1))


def test_what_the_policy_lacks_is_named_once(tmp_path: Path) -> None:
    config = adapted(tmp_path, adapter={"targets": ["nowhere"]}, ppo__value_path=reward_model(tmp_path / "scored"))
    assert sum("adapter.targets=nowhere" in line for line in find_problems(config, world_size=1)) == 1
    config.adapter = AdapterConfig()
    config.recipe.reference = "adapter"
    says = "recipe.reference=adapter is the policy with its adapters switched off, and adapter.name=none has none"
    assert any(says in line for line in find_problems(config, world_size=1))
