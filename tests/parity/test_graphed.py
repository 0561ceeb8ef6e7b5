"""train.cuda_graphs with a stand-in for a graph, which computes again what was captured: the bits of eager passes.

tests/gpu/test_graphed_cuda.py has real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainer.build
from data.batch import Batch
from data.config import DataConfig
from kernels.attention import alibi
from models.layers import rope
from tests.models.small import random_decoder, tiny
from tests.parity.harness import Outcome, changed, run_here, run_on, text_corpus, tiny_config
from tests.parity.test_fp8 import COMPILED, FP8
from tests.parity.test_sft import tuning
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.graphed import Found, GraphedPasses
from trainer.validate import find_problems


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("graphed"))


def again(compute: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
    """Into the same memory, as a graph does."""
    sums, gradients = compute()

    def replay() -> None:
        new_sums, new = compute()
        sums.copy_(new_sums)
        assert list(new) == list(gradients)
        for name, gradient in new.items():
            gradients[name].copy_(gradient)

    return (sums, gradients), replay


def run_graphed(config: TrainConfig) -> Outcome | None:
    captured = []

    def make() -> GraphedPasses:
        captured.append(GraphedPasses(again))
        return captured[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.build, "PlainPasses", make)
        outcome = run_here(config)
    assert captured[0]._captured
    return outcome


def run_with_the_first_batch(config: TrainConfig) -> Outcome | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "copy_", lambda self, other: None)
        return run_graphed(config)


def assert_same_bits(ours: Outcome, theirs: Outcome) -> None:
    assert ours.losses == theirs.losses
    assert ours.grad_norms == theirs.grad_norms
    assert [name for name in ours.weights if not torch.equal(ours.weights[name], theirs.weights[name])] == []


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"parallel__zero_stage": 0},
    "zero1": {"parallel__zero_stage": 1},
    "bf16": {"parallel__zero_stage": 1, "precision__compute": "bf16"},
    "uneven": {"train__micro_batch_size": 3, "model__dropout": 0.2},
    "fp8": FP8 | {"precision__fp8_recipe": "tensorwise_delayed", "parallel__zero_stage": 1},
    "recomputed": COMPILED | {"model__activation_checkpoint": "full", "parallel__zero_stage": 1},
}


def config_of(corpus: DataConfig, folder: Path, **changes: Any) -> TrainConfig:
    defaults = {"train__steps": 5, "train__global_batch_size": 8, "train__micro_batch_size": 1}
    return tiny_config(folder, corpus, **(defaults | changes))


@pytest.mark.some(3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_have_the_bits_of_eager_passes(ranks: RankPool, corpus: DataConfig, tmp_path: Path, layout: str) -> None:
    """Gradients of the micro-batch before, or that are summed twice; a shape that another one's graph computes."""
    config = config_of(corpus, tmp_path / "plain", **LAYOUTS[layout])
    theirs = run_on(ranks, 2, config)
    ours = ranks.run(2, run_graphed, changed(config, tmp_path / "graphed"))[0]
    assert_same_bits(ours, theirs)


def test_graphs_have_the_bits_of_eager_passes_in_fine_tuning(ranks: RankPool, tmp_path: Path) -> None:
    """Labels of the answers of another conversation."""
    config = tuning(tmp_path, train__micro_batch_size=1, parallel__zero_stage=1)
    theirs = run_on(ranks, 2, config)
    ours = ranks.run(2, run_graphed, changed(config, tmp_path / "graphed"))[0]
    assert_same_bits(ours, theirs)


def test_another_batch_would_be_seen(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Negative control."""
    config = config_of(corpus, tmp_path / "plain")
    theirs = run_on(ranks, 2, config)
    ours = ranks.run(2, run_with_the_first_batch, changed(config, tmp_path / "broken"))[0]
    assert ours.losses != theirs.losses


class _Crossings(TorchDispatchMode):
    """Operations on the device `meta` that take numbers from the host, but for single ones."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(t) if isinstance(x, Tensor)] for t in ((args, kwargs), result))
        if any(x.is_meta for x in given + made) and any(x.is_cpu and x.ndim for x in given):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize(
    ("changes", "constants"),
    [({}, 1), ({"positions": "alibi"}, 1), ({"positions": "learned", "dropout": 0.1}, 0), ({"sliding_window": 8}, 1)],
)
def test_only_kept_constants_come_from_the_host(changes: dict[str, Any], constants: int) -> None:
    """A copy that a capture refuses, or that a graph would repeat from memory that is somebody else's by then."""
    model = random_decoder(tiny(**changes)).to("meta").train()
    tokens = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    batch = {"documents": tokens.int(), "samples": tokens[:, 0]}
    asked = []

    def kept(key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        asked.append(key)
        return torch.empty(make().shape, device=device)

    with _Crossings() as crossings, pytest.MonkeyPatch.context() as patch:
        for module in (rope, alibi):
            patch.setattr(module, "from_host", kept)
        model(tokens, **batch).float().sum().backward()
    assert crossings.found == []
    assert len(asked) == constants


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel__tp": 2}, "train.cuda_graphs=true does not work with parallel.tp=2"),
        ({"parallel__zero_stage": 3}, "train.cuda_graphs=true does not work with parallel.zero_stage=3"),
        ({"model__activation_checkpoint": "offload"}, "train.cuda_graphs=true does not work with model.activation_"),
        ({"train__device": "cpu"}, "train.cuda_graphs=true does not work with train.device=cpu"),
    ],
)
def test_what_does_not_work_is_refused(corpus: DataConfig, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    lines = find_problems(config_of(corpus, tmp_path / "run", train__cuda_graphs=True, **changes), world_size=4)
    assert [line for line in lines if line.startswith(says)], lines


def test_without_cuda_it_is_one_error(corpus: DataConfig, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path / "run", train__cuda_graphs=True, train__device="auto")
    with pytest.raises(ValueError, match=r"train.cuda_graphs=true needs CUDA, and this runs on cpu"):
        trainer.build.check_graphs_run(config, torch.device("cpu"))
