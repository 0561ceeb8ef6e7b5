"""Several adapters in one engine: each request has the tokens of its own, as `peft` and transformers compute them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import safetensors.torch

from inference.engine import Engine, RequestError
from inference.layout import ServingLayout
from tests.inference.adapters import CHOICES, GREEDY, PROMPTS, SMALL, by_peft, engine_of, make_adapters, on_a_rank
from tests.inference.serving import NAME, serving
from tests.launch.conftest import small_llama
from tests.pool import RankPool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("base") / "model", heads=4, inner=36)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_adapters(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def wanted(model: Path, adapters: dict[str, str]) -> list[list[int]]:
    return by_peft(model, adapters, PROMPTS, CHOICES)


def tokens_of(engine: Engine, choices: list[str | None] | None = None) -> list[list[int]]:
    return [done.token_ids for done in engine.generate(PROMPTS, GREEDY, CHOICES if choices is None else choices)]


def test_one_batch_of_several_adapters_and_the_model_alone(
    model: Path, adapters: dict[str, str], wanted: list[list[int]]
) -> None:
    """A token with its neighbour's adapter, a scale of another layer, padded ranks, a prefix of another adapter's."""
    engine = engine_of(model, adapters)
    assert tokens_of(engine) == wanted
    alone = tokens_of(engine, [None] * len(PROMPTS))
    assert alone == by_peft(model, adapters, PROMPTS, [None] * len(PROMPTS))
    # The control: every adapter gives other tokens than the model does.
    assert all(one != other for one, other, by in zip(wanted, alone, CHOICES, strict=True) if by is not None)
    assert tokens_of(engine) == wanted  # and again, from what is in the cache
    assert engine.counts.cached_tokens > 0


def test_prefixes_are_found_again_by_their_own_adapter_alone(model: Path, adapters: dict[str, str]) -> None:
    """Keys of one adapter read by another: nothing would fail, and the text would be a mixture."""
    engine = engine_of(model, adapters)
    prompt, hits = list(range(20, 29)), []
    for adapter in ("all", None, "mixed", "all", None, "mixed"):
        engine.generate([prompt], GREEDY, [adapter])
        hits.append(engine.counts.cached_tokens)
    assert hits == [0, 0, 0, 8, 16, 24]


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_sequences_that_give_way_come_back_with_their_adapter(
    model: Path, adapters: dict[str, str], wanted: list[list[int]], preemption: str
) -> None:
    """A row that keeps the adapter of the sequence before."""
    config = replace(SMALL, num_blocks=16, host_blocks=16, max_seq_len=20, preemption=preemption)
    engine = engine_of(model, adapters, config)
    assert tokens_of(engine) == wanted
    assert engine.counts.swapped + engine.counts.recomputed > 0


def test_drafts_are_judged_by_the_adapter(model: Path, adapters: dict[str, str], wanted: list[list[int]]) -> None:
    assert tokens_of(engine_of(model, adapters, drafts=True)) == wanted


def test_ranks_of_tp_serve_the_same(
    ranks: RankPool, model: Path, adapters: dict[str, str], wanted: list[list[int]]
) -> None:
    """A rank with rows of B that are another's; the columns of A of a row-parallel layer."""
    for found in ranks.run(2, on_a_rank, model, adapters, ServingLayout(tp=2)):
        assert found.tokens == wanted


def test_in_deterministic_mode_a_request_has_the_same_bits_alone_and_in_a_batch(
    model: Path, adapters: dict[str, str]
) -> None:
    """A product whose rows depend on how many there are of their adapter. The control: in fp32 they otherwise do."""
    differ = []
    for deterministic in (True, False):
        config = replace(SMALL, deterministic=deterministic, prefix_cache=False, max_batch_tokens=32)
        engine = engine_of(model, adapters, config, dtype="fp32")
        together = [done.logprobs for done in engine.generate(PROMPTS, GREEDY, CHOICES)]
        alone = [engine.generate([p], GREEDY, [by])[0].logprobs for p, by in zip(PROMPTS, CHOICES, strict=True)]
        differ.append(together != alone)
    assert differ == [False, True]


def test_the_field_model_of_a_request_names_an_adapter(
    model: Path, adapters: dict[str, str], wanted: list[list[int]]
) -> None:
    """A server that answers by the model whatever it is asked for."""
    body = {"max_tokens": 9, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
    with serving(engine_of(model, adapters)) as running:
        for prompt, choice, tokens in zip(PROMPTS, CHOICES, wanted, strict=True):
            answer = running.post("/v1/completions", body | {"prompt": prompt, "model": choice or NAME}).json()
            assert answer["model"] == (choice or NAME)
            assert answer["choices"][0]["token_ids"] == tokens
        listed = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [one["id"] for one in listed] == [NAME, *adapters]
        assert [one.get("parent") for one in listed] == [None, *[NAME] * len(adapters)]
        assert httpx.get(f"{running.url}/v1/models/mixed").json()["root"] == "mixed"
        refused = running.post("/v1/completions", body | {"prompt": [1], "model": "other"})
        assert refused.status_code == 404
        assert "the model 'other' is not served here; use 'tiny', 'attention', 'all', 'mixed'" in refused.text


def test_what_is_not_served_is_refused_by_name(model: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    """An adapter that is silently not there."""
    engine = engine_of(model, adapters)
    with pytest.raises(RequestError, match=r"prompts\[1\]: the adapter .other. is not served: there are att"):
        engine.generate(PROMPTS[:2], GREEDY, ["all", "other"])
    with pytest.raises(RequestError, match="the adapter 'all' is not served: there are none"):
        engine_of(model, {}).add([1], GREEDY, "all")
    made = make_adapters(model, tmp_path, {"dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj"]}})
    with pytest.raises(ValueError, match=r"adapter dora has lengths of rows \(DoRA, blocks.0.attention.q\)"):
        engine_of(model, made)
    shutil.copytree(adapters["all"], tmp_path / "narrow")
    file = tmp_path / "narrow" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    safetensors.torch.save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(ValueError, match=r"adapter narrow: the adapter of blocks.0.attention.q is for a weight"):
        engine_of(model, {"narrow": str(tmp_path / "narrow")})
    with pytest.raises(ValueError, match="the model has adapters already"):
        Engine(engine.runner.model, SMALL, adapters={"again": {}})
