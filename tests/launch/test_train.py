"""launch/train.py as it is used: real processes, real signals, real mistakes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.tokenizer import train_bpe
from tests.parity.harness import text_corpus
from trainer.resilience import PREEMPTED_EXIT_CODE

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# As from a shell: what the tests set for themselves must not be needed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
PATIENCE = 180.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def small(corpus: DataConfig) -> list[str]:
    """Overrides for a run of milliseconds per step, whose numbers do not depend on train.steps."""
    model = ["hidden_size=36", "intermediate_size=50", "num_layers=2", "num_heads=6", "num_kv_heads=2", "dropout=0.1"]
    return [
        "data=text",
        f"data.path={corpus.path}",
        f"data.cache_dir={corpus.cache_dir}",
        "data.tokenizer.vocab_size=300",
        "data.mask_documents=true",
        "model.vocab_size=300",
        "model.max_seq_len=64",
        *(f"model.{field}" for field in model),
        "train.device=cpu",
        "train.seq_len=24",
        "train.global_batch_size=8",
        "schedule=constant",
        "checkpoint.interval=5",
    ]


def finished(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=2 * PATIENCE
    )


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; none before there is one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def numbers_of(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(run_dir)]


@contextlib.contextmanager
def started(command: list[str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that runs in the background and is gone afterwards, with all that it started."""
    process = subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.05)


def worker(launcher: int, rank: int) -> int:
    """Process id of a rank that torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.fixture(scope="module")
def reference(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which an uninterrupted run of sixty steps on two ranks left runs/whole."""
    folder = tmp_path_factory.mktemp("reference")
    done = finished([*TORCHRUN, TRAIN, *small, "train.steps=60", "run.dir=runs/whole"], folder)
    assert done.returncode == 0, done.stderr
    assert "done: step 60" in done.stdout
    return folder


def test_a_run_leaves_its_files_and_can_be_continued(reference: Path, small: list[str]) -> None:
    """A script that works only where the tests put it; a finished run that does not go on when asked for more steps."""
    run_dir = reference / "runs" / "whole"
    assert [line["step"] for line in lines_of(run_dir)] == list(range(1, 61))
    assert {path.name for path in run_dir.iterdir()} >= {"metrics.jsonl", "config.yaml", "run.json", "checkpoints"}
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_50", "step_55", "step_60"]
    assert json.loads((run_dir / "run.json").read_text())["world_size"] == 2
    before = numbers_of(run_dir)
    # One process now: the layout of the machine one happens to get next.
    more = finished([sys.executable, TRAIN, *small, "train.steps=62", "run.dir=runs/whole"], reference)
    assert more.returncode == 0, more.stderr
    assert "done: step 62" in more.stdout
    assert numbers_of(run_dir)[:60] == before
    assert [line["step"] for line in lines_of(run_dir)[60:]] == [61, 62]


def assert_continues(reference: Path, folder: Path, small: list[str], run_dir: Path) -> None:
    """Started again for a few steps more, the run is the uninterrupted one, bit for bit."""
    steps = lines_of(run_dir)[-1]["step"] + 3
    again = finished([*TORCHRUN, TRAIN, *small, f"train.steps={steps}", f"run.dir={run_dir}"], folder)
    assert again.returncode == 0, again.stderr
    mine, whole = numbers_of(run_dir), numbers_of(reference / "runs" / "whole")
    assert [step for step, _, _ in mine] == list(range(1, steps + 1))
    assert steps <= len(whole), "the run was interrupted too late to compare what follows"
    assert mine == whole[:steps]


@pytest.mark.thorough
def test_a_run_that_is_preempted_and_then_loses_a_rank_continues(
    reference: Path, small: list[str], tmp_path: Path
) -> None:
    """Work since the last checkpoint that is lost when a scheduler takes the machine away; ranks that wait for a dead
    one for ever; a restart that repeats or loses steps."""
    run_dir = tmp_path / "run"
    command = [*TORCHRUN, TRAIN, *small, "train.steps=100000", f"run.dir={run_dir}", "checkpoint.interval=0"]
    with started(command, tmp_path) as process:
        wait_for(lambda: len(lines_of(run_dir)) >= 6, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0  # the run has not finished
    last = lines_of(run_dir)[-1]["step"]
    assert f"preempted at step {last}" in errors
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{last}"]
    command[-1] = "checkpoint.interval=5"
    with started(command, tmp_path) as process:
        wait_for(lambda: len(lines_of(run_dir)) >= last + 8, process)
        os.kill(worker(process.pid, rank=1), signal.SIGKILL)
        killed = time.monotonic()
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert time.monotonic() - killed < PATIENCE / 2
    assert_continues(reference, tmp_path, small, run_dir)
    resumed = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "resume" for event in resumed) == 2


def test_one_process_that_is_preempted_says_so_by_its_exit_code(small: list[str], tmp_path: Path) -> None:
    """A launcher that takes a preempted run for a finished or a broken one."""
    run_dir = tmp_path / "run"
    with started([sys.executable, TRAIN, *small, "train.steps=100000", f"run.dir={run_dir}"], tmp_path) as process:
        wait_for(lambda: len(lines_of(run_dir)) >= 2, process)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == PREEMPTED_EXIT_CODE, errors
    assert "Traceback" not in errors


@pytest.mark.thorough
def test_a_sweep_trains_each_point_in_its_own_folder_and_a_configuration_can_be_printed(
    small: list[str], tmp_path: Path
) -> None:
    """Jobs of a sweep that overwrite each other, or fail on the process group of the one before."""
    command = [sys.executable, TRAIN, "--multirun", *small, "train.steps=2", "run.dir=sweep", "optim.lr=1e-3,3e-3"]
    done = finished(command, tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = sorted(folder for folder in (tmp_path / "sweep").iterdir() if folder.is_dir())
    assert [job.name for job in jobs] == ["optim.lr=0.001", "optim.lr=0.003"]
    assert [[line["lr"] for line in lines_of(job)] for job in jobs] == [[1e-3] * 2, [3e-3] * 2]
    printed = finished([sys.executable, TRAIN, "--cfg", "job", *small], tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert "global_batch_size: 8" in printed.stdout


# ---- mistakes

PROGRAM = """
import json, os, sys
from launch.errors import exit_code_of
from launch.train import train
for arguments in json.loads(sys.argv[1]):
    code = exit_code_of(train, arguments)
    if os.environ.get("RANK", "0") == "0":
        print(f"exit code {code}", file=sys.stderr, flush=True)
"""


def outcomes(text: str) -> list[tuple[list[str], int]]:
    """(lines on stderr, exit code) of each command that PROGRAM ran."""
    found: list[tuple[list[str], int]] = []
    said: list[str] = []
    for line in text.splitlines():
        if match := re.fullmatch(r"exit code (\d+)", line):
            found.append((said, int(match[1])))
            said = []
        else:
            said.append(line)
    return found


def broken_model(folder: Path) -> Path:
    """A Hugging Face folder whose safetensors file is cut off."""
    train_bpe(iter(["the tokenizer of these weights " * 20]), 290).save(folder)
    shape = {"vocab_size": 300, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5, **shape}))
    (folder / "model.safetensors").write_bytes(b'\xff\x00\x00\x00\x00\x00\x00\x00{"model.embed')
    return folder


Mistakes = dict[str, tuple[list[str], int, list[str]]]
"""Name to arguments, exit code, and what each line says."""


def wrong_configurations(small: list[str]) -> Mistakes:
    """What is found before a process group exists."""
    return {
        "a typo": ([*small, "optim.lrr=1e-3"], 2, ["there is no key optim.lrr; did you mean optim.lr?"]),
        "a wrong type": ([*small, "train.steps=many"], 2, ["train.steps must be a whole number"]),
        "an unknown choice": (
            [*small, "model=bert"],
            2,
            ["there is no configs/model/bert.yaml; use one of deepseek"],
        ),
        "several": (
            [*small, "train.grad_clip=-1", "optim.lr=-1", "parallel.dp_replicate=3"],
            2,
            ["parallel.dp_replicate=3 does not divide", "optim.lr=-1.0 must be", "train.grad_clip=-1.0 must be"],
        ),
        "no such data": ([*small, "data.path=/nowhere"], 2, ["data.path=/nowhere: no file with one of the endings"]),
        "no such checkpoint": (
            [*small, "checkpoint.resume=/nowhere/step_5"],
            2,
            ["checkpoint.resume=/nowhere/step_5 does not exist"],
        ),
        "no GPU": ([*small, "train.device=cuda"], 2, ["train.device=cuda, but torch sees no CUDA device"]),
    }


def wrong_surroundings(small: list[str], reference: Path, folder: Path) -> Mistakes:
    """What only shows once the ranks look at data, weights and directories together."""
    np.save(folder / "short.npy", np.arange(10))
    (folder / "blank").mkdir()
    (folder / "blank" / "a.jsonl").write_text('{"text": ""}\n')
    (folder / "file").write_text("")
    whole = reference / "runs" / "whole"
    return {
        "no documents": ([*small, f"data.path={folder}/blank"], 2, ["empty"]),
        "too few tokens": (
            [*small, "data=tokens", "data.mask_documents=false", f"data.path={folder}/short.npy"],
            2,
            ["holds 10 tokens, fewer than one sample of train.seq_len + 1 = 25"],
        ),
        "a tokenizer too large": (
            [*small, "model.vocab_size=200"],
            2,
            ["model.vocab_size=200 is smaller than the tokenizer's 300; set model.vocab_size=300 or more"],
        ),
        "damaged weights": (
            [*small, "model=hf", f"model.path={broken_model(folder / 'hf')}"],
            1,
            ["model.safetensors"],
        ),
        "a checkpoint of another model": (
            [*small, "model.num_layers=3", f"run.dir={whole}", "train.steps=99"],
            2,
            ["is of another model: model.num_layers=3 (checkpoint: 2)"],
        ),
        "another optimizer": (
            [*small, "optim=muon", f"run.dir={whole}", "train.steps=99"],
            1,
            ["does not hold this run's tensors"],
        ),
        "a directory that is taken": (
            [*small, f"run.dir={whole}", "checkpoint.resume=never"],
            2,
            ["already holds a run"],
        ),
        "a directory that is none": ([*small, f"run.dir={folder}/file/run"], 2, ["cannot be created: Not a directory"]),
    }


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to size and time of change of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def assert_said(said: list[str], code: int, expected_code: int, expected: list[str], name: str) -> None:
    assert code == expected_code, (name, said)
    prefix = "configuration error: " if expected_code == 2 else "error: "
    assert len(said) == len(expected), (name, said)
    assert all(line.startswith(prefix) for line in said), (name, said)
    assert all(any(words in line for line in said) for words in expected), (name, said)


def assert_explained(table: Mistakes, launcher: list[str], folder: Path, **environment: str) -> None:
    """Each mistake, made one after the other by the same processes, is explained as the table says; nothing appears."""
    program, work = folder / "program.py", folder / "work"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")
    work.mkdir()
    commands = json.dumps([arguments for arguments, _, _ in table.values()])
    # On a loaded machine torch's sockets warn of waits that were long; that is no part of an explanation.
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = finished([*launcher, str(program), commands], work, **quiet | environment)
    seen = outcomes(done.stderr)
    assert len(seen) == len(table), done.stderr
    for (name, (_, code, lines)), (said, seen_code) in zip(table.items(), seen, strict=True):
        assert_said(said, seen_code, code, lines, name)
    assert list(work.iterdir()) == []


def test_a_wrong_configuration_is_one_readable_line_per_problem(small: list[str], tmp_path: Path) -> None:
    """A traceback for a typo, or a run that starts in spite of it."""
    assert_explained(wrong_configurations(small), [sys.executable], tmp_path)


@pytest.mark.thorough
def test_wrong_data_weights_or_directories_are_explained_by_one_rank_and_nothing_is_written(
    small: list[str], reference: Path, tmp_path: Path
) -> None:
    """The message once per rank, a run directory that a failed start leaves behind, ranks that wait for one that failed
    (the next command would then hang)."""
    before = snapshot(reference)
    assert_explained(wrong_surroundings(small, reference, tmp_path), TORCHRUN, tmp_path)
    assert snapshot(reference) == before


def test_a_port_that_is_taken_is_named(small: list[str], tmp_path: Path) -> None:
    """Two runs on one machine, and a page of C++ frames."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = str(listening.getsockname()[1])
        table: Mistakes = {"port": (small, 1, [f"port: {port}"])}
        rendezvous = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        assert_explained(table, [sys.executable], tmp_path, **rendezvous)


def test_under_torchrun_one_rank_explains_a_mistake_before_the_launcher_ends_the_others(
    small: list[str], tmp_path: Path
) -> None:
    """A second rank that exits first, so that rank 0 is ended before it has said anything."""
    done = finished([*TORCHRUN, TRAIN, *small, "optim.lrr=1"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("configuration error: optim.lrr=1: there is no key optim.lrr") == 1
    assert "exitcode: 2" in re.sub(r"exitcode\s*: 2", "exitcode: 2", done.stderr)
    assert list(tmp_path.iterdir()) == []
