"""A run beside its prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from launch.compose import compose_one
from planner.hardware_files import FOLDER
from tests.parity.harness import tiny_config
from tests.pool import RankPool
from trainer.config import ConfigError, TrainConfig
from trainer.predicted import compare
from trainer.trainer import Trainer
from trainer.validate import finalize


def config_of(*overrides: str) -> TrainConfig:
    return finalize(compose_one(["+exp=zero3_13b", *overrides]), world_size=4)


def test_a_run_on_known_hardware_is_compared() -> None:
    """The first steps, which compile, in the median; a sign that is the wrong way round."""
    seconds = [60.0, 9.0, 3.0, *[2.9] * 9]
    text, fields = compare(config_of(), world_size=4, device_name="NVIDIA H200", seconds=seconds, peak_gib=70.4)
    assert fields["measured_step_seconds"] == 2.9
    assert fields["step_seconds"] == pytest.approx(2.9, rel=0.12)
    assert fields["peak_memory_gib"] == pytest.approx(70.4, rel=0.03)
    assert f"({fields['peak_memory_gib'] / 70.4 - 1:+.1%})" in text
    _, few = compare(config_of(), world_size=4, device_name="NVIDIA H200", seconds=seconds[:5], peak_gib=None)
    assert not {"measured_step_seconds", "measured_peak_memory_gib"} & set(few)


def test_unknown_hardware_is_said_and_not_guessed() -> None:
    """Rates of another machine under the name of this one."""
    text, fields = compare(config_of(), world_size=4, device_name="abacus", seconds=[1.0] * 9, peak_gib=None)
    assert "no file of configs/hardware is of 'abacus'" in text
    assert fields == {}


def test_a_hardware_file_that_is_not_there_is_refused_before_the_run() -> None:
    """A run of a week that ends in that message."""
    with pytest.raises(ConfigError, match=r"logging\.hardware=abacus is not there"):
        config_of("logging.hardware=abacus")


def _run(config: TrainConfig) -> list[dict[str, Any]]:
    trainer = Trainer(finalize(config, world_size=1))
    try:
        trainer.run()
    finally:
        trainer.close()
    events = (Path(config.run.dir) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, events) if event["kind"] == "predicted"]


def test_a_run_says_once_at_its_end_how_it_compares(ranks: RankPool, tmp_path: Path) -> None:
    """A comparison that nobody calls."""
    np.save(tmp_path / "tokens.npy", np.arange(2000, dtype=np.int32) % 300)
    data = DataConfig(source="tokens", path=str(tmp_path / "tokens.npy"), shuffle=False, num_workers=0)
    config = tiny_config(tmp_path / "known", data, train__steps=7, schedule__warmup_steps=0)
    config.logging.hardware = str(FOLDER / "h200.yaml")
    ((event,),) = ranks.run(1, _run, config)
    info = json.loads((tmp_path / "known" / "run.json").read_text())
    assert info["predicted"]["measured_step_seconds"] == event["measured_step_seconds"] > 0
    assert info["starts"]
    config = tiny_config(tmp_path / "unknown", data, train__steps=1, schedule__warmup_steps=0)
    ((event,),) = ranks.run(1, _run, config)
    assert "no file of configs/hardware is of 'cpu'" in event["text"]
    assert "predicted" not in json.loads((tmp_path / "unknown" / "run.json").read_text())
