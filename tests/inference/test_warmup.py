"""What happens before the first request, and on which device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from inference.batch import padding
from inference.config import EngineConfig
from inference.device import on_device
from inference.engine import Engine
from inference.graphs import GraphSizes, StepGraphs
from inference.runner import ModelRunner
from inference.speculation.build import build_speculation
from inference.speculation.config import SpeculationConfig
from inference.speculation.runner import SpeculativeRunner, state_keys
from launch.lab_config import doubts
from tests.inference.greedy import GREEDY, prompts_of
from tests.inference.serving import text_tokenizer
from tests.models.small import random_decoder, tiny

CONFIG = EngineConfig(block_size=4, max_batch_tokens=40, max_sequences=5, num_blocks=30)


class Uncaptured(StepGraphs):
    """Computes without a graph; remembers what was captured before it was run."""

    def _capture(self, key: Any, inputs: torch.Tensor) -> None:
        self._forwards[key.decodes](inputs, key.sequences)
        self._captured[key] = key  # type: ignore[assignment]

    def run(self, inputs: torch.Tensor, size: tuple[int, int], *, decodes: bool) -> Any:
        assert (decodes, *size) in self._captured, "a request waits for a capture"
        return self._forwards[decodes](inputs, size[0])


@pytest.mark.parametrize("method", ["none", "ngram"])
def test_after_a_warm_up_no_step_captures_and_nothing_was_written(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that is asked for and was not captured; padding that writes into somebody's page, or is attended to."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    model = random_decoder(tiny()).double()
    wanted = Engine(model, CONFIG).generate(prompts_of([3, 9, 14, 2], shared=2), GREEDY)
    drafting = build_speculation(SpeculationConfig(method=method, switch_off=False, ngram_max=1), model)
    engine = Engine(model, CONFIG, speculation=drafting)
    runner = engine.runner
    runner.graphs = Uncaptured(runner._decode, runner._mixed, 5, 40)
    assert runner._tables.nobody == 5
    nothing = runner._keys.clone()
    with torch.no_grad():
        runner.graphs.capture(runner.graphs.every_key(), runner._tables.nobody)
        if isinstance(runner, SpeculativeRunner):
            runner._state_graphs = Uncaptured(runner._decode_states, runner._mixed_states, 5, 40)
            runner._state_graphs.capture(state_keys(CONFIG, 4, follows=False), runner._tables.nobody)
    assert torch.equal(runner._keys, nothing)
    found = engine.generate(prompts_of([3, 9, 14, 2], shared=2), GREEDY)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert method == "none" or found[0].speculation is not None


def test_a_padding_batch_belongs_to_nobody() -> None:
    """A row of block tables that is a sequence's, or a token that has a place."""
    for key in GraphSizes(5, 40).every_key():
        packed = padding(7, key.sequences, key.tokens)
        assert len(packed) == 4 * key.tokens + 4 * key.sequences + 1
        assert set(packed[3 * key.tokens : 4 * key.tokens + key.sequences].tolist()) == {7}


def test_all_that_touches_the_device_happens_inside_its_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine on cuda:1 that launches on cuda:0: kernels of Triton and streams go by the current device, which every
    thread has of its own, and a server steps in another thread than it makes the engine in."""
    inside: set[int] = set()  # threads

    @contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        before = threading.get_ident() in inside
        inside.add(threading.get_ident())
        yield
        if not before:
            inside.remove(threading.get_ident())

    monkeypatch.setattr("inference.engine.on_device", recorded)
    calls: list[str] = []

    def guarded(name: str) -> Callable[..., Any]:
        original = getattr(ModelRunner, name)

        def call(self: ModelRunner, *args: Any, **options: Any) -> Any:
            assert threading.get_ident() in inside, name
            calls.append(name)
            return original(self, *args, **options)

        return call

    for name in ("__init__", "launch", "results", "receive_weights", "warm_up"):
        monkeypatch.setattr(ModelRunner, name, guarded(name))
    config = EngineConfig(block_size=4, max_sequences=4, overlap=True, warmup=True)
    model = random_decoder(tiny()).double()
    engine = Engine(model, config)
    assert engine.warmed_up is not None
    assert engine.warmed_up.graphs == 0  # on the CPU

    def use() -> None:
        engine.generate([[1, 2, 3], [4]], GREEDY)
        engine.add([5, 6], GREEDY)
        engine.step()
        engine.step()
        engine.preempt(engine.scheduler.running[0])
        engine.load_weights(model.state_dict())
        while engine.num_unfinished:
            engine.step()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert set(calls) == {"__init__", "launch", "results", "receive_weights", "warm_up"}
    assert engine.num_unfinished == 0


def test_the_guard_sets_the_device_of_cuda_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard for the wrong index, or one that asks CUDA where there is none."""
    asked: list[object] = []

    @contextmanager
    def fake(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", fake)
    with on_device(torch.device("cpu")):
        assert asked == []
    with on_device(torch.device("cuda", 1)):
        assert asked == [torch.device("cuda", 1)]


def test_what_is_perhaps_not_meant_is_said() -> None:
    """A server that refuses every second text, or writes nonsense behind token 32, and gives no hint why."""
    tokenizer = text_tokenizer()
    small = random_decoder(tiny(vocab_size=tokenizer.vocab_size - 7)).double()
    (words, length) = doubts(Engine(small, EngineConfig(max_seq_len=50), tokenizer=tokenizer))
    assert f"the tokenizer has {tokenizer.vocab_size} tokens and the model {tokenizer.vocab_size - 7}" in words
    assert "engine.max_seq_len=50 is beyond the 32 tokens" in length
    assert doubts(Engine(random_decoder(tiny(vocab_size=tokenizer.vocab_size)), tokenizer=tokenizer)) == []
