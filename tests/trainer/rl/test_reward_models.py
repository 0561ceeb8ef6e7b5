"""Reward models as rewards: those of transformers, on the tokens that were sampled, whatever the layout."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.data.conversing import chat_folder
from tests.parity.harness import run_on
from tests.pool import RankPool
from tests.trainer.rl.rolling import EVEN, SEQ_LEN, rolling
from trainer.config import TrainConfig
from trainer.rl.config import RewardConfig
from trainer.rl.reward_models import scoring_batches
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems


def reward_model(
    folder: Path, *, seed: int = 0, num_labels: int = 1, vocab_size: int = 300, causal: bool = False
) -> str:
    """A random one of transformers in a folder, of another shape than the policy."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.3,
        num_labels=num_labels,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    kind = transformers.LlamaForCausalLM if causal else transformers.LlamaForSequenceClassification
    kind(config).save_pretrained(folder)
    return str(folder)


def rolled(folder: Path, path: str, **changes: Any) -> TrainConfig:
    rewards = [RewardConfig(EVEN, 0.5), RewardConfig("model", 2.0, path=path)]
    return rolling(folder, **{"rl__rewards": rewards, "train__steps": 1, "train__micro_batch_size": 2} | changes)


def first_groups(config: TrainConfig) -> list[tuple[list[int], float | None, dict[str, float]]]:
    """Of four prompts: tokens, reward and its parts."""
    trainer = Trainer(finalize(config, world_size=1))
    try:
        recipe: Any = trainer.recipe
        groups, _ = recipe._collector.groups(range(4), recipe._samples["train"], size=4)
        return [(r.tokens, r.reward, r.rewards) for group in groups for r in group.rollouts]
    finally:
        trainer.close()


def test_the_reward_is_what_transformers_gives_the_same_tokens(ranks: RankPool, tmp_path: Path) -> None:
    """A reward read one token early, off another completion of the row, or of the policy's own weights."""
    path = reward_model(tmp_path / "reward")
    (found,) = ranks.run(1, first_groups, rolled(tmp_path, path))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path).double().eval()
    assert len(found) == 16
    one_early = 0.0
    for tokens, reward, parts in found:
        with torch.no_grad():
            whole, cut = (theirs(torch.tensor([some])).logits.item() for some in (tokens, tokens[:-1]))
        assert parts["model"] == pytest.approx(whole, rel=1e-4, abs=1e-5)
        assert reward == pytest.approx(0.5 * parts["even"] + 2.0 * parts["model"], rel=1e-12)
        one_early = max(one_early, abs(cut - whole))
    assert one_early > 0.1  # negative control


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1, offloaded": {"parallel__zero_stage": 1},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "tp": {"parallel__tp": 2},
    "cp": {"parallel__cp": 2},
    "pp": {"parallel__pp": 2},
}


def test_two_ranks_reward_as_one(ranks: RankPool, tmp_path: Path) -> None:
    """Shards that one rank waits for alone, because another has fewer rows; ranks of tp that hold different rewards."""
    path = reward_model(tmp_path / "reward")
    (wanted,) = run_on(ranks, 1, rolled(tmp_path / "one", path)).metrics
    for name, layout in LAYOUTS.items():
        config = rolled(tmp_path / name, path, **layout)
        config.recipe.rl.rewards[1].offload = "offloaded" in name
        (found,) = run_on(ranks, 2, config).metrics
        assert found["reward_model"] == pytest.approx(wanted["reward_model"], rel=1e-5), name
        assert found["reward"] == pytest.approx(wanted["reward"], rel=1e-5), name
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4), name


def test_several_models_have_names_of_their_own_and_validation_has_them_too(ranks: RankPool, tmp_path: Path) -> None:
    paths = [reward_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    rewards = [RewardConfig("model", 1.0, path=path) for path in paths]
    config = rolling(tmp_path, rl__rewards=rewards, train__steps=1, train__eval_interval=1)
    (line,) = run_on(ranks, 1, config).metrics
    assert line["reward_model_0"] != line["reward_model_1"]
    assert line["reward"] == pytest.approx(line["reward_model_0"] + line["reward_model_1"], rel=1e-9)
    assert line["validation_reward"] != 0


def test_sequences_are_laid_out_so_that_none_is_longer_than_a_row() -> None:
    sequences = [list(range(1, n + 1)) for n in (5, 3, 8, 2, 1)]
    found = scoring_batches(sequences, seq_len=8, micro_batch_size=2)
    for one in found:
        assert one.batch.tokens.shape[1] <= 8
        for sequence, row, place in one.ends:
            first = place + 1 - len(sequences[sequence])
            assert one.batch.tokens[row, first : place + 1].tolist() == sequences[sequence]
            assert one.batch.positions[row, first : place + 1].tolist() == list(range(len(sequences[sequence])))
    assert sorted(sequence for one in found for sequence, _, _ in one.ends) == list(range(5))
    assert scoring_batches([], seq_len=8, micro_batch_size=2) == []


def test_rows_that_are_filled_up_hold_the_same_sequences_in_the_same_places() -> None:
    """A micro-batch of another shape than the others, or one that brings a sequence twice."""
    sequences = [list(range(1, n + 1)) for n in (5, 3, 4, 6, 1)]
    found, filled_up = (
        scoring_batches(sequences, seq_len=8, micro_batch_size=10, few_shapes=few_shapes)
        for few_shapes in (False, True)
    )
    assert [one.batch.tokens.shape for one in filled_up] == [(4, 8)]  # three rows, to an eighth of ten
    for one, other in zip(found, filled_up, strict=True):
        assert one.ends == other.ends
        rows, length = one.batch.tokens.shape
        assert torch.equal(one.batch.tokens, other.batch.tokens[:rows, :length])
        assert torch.equal(one.batch.documents, other.batch.documents[:rows, :length])
        assert not other.batch.tokens[rows:].any()
        assert not other.batch.tokens[:, length:].any()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"causal": True}, "has no score.weight, so it is no reward model"),
        ({"num_labels": 2}, "classifies into 2 labels; a reward model has one"),
        ({"vocab_size": 299}, "has 299 words and the trained model 300"),
    ],
)
def test_a_folder_that_is_no_reward_model_is_refused(tmp_path: Path, kind: dict[str, Any], says: str) -> None:
    lines = find_problems(rolled(tmp_path, reward_model(tmp_path / "reward", **kind)), world_size=1)
    assert any(line.startswith("recipe.rl.rewards[1].path=") and says in line for line in lines), lines


def test_a_reward_model_may_know_more_words(tmp_path: Path) -> None:
    """One with a padding token of its own, as most have."""
    assert find_problems(rolled(tmp_path, reward_model(tmp_path / "reward", vocab_size=301)), world_size=1) == []


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (RewardConfig("model"), "recipe.rl.rewards[0].path is missing"),
        (RewardConfig("model", path="nowhere"), "recipe.rl.rewards[0].path=nowhere does not exist"),
        (RewardConfig(EVEN, path="x"), "recipe.rl.rewards[0].path=x has no effect with function=tests"),
        (RewardConfig("model", path="x", arguments={"a": 1}), "recipe.rl.rewards[0].arguments={'a': 1} has no effect"),
    ],
)
def test_what_a_reward_does_not_read_is_refused(tmp_path: Path, reward: RewardConfig, says: str) -> None:
    lines = find_problems(rolling(tmp_path, rl__rewards=[reward]), world_size=1)
    assert any(says in line for line in lines), lines


def test_a_reward_model_of_another_tokenizer_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    """The same number of words, of which it reads others than the policy wrote; the second is the control."""
    path = Path(reward_model(tmp_path / "reward"))
    config = rolled(tmp_path, str(path))
    chat_folder(tmp_path / "same")
    shutil.copy(tmp_path / "same" / "tokenizer.json", path)
    run_on(ranks, 1, config)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(AssertionError, match="has another tokenizer than the policy"):
        run_on(ranks, 1, rolled(tmp_path / "other", str(path)))
