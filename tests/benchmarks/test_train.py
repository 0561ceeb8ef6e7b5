"""benchmarks/train.py on a run folder whose numbers are worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.config import LoggingConfig, TrainConfig
from trainer.metrics import MetricLogger
from trainer.run_info import RunInfo, write_config, write_run_info

ROOT = Path(__file__).resolve().parents[2]


def write_run(run_dir: Path, *, mfu: bool = True) -> None:
    """Written by the code that writes real ones. Start 1: steps 1-3; start 2, from step 2: steps 3-6."""
    config = TrainConfig()
    config.parallel.zero_stage = 2
    write_config(run_dir, config)
    for resume_step, last_step in ((0, 3), (2, 6)):
        info = RunInfo(
            device=torch.device("cpu"),
            world_size=2,
            mesh={"dp_shard": 2},
            kernels={"attention": "sdpa"},
            precision={"compute": "fp32"},
            flops_per_token=1000.0,
            flops_per_token_causal=800.0,
            peak_flops=1e6 if mfu else None,
            resume_step=resume_step,
            argv=["launch/train.py", "parallel=zero2", f"run.dir={run_dir}"],
        )
        write_run_info(run_dir, info)
        metrics = MetricLogger(
            run_dir,
            LoggingConfig(console=False),
            is_main=True,
            total_steps=6,
            run_name="x",
            config_dict={},
            resume_step=resume_step,
        )
        for step in range(resume_step + 1, last_step + 1):
            # Steps of the second start take 10 (warm-up), 1, 1 and 2 seconds, over 100 tokens per device each.
            seconds = {3: 10.0, 4: 1.0, 5: 1.0, 6: 2.0}.get(step, 50.0) if resume_step else 50.0
            metrics.log(
                {
                    "step": step,
                    "loss": 10.0 - step,
                    "step_seconds": seconds,
                    "tokens_per_second_per_gpu": 100 / seconds,
                    "mfu": 1000 * (100 / seconds) / 1e6 if mfu else None,
                    "peak_memory_gib": 0.25 * step if mfu else None,
                    "data_wait_seconds": 0.1,
                }
            )
        metrics.close()


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "benchmarks/train.py", *args], capture_output=True, text=True, cwd=ROOT)


def test_the_summary_is_over_the_newest_start_after_its_warm_up(tmp_path: Path) -> None:
    """Catches means over warm-up steps or an earlier start, and a mean of rates where tokens over time is meant."""
    write_run(tmp_path / "run")
    out = tmp_path / "results" / "x.json"
    done = run(str(tmp_path / "run"), "--skip", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert json.loads(out.read_text()) == summary
    assert summary["steps_measured"] == 3
    assert summary["tokens_per_second_per_gpu"] == pytest.approx(300 / 4)  # the mean of the rates would be 83.3
    assert summary["mfu"] == pytest.approx(0.075)
    assert summary["mfu_causal"] == pytest.approx(0.06)
    assert summary["profile"] is None
    assert summary["step_seconds_median"] == 1.0
    assert summary["step_seconds_mean"] == pytest.approx(4 / 3)
    assert summary["data_wait_fraction"] == pytest.approx(0.3 / 4)
    assert summary["peak_memory_gib"] == 1.5
    assert (summary["loss_first"], summary["loss_last"]) == (7.0, 4.0)
    assert (summary["world_size"], summary["device"]) == (2, "cpu")
    assert summary["flops_per_token"] == 1000.0
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["config"]["parallel.zero_stage"] == 2
    assert summary["overrides"] == ["parallel=zero2"]
    assert str(tmp_path) not in done.stdout


def test_a_run_without_mfu_and_memory_has_nulls(tmp_path: Path) -> None:
    """Catches a summary of a CPU run that fails or invents an MFU."""
    write_run(tmp_path, mfu=False)
    summary = json.loads(run(str(tmp_path), "--skip", "0").stdout)
    assert summary["mfu"] is None
    assert summary["peak_memory_gib"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--skip", "4"], "4 steps since its newest start"), (["--skip", "-1"], "must not be negative")],
)
def test_a_warm_up_that_leaves_no_steps_is_one_line_and_exit_code_2(
    tmp_path: Path, args: list[str], message: str
) -> None:
    """Catches a traceback, and a division by zero, for a run that is too short."""
    write_run(tmp_path)
    done = run(str(tmp_path), *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_without_a_run_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """Catches a traceback for a mistyped folder."""
    done = run(str(tmp_path))
    assert done.returncode == 2
    assert "run.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1
