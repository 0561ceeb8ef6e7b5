"""benchmarks/peers and benchmarks/compare.py: what of them runs without a GPU and without the peers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import compare
from benchmarks.launches import launch, shown, torchrun
from benchmarks.peers import hugging_face, measure, titan
from benchmarks.train import summarize
from models.flops import flops_per_token
from tests.benchmarks.test_train import write_run
from tests.pool import RankPool


def parsed(monkeypatch: pytest.MonkeyPatch, *argv: str, world_size: int = 1) -> Any:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    options = measure.parser("")
    options.add_argument("--checkpoint", default="none")
    options.add_argument("--fp8", default="none")
    return measure.parse(options, argv)


def test_both_sides_of_a_comparison_draw_from_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of the embedding and words of the loss that only one side reads: it would be compared on easier work."""
    shape = ["--seq-len", "32", "--micro-batch-size", "2", "--steps", "8"]
    ours, theirs = compare.parse(["llama3_1b", *shape]), parsed(monkeypatch, "llama3_1b", *shape)
    compare.write_tokens(ours, tmp_path / "tokens.npy")
    for tokens in (torch.from_numpy(np.load(tmp_path / "tokens.npy")), torch.stack(measure.random_batches(*theirs, 0))):
        assert 0.95 * 128256 < tokens.max() < 128256
        assert float(tokens.double().mean()) == pytest.approx(128256 / 2, rel=0.15)


@pytest.mark.parametrize(
    ("model", "layers", "hidden", "ffn", "kv"),
    [("llama3_1b", 16, 2048, 8192, 512), ("llama3_8b", 32, 4096, 14336, 1024)],
)
def test_a_peer_counts_the_flops_of_the_shape_and_makes_its_layers_as_wide(
    monkeypatch: pytest.MonkeyPatch, model: str, layers: int, hidden: int, ffn: int, kv: int
) -> None:
    """Catches an MFU by another formula, or another model: both make a ratio of speeds worth nothing."""
    _, config = parsed(monkeypatch, model)
    matrices = layers * (hidden * (2 * hidden + 2 * kv) + 3 * hidden * ffn + 2 * hidden) + hidden + 128256 * hidden
    assert flops_per_token(config, 8192) == 6 * matrices + 12 * layers * hidden * 8192
    sizes = titan.ffn_sizes(config)
    width = int(2 * 4 * hidden / 3)  # TorchTitan rounds this up
    multiple = sizes["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == ffn
    with pytest.raises(ValueError, match="parameters"):
        measure.check_size(config, 6)


def test_settings_of_torchtitan_follow_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches fp8 of the output layer, a gather in fp8 with row-wise scales, which TorchTitan refuses, and a typo."""
    arguments = ("llama3_8b", "--micro-batch-size", "2", "--zero-stage", "2", "--checkpoint", "selective-op")
    args, _ = parsed(monkeypatch, *arguments, "--fp8", "tensorwise", world_size=4)
    settings = titan.job_settings(args, world_size=4, folder="x")
    assert settings["training.local_batch_size"] == 2
    assert settings["parallelism.fsdp_reshard_after_forward"] == "never"
    assert settings["activation_checkpoint.mode"] == "selective"
    assert settings["activation_checkpoint.selective_ac_option"] == "op"
    assert settings["quantize.linear.float8.filter_fqns"] == ["output"]
    assert settings["quantize.linear.float8.enable_fsdp_float8_all_gather"]
    assert not titan.job_settings(args, world_size=1, folder="x")[
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    ]
    args, _ = parsed(monkeypatch, *arguments, "--fp8", "rowwise")
    settings = titan.job_settings(args, world_size=4, folder="x")
    assert settings["quantize.linear.float8.recipe_name"] == "rowwise"
    assert "quantize.linear.float8.enable_fsdp_float8_all_gather" not in settings
    assert titan.checkpointing("budget-0.5") == {"mode": "memory_budget", "memory_budget": 0.5}
    with pytest.raises(ValueError, match="--checkpoint selective is unknown"):
        titan.checkpointing("selective")
    with pytest.raises(AttributeError, match="sed"):
        titan.apply_settings(type("Job", (), {"training": object()})(), {"training.sed": 1})


@pytest.mark.parametrize(
    ("argv", "world_size", "message"),
    [
        (["llama3_1b", "--precision", "autocast"], 2, "--precision autocast is for one GPU, not 2"),
        (["llama3_1b", "--steps", "5"], 1, "leave nothing to measure"),
        (["llama9"], 1, "llama9"),
        (["gpt2"], 1, "of family gpt2"),
    ],
)
def test_what_a_peer_cannot_run_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    world_size: int,
    message: str,
) -> None:
    """Catches a failure after minutes of set-up on the GPUs."""
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, *argv, world_size=world_size)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def train_hugging_face() -> dict[str, Any]:
    options = measure.parser("")
    options.set_defaults(liger="none", checkpoint="full", attention="sdpa")
    shape = ["llama_tiny", "--seq-len", "16", "--micro-batch-size", "2", "--steps", "6", "--skip", "2", "--no-compile"]
    return hugging_face.run(*measure.parse(options, shape), torch.device("cpu"))


@pytest.mark.thorough
def test_transformers_trains_on_two_ranks_and_reports_in_the_form_of_our_own_runs(
    ranks: RankPool, tmp_path: Path
) -> None:
    """Catches a field that is missing where runs are compared, tokens of one rank for those of all, and no training."""
    result = ranks.run(2, train_hugging_face)[0]
    write_run(tmp_path)
    ours = summarize(tmp_path, skip=1)
    assert set(ours) - set(result) == set()
    assert set(result) - set(ours) == {"step_seconds"}
    assert set(result["config"]) <= set(ours["config"])
    assert (result["world_size"], result["steps_measured"], len(result["step_seconds"])) == (2, 4, 4)
    assert result["config"]["train.global_batch_size"] == 4
    per_gpu = 4 * 2 * 16 / sum(result["step_seconds"])
    assert result["tokens_per_second_per_gpu"] == pytest.approx(per_gpu)
    assert 0 < result["loss_last"] < result["loss_first"] < 12
    json.dumps(result)


def arguments(*argv: str) -> Any:
    return compare.parse(["llama3_1b", "--steps", "4", "--skip", "1", *argv])


def test_contestants_get_the_same_shape(tmp_path: Path) -> None:
    """Catches a comparison of different batches, or a peer that writes where nobody reads."""
    args = arguments("--gpus", "2", "--micro-batch-size", "3", "--peer", "titan --fp8 rowwise")
    ours = compare.command_of("lattice parallel.zero_stage=3", args, tmp_path / "0")
    for expected in (
        "train.global_batch_size=6",
        "train.micro_batch_size=3",
        "train.steps=4",
        f"run.dir={tmp_path / '0'}",
    ):
        assert expected in ours
    peer = " ".join(compare.command_of("titan --fp8 rowwise", args, tmp_path / "1"))
    assert "--nproc-per-node 2" in peer
    assert peer.endswith(
        "peers/titan.py llama3_1b --seq-len 8192 --micro-batch-size 3 --steps 4 --skip 1 "
        f"--out {tmp_path / '1' / 'result.json'} --fp8 rowwise"
    )
    for wrong, message in (
        (["--peer", "megatron"], "megatron"),
        (["--skip", "4"], "nothing"),
        (["--gpus", "0"], "positive"),
    ):
        with pytest.raises(SystemExit):
            arguments(*wrong)
        assert message


def test_rounds_alternate_and_the_file_grows_with_every_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches results that are lost with the last run, and a table of ratios the wrong way round."""
    out, sizes = tmp_path / "x.json", []
    speeds = {"lattice": [100.0, 120.0], "titan": [80.0, 60.0], "hugging_face": []}

    def run(contestant: str, args: Any, run_dir: Path) -> dict[str, Any]:
        sizes.append(len(json.loads(out.read_text())["runs"]) if out.exists() else 0)
        if not (left := speeds[contestant]):
            return {"command": "", "seconds": 1.0, "result": None, "error": "no"}
        result = {"tokens_per_second_per_gpu": left.pop(0), "mfu": 0.5, "peak_memory_gib": None}
        return {"command": "", "seconds": 1.0, "result": result, "error": None}

    monkeypatch.setattr(compare, "run", run)
    argv = ["llama3_1b", "--seq-len", "8", "--rounds", "2", "--peer", "titan", "--peer", "hugging_face"]
    assert compare.main([*argv, "--out", str(out)]) == 1
    record = json.loads(out.read_text())
    order = [entry["contestant"] for entry in record["runs"]]
    assert order == ["lattice", "titan", "hugging_face", "hugging_face", "titan", "lattice"]
    assert sizes == list(range(6))
    shown = capsys.readouterr().err
    assert "| titan | 80 | 50.0% |  | 1.500 |" in shown  # the best round of both
    assert "| hugging_face | failed | | | |" in shown


def test_a_run_that_takes_too_long_is_ended_and_one_that_fails_says_why(tmp_path: Path) -> None:
    """Catches a peer that hangs and holds the GPUs from those after it."""
    log = tmp_path / "log"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert launch(sleep, log, limit=0.3) == "longer than the limit of 0.3 seconds"
    assert launch([sys.executable, "-c", "print(1); exit(3)"], log, limit=20) == "1"
    assert launch([sys.executable, "-c", "raise ValueError('x')"], log, limit=20) == "ValueError: x"
    assert launch([sys.executable, "-c", "exit(3)"], log, limit=20) == "exit code 3"
    assert launch([sys.executable, "-c", "pass"], log, limit=20) is None


def test_a_record_holds_no_path_of_one_machine(tmp_path: Path) -> None:
    command = torchrun(4, "launch/train.py", f"run.dir={tmp_path / '1'}")
    assert shown(command, tmp_path) == "torchrun --standalone --nproc-per-node 4 launch/train.py run.dir=RUNS/1"
