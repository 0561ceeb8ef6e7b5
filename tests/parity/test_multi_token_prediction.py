"""Multi-token prediction: the trainer against the formula in fp64, and every layout against one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from models.mtp_config import MTPConfig
from parallel.fused import separate
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    largest,
    loss_deviation,
    relative_difference,
    run_here,
    run_on,
    text_corpus,
    tiny_config,
    whole,
)
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.sequence import SequenceParts
from trainer.step import train_step
from trainer.trainer import Trainer
from trainer.validate import finalize

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model__mtp": MTPConfig(depth=2, loss_weight=0.5), "data__mask_documents": True},
    "tied": {
        "model__mtp": MTPConfig(depth=1),
        "model__tie_embeddings": True,
        "model__dropout": 0.1,
        "model__norm": "layernorm",
        "model__sliding_window": 7,
        "model__sliding_window_layers": [1],
    },
    "latent": {
        "model__mtp": MTPConfig(depth=1),
        "model__attention_sinks": True,
        "model__num_kv_heads": None,
        "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
        "data__mask_documents": True,
    },
    "experts": {
        "model__family": "deepseek_v3",
        "model__mtp": MTPConfig(depth=1),
        "model__num_kv_heads": None,
        "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
        "model__moe": MoEConfig(num_experts=5, top_k=2, intermediate_size=11, num_shared=1, router="sigmoid"),
        "model__routing": RoutingConfig(aux_weight=0.001, bias_update_rate=0.01),
    },
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    folder = tmp_path_factory.mktemp("ahead")
    corpus = text_corpus(folder)
    return {
        name: tiny_config(
            folder / name,
            corpus,
            train__steps=2,
            schedule__warmup_steps=1,
            train__micro_batch_size=2,
            train__eval_interval=2,
            train__eval_batches=1,
            model__num_heads=4,
            model__head_dim=None if "model__mla" in changes else 6,
            model__intermediate_size=52,
            **changes,
        )
        for name, changes in VARIANTS.items()
    }


# ---- against the formula


class _Formula:
    """A Llama with blocks of multi-token prediction, one sequence at a time, as the papers write it."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.w = config, weights

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.w[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T

    def attention(self, x: Tensor, name: str, positions: Tensor, documents: Tensor) -> Tensor:
        T, H, G = len(x), self.config.num_heads, self.config.num_kv_heads
        q, k, v = (self.linear(x, f"{name}.{n}").view(T, -1, self.config.head_dim) for n in "qkv")
        q, k = self.turn(q, positions), self.turn(k, positions)
        seen = torch.ones(T, T).tril().bool() & (documents[:, None] == documents)
        heads = []
        for h in range(H):
            g = h // (H // G)
            scores = q[:, h] @ k[:, g].T / math.sqrt(q.shape[-1])
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, g])
        return self.linear(torch.cat(heads, -1), f"{name}.o")

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = positions[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def block(self, x: Tensor, name: str, positions: Tensor, documents: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x, f"{name}.attention_norm"), f"{name}.attention", positions, documents)
        y = self.norm(x, f"{name}.mlp_norm")
        return x + self.linear(
            F.silu(self.linear(y, f"{name}.mlp.gate")) * self.linear(y, f"{name}.mlp.up"), f"{name}.mlp.down"
        )

    def losses(self, batches: list[Batch]) -> list[Tensor]:
        """Mean losses of the next token, and of each block of multi-token prediction."""
        depth = self.config.mtp.depth
        found: list[list[Tensor]] = [[] for _ in range(1 + depth)]
        rows = [(b, r) for b in batches for r in range(len(b.tokens))]
        for batch, r in rows:
            tokens, labels, positions = batch.tokens[r], batch.labels[r], batch.positions[r].double()
            documents = torch.zeros_like(tokens) if batch.documents is None else batch.documents[r]
            h = self.w["embedding.weight"][tokens]
            for layer in range(self.config.num_layers):
                h = self.block(h, f"blocks.{layer}", positions, documents)
            h = self.norm(h, "final_norm")
            for k in range(1 + depth):
                if k > 0:  # T - k positions are left: only those have a k-th token after them
                    name = f"blocks.{self.config.num_layers + k - 1}"
                    e = self.norm(self.w["embedding.weight"][tokens[k:]], f"{name}.look_ahead.embedding_norm")
                    h = self.norm(h[: len(tokens) - k], f"{name}.look_ahead.hidden_norm")
                    h = self.linear(torch.cat([e, h], -1), f"{name}.look_ahead.project")
                    h = self.block(h, name, positions[: len(h)], documents[: len(h)])
                    h = self.norm(h, f"{name}.output_norm")
                log_p = self.linear(h, "head").log_softmax(-1)
                for i in range(len(h)):
                    target = int(labels[i + k])
                    if target != IGNORE_INDEX and documents[i + k] == documents[i]:
                        found[k].append(-log_p[i, target])
        return [torch.stack(of_depth).mean() for of_depth in found]


def against_the_formula(config: TrainConfig) -> tuple[float, float, float]:
    """Largest relative deviations of a first step: of the losses, of the gradients; and of them without w / D."""
    trainer = Trainer(finalize(config, world_size=1))
    state, model = trainer.state, trainer.config.model
    weights = {name: whole(w).double().requires_grad_() for name, w in state.weights().items()}
    batches = trainer.train_data.next_step()
    losses = _Formula(model, weights).losses(batches)
    total = losses[0] + model.mtp.loss_weight / model.mtp.depth * torch.stack(losses[1:]).sum()
    names = list(weights)
    expected = dict(zip(names, torch.autograd.grad(total, list(weights.values()), retain_graph=True), strict=True))
    unweighted = torch.autograd.grad(torch.stack(losses).sum(), list(weights.values()))
    found: dict[str, Tensor] = {}

    def capture(**kwargs: Any) -> None:
        held = {name: m.grad.clone() for name, m in state.data_parallel.masters.items() if m.grad is not None}
        found.update({name: whole(grad) for name, grad in separate(held, state.fused).items()})

    state.optimizer.step = capture  # type: ignore[method-assign]
    metrics = train_step(state, [batch.look_ahead(model.mtp.depth) for batch in batches], lr=0.0)
    trainer.close()
    ours = [metrics.loss, *(metrics.extra[f"mtp_loss_{k}"] for k in range(1, 1 + model.mtp.depth))]
    of_losses = max(abs(a.item() / b.item() - 1) for a, b in zip(ours, losses, strict=True))
    assert found.keys() == expected.keys()

    def deviation(reference: dict[str, Tensor]) -> float:
        return largest(relative_difference(found[n], g) for n, g in reference.items())

    return of_losses, deviation(expected), deviation(dict(zip(names, unweighted, strict=True)))


@pytest.mark.parametrize("masked", [True, False])
def test_a_step_is_the_formula(ranks: RankPool, configs: dict[str, TrainConfig], tmp_path: Path, masked: bool) -> None:
    """Tokens or targets one place off, a target across documents, a hidden state before its norm, a loss divided by
    the tokens of another; negative control: without the weight the gradients differ."""
    config = changed(configs["llama"], tmp_path / "run", data__mask_documents=masked, train__global_batch_size=4)
    of_losses, of_gradients, without_weight = ranks.run(1, against_the_formula, config)[0]
    assert of_losses <= 1e-6
    assert of_gradients <= 1e-5
    assert without_weight > 1e-2


# ---- layouts


def _layout(**changes: Any) -> dict[str, Any]:
    return {("train__" if name in ("micro_batch_size", "compile", "compile_backend") else "parallel__") + name: value
            for name, value in ({"zero_stage": 0} | changes).items()}  # fmt: skip


COMPILED = {"compile": True, "compile_backend": "aot_eager"}
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 2, _layout()),
    ("llama", 4, _layout(zero_stage=3)),
    ("llama", 4, _layout(tp=2, cp=2, sequence_parallel=True, zero_stage=1)),
    ("llama", 2, _layout(pp=2, pp_schedule="zero_bubble")),
    ("llama", 2, _layout(**COMPILED)),
    ("tied", 4, _layout(tp=2, sequence_parallel=True, zero_stage=2) | {"model__activation_checkpoint": "selective"}),
    ("tied", 2, _layout(pp=2, zero_stage=3) | {"model__activation_checkpoint": "offload"}),
    ("latent", 8, _layout(tp=2, sequence_parallel=True, cp=2, pp=2, zero_stage=1)),
    ("experts", 4, _layout(zero_stage=3)),
    ("experts", 2, _layout(zero_stage=1) | {"model__activation_checkpoint": "full"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, configs: dict[str, TrainConfig]) -> dict[str, Outcome]:
    return {name: run_on(ranks, 1, config) for name, config in configs.items()}


def _assert_same(outcome: Outcome, reference: Outcome, depth: int) -> None:
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5
    for ours, theirs in zip(outcome.metrics, reference.metrics, strict=True):
        for k in range(1, depth + 1):
            assert ours[f"mtp_loss_{k}"] == pytest.approx(theirs[f"mtp_loss_{k}"], rel=1e-6)
    assert outcome.metrics[-1]["validation_loss"] == pytest.approx(reference.metrics[-1]["validation_loss"], rel=1e-6)


@pytest.mark.some(2)
@pytest.mark.parametrize(("variant", "world_size", "changes"), LAYOUTS)
def test_every_layout_trains_the_same_model(
    ranks: RankPool,
    configs: dict[str, TrainConfig],
    one_process: dict[str, Outcome],
    tmp_path: Path,
    variant: str,
    world_size: int,
    changes: dict[str, Any],
) -> None:
    """Later tokens taken from a rank's part of the sequence, a table that one stage updates alone, a count of valid
    tokens that is a rank's own."""
    config = changed(configs[variant], tmp_path / "run", train__micro_batch_size=1, **changes)
    _assert_same(run_on(ranks, world_size, config, timeout=240), one_process[variant], config.model.mtp.depth)


def _look_ahead_after_the_cut(config: TrainConfig) -> Outcome | None:
    true = SequenceParts.of

    def late(self: SequenceParts, batch: Batch) -> Batch:
        depth = len(batch.ahead)
        batch.ahead = ()
        return true(self, batch).look_ahead(depth)

    SequenceParts.of = late  # type: ignore[method-assign]
    try:
        return run_here(config)
    finally:
        SequenceParts.of = true  # type: ignore[method-assign]


def test_looking_ahead_inside_a_part_of_the_sequence_is_noticed(
    ranks: RankPool, configs: dict[str, TrainConfig], one_process: dict[str, Outcome], tmp_path: Path
) -> None:
    """Negative control."""
    config = changed(configs["tied"], tmp_path / "run", **_layout(cp=2))
    outcome = ranks.run(2, _look_ahead_after_the_cut, config)[0]
    assert outcome is not None
    with pytest.raises(AssertionError):
        _assert_same(outcome, one_process["tied"], 1)
