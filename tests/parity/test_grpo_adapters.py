"""recipe=grpo with adapters: rollouts by base and adapters where they lie, gradients of the adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from models.adapter_config import AdapterConfig
from models.invariant import make_batch_invariant
from models.lora import adapters_off
from tests.models.oracle import pair
from tests.models.test_peft import adapted
from tests.parity.adapting import randomly, run_adapted
from tests.parity.harness import Outcome
from tests.parity.test_grpo import same
from tests.pool import RankPool
from tests.trainer.rl.rolling import adapting, rolling
from trainer.config import TrainConfig
from trainer.convert import export_checkpoint
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, rows of one rollout each."""
    folder = tmp_path_factory.mktemp("grpo")
    return run_adapted(ranks, 1, adapting(rolling(folder, train__micro_batch_size=1), folder))


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"parallel__zero_stage": 1},
    "zero3, gathered once": {"parallel__zero_stage": 3, "rl__weights": "gather"},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "zero3 and tp, gathered once": {"parallel__tp": 2, "parallel__zero_stage": 3, "rl__weights": "gather"},
    "tp": {"parallel__tp": 2},
}


@pytest.mark.some(2, unless_thorough=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_ranks_train_the_same_adapters(
    ranks: RankPool, tmp_path: Path, reference: Outcome, layout: str
) -> None:
    """Rollouts of a part of B, of the base alone, or of adapters of the step before."""
    size = 4 if "and tp" in layout else 2
    same(run_adapted(ranks, size, adapting(rolling(tmp_path, **LAYOUTS[layout]), tmp_path)), reference)


@pytest.mark.parametrize("settings", [{}, {"quantize": "nf4"}, {"dora": True}], ids=["lora", "qlora", "dora"])
def test_in_deterministic_mode_trainer_and_sampler_agree_to_the_bit(
    ranks: RankPool, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Products of adapters that depend on how many rows there are; the control is the test of half precision."""
    changes = {"train__batch_invariant": True, "precision__compute": "bf16", "train__global_batch_size": 8}
    config = adapting(rolling(tmp_path, **changes), tmp_path, **settings)
    for line in run_adapted(ranks, 1, config).metrics:
        assert line["sampler_max_delta"] == line["sampler_kl"] == 0.0
        assert line["grad_norm"] > 0


def test_in_half_precision_they_otherwise_do_not(ranks: RankPool, tmp_path: Path) -> None:
    """Negative control; and 4 bits that are served as they are trained."""
    config = adapting(rolling(tmp_path, precision__compute="bf16", train__steps=1), tmp_path, quantize="nf4")
    (line,) = run_adapted(ranks, 1, config).metrics
    assert 1e-4 < line["sampler_max_delta"] < 0.2


def served(config: TrainConfig) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy tokens of the engine on the model as it was trained, with and without its adapters; checkpointed."""
    with randomly():
        trainer = Trainer(finalize(config, world_size=1))
    try:
        trainer.run()
        engine: Engine = trainer.recipe._engine  # type: ignore[attr-defined]
        engine.weights_changed()
        greedy = SamplingConfig(temperature=0.0, max_tokens=12, ignore_eos=True)
        prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
        found = [completion.token_ids for completion in engine.generate(prompts, greedy)]
        engine.weights_changed()
        with adapters_off(trainer.state.model):
            return found, [completion.token_ids for completion in engine.generate(prompts, greedy)]
    finally:
        trainer.close()


def test_what_the_engine_serves_is_what_peft_computes(ranks: RankPool, tmp_path: Path) -> None:
    """An engine that serves the base: it would agree with itself on every layout."""
    config = adapting(rolling(tmp_path, train__steps=1), tmp_path)
    config.checkpoint.at_end = True
    ((found, off),) = ranks.run(1, served, config)
    export_checkpoint(Path(config.run.dir), tmp_path / "peft")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tokenizer", dtype=torch.float64)
    plain = [greedy_tokens(base, prompt) for prompt in ([5, 6, 7], [9, 8, 7, 6, 5, 4])]
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).double()
    assert found == [greedy_tokens(theirs, prompt) for prompt in ([5, 6, 7], [9, 8, 7, 6, 5, 4])]
    assert off == plain != found


@torch.no_grad()
def greedy_tokens(model: Any, prompt: list[int], count: int = 12) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_reference_is_the_policy_without_its_adapters(ranks: RankPool, tmp_path: Path) -> None:
    """A divergence from something else than the model beside the policy."""
    lines = []
    for name in ("model", "adapter"):
        config = rolling(tmp_path / name, rl__kl_weight=0.5, recipe__reference=name)
        lines.append(run_adapted(ranks, 1, adapting(config, tmp_path / name)).metrics)
    for ours, theirs in zip(*lines, strict=True):
        assert ours["kl"] == theirs["kl"] > 1e-3
        assert ours["loss"] == theirs["loss"]


def test_latent_attention_is_refused_where_its_matrix_is_adapted(tmp_path: Path) -> None:
    """An engine that reads the weight of a layer and not its adapter."""
    config = adapting(rolling(tmp_path), tmp_path)
    assert find_problems(config, world_size=1) == []
    _, base = pair("deepseek_v2", tmp_path / "latent")
    config.model.path = str(tmp_path / "latent")
    says = "rollouts attend through pages, which reads the weight of attention.kv_b and not its layer"
    found = find_problems(config, world_size=1)
    assert any(says in line for line in found), found
    config.adapter.targets = ["o"]
    assert not any(says in line for line in find_problems(config, world_size=1))
    Engine(adapted(base, AdapterConfig("lora", targets=["o"])), EngineConfig(num_blocks=4))
    model = adapted(base, AdapterConfig("lora", targets=["kv_b"]))
    with pytest.raises(ValueError, match=r"attention.kv_b has an adapter, or 4 bits"):
        Engine(model, EngineConfig(num_blocks=4))
    with pytest.raises(ValueError, match=r"attention.kv_b has an adapter, or 4 bits"):
        make_batch_invariant(model)
