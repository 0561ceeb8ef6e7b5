"""The gradient of recipe=grpo against transformers' logits and REINFORCE written out, on the same completions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.config import ModelConfig
from tests.pool import RankPool
from tests.trainer.rl.rolling import SEQ_LEN, rolling
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize


def step_here(config: TrainConfig) -> tuple[list[Any], float]:
    """The rollouts of the first step, and its gradient norm before clipping."""
    trainer = Trainer(finalize(config, world_size=1))
    rollouts: list[Any] = []
    recipe = trainer.recipe
    pack = recipe._packed  # type: ignore[attr-defined]

    def packed(given: list[Any]) -> Any:
        rollouts.extend(given)
        return pack(given)

    recipe._packed = packed  # type: ignore[attr-defined]
    try:
        trainer.run()
    finally:
        trainer.close()
    (line,) = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [(r.number, r.tokens, r.spans, r.reward) for r in rollouts], json.loads(line)["grad_norm"]


@pytest.mark.parametrize("micro", [1, 4])
def test_the_gradient_is_that_of_reinforce_by_transformers(ranks: RankPool, tmp_path: Path, micro: int) -> None:
    """Advantages on another completion's tokens; a label one place off; a prompt that is learned."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = rolling(tmp_path, train__steps=1, train__micro_batch_size=micro, train__grad_clip=0.0)
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
            pad_token_id=None,
        )
    )
    weights = tmp_path / "tokenizer"  # a model's folder has both
    model.save_pretrained(weights)
    config.model = ModelConfig(family="hf", path=str(weights))
    config.data.tokenizer.path = None
    ((rollouts, grad_norm),) = ranks.run(1, step_here, config)
    assert len(rollouts) == 16
    loss = torch.zeros(())
    for number, tokens, spans, reward in rollouts:
        rewards = torch.tensor([other for same, _, _, other in rollouts if same == number])
        advantage = (reward - rewards.mean()) / (rewards.std() + 1e-4)
        ((begin, end),) = spans
        assert end == len(tokens)
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        said = logprobs[torch.arange(begin - 1, end - 1), torch.tensor(tokens[begin:end])]
        loss = loss - advantage * said.mean() / len(rollouts)
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    assert grad_norm == pytest.approx(norm.item(), rel=1e-4)
