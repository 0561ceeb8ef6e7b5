"""Runs of adapters: their checkpoints, what they cost, what they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor

from data.config import DataConfig
from launch.convert import convert
from launch.errors import exit_code_of
from models.adapter_config import AdapterConfig
from parallel.data import state_bytes
from tests.parity.adapting import adapter_config, run_adapted, token_data
from tests.parity.harness import changed, run_on
from tests.pool import RankError, RankPool
from trainer.checkpoint import tensor_shapes
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> DataConfig:
    return token_data(folder)


def saving(config: TrainConfig) -> TrainConfig:
    config.checkpoint.at_end = True
    return config


def costs(config: TrainConfig) -> dict[str, Any]:
    """What a run holds behind a step, on one rank."""
    trainer = Trainer(finalize(config, world_size=torch.distributed.get_world_size()))
    try:
        trainer.run()
        state = trainer.state
        trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        return {
            "bytes": state_bytes(state.data_parallel, state.optimizer.state_tensors()),
            "trained": trained,
            "all": sum(p.numel() for p in state.model.parameters()),
            "with_gradient": [
                n for n, p in state.model.named_parameters() if p.grad is not None and not p.requires_grad
            ],
            "dtypes": {str(p.dtype) for p in state.model.parameters() if not p.requires_grad},
            "masters": sorted(state.data_parallel.masters),
            "whole": sum(not isinstance(p, DTensor) for p in state.model.parameters()),
        }
    finally:
        trainer.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_weights_cost_neither_gradient_nor_optimizer_nor_master(
    ranks: RankPool, folder: Path, corpus: DataConfig, stage: int
) -> None:
    """A wide copy of the whole model, or moments for it."""
    config = adapter_config(folder, corpus, train__steps=1, precision__compute="bf16", parallel__zero_stage=stage)
    found = ranks.run(1, costs, changed(config, folder / f"costs-{stage}"))[0]
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in found["masters"])
    assert found["trained"] < found["all"] / 2
    assert found["with_gradient"] == []
    assert found["dtypes"] == {"torch.bfloat16"}
    held, trained = found["bytes"], found["trained"]
    assert held["optimizer"] == 8 * trained + 4  # two moments in fp32, and the count of steps
    assert held["gradients"] <= 8 * trained  # of one step; in fp32, and until the update in the dtype of the reduction
    if stage == 3:
        assert held["master"] == 0  # they are the parameters
        assert held["parameters"] == 4 * trained + 2 * (found["all"] - trained)
        assert found["whole"] == 0  # what is frozen is cut as well
    else:
        assert held["master"] == 4 * trained
        assert held["parameters"] == 2 * found["all"]


def test_4_bits_cost_4_bits(ranks: RankPool, folder: Path, corpus: DataConfig) -> None:
    """A weight that is kept beside its quantized self, or magnitudes in fp32."""
    config = adapter_config(folder, corpus, "llama_of_blocks", train__steps=1, precision__compute="bf16")
    wide = ranks.run(1, costs, changed(config, folder / "wide"))[0]
    config.adapter.quantize = "nf4"
    found = ranks.run(1, costs, changed(config, folder / "narrow"))[0]
    assert found["trained"] == wide["trained"]
    assert found["with_gradient"] == []
    linear = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 256)  # values, of two blocks
    saved = wide["bytes"]["parameters"] - found["bytes"]["parameters"]
    assert saved == pytest.approx(linear * (16 - 4.13) / 8, rel=2e-3)
    assert find_problems(config, world_size=1) == []
    eight = changed(config, folder, parallel__tp=8)
    assert any(
        "cuts the 256 columns of mlp.down into pieces of 32" in line for line in find_problems(eight, world_size=8)
    )
    odd = adapter_config(folder, corpus)
    odd.adapter.quantize = "nf4"
    assert any("rows of mlp.down have 44" in line for line in find_problems(odd, world_size=1))
    odd = adapter_config(folder, corpus, "mixtral")
    odd.adapter.quantize = "nf4"
    assert any("rows of mlp.experts.down have 44" in line for line in find_problems(odd, world_size=1))


def test_a_run_resumes_on_another_layout(ranks: RankPool, folder: Path, corpus: DataConfig) -> None:
    """A checkpoint that needs the layout it was made on, or begins the adapters anew."""
    setting = {"train__steps": 4, "schedule__name": "constant"}
    whole = run_on(ranks, 1, changed(adapter_config(folder, corpus, **setting), folder / "whole"))
    half = saving(changed(adapter_config(folder, corpus, **setting), folder / "half", train__steps=2))
    run_on(ranks, 1, half)
    names = {name.rpartition(".")[2] for name in tensor_shapes(folder / "half" / "checkpoints" / "step_2")}
    assert {"lora_a", "lora_b"} <= names
    assert not {"weight", "bias"} & names
    again = changed(half, folder / "half", train__steps=4, parallel__zero_stage=3, parallel__tp=2)
    assert run_on(ranks, 4, again).losses == pytest.approx(whole.losses, rel=1e-6)
    assert run_on(ranks, 1, saving(changed(half, folder / "same", train__steps=4))).losses == whole.losses


def test_another_base_or_other_adapters_are_refused(ranks: RankPool, folder: Path, corpus: DataConfig) -> None:
    """Adapters that go on beside weights they were not trained for."""
    config = saving(changed(adapter_config(folder, corpus, train__steps=1), folder / "refusing"))
    run_on(ranks, 1, config)
    other = transformers.LlamaForCausalLM.from_pretrained(folder / "llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[:] += 0.01
    other.save_pretrained(folder / "other")
    path = config.model.path
    config.train.steps, config.model.path = 2, str(folder / "other")
    with pytest.raises(
        RankError, match=r"model.path=.*other is not the model that the adapters in .* were trained for"
    ):
        run_on(ranks, 1, config)
    config.model.path, config.adapter.alpha = path, 7.0
    with pytest.raises(RankError, match=r"other adapters: adapter.alpha=7.0 \(checkpoint: 6.0\)"):
        run_on(ranks, 1, config)
    config.adapter = AdapterConfig()
    with pytest.raises(RankError, match="holds adapters, and this run has none; use adapter=lora"):
        run_on(ranks, 1, config)


def test_exported_adapters_are_what_peft_loads_and_merged_ones_the_same_model(
    ranks: RankPool, folder: Path, corpus: DataConfig
) -> None:
    """What was trained is lost on its way out."""
    config = saving(changed(adapter_config(folder, corpus, optim__lr=3e-2), folder / "exported", parallel__tp=2))
    run_on(ranks, 2, config)
    assert exit_code_of(convert, ["export", config.run.dir, str(folder / "peft")]) == 0
    assert exit_code_of(convert, ["export", config.run.dir, str(folder / "merged"), "--merged"]) == 0
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "llama")
    tokens = torch.arange(20)[None]
    plain = base(tokens).logits
    theirs = peft.PeftModel.from_pretrained(base, str(folder / "peft"))(tokens).logits
    merged = transformers.LlamaForCausalLM.from_pretrained(folder / "merged")(tokens).logits
    torch.testing.assert_close(merged, theirs, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 0.01
    description = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == str(folder / "llama")


def test_what_does_not_go_together_is_one_line(folder: Path, corpus: DataConfig) -> None:
    """A setting that is accepted and then not used, or fails in the middle."""
    config = adapter_config(folder, corpus)
    assert find_problems(config, world_size=1) == []
    refused = {
        "optim__name": "muon",
        "precision__compute": "fp8",
    }
    for key, value in refused.items():
        found = find_problems(changed(config, folder, **{key: value}), world_size=1)
        assert any("does not work with adapter.name=lora" in line for line in found), (key, found)
    piped = changed(config, folder, parallel__pp=2, parallel__pp_schedule="zero_bubble")
    assert any("next to no weight gradients" in line for line in find_problems(piped, world_size=2))
    piped = changed(config, folder, parallel__pp=2)
    piped.adapter.targets = ["blocks.0.*"]
    assert any("leaves block 1 without an adapter" in line for line in find_problems(piped, world_size=2))
    config.adapter.name = "none"
    found = find_problems(config, world_size=1)
    assert "adapter.rank=3 has no effect with adapter.name=none; use adapter.rank=16" in found
    config.adapter.name = "lora"
    config.adapter.targets = ["q_proj"]
    assert any(line.startswith("adapter.targets=q_proj matches no") for line in find_problems(config, world_size=1))


def test_b_learns_by_its_own_rate(ranks: RankPool, folder: Path, corpus: DataConfig) -> None:
    """LoRA+ that scales A too, or nothing: the first update of AdamW is lr in size, whatever the gradient."""
    config = adapter_config(
        folder, corpus, train__steps=1, optim__weight_decay=0.0, optim__lr=1e-3, train__grad_clip=0.0
    )
    config.optim.eps = 1e-30
    plain = run_adapted(ranks, 1, changed(config, folder / "plus-1"))
    config.adapter.lr_ratio = 16.0
    plus = run_adapted(ranks, 1, changed(config, folder / "plus-16"))
    config.optim.lr, config.adapter.lr_ratio = 0.0, 1.0
    start = run_adapted(ranks, 1, changed(config, folder / "plus-0")).weights
    for name, weight in start.items():
        ratio = (plus.weights[name] - weight) / (plain.weights[name] - weight)
        assert ratio.median().item() == pytest.approx(16.0 if name.endswith("lora_b") else 1.0, rel=1e-3), name
