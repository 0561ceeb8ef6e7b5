"""What a continued run is told about what changed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from parallel.precision import PrecisionConfig
from trainer.config import ConfigError, TrainConfig
from trainer.identity import changed_settings, check_same_scaling, check_tokenizer_is_known


def test_settings_that_changed_since_the_checkpoint_are_named() -> None:
    """A run continued with another learning rate, and nobody knows from which step on."""
    before = asdict(TrainConfig())
    config = TrainConfig()
    config.optim.lr = 0.5
    config.train.steps = 7
    config.run.dir = "elsewhere"
    assert changed_settings(before, config) == ["optim.lr=0.5 (was 0.0003)", "train.steps=7 (was 100)"]


def test_imported_weights_do_not_meet_a_tokenizer_trained_here(tmp_path: Path) -> None:
    """Token numbers that fit the model and mean other text."""
    (tmp_path / "extra.json").write_text(json.dumps({"weights_only": True}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path is missing"):
        check_tokenizer_is_known(tmp_path, DataConfig(source="text", path="x"))
    check_tokenizer_is_known(tmp_path, DataConfig(source="tokens", path="x.npy"))


def test_scales_of_delayed_scaling_go_on_only_as_what_they_were(tmp_path: Path) -> None:
    """A tensor of another shape, found deep inside of loading; other recipes have no state and may change."""
    delayed = PrecisionConfig("fp8", fp8_recipe="tensorwise_delayed")
    bf16 = {"compute": "bf16", "master": "fp32"}  # from before there was fp8

    def resume(saved: dict[str, Any], goes_on: PrecisionConfig, *, were_fused: bool | None = True) -> None:
        model = {} if were_fused is None else {"model": {"fused_projections": were_fused}}
        (tmp_path / "extra.json").write_text(json.dumps({"config": {"precision": saved, **model}}))
        check_same_scaling(tmp_path, goes_on, fused_projections=True)

    resume(asdict(delayed), delayed)
    resume(bf16, PrecisionConfig("fp8"), were_fused=None)
    resume(bf16, PrecisionConfig("bf16"), were_fused=None)
    with pytest.raises(ConfigError, match=r"precision\.compute=fp8 \(checkpoint: bf16\)"):
        resume(bf16, delayed)
    with pytest.raises(ConfigError, match=r"precision\.fp8_skip=\['attention'\] \(checkpoint: \[\]\)"):
        resume(asdict(delayed), replace(delayed, fp8_skip=["attention"]))
    with pytest.raises(ConfigError, match=r"model\.fused_projections=True \(checkpoint: False\); use what"):
        resume(asdict(delayed), delayed, were_fused=None)  # from before layers were fused
    (tmp_path / "extra.json").write_text(json.dumps({"weights_only": True}))
    check_same_scaling(tmp_path, delayed, fused_projections=True)
