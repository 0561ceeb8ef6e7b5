"""The whole of training against another implementation: transformers and torch.optim in a loop written out here.

Nothing below `Oracle` comes from this project: model, loss, clipping, schedule, weight-decay groups and the reading of
the tokens are written again from what the documentation says. Losses and gradient norms agree to 1e-6 over twenty
steps; every mistake that is made on purpose at the end shows at least ten times as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from data.config import DataConfig
from models.config import ModelConfig
from tests.parity.harness import run_on, tiny_config
from tests.pool import RankPool
from trainer.config import OptimConfig, ScheduleConfig, TrainConfig

STEPS, SEQ_LEN, BATCH = 20, 24, 8
VOCAB = 97
# Both sides sum fp32 in another order. Measured: 1.3e-7 to 2.2e-7, on losses and on gradient norms.
TOLERANCE = 1e-6

FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=36,
            intermediate_size=50,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=33,
            n_layer=2,
            n_head=3,
            n_positions=SEQ_LEN,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}


@dataclass
class Oracle:
    """Twenty steps of training without this project. The fields are what a mistake can be made in."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.1
    decays_tables: bool = False  # embeddings and learned positions
    decays_vectors: bool = False  # norms and biases
    clip: float = 1.0
    warmup: int = 3
    warmup_offset: int = 0
    final_fraction: float = 0.1
    shift: int = 1  # the label of a token is this many places on
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def train(self, model: nn.Module, tokens: np.ndarray) -> Oracle:
        """Fill losses and grad_norms (before clipping)."""
        optimizer = torch.optim.AdamW(self.groups(model), lr=self.lr, betas=self.betas, eps=self.eps)
        for step in range(1, STEPS + 1):
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step)
            inputs, labels = self.batch(tokens, step)
            logits = model(input_ids=inputs).logits
            loss = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            self.losses.append(loss.item())
            self.grad_norms.append(norm.item())
        return self

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices decay; tables of vectors, norms and biases do not."""
        decayed, others = [], []
        for name, parameter in model.named_parameters():
            table = any(part in name for part in ("embed_tokens", "wte", "wpe"))
            decays = self.decays_vectors if parameter.ndim == 1 else (self.decays_tables if table else True)
            (decayed if decays else others).append(parameter)
        return [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]

    def rate(self, step: int) -> float:
        """Linear to lr at step `warmup`, then half a cosine to final_fraction * lr at the last step."""
        if step <= self.warmup:
            return self.lr * (step + self.warmup_offset) / self.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (STEPS - self.warmup)))
        return self.lr * (self.final_fraction + (1 - self.final_fraction) * cosine)

    def batch(self, tokens: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        """Sample i is tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]; step s takes the samples from (s - 1) * BATCH on."""
        inputs, labels = [], []
        for i in range((step - 1) * BATCH, step * BATCH):
            inputs.append(tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN])
            labels.append(tokens[i * SEQ_LEN + self.shift : (i + 1) * SEQ_LEN + self.shift])
        return tuple(torch.from_numpy(np.stack(rows).astype(np.int64)) for rows in (inputs, labels))  # type: ignore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokens.npy, where a token mostly decides the next one, and a folder of each family saved by transformers."""
    place = tmp_path_factory.mktemp("transformers")
    generator = np.random.default_rng(4)
    tokens = [1]
    for noise in generator.random(STEPS * BATCH * SEQ_LEN + SEQ_LEN):
        tokens.append((5 * tokens[-1] + 2) % VOCAB if noise < 0.8 else int(noise * 1e6) % VOCAB)
    np.save(place / "tokens.npy", np.array(tokens, dtype=np.uint16))
    for name, build in FAMILIES.items():
        torch.manual_seed(11)
        build().save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def oracles(folder: Path) -> dict[str, Oracle]:
    return {family: oracle(folder, family, Oracle()) for family in FAMILIES}


def oracle(folder: Path, family: str, settings: Oracle) -> Oracle:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / family, attn_implementation="eager").train()
    return settings.train(model, np.load(folder / "tokens.npy"))


def config_of(folder: Path, family: str, run_dir: Path, **changes: Any) -> TrainConfig:
    """What a user would ask this project for."""
    data = DataConfig(
        source="tokens", path=str(folder / "tokens.npy"), shuffle=False, validation_fraction=0.0, num_workers=0
    )
    config = tiny_config(run_dir, data, train__steps=STEPS, train__seq_len=SEQ_LEN, train__global_batch_size=BATCH)
    config.model = ModelConfig(family="hf", path=str(folder / family))
    config.optim = OptimConfig(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1)
    config.schedule = ScheduleConfig(name="cosine", warmup_steps=3, final_fraction=0.1)
    config.train.grad_clip = 1.0
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


def deviation(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of any step."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.some(4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("world_size", "zero_stage", "micro_batch_size"), [(1, 0, 8), (2, 1, 1), (2, 3, 2)], ids=["1", "zero1x2", "zero3x2"]
)
def test_twenty_steps_are_those_of_transformers_and_torch(
    family: str,
    world_size: int,
    zero_stage: int,
    micro_batch_size: int,
    ranks: RankPool,
    folder: Path,
    oracles: dict[str, Oracle],
    tmp_path: Path,
) -> None:
    """A mistake that all layouts of this project share, which comparing them with one another cannot show."""
    changes = {"parallel__zero_stage": zero_stage, "train__micro_batch_size": micro_batch_size}
    outcome = run_on(ranks, world_size, config_of(folder, family, tmp_path / "run", **changes))
    assert len(outcome.losses) == STEPS
    losses = deviation(outcome.losses, oracles[family].losses)
    norms = deviation(outcome.grad_norms, oracles[family].grad_norms)
    print(f"{family} {world_size} ranks, ZeRO-{zero_stage}: losses {losses:.1e}, gradient norms {norms:.1e}")
    assert losses <= TOLERANCE
    assert norms <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twenty_steps_learn_and_are_clipped_in_part(family: str, oracles: dict[str, Oracle]) -> None:
    """A comparison that is no test of clipping, or of anything, because nothing happens in it."""
    reference = oracles[family]
    assert reference.losses[-1] < reference.losses[0] - 0.2
    clipped = [norm > reference.clip for norm in reference.grad_norms]
    assert 2 <= sum(clipped) <= STEPS - 2


MISTAKES: dict[str, dict[str, Any]] = {
    "embeddings decay": {"decays_tables": True},
    "norms and biases decay": {"decays_vectors": True},
    "other beta2": {"betas": (0.9, 0.999)},
    "other eps": {"eps": 1e-8},
    "no clipping": {"clip": math.inf},
    "warm-up one step early": {"warmup_offset": -1},
    "cosine to zero": {"final_fraction": 0.0},
    "labels not shifted": {"shift": 0},
}


@pytest.mark.some(4)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(mistake: str, folder: Path, oracles: dict[str, Oracle]) -> None:
    """A tolerance that lets pass what the comparison is for."""
    wrong = oracle(folder, "gpt2", Oracle(**MISTAKES[mistake]))
    seen = deviation(wrong.losses, oracles["gpt2"].losses)
    print(f"{mistake}: {seen:.1e}")
    assert seen > 10 * TOLERANCE
