"""Heads that draft: their gradients against plain PyTorch, a model that costs nothing, and the way to the lab."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.config import DataConfig
from inference.config import EngineConfig
from inference.engine import Engine
from inference.speculation.config import SpeculationConfig
from launch.convert import convert
from launch.open_model import LabModelConfig, open_model
from launch.open_speculation import open_speculation
from models.config import ModelConfig
from models.hf import export_hf_weights
from models.layers.attention import build_context
from models.speculator import Speculator, load_speculator
from models.speculator_config import SpeculatorConfig
from parallel.dims import ParallelConfig
from parallel.regions import local_tensor
from tests.inference.greedy import GREEDY, prompts_of
from tests.models.small import random_decoder, tiny
from tests.parity.harness import tiny_config
from tests.pool import RankPool
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, TrainConfig
from trainer.convert import load_checkpoint
from trainer.speculator import HeadPasses, targets
from trainer.trainer import Preempted, Trainer
from trainer.validate import finalize

T = 11


def heads_for(kind: str, config: ModelConfig) -> Speculator:
    heads = Speculator(SpeculatorConfig(kind, num_heads=3, num_layers=2), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return heads.double()


def batch_of_documents() -> Batch:
    """Two sequences, the first of two documents and with a prompt that carries no loss."""
    tokens = torch.randint(0, 61, (2, T + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, :2] = IGNORE_INDEX
    documents = torch.tensor([[0] * 6 + [1] * 5, [0] * T], dtype=torch.int32)
    labels[0, 5] = IGNORE_INDEX  # the end of the first document
    return Batch(tokens[:, :-1], labels, torch.arange(T).expand(2, -1).clone(), documents, torch.tensor([0, 1]))


def oracle(kind: str, hidden: Tensor, batch: Batch, heads: Speculator, model: Any) -> Tensor:
    """Token by token, from the definitions."""
    assert batch.documents is not None
    places = [
        (b, i, ahead)
        for b in range(2)
        for i in range(T)
        for ahead in range(1, 4 if kind == "medusa" else 2)
        if i + ahead < T and batch.documents[b, i] == batch.documents[b, i + ahead]
        if batch.labels[b, i + ahead] != IGNORE_INDEX
    ]
    if kind == "medusa":
        losses = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
        for b, i, ahead in places:
            head: Any = heads.blocks[ahead - 1]
            x = hidden[b, i]
            for layer in head.layers:
                x = x + F.silu(layer.weight @ x + layer.bias)
            losses[ahead - 1] = losses[ahead - 1] + F.cross_entropy(head.output.weight @ x, batch.labels[b, i + ahead])
        return torch.stack(losses)
    context = build_context(
        model.config,
        seq_len=T,
        device=hidden.device,
        dtype=hidden.dtype,
        positions=batch.positions,
        documents=batch.documents,
        samples=batch.samples,
    )
    later = torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], dim=1)
    states = heads.continue_states(hidden, model.embedding(later), context)
    cross, smooth = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for b, i, _ in places:
        p = (model.head.weight @ hidden[b, i + 1]).softmax(0)
        cross = cross + F.cross_entropy(model.head.weight @ states[b, i], p)
        smooth = smooth + F.smooth_l1_loss(states[b, i], hidden[b, i + 1])
    return torch.stack([cross, smooth])


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_losses_and_gradients_are_those_of_the_definitions(kind: str) -> None:
    """A target one place off, a label of another document, a state of the wrong token, a gradient into the model."""
    model = random_decoder(tiny()).double().requires_grad_(False)
    heads, batch = heads_for(kind, model.config), batch_of_documents()
    with torch.no_grad():
        hidden = model(batch.tokens, documents=batch.documents, positions=batch.positions, head=lambda h, w: h)
    config = tiny(speculator=heads.config)
    weights = torch.tensor([0.3, 0.5, 0.7][: 3 if kind == "medusa" else 2], dtype=torch.float64)
    expected = oracle(kind, hidden, batch, heads, model)
    wanted = torch.autograd.grad(expected @ weights, list(heads.parameters()))
    losses = HeadPasses(model, heads).losses(targets(batch, config))
    torch.testing.assert_close(losses, expected)
    found = torch.autograd.grad(losses, list(heads.parameters()), grad_outputs=weights)
    for (name, _), ours, theirs in zip(heads.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
        assert ours.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model, and tokens."""
    folder = tmp_path_factory.mktemp("speculator")
    export_hf_weights(random_decoder(tiny()).state_dict().__getitem__, tiny(), folder / "hf", dtype=torch.float32)
    tokens = (np.arange(24 * 8 * 12 + 1) ** 2 // 7) % 61
    np.save(folder / "tokens.npy", tokens)
    return folder


def run_config(files: Path, run: Path, kind: str, **changes: Any) -> TrainConfig:
    data = DataConfig(source="tokens", path=str(files / "tokens.npy"), num_workers=0)
    config = tiny_config(run, data, train__steps=8, checkpoint__at_end=True, **changes)
    config.model = (
        ModelConfig(family="hf", path=str(files / "hf"), speculator=SpeculatorConfig(kind, num_heads=2))
        if kind == "medusa"
        else ModelConfig(family="hf", path=str(files / "hf"), speculator=SpeculatorConfig(kind))
    )
    return config


def train_here(config: TrainConfig) -> dict[str, Any]:
    """Train; what this rank held."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    state = trainer.state
    assert isinstance(state.passes, HeadPasses)
    before = {name: tensor.clone() for name, tensor in state.passes.base.state_dict().items()}
    try:
        trainer.run()
    finally:
        trainer.close()
    after = state.passes.base.state_dict()
    heads = sum(parameter.numel() for parameter in state.model.parameters())
    moments = [t for name, t in state.optimizer.state_tensors().items() if "step" not in name]
    return {
        "untouched": all(torch.equal(tensor, before[name]) for name, tensor in after.items()),
        "gradients": [p for p in state.passes.base.parameters() if p.grad is not None or p.requires_grad],
        "heads": heads,
        "masters": sum(local_tensor(master).numel() for master in state.data_parallel.masters.values()),
        "moments": sum(local_tensor(t).numel() for t in moments),
    }


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_heads_are_trained_on_any_number_of_ranks_and_drafted_with(
    ranks: RankPool, files: Path, tmp_path: Path, kind: str
) -> None:
    """A model that is updated, or has moments; heads that depend on the layout; an export that the lab cannot read."""
    one = run_config(files, tmp_path / "one", kind, parallel__zero_stage=0)
    (alone,) = ranks.run(1, train_here, one)
    assert alone["untouched"]
    assert alone["gradients"] == []
    assert alone["masters"] == alone["heads"]
    assert alone["moments"] == 2 * alone["heads"]
    two = run_config(files, tmp_path / "two", kind, parallel__zero_stage=2)
    shared = ranks.run(2, train_here, two)
    assert all(rank["untouched"] for rank in shared)
    assert sum(rank["masters"] for rank in shared) == alone["heads"]
    losses = [[line["loss"] for line in metrics(config)] for config in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    further = {"medusa": ["head_2_loss"], "eagle": ["state_loss"]}[kind]
    assert all(name in metrics(one)[0] for name in further)

    ranks.run(1, convert, ["export", str(tmp_path / "two"), str(tmp_path / "heads")])
    opened = open_model(
        LabModelConfig(path=str(files / "hf"), speculator_path=str(tmp_path / "heads")), torch.device("cpu")
    )
    drafting = open_speculation(opened, SpeculationConfig(kind, switch_off=False))
    engine = Engine(opened.model, EngineConfig(block_size=4), speculation=drafting)
    prompts = prompts_of([3, 9])
    found = engine.generate(prompts, GREEDY)
    assert [c.token_ids for c in found] == [c.token_ids for c in Engine(opened.model).generate(prompts, GREEDY)]
    assert all(completion.speculation is not None for completion in found)
    with pytest.raises(CheckpointError, match=f"holds {kind} heads for a model; give model.path the model"):
        load_checkpoint(tmp_path / "two", name="model.path", dtype=torch.float32, device=torch.device("cpu"))


def test_a_run_of_heads_goes_on_from_its_checkpoint(ranks: RankPool, files: Path, tmp_path: Path) -> None:
    """Heads that begin anew, or a model that is not there after a restart."""
    whole = run_config(files, tmp_path / "whole", "eagle")
    ranks.run(1, train_here, whole)
    parts = run_config(files, tmp_path / "parts", "eagle")
    ranks.run(1, stop_after, parts, 4)
    ranks.run(1, train_here, parts)
    assert [m["loss"] for m in metrics(parts)] == [m["loss"] for m in metrics(whole)]


def stop_after(config: TrainConfig, steps: int) -> None:
    trainer = Trainer(finalize(config, world_size=1))
    trainer.guard.requested = lambda step: step >= steps  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        trainer.run()
    trainer.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"parallel": ParallelConfig(zero_stage=3)},
            "parallel.zero_stage=3 does not work with model.speculator.kind=eagle",
        ),
        ({"parallel": ParallelConfig(zero_stage=0, tp=2)}, "parallel.tp=2 does not work with model.speculator.kind"),
        ({"path": None}, "model.speculator.kind=eagle trains heads for a model that is there already: set model.path"),
        ({"kind": "hydra"}, "model.speculator.kind=hydra is unknown"),
        ({"num_heads": 2}, "model.speculator.num_heads=2 has no effect with model.speculator.kind=eagle"),
    ],
)
def test_what_heads_cannot_be_trained_with_is_refused(
    files: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """Nothing silently trained on another layout than was asked for."""
    config = run_config(files, tmp_path / "run", "eagle")
    config.parallel = changes.get("parallel", ParallelConfig(zero_stage=0))
    config.model.speculator = SpeculatorConfig(changes.get("kind", "eagle"), num_heads=changes.get("num_heads", 4))
    if "path" in changes:
        config.model = tiny(speculator=config.model.speculator)
    with pytest.raises(ConfigError) as refused:
        finalize(config, world_size=2)
    assert any(says in problem for problem in refused.value.problems)


def test_heads_of_another_model_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    """Drafts from weights that mean something else."""
    with pytest.raises(ValueError, match="holds no heads"):
        load_speculator(tmp_path, tiny(), dtype=torch.float32, device=torch.device("cpu"))
