"""Weights that change under captured graphs: the graphs that are there serve the new ones."""

from __future__ import annotations

import pytest
import torch

from inference.config import EngineConfig
from inference.engine import Engine
from tests.inference.greedy import GREEDY, prompts_of
from tests.models.small import random_decoder, tiny

pytestmark = pytest.mark.gpu


def test_no_graph_is_captured_again_when_weights_are_loaded_in_place() -> None:
    """A graph that reads what nobody writes any more, or minutes of capturing after every update of a trainer."""
    prompts, config = prompts_of([5, 14, 20], shared=4), EngineConfig(block_size=4, max_sequences=4)
    engine = Engine(random_decoder(tiny()).cuda(), config)
    old = engine.generate(prompts, GREEDY)
    assert engine.runner.graphs is not None
    captured = dict(engine.runner.graphs._captured)
    assert captured
    other = random_decoder(tiny())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    engine.load_weights(other.state_dict())
    new = engine.generate(prompts, GREEDY)
    expected = Engine(other.cuda(), config).generate(prompts, GREEDY)
    assert [completion.token_ids for completion in new] == [completion.token_ids for completion in expected]
    assert [completion.token_ids for completion in new] != [completion.token_ids for completion in old]
    again = engine.runner.graphs._captured
    assert again.keys() == captured.keys()
    assert all(again[size] is captured[size] for size in captured)
