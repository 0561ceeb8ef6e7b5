"""precision.fp8_all_gather: weights that ranks gather in fp8 are the weights that each would quantize, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import models.fp8
import models.fp8_gather
import trainer.passes
import trainer.step
import trainer.trainer
from data.config import DataConfig
from planner.traffic import traffic
from tests.parity.harness import Outcome, changed, run_here, run_on, text_corpus, tiny_config
from tests.parity.interrupted import run_part_on
from tests.parity.test_fp8 import COMPILED, FP8
from tests.parity.test_kto import judging
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.predicted import job_of
from trainer.validate import finalize, find_problems

GATHERED = {"precision__fp8_all_gather": True}
DELAYED = {"precision__fp8_recipe": "tensorwise_delayed"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("fp8-gather"))


def sharded(corpus: DataConfig, folder: Path, **changes: Any) -> TrainConfig:
    """Four steps of ZeRO-3, validated twice."""
    defaults = FP8 | {"parallel__zero_stage": 3, "train__steps": 4, "train__eval_interval": 2}
    return tiny_config(folder, corpus, **(defaults | changes))


def assert_same_bits(ours: Outcome, theirs: Outcome) -> None:
    assert ours.losses == theirs.losses
    for found, expected in ((ours.first_gradients, theirs.first_gradients), (ours.weights, theirs.weights)):
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    validations = [[line.get("validation_loss") for line in run.metrics] for run in (ours, theirs)]
    assert validations[0] == validations[1]


@pytest.mark.some(2, unless_thorough=True)
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (2, DELAYED),
        (4, DELAYED | {"parallel__dp_replicate": 2}),
        (2, DELAYED | {"model__activation_checkpoint": "full"}),
        (2, DELAYED | COMPILED),
        (2, COMPILED | {"model__activation_checkpoint": "selective"}),
        (2, DELAYED | {"precision__fp8_fused": True}),
        (4, DELAYED | {"parallel__pp": 2, "parallel__pp_schedule": "1f1b"}),
    ],
    ids=["dynamic", "delayed", "replicas", "recomputed", "compiled", "compiled dynamic", "fused", "pipeline"],
)
def test_the_bits_are_those_of_weights_gathered_whole(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    """A scale of one rank's shard, or of the weights before an update; a largest magnitude that is not recorded; bytes
    of another layer."""
    whole = sharded(corpus, tmp_path / "whole", **changes)
    theirs = run_on(ranks, world_size, whole)
    ours = run_on(ranks, world_size, changed(whole, tmp_path / "fp8", **GATHERED))
    assert_same_bits(ours, theirs)


def gathered_bytes(config: TrainConfig) -> tuple[Outcome | None, int]:
    """What a run gave on this rank, and the bytes that it gave to all-gathers of its last step."""
    sent: list[int] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch 2.13, 2.11
    gather = getattr(dist, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        tensors = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)]
        sent.append(min(tensor.nbytes for tensor in tensors))  # input and output
        return gather(*args, **kwargs)

    step = trainer.step.train_step

    def last(*args: Any, **kwargs: Any) -> Any:
        sent.clear()
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, name, counting)
        patch.setattr(trainer.trainer, "train_step", last)
        outcome = run_here(config)
    return outcome, sum(sent)


@pytest.mark.thorough
def test_half_the_bytes_travel_as_the_plan_says(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Weights that are gathered in bf16 after all."""
    found = []
    for changes in ({}, GATHERED):
        config = sharded(corpus, tmp_path / f"run{len(found)}", **changes, model__num_layers=6, train__eval_interval=0)
        ((_, sent), _) = ranks.run(2, gathered_bytes, config)
        job = job_of(finalize(config, world_size=2), world_size=2)
        (planned,) = (t.bytes for t in traffic(job) if (t.axis, t.collective) == ("shard", "all_gather"))
        assert sent == pytest.approx(planned, rel=0.02)
        found.append(sent)
    assert found[1] < 0.75 * found[0]


def kept_in_fp8(config: TrainConfig) -> set[tuple[int, ...]]:
    """Shapes of what the last forward keeps in fp8 for its backward."""
    kept: set[tuple[int, ...]] = set()
    forward = trainer.passes.forward_loss_sum

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float8_e4m3fn:
            kept.add(tuple(tensor.shape))
        return tensor

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.passes, "forward_loss_sum", watched)
        run_here(config)
    return kept


def test_compiled_blocks_do_not_keep_transposed_weights(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """A whole model in fp8 on each rank: what depends on no gradient is computed in the forward graph, and kept."""
    changes = DELAYED | COMPILED | GATHERED | {"model__num_layers": 2, "train__eval_interval": 0}
    config = sharded(corpus, tmp_path / "run", **changes)
    model = finalize(config, world_size=2).model
    for kept in ranks.run(2, kept_in_fp8, config):
        assert (2 * model.intermediate_size, model.hidden_size) in kept  # as it was gathered, freed with the block
        assert (model.hidden_size, 2 * model.intermediate_size) not in kept


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a policy and its reference, of sizes that fp8 takes."""
    path = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(path / name)
    return path


def judged(policies: Path, name: str, **changes: Any) -> TrainConfig:
    defaults = {"precision__compute": "fp8", "parallel__zero_stage": 3, "train__steps": 4, "train__eval_interval": 0}
    config = judging(policies, name, **(defaults | {"checkpoint__interval": 2} | changes))
    config.train.global_batch_size, config.train.micro_batch_size = 12, 6
    return config


@pytest.mark.thorough
@pytest.mark.some(1)
@pytest.mark.parametrize("recipe", ["tensorwise_delayed", "tensorwise_dynamic"])
def test_forwards_before_a_step_have_its_scales(ranks: RankPool, policies: Path, recipe: str) -> None:
    """KTO asks the policy before a step: scales of 1, or of the weights before; after a restart as well."""
    changes = {"precision__fp8_recipe": recipe}
    theirs = run_on(ranks, 2, judged(policies, f"{recipe}-whole", **changes))
    gathered = judged(policies, f"{recipe}-fp8", **changes, **GATHERED)
    assert_same_bits(run_on(ranks, 2, gathered), theirs)
    stopped = changed(gathered, Path(gathered.run.dir).with_name("stopped"))
    run_part_on(ranks, 2, stopped, crash_before=4)
    continued = run_part_on(ranks, 2, stopped)
    assert continued.resumed_from == "step_2"
    assert continued.of("loss") == theirs.losses


def test_a_gather_without_scales_is_an_error() -> None:
    """A forward that nobody has announced."""
    weight = models.fp8_gather.Fp8Weight(torch.randn(4, 16), 0, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"call Fp8Linears.begin before this forward"):
        weight.shard.fsdp_pre_all_gather(None, weight.shard.shape, (16, 1), None, None)  # type: ignore[attr-defined]


def run_with_scales_of_shards(config: TrainConfig) -> Outcome | None:
    """Each rank quantizes its rows by their own largest magnitude."""
    with pytest.MonkeyPatch.context() as patch:
        alone = SimpleNamespace(all_reduce=lambda *args, **kwargs: None, ReduceOp=dist.ReduceOp)
        patch.setattr(models.fp8_gather, "dist", alone)
        return run_here(config)


def run_with_scales_of_the_beginning(config: TrainConfig) -> Outcome | None:
    """Nobody looks at the weights again after an update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.fp8_gather.GatheredWeights, "changed", lambda self: None)
        return run_here(config)


@pytest.mark.parametrize("broken", [run_with_scales_of_shards, run_with_scales_of_the_beginning])
def test_other_scales_are_other_bits(ranks: RankPool, corpus: DataConfig, tmp_path: Path, broken: Any) -> None:
    """Negative control."""
    whole = sharded(corpus, tmp_path / "whole", optim__lr=0.1)
    theirs = run_on(ranks, 2, whole)
    gathered = changed(whole, tmp_path / "fp8", **GATHERED)
    assert_same_bits(run_on(ranks, 2, gathered), theirs)
    ours = ranks.run(2, broken, changed(gathered, tmp_path / "broken"))[0]
    assert ours.losses != theirs.losses


def test_the_run_says_which_weights_are_gathered_in_fp8(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Shards of unequal size go in bf16: of three ranks all but 192 rows, gate and up of both layers."""
    changes = GATHERED | {"model__intermediate_size": 96, "train__eval_interval": 0, "train__global_batch_size": 6}
    config = sharded(corpus, tmp_path / "run", **changes)
    run_on(ranks, 3, config)
    used = json.loads((Path(config.run.dir) / "run.json").read_text())["kernels"]
    assert used["fp8_weights"] == "2 of 8 gathered in fp8"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel__zero_stage": 1}, "precision.fp8_all_gather=true does not work with parallel.zero_stage=1: ranks"),
        ({"parallel__tp": 2}, "precision.fp8_all_gather=true does not work with parallel.tp=2"),
        ({"parallel__cpu_offload": True}, "precision.fp8_all_gather=true does not work with parallel.cpu_offload=true"),
        ({"precision__fp8_recipe": "rowwise"}, "precision.fp8_all_gather=true does not work with precision.fp8_recipe"),
        ({"precision__compute": "bf16"}, "precision.fp8_all_gather=true has no effect with precision.compute=bf16"),
    ],
)
def test_what_does_not_work_is_refused(corpus: DataConfig, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    lines = find_problems(sharded(corpus, tmp_path / "run", **(GATHERED | changes)), world_size=4)
    assert [line for line in lines if line.startswith(says)], lines


def test_a_layout_of_which_every_shard_is_uneven_is_refused(corpus: DataConfig, tmp_path: Path) -> None:
    """Three ranks: everything would go in bf16."""
    config = sharded(corpus, tmp_path / "run", **GATHERED, train__global_batch_size=6)
    (line,) = find_problems(config, world_size=3)
    assert line.startswith(
        "precision.fp8_all_gather=true has no weight to gather in fp8: none of [32, 128] rows divides"
    )
