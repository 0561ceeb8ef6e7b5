"""benchmarks/curves.py, layouts.py and growth.py, with launches that only write what a run leaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import curves, growth, layouts
from launch.compose import compose_one
from tests.benchmarks.test_train import write_run
from trainer.validate import finalize

COMPOSING = threading.Lock()


def launched(
    command: Sequence[str], log: Path, *, limit: float, environment: Mapping[str, str] | None = None
) -> str | None:
    """Instead of the launch: the configuration is a real one, the losses are 9, 8, 7 ... times what the lr says."""
    overrides = list(command[command.index(next(part for part in command if part.endswith("train.py"))) + 1 :])
    with COMPOSING:  # one at a time: Hydra's state is global
        config = compose_one(overrides)
    processes = int(command[command.index("--nproc-per-node") + 1])
    if environment is not None:
        assert len(environment["CUDA_VISIBLE_DEVICES"].split(",")) == processes
    try:
        config = finalize(config, world_size=processes)
    except ValueError as error:
        return str(error)
    write_run(Path(config.run.dir))
    path = Path(config.run.dir) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["loss"] *= config.optim.lr / 1e-3
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return None


def test_curves_are_held_to_the_first_and_a_failed_one_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a deviation of the wrong sign or of single steps, and a table that leaves out the run that failed."""
    monkeypatch.setattr(curves, "launch", launched)
    out = tmp_path / "curves.json"
    runs = ["--run", "optim.lr=1e-3", "--run", "optim.lr=2e-3", "--run", "optim.lr=-1"]
    arguments = ["stdlib", *runs, "--gpus", "4", "--gpus-of-one", "2", "--window", "2", "--out", str(out)]
    assert curves.main([*arguments, "train.device=cpu", "optim=adamw"]) == 1
    first, twice, failed = json.loads(out.read_text())["runs"]
    assert first["losses"] == [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    assert (first["loss_end"], first["end_deviation"]) == (4.5, 0)
    assert twice["end_deviation"] == pytest.approx(1.0)
    assert twice["largest_deviation"] == pytest.approx(1.0)
    assert "optim.lr" in failed["error"]


def test_layouts_that_cannot_run_are_recorded_beside_those_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one layout out of memory that takes the results of all others with it."""
    monkeypatch.setattr(layouts, "launch", launched)
    out = tmp_path / "layouts.json"
    arguments = ["stdlib", "--gpus", "4", "--only", "zero2", "tp4+sp", "--out", str(out)]
    changes: list[Any] = [
        "train.device=cpu",
        "model.num_heads=6",
        "model.num_kv_heads=2",
        "model.hidden_size=96",
        "optim.lr=1e-3",
    ]
    assert layouts.main([*arguments, *changes, "optim=adamw"]) == 0
    result = json.loads(out.read_text())["layouts"]
    assert result["zero2"]["losses"] == [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    assert result["zero2"]["tokens_per_second_per_gpu"] == pytest.approx(50)  # of the one step that is measured
    assert "parallel.tp=4" in result["tp4+sp"]["error"]


@pytest.mark.thorough
@pytest.mark.some(2)
@pytest.mark.parametrize("kind", growth.KINDS)
def test_growth_asks_for_runs_that_are_configurations_of_the_trainer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a batch that does not divide, or a layout that is refused only when the GPUs are there."""
    monkeypatch.setattr(layouts, "launch", launched)
    out = tmp_path / "growth.json"
    assert growth.main(["llama3_1b", kind, "--out", str(out), "train.device=cpu"]) == 0
    runs = json.loads(out.read_text())[kind]
    assert {name: run.get("error") for name, run in runs.items()} == dict.fromkeys(runs)
    assert len(runs) >= 3


def test_growth_keeps_the_tokens_of_a_step_as_it_says() -> None:
    """Catches weak scaling by a batch that stays, and sequences compared at different numbers of tokens."""

    def value(run: layouts.Run, key: str) -> int:
        return int(next(change.partition("=")[2] for change in run.changes if change.startswith(f"{key}=")))

    tokens = {
        kind: [value(run, "train.global_batch_size") * value(run, "train.seq_len") for run in runs(4).values()]
        for kind, runs in growth.KINDS.items()
    }
    assert tokens["sequence"] == [4 * growth.TOKENS_PER_GPU] * len(tokens["sequence"])
    assert tokens["weak"] == [growth.TOKENS_PER_GPU * n for n in (1, 2, 4)]
    assert tokens["strong"] == [4 * growth.TOKENS_PER_GPU] * 3
    alone = growth.sequence(1).values()
    assert [value(run, "train.seq_len") for run in alone] == [2048, 8192, 32768, 65536, 131072]
    assert ["model.activation_checkpoint=full" in run.changes for run in alone] == [False, False, False, True, True]
