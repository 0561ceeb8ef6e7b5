"""benchmarks/curves.py and benchmarks/layouts.py: real launches of the trainer on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import curves, layouts

SMALL = [
    "train.steps=4", "train.seq_len=32", "train.global_batch_size=4", "train.micro_batch_size=1", "train.device=cpu",
    "train.eval_interval=0", "train.sample_tokens=0", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2", "model.vocab_size=512", "optim=adamw",
]  # fmt: skip


def test_curves_of_equal_runs_are_equal_and_a_failed_one_says_why(tmp_path: Path) -> None:
    """Catches runs of different data or seeds, and a comparison that leaves out the run that failed."""
    out = tmp_path / "curves.json"
    tokens = _tokens(tmp_path)
    runs = ["--run", "train.compile=false", "--run", "model.attention=sdpa", "--run", "optim.lr=-1"]
    assert curves.main(["stdlib", *runs, "--window", "2", "--out", str(out), *SMALL, *tokens]) == 1
    first, same, failed = json.loads(out.read_text())["runs"]
    assert len(first["losses"]) == 4
    assert first["end_deviation"] == 0
    assert abs(same["end_deviation"]) < 1e-5
    assert same["largest_deviation"] < 1e-5
    assert "optim.lr" in failed["error"]


def test_layouts_that_cannot_run_are_recorded_beside_those_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one layout out of memory that takes the results of all others with it."""
    monkeypatch.setattr(layouts, "LAYOUTS", {"one": [], "two": ["parallel.tp=2"]})
    out = tmp_path / "layouts.json"
    assert layouts.main(["stdlib", "--gpus", "1", "--out", str(out), *SMALL]) == 0
    result = json.loads(out.read_text())["layouts"]
    assert len(result["one"]["losses"]) == 4
    assert result["one"]["tokens_per_second_per_gpu"] > 0
    assert "parallel.tp" in result["two"]["error"]


def _tokens(folder: Path) -> list[str]:
    import numpy as np

    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 512, 4096).astype(np.int32))
    return ["data=tokens", f"data.path={folder / 'tokens.npy'}", "data.validation_fraction=0"]
