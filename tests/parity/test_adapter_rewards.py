"""recipe=reward with adapters: the head is trained beside them, and goes out and in as PEFT's modules_to_save."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from models.init import SCORE_HEAD
from models.peft import WEIGHTS, load_peft, load_score
from models.registry import resolve_model
from tests.parity.adapting import run_adapted
from tests.parity.harness import Outcome, changed, run_on
from tests.parity.test_preferences import LAYOUTS, REPORTED, ROWS, rewarding, same, tiny_llama
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.convert import export_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapted-rewards")
    tiny_llama(path / "policy", 0)
    return path


def adapting(folder: Path, name: str, *, adapter: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    config = rewarding(folder, name, packing=False, **({"train__global_batch_size": len(ROWS) - 1} | changes))
    config.adapter = AdapterConfig(**({"name": "lora", "rank": 3, "alpha": 6.0} | (adapter or {})))
    return config


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path) -> Outcome:
    return run_adapted(ranks, 1, adapting(folder, "one"))


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", ["zero3", "tp", "pp"])
def test_two_ranks_train_head_and_adapters_as_one(
    ranks: RankPool, folder: Path, reference: Outcome, layout: str
) -> None:
    """A head that stays as it was drawn, or whose gradient is summed over ranks that have all of it."""
    layouts = LAYOUTS | {"zero3": {"parallel__zero_stage": 3, "train__micro_batch_size": 1}}
    config = changed(adapting(folder, layout), folder / layout / "run", **layouts[layout])
    found = run_adapted(ranks, 2, config)
    same(found, reference, REPORTED[:4])
    assert reference.first_gradients[SCORE_HEAD].abs().max() > 0
    others = {name.rpartition(".")[2] for name in found.first_gradients if name != SCORE_HEAD}
    assert others == {"lora_a", "lora_b"}


def test_a_run_resumes_to_the_same_bits(ranks: RankPool, folder: Path) -> None:
    """A head without its moments, or drawn again."""
    setting = {"train__steps": 4, "optim__lr": 1e-2}
    whole, half = (adapting(folder, name, **setting) for name in ("whole", "half"))
    whole.schedule.name = half.schedule.name = "constant"
    half.train.steps, half.checkpoint.at_end = 2, True
    wanted = run_on(ranks, 1, whole)
    run_on(ranks, 1, half)
    half.train.steps = 4
    assert run_on(ranks, 1, half).losses == wanted.losses


def test_what_goes_out_is_pefts_and_what_peft_writes_is_gone_on_from(ranks: RankPool, folder: Path) -> None:
    """A head that is lost on its way, in either direction: the base has none."""
    config = adapting(folder, "out", optim__lr=3e-2)
    config.checkpoint.at_end = True
    trained = run_on(ranks, 1, config)
    out, merged, again = (folder / "out" / name for name in ("peft", "merged", "again"))
    ranks.run(1, export_checkpoint, Path(config.run.dir), out)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    model_of = transformers.AutoModelForSequenceClassification.from_pretrained
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        theirs = peft.PeftModel.from_pretrained(model_of(folder / "policy", num_labels=1), str(out))
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    ranks.run(1, export_checkpoint, Path(config.run.dir), merged, merged=True)
    whole = model_of(merged)
    torch.testing.assert_close(whole.score.weight.detach(), trained.weights[SCORE_HEAD])
    tokens = torch.arange(2, 22)[None]
    torch.testing.assert_close(theirs(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-5)

    theirs.save_pretrained(str(again))
    going_on = adapting(folder, "again-run", adapter={"path": str(again)}, train__steps=1)
    beside = adapting(folder, "merged-run", train__steps=1)
    beside.adapter, beside.model.path = AdapterConfig(), str(merged)
    assert run_on(ranks, 1, going_on).losses[0] == pytest.approx(run_on(ranks, 1, beside).losses[0], rel=1e-5)

    shape = resolve_model(ModelConfig(family="hf", path=str(folder / "policy"), score=True))
    assert load_score(again, shape).shape == (1, shape.hidden_size)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="has modules_to_save="):
        load_peft(again, resolve_model(ModelConfig(family="hf", path=str(folder / "policy"))))
    shape.hidden_size += 1
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*score.weight has shape \[1, 24\], not \[1, 25\]"):
        load_score(again, shape)


def test_the_principal_part_of_the_weights_has_no_head(ranks: RankPool, folder: Path) -> None:
    """PiSSA, which keeps what adapters began as: the head is none."""
    one, other = adapting(folder, "drawn", train__steps=1), adapting(folder, "principal", train__steps=2)
    other.adapter.init = "pissa"
    other.checkpoint.at_end = True
    found = run_on(ranks, 1, other)
    assert found.losses[0] == pytest.approx(run_on(ranks, 1, one).losses[0], rel=1e-4)
    ranks.run(1, export_checkpoint, Path(other.run.dir), folder / "principal-peft")
    shape = resolve_model(ModelConfig(family="hf", path=str(folder / "policy"), score=True))
    head = load_score(folder / "principal-peft", shape)
    assert head is not None
    torch.testing.assert_close(head, found.weights[SCORE_HEAD])
