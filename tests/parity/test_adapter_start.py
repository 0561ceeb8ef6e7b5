"""adapter.init=pissa and adapter.path: how adapters begin, on every layout, and as `peft` has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from data.config import DataConfig
from launch.convert import convert
from models.peft import load_peft
from models.registry import resolve_model
from tests.parity.adapting import adapter_config, token_data
from tests.parity.harness import Outcome, changed, gradient_deviation, loss_deviation, run_on
from tests.pool import RankPool
from trainer.adapter_start import principal
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems

TOKENS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> DataConfig:
    return token_data(folder)


def principal_run(folder: Path, corpus: DataConfig, name: str, family: str = "llama", **changes: Any) -> TrainConfig:
    config = changed(adapter_config(folder, corpus, family), folder / name, schedule__name="constant", **changes)
    config.adapter.init, config.adapter.alpha, config.optim.lr = "pissa", 3.0, 3e-3
    config.checkpoint.at_end = True
    return config


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path, corpus: DataConfig) -> Outcome:
    return run_on(ranks, 1, principal_run(folder, corpus, "one"))


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero3": (2, {"parallel__zero_stage": 3}),
    "tp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "zero2_pp": (4, {"parallel__zero_stage": 2, "parallel__pp": 2}),
    "zero3_tp": (4, {"parallel__zero_stage": 3, "parallel__tp": 2}),
}


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=[pytest.mark.thorough] if n in ("zero2_pp", "zero3_tp") else []) for n in LAYOUTS],
)
def test_every_layout_begins_with_the_same_parts(
    ranks: RankPool, folder: Path, corpus: DataConfig, reference: Outcome, layout: str
) -> None:
    """The decomposition of a shard; weights that keep what the adapters took."""
    size, changes = LAYOUTS[layout]
    found = run_on(ranks, size, principal_run(folder, corpus, layout, **changes))
    assert loss_deviation(found, reference) < 1e-5
    assert gradient_deviation(found, reference) < 1e-4


def test_a_run_begins_as_the_model_and_learns_from_both_matrices(
    ranks: RankPool, folder: Path, corpus: DataConfig, reference: Outcome
) -> None:
    """W + B A where it is to be W; the control is a gradient of A, which drawn adapters do not have."""
    plain = run_on(ranks, 1, changed(adapter_config(folder, corpus), folder / "plain"))
    assert reference.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    name = "blocks.0.mlp.up.lora_a"
    assert reference.first_gradients[name].abs().max() > 0
    assert plain.first_gradients[name].abs().max() == 0


def test_the_principal_part_is_that_of_peft() -> None:
    """A root of the scale that is missing, or on the wrong side; another part of the spectrum."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=False)
    weight = layer.weight.detach().clone()
    model = torch.nn.Sequential(layer)
    config = peft.LoraConfig(r=5, lora_alpha=15, init_lora_weights="pissa", target_modules=["0"])
    theirs: Any = peft.get_peft_model(model, config).base_model.model[0]
    a, b = principal(weight, 5, 3.0)
    part = 3.0 * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(3.0 * b @ a, part, rtol=0, atol=2e-2 * part.abs().max().item())  # of bf16
    torch.testing.assert_close(a.square().sum(1), theirs.lora_A["default"].weight.square().sum(1), rtol=1e-2, atol=0)
    torch.testing.assert_close(weight - 3.0 * b @ a, theirs.base_layer.weight, rtol=0, atol=5e-3)
    stacked = principal(torch.stack([weight, weight.flip(0)]), 5, 3.0)
    assert torch.equal(stacked[0][0], a)
    with pytest.raises(ValueError, match=r"adapter.rank=25 is more than a weight of \[40, 24\] has"):
        principal(weight, 25, 1.0)


def logits_of(config: TrainConfig) -> torch.Tensor:
    """Of the model as it is when a run begins, or goes on."""
    trainer = Trainer(finalize(config, world_size=1))
    try:
        with torch.no_grad():
            return trainer.state.model(TOKENS).detach().clone()
    finally:
        trainer.close()


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, str(adapter))(TOKENS).logits


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_was_trained_is_an_adapter_of_twice_the_rank(
    ranks: RankPool, folder: Path, corpus: DataConfig, family: str
) -> None:
    """An exported adapter for weights that nobody else has; a run that goes on with other weights than it had."""
    config = principal_run(folder, corpus, f"exported-{family}", family)
    config.adapter.rank_stabilized = family == "llama"
    run_on(ranks, 1, config)
    (ours,) = ranks.run(1, logits_of, config)
    run = str(config.run.dir)
    ranks.run(1, convert, ["export", run, str(folder / f"peft-{family}")])
    theirs = by_peft(folder / family, folder / f"peft-{family}")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    description = json.loads((folder / f"peft-{family}" / "adapter_config.json").read_text())
    assert description["r"] == 6
    ranks.run(1, convert, ["export", run, str(folder / f"merged-{family}"), "--merged"])
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / f"merged-{family}")
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, theirs, rtol=1e-4, atol=1e-4)
        plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / family)
        assert (plain(TOKENS).logits - theirs).abs().max() > 0.01


def test_a_run_goes_on_with_the_weights_it_had(
    ranks: RankPool, folder: Path, corpus: DataConfig, reference: Outcome
) -> None:
    """A beginning that is computed anew, or from what was trained."""
    config = principal_run(folder, corpus, "half", train__steps=2)
    run_on(ranks, 1, config)
    config.train.steps = 3
    assert run_on(ranks, 1, config).losses == reference.losses


def test_4_bits_are_of_what_is_left_and_lose_less(ranks: RankPool, folder: Path, corpus: DataConfig) -> None:
    """Weights that are quantized before their principal part is taken: its error would be the same as without."""
    base = adapter_config(folder, corpus, "llama_of_blocks")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(str(base.model.path))
    with torch.no_grad():
        exact = plain(TOKENS).logits
    errors = []
    for init in ("lora", "pissa"):
        config = changed(base, folder / f"nf4-{init}", train__steps=1)
        config.adapter.init, config.adapter.quantize, config.adapter.rank = init, "nf4", 64
        (found,) = ranks.run(1, logits_of, config)
        errors.append((found - exact).square().mean().sqrt().item())
    assert errors[1] < 0.9 * errors[0]


def peft_folder(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of PEFT that was changed since it began; of PiSSA: converted to one for the base."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules="all-linear", **settings)
    adapted = peft.get_peft_model(model, config)
    began = folder.with_name(f"{folder.name}-began")
    adapted.save_pretrained(str(began))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    converts = {"path_initial_model_for_weight_conversion": str(began)} if settings else {}
    adapted.save_pretrained(str(folder), **converts)
    if settings:
        adapted.save_pretrained(str(folder.with_name(f"{folder.name}-unconverted")))
    with torch.no_grad():
        torch.save(adapted(TOKENS).logits, folder / "logits.pt")
    return folder


def beginning(folder: Path, corpus: DataConfig, path: Path, **settings: Any) -> TrainConfig:
    config = changed(adapter_config(folder, corpus), folder / f"run-of-{path.name}")
    config.adapter.path, config.adapter.rank = str(path), settings.pop("rank", 3)
    config.adapter.alpha = settings.pop("alpha", 6.0)
    return changed(config, folder / f"run-of-{path.name}", **settings)


@pytest.mark.parametrize("began", ["lora", "pissa"])
def test_a_run_begins_with_what_peft_has_saved(ranks: RankPool, folder: Path, corpus: DataConfig, began: str) -> None:
    """Adapters that are drawn anew although a folder is named; PiSSA's taken for those of the whole weights."""
    adapter_config(folder, corpus)
    path = peft_folder(folder / "llama", folder / began, **({} if began == "lora" else {"init_lora_weights": "pissa"}))
    twice = {} if began == "lora" else {"rank": 6, "alpha": 12.0}
    config = beginning(folder, corpus, path, **twice)
    assert find_problems(config, world_size=1) == []
    (found,) = ranks.run(1, logits_of, config)
    torch.testing.assert_close(found, torch.load(path / "logits.pt"), rtol=1e-4, atol=1e-4)
    two = {"parallel__tp": 2, "parallel__zero_stage": 3}
    config.optim.lr = 0.0
    one = run_on(ranks, 1, changed(config, folder / f"one-{began}"))
    assert run_on(ranks, 2, changed(config, folder / f"two-{began}", **two)).losses == pytest.approx(one.losses)


def test_folders_that_do_not_fit_are_refused_in_a_line(folder: Path, corpus: DataConfig) -> None:
    """Adapters of another rank, scale or layer, cut or padded in silence."""
    adapter_config(folder, corpus)
    path = peft_folder(folder / "llama", folder / "fits")

    def said(**settings: Any) -> str:
        config = beginning(folder, corpus, Path(settings.pop("path", path)), **settings)
        return "\n".join(find_problems(config, world_size=1))

    assert said() == ""
    assert f"adapter.rank=4 is not that of adapter.path={path}; use adapter.rank=3" in said(rank=4)
    assert "adapter.alpha=7.0 scales by 2.33333, and" in said(alpha=7.0)
    assert "by 2; use adapter.alpha=6.0" in said(alpha=7.0)
    assert "is not what adapter.path=" in said(adapter__targets=["q", "v"])
    assert "blocks.0.attention.k is not in adapter.targets; its layers are attention.k," in said(
        adapter__targets=["q", "v"]
    )
    assert "adapter.dora=True is not so in" in said(adapter__dora=True)
    assert "adapter.init=pissa does not work with adapter.path=" in said(adapter__init="pissa")
    assert "adapter_config.json cannot be read" in said(path=folder / "nowhere")
    assert "adapter.init=olora is unknown; use adapter.init=lora or pissa" in said(adapter__init="olora")
    dora = {"adapter__init": "pissa", "adapter__dora": True}
    config = changed(adapter_config(folder, corpus), folder / "dora", **dora)
    assert any(
        "adapter.init=pissa does not work with adapter.dora=True" in p for p in find_problems(config, world_size=1)
    )
    shutil.copytree(path, folder / "unconverted")
    file = folder / "unconverted" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    model = resolve_model(config.model)
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4': it is for weights that were changed"):
        load_peft(folder / "unconverted", model)
