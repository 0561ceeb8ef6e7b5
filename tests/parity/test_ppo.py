"""recipe=ppo: advantages, gradients of policy and value model, on every layout and against transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.config import ModelConfig
from tests.parity.harness import Outcome, gradient_deviation, run_on
from tests.pool import RankPool
from tests.trainer.rl.ppo_runs import proximal
from tests.trainer.rl.rolling import SEQ_LEN
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize

SEVERAL = {"rl__minibatches": 2, "train__steps": 2}
SAMPLED = ("reward", "valid_tokens", "completion_tokens", "groups_trained")
REPORTED = ("explained_variance", "return_mean", "advantage_std", "reference_kl", "kl_coefficient")


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, rows of one rollout each."""
    return run_on(ranks, 1, proximal(tmp_path_factory.mktemp("ppo"), train__micro_batch_size=1, **SEVERAL))


def same(found: Outcome, wanted: Outcome) -> None:
    for ours, theirs in zip(found.metrics, wanted.metrics, strict=True):
        for name in SAMPLED:
            assert ours.get(name) == (pytest.approx(theirs[name], rel=1e-12) if name in theirs else None), name
        for name in REPORTED:
            assert ours.get(name) == (pytest.approx(theirs[name], rel=1e-3, abs=1e-6) if name in theirs else None), name
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["value_loss"] == pytest.approx(theirs["value_loss"], rel=1e-4)
        assert ours["value_grad_norm"] == pytest.approx(theirs["value_grad_norm"], rel=1e-4)
        assert ours["value_clipped"] == pytest.approx(theirs["value_clipped"], abs=0.02)
    assert gradient_deviation(found, wanted) < 1e-4


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"parallel__zero_stage": 1},
    "zero2": {"parallel__zero_stage": 2},
    "zero3, gathered once": {"parallel__zero_stage": 3, "rl__weights": "gather"},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "compiled": {"train__compile": True, "train__compile_backend": "aot_eager"},
    "zero3 and tp": {"parallel__tp": 2, "parallel__zero_stage": 3, "rl__weights": "stream"},
    "tp": {"parallel__tp": 2},
    "pp": {"parallel__pp": 2},
    "cp": {"parallel__cp": 2},
    "zero3 and tp, sp": {"parallel__tp": 2, "parallel__zero_stage": 3, "parallel__sequence_parallel": True},
    "pp and tp, cut over its ranks": {"parallel__pp": 2, "parallel__tp": 2, "parallel__sequence_parallel": True},
}


def test_packing_and_micro_batches_change_nothing(ranks: RankPool, tmp_path: Path, reference: Outcome) -> None:
    """A value read from another completion's tokens; whitening by micro-batch."""
    same(run_on(ranks, 1, proximal(tmp_path, train__micro_batch_size=4, **SEVERAL)), reference)


@pytest.mark.some(2, unless_thorough=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_ranks_train_as_one(ranks: RankPool, tmp_path: Path, reference: Outcome, layout: str) -> None:
    """Whitening by rank, a value model that is not on the policy's layout, gradients that are not summed."""
    size = 4 if "and tp" in layout else 2
    same(run_on(ranks, size, proximal(tmp_path, **SEVERAL, **LAYOUTS[layout])), reference)


def test_advantages_that_are_not_whitened_would_be_seen(ranks: RankPool, tmp_path: Path, reference: Outcome) -> None:
    """The negative control of the two above."""
    other = run_on(ranks, 1, proximal(tmp_path, ppo__whiten=False, **SEVERAL))
    assert gradient_deviation(other, reference) > 1e-2


def step_here(config: TrainConfig) -> tuple[list[Any], dict[str, float]]:
    """The rollouts of the first step, and its metrics."""
    trainer = Trainer(finalize(config, world_size=1))
    recipe: Any = trainer.recipe
    rollouts: list[Any] = []
    complete = recipe._complete

    def completed(batches: list[list[Any]]) -> Any:
        found = complete(batches)
        rollouts.extend(batches[0])
        return found

    recipe._complete = completed
    try:
        trainer.run()
    finally:
        trainer.close()
    (line,) = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [(r.tokens, r.spans[0], r.reward, r.advantages, r.returns) for r in rollouts], json.loads(line)


def llama(kind: Any, folder: Path, *, seed: int, hidden_size: int = 24) -> str:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.3,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    kind(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_step_is_that_of_trls_formulas_on_transformers_models(
    ranks: RankPool, tmp_path: Path, temperature: float
) -> None:
    """Policy, reference and value model of three folders, in fp64: advantages, losses and both gradients.

    A value of the place after a token; a penalty of the wrong sign; a reward on every token; a reference, or a
    gradient, at another temperature than completions were drawn at.
    """
    policy_path = llama(transformers.LlamaForCausalLM, tmp_path / "tokenizer", seed=0)  # with a tokenizer beside it
    reference_path = llama(transformers.LlamaForCausalLM, tmp_path / "reference", seed=1)
    value_path = llama(transformers.LlamaForSequenceClassification, tmp_path / "value", seed=2, hidden_size=36)
    gamma, lam, beta = 0.98, 0.9, 0.3
    config = proximal(
        tmp_path,
        train__steps=1,
        train__grad_clip=0.0,
        rl__temperature=temperature,
        recipe__reference_path=reference_path,
        ppo__value_path=value_path,
        ppo__gamma=gamma,
        ppo__gae_lambda=lam,
        ppo__kl_coefficient=beta,
    )
    config.model = ModelConfig(family="hf", path=policy_path)
    config.data.tokenizer.path = None
    ((rollouts, line),) = ranks.run(1, step_here, config)
    assert len(rollouts) == 16
    policy = transformers.LlamaForCausalLM.from_pretrained(policy_path).double()
    frozen = transformers.LlamaForCausalLM.from_pretrained(reference_path).double()
    valued = transformers.LlamaForSequenceClassification.from_pretrained(value_path).double()
    said, values, advantages, returns, divergences = [], [], [], [], []
    for tokens, (begin, end), score, ours, _ in rollouts:
        inputs = torch.tensor([tokens])
        places, labels = torch.arange(begin - 1, end - 1), torch.tensor(tokens[begin:end])
        logprobs, of_reference = (
            (model(inputs).logits[0] / temperature).log_softmax(-1)[places, labels] for model in (policy, frozen)
        )
        value = valued.score(valued.model(inputs).last_hidden_state)[0, places, 0]
        rewards = -beta * (logprobs - of_reference).detach()
        divergences.append((logprobs - of_reference).sum().item())
        rewards[-1] += score
        last, found = 0.0, torch.zeros(end - begin, dtype=torch.float64)
        for t in reversed(range(end - begin)):
            following = value[t + 1].item() if t + 1 < end - begin else 0.0
            last = rewards[t].item() + gamma * following - value[t].item() + gamma * lam * last
            found[t] = last
        assert len(ours) == end - begin
        said, values = [*said, logprobs], [*values, value]
        advantages, returns = [*advantages, found], [*returns, found + value.detach()]
    of_all, targets, estimates = torch.cat(advantages), torch.cat(returns), torch.cat(values)
    white = (of_all - of_all.mean()) * torch.rsqrt(of_all.var() + 1e-8)
    assert torch.cat([torch.tensor(ours) for *_, ours, _ in rollouts]).numpy() == pytest.approx(white.numpy(), abs=2e-4)
    assert torch.cat([torch.tensor(ours) for *_, ours in rollouts]).numpy() == pytest.approx(targets.numpy(), abs=2e-4)
    assert line["reference_kl"] == pytest.approx(sum(divergences) / 16, rel=1e-4)
    explained = 1 - (targets - estimates.detach()).var() / targets.var()
    assert line["explained_variance"] == pytest.approx(explained.item(), rel=1e-3, abs=1e-4)
    value_loss = 0.5 * (estimates - targets).square().mean()
    assert line["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    value_loss.backward()
    (-(white * torch.cat(said)).mean()).backward()
    for model, name in ((valued, "value_grad_norm"), (policy, "grad_norm")):
        norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        assert line[name] == pytest.approx(norm.item(), rel=1e-3), name
