"""benchmarks/predictions.py: what it measures is legal and planned for, and its table says how far off plans are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.layouts import Run
from benchmarks.predictions import MEMORY, TIME, alone, main, table, together
from launch.compose import compose_one
from planner.memory import memory_of_ranks
from trainer.predicted import job_of, not_planned
from trainer.validate import finalize


@pytest.mark.some(1)
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_configuration_is_legal_and_fits_an_h200_by_its_plan(tmp_path: Path, gpus: int) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros(100_000, dtype=np.int32))
    common = ["+exp=llama3_1b", "data=tokens", f"data.path={tmp_path / 'tokens.npy'}", "data.validation_fraction=0"]
    common += ["train.steps=8", "schedule.warmup_steps=8"]
    for name, changes in (alone() if gpus == 1 else together(gpus)).items():
        config = finalize(compose_one([*common, *changes]), world_size=gpus)
        assert not not_planned(config), name
        (first, *_) = memory_of_ranks(job_of(config, world_size=gpus), largest=True)
        assert first.peak < 139 * 2**30, name


def test_the_table_counts_what_is_close_enough() -> None:
    def run(time: float, memory: float, predicted: dict[str, float]) -> dict[str, object]:
        measured = {"step_seconds_median": time, "peak_memory_gib": memory, "predicted": predicted}
        return {"gpus": 1, "changes": [], "device": "x", "versions": {}} | measured

    plan = {"step_seconds": 1.0, "peak_memory_gib": 10.0}
    one = {"close": run(1.0 / (1 + TIME * 0.9), 10.0 / (1 + MEMORY * 0.9), plan), "far": run(2.0, 10.0, plan)}
    two = {"none": run(1.0, 1.0, {}), "failed": {"gpus": 1, "changes": [], "error": "out of memory"}}
    found = table([{"configurations": one}, {"configurations": two}])
    assert found["held"]["step_seconds"] | {"largest": 0} == {
        "configurations": 2, "allowed": TIME, "within": 1, "largest": 0,
    }  # fmt: skip
    assert found["held"]["step_seconds"]["largest"] == pytest.approx(0.5)
    assert found["held"]["peak_memory_gib"]["within"] == 2
    assert found["configurations"]["1x none"]["step_seconds_error"] is None
    assert found["configurations"]["1x failed"]["error"] == "out of memory"


def test_parts_are_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measured(_kind: str, runs: dict[str, Run], *_: object) -> dict[str, object]:
        asked.extend(runs)
        return {}

    monkeypatch.setattr("benchmarks.predictions.measure", measured)
    for part in ("1/2", "2/2"):
        assert main(["--part", part]) == 0
    assert sorted(asked) == sorted(alone())
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(SystemExit):
            main(["--part", wrong])
        assert "must be K/N" in capsys.readouterr().err
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"configurations": {}}))
    assert main(["--table", str(file), "--out", str(tmp_path / "all.json")]) == 0
    assert json.loads((tmp_path / "all.json").read_text())["configurations"] == {}
