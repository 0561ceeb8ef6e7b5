"""An engine over the weights of a live trainer: new ones are served, and nothing that a graph points to moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.config import DataConfig
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.layout import ServingLayout
from models.decoder import Decoder
from models.registry import build_model
from parallel.regions import local_tensor
from tests.inference import on_ranks
from tests.inference.greedy import GREEDY, by_the_whole_model, prompts_of
from tests.inference.test_ranks import even
from tests.models.small import random_decoder, tiny
from tests.parity.harness import text_corpus, tiny_config, whole
from tests.pool import RankPool
from tests.trainer.test_step import micro_batches
from trainer.checkpoint import TensorReader
from trainer.config import TrainConfig
from trainer.step import train_step
from trainer.trainer import Trainer
from trainer.validate import finalize

PROMPTS = prompts_of([5, 14], shared=4)


def pointers(engine: Engine) -> list[int]:
    """Of whatever a captured graph reads or writes that is not its own."""
    runner = engine.runner
    tensors = [local_tensor(p) for p in (*runner.model.parameters(), *runner.model.buffers())]
    tensors += [x for x in (runner._keys, runner._values, runner._tables.tables, runner._last_tokens) if x is not None]
    assert runner._frequencies is not None
    return [tensor.data_ptr() for tensor in (*tensors, runner._frequencies[0])]


def plain(config: TrainConfig, weights: dict[str, Tensor]) -> Decoder:
    model = build_model(config.model)
    model.load_state_dict(weights)
    return model.eval()


def served_while_training(config: TrainConfig) -> None:
    """A trainer with an engine beside it, and then its checkpoint, against a model that was built anew."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    engine = Engine(trainer.state.model, EngineConfig(block_size=4, max_seq_len=40))
    expected: list[list[list[int]]] = []
    try:
        before = pointers(engine)
        for _ in range(2):
            weights = {name: whole(master) for name, master in trainer.state.weights().items()}
            for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
                tokens, logprobs = by_the_whole_model(plain(trainer.config, weights), prompt, 6)
                assert completion.token_ids == tokens
                torch.testing.assert_close(completion.logprobs, logprobs, rtol=0, atol=1e-5)
            expected.append([completion.token_ids for completion in engine.generate(PROMPTS, GREEDY)])
            rank = trainer.mesh.samples.get_local_rank()
            batches = micro_batches((24,) * 8, rank=rank, world_size=trainer.dims.dp, size=1)
            train_step(trainer.state, batches, lr=0.1)
            engine.weights_changed()
            assert engine.runner.model.training
        assert expected[0] != expected[1]
        tensors = {f"model/{name}": master for name, master in trainer.state.weights().items()}
        trainer.checkpoints.save(1, tensors, {}, blocking=True)
        saved = [completion.token_ids for completion in engine.generate(PROMPTS, GREEDY)]
        train_step(trainer.state, batches, lr=0.1)
        reader = TensorReader(trainer.run_dir / "checkpoints" / "step_1")
        engine.load_weights({name: reader.read(f"model/{name}") for name in engine.runner.model.state_dict()})
        assert [completion.token_ids for completion in engine.generate(PROMPTS, GREEDY)] == saved
        assert pointers(engine) == before
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("weights"))


LAYOUTS: dict[str, dict[str, Any]] = {"zero1": {"zero_stage": 1}, "tp": {"zero_stage": 0, "tp": 2}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_engine_serves_what_a_trainer_beside_it_has_learned(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, layout: str
) -> None:
    """Rollouts by weights of before; a copy that has to be kept; a graph that reads what nobody writes any more."""
    changes = {f"parallel__{name}": value for name, value in LAYOUTS[layout].items()}
    ranks.run(2, served_while_training, tiny_config(tmp_path, corpus, **changes))


def test_weights_loaded_in_place_are_served_and_unfinished_requests_go_on_by_them() -> None:
    """A cache of other weights under a continuation; storage that was replaced."""
    model, other = random_decoder(tiny()).double(), random_decoder(tiny()).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    engine = Engine(model, EngineConfig(block_size=4))
    before = pointers(engine)
    request = engine.add(PROMPTS[1], replace(GREEDY, max_tokens=5))
    begun: list[int] = []
    while len(begun) < 2:
        begun += [token for delta in engine.step() for token in delta.token_ids]
    engine.load_weights(other.state_dict())
    found: list[int] = []
    while engine.num_unfinished:
        found += [token for delta in engine.step() if delta.request == request for token in delta.token_ids]
    assert found == by_the_whole_model(other, PROMPTS[1] + begun, 3)[0]
    assert pointers(engine) == before


def loaded_on_ranks(layout: ServingLayout) -> list[list[int]]:
    engine = Engine(on_ranks.shards_of(random_decoder(even()).double(), layout), EngineConfig(block_size=4))
    other = random_decoder(even()).double()
    state = {name: -0.7 * tensor for name, tensor in other.state_dict().items()}
    before = pointers(engine)
    engine.load_weights(state)
    assert pointers(engine) == before
    return [completion.token_ids for completion in engine.generate(PROMPTS, GREEDY)]


def test_a_rank_takes_its_part_of_weights_that_are_loaded(ranks: RankPool) -> None:
    """Another rank's rows, or those of the fused projection in the order of one process."""
    other = random_decoder(even()).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    expected = [by_the_whole_model(other, prompt, 6)[0] for prompt in PROMPTS]
    for found in ranks.run(4, loaded_on_ranks, ServingLayout(tp=4)):
        assert found == expected


def test_weights_that_do_not_fit_are_refused_in_one_line_and_change_nothing() -> None:
    """Half of a checkpoint in a model; a dtype that is cast silently."""
    model = random_decoder(tiny())
    engine = Engine(model, EngineConfig(block_size=4))
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (expected,) = engine.generate([PROMPTS[0]], SamplingConfig(temperature=0, max_tokens=4))
    norm = "final_norm.weight"
    for wrong, says in (
        ({name: tensor for name, tensor in good.items() if name != norm}, "1 missing (final_norm.weight)"),
        (good | {"x": good[norm]}, "1 not the model's (x)"),
        (good | {norm: good[norm][:3]}, "1 of another shape (final_norm.weight [3] for [24])"),
        (good | {norm: good[norm].half()}, "1 of another dtype (final_norm.weight torch.float16 for torch.float32)"),
    ):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in wrong.items()}
        with pytest.raises(ValueError, match="do not fit") as refused:
            engine.load_weights(zeros)
        assert says in str(refused.value)
        assert "\n" not in str(refused.value)
    engine.weights_changed()
    assert engine.generate([PROMPTS[0]], SamplingConfig(temperature=0, max_tokens=4))[0].token_ids == expected.token_ids
