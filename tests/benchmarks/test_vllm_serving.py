"""benchmarks/peers/vllm_serving.py, as far as it runs without vLLM: the shapes are ours, and its absence is a line."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.peers import vllm_serving
from launch.compose import compose_one
from models.registry import resolve_model
from parallel.groups import NO_GROUPS


@pytest.mark.parametrize(
    ("theirs", "ours"), [(vllm_serving.LLAMA, serving.LLAMA), (vllm_serving.QWEN, serving.QWEN)], ids=["llama", "qwen"]
)
def test_shapes_are_those_of_our_own_program(theirs: dict[str, Any], ours: list[str]) -> None:
    """A comparison of two models."""
    config = resolve_model(compose_one(ours).model)
    same = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_embeddings,
    }
    assert {name: theirs[name] for name in same} == same


@pytest.mark.parametrize("name", vllm_serving.CASES)
def test_requests_are_those_of_our_own_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths, or another temperature, under the same name."""
    asked: list[tuple[list[int], list[int], float]] = []

    def timed(engine: object, lengths: list[int], new: list[int], temperature: float, *, seed: int) -> float:
        asked.append((lengths, new, temperature))
        return 1.0 + len(asked)

    monkeypatch.setattr(serving, "timed", timed)
    monkeypatch.setattr(serving, "weight_bytes", lambda model: 1)
    model = SimpleNamespace(config=resolve_model(compose_one(serving.LLAMA).model), groups=NO_GROUPS)
    engine = SimpleNamespace(runner=SimpleNamespace(model=model, cache_bytes_per_token=1))
    _, settings, run = serving.CASES[name]
    run(engine, 1)  # type: ignore[arg-type]
    case = vllm_serving.CASES[name]
    assert (case.lengths, case.new, case.temperature) in asked
    assert (case.max_seq_len, case.max_sequences) == (settings.max_seq_len, settings.max_sequences)


def test_without_vllm_it_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback where a peer is not installed."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(sys, "argv", ["vllm_serving.py"])
    with pytest.raises(SystemExit) as ended:
        vllm_serving.main()
    assert ended.value.code == 2
    assert "the committed numbers are of vllm==0.22.1" in capsys.readouterr().err
