"""benchmarks/predictions.py: what it measures is legal and planned for, and its table says how far off plans are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.layouts import Run
from benchmarks.predictions import ALLOWED, alone, main, table, together
from launch.compose import compose_for, compose_one
from launch.plan import PLAN, plan_of
from planner.memory import memory_of_ranks
from trainer.predicted import job_of, not_planned
from trainer.validate import finalize

SMALL = ["train.seq_len=2048", "train.micro_batch_size=1", "train.global_batch_size=1"]


@pytest.mark.thorough
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


def _result(name: str, **found: object) -> dict[str, object]:
    """Of `measure`: one small configuration, `found` in 5 s and 1 GiB on an H200."""
    run = {"gpus": 1, "changes": SMALL, "device": "NVIDIA H200", "versions": {"torch": "2"}}
    run |= {"step_seconds_median": 5.0, "peak_memory_gib": 1.0, "predicted": {"step_seconds": 7.0}}
    return {"experiment": "llama3_1b", "overrides": ["model.num_layers=2"], "configurations": {name: run | found}}


def test_the_table_plans_each_configuration_anew() -> None:
    """Predictions of the version that measured, and overrides of all runs that the table forgets."""
    found = table([_result("one")])["configurations"]["1x one"]
    plan = plan_of(compose_for(PLAN, ["+exp=llama3_1b", "model.num_layers=2", *SMALL, "plan.gpus=1"]))
    assert found["step_seconds_predicted"] == pytest.approx(plan["step_seconds"])
    assert found["peak_memory_gib_predicted"] * 2**30 == pytest.approx(plan["ranks"][0]["peak_bytes"])
    assert found["step_seconds_error"] == pytest.approx(plan["step_seconds"] / 5.0 - 1)
    assert (found["step_seconds_measured"], found["peak_memory_gib_measured"]) == (5.0, 1.0)
    assert found["changes"] == ["model.num_layers=2", *SMALL]


def test_the_table_counts_what_is_close_enough() -> None:
    """And keeps errors, devices without rates, and the last measurement of several, of tables of before as well."""
    plain = table([_result("any")])["configurations"]["1x any"]
    seconds, gib = plain["step_seconds_predicted"], plain["peak_memory_gib_predicted"]
    time, memory = ALLOWED["step_seconds"], ALLOWED["peak_memory_gib"]
    close = {"step_seconds_median": seconds / (1 + time * 0.9), "peak_memory_gib": gib / (1 + memory * 0.9)}
    before = table([_result("close"), _result("far", step_seconds_median=seconds * 2, peak_memory_gib=gib)])
    failed = {"gpus": 1, "changes": [], "error": "out of memory"}
    results = [before, _result("close", **close), _result("unknown", device="abacus")]
    found = table([*results, {"overrides": [], "configurations": {"failed": failed}}])
    assert found["held"]["step_seconds"] | {"largest": 0} == {
        "configurations": 2, "allowed": time, "within": 1, "largest": 0,
    }  # fmt: skip
    assert found["held"]["step_seconds"]["largest"] == pytest.approx(0.5)
    assert found["held"]["peak_memory_gib"]["within"] == 2
    assert found["configurations"]["1x unknown"]["step_seconds_error"] is None
    assert found["configurations"]["1x failed"]["error"] == "out of memory"
    assert table([found]) == found


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
    file.write_text(json.dumps({"overrides": [], "configurations": {}}))
    assert main(["--table", str(file), "--out", str(tmp_path / "all.json")]) == 0
    assert json.loads((tmp_path / "all.json").read_text())["configurations"] == {}
