"""MetricLogger: the same numbers everywhere, and a metrics.jsonl that survives crashes and restarts."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.dims import ParallelConfig
from tests.parity.harness import run_here, text_corpus, tiny_config
from tests.pool import RankPool
from trainer.config import LoggingConfig
from trainer.metrics import MetricLogger
from trainer.sinks import MAX_RANKS, curves_of_ranks

# No value below is exact in fp32, so a sink that rounds is seen.
RECORDS: list[dict[str, Any]] = [
    {"step": 1, "loss": 10 / 3, "grad_norm": 0.1, "lr": 1e-5, "tokens": 4096, "mfu": None, "skipped_steps": 0},
    {"step": 2, "loss": 1 / 3, "grad_norm": 0.7, "lr": 2e-5, "tokens": 8192, "mfu": 0.4, "validation_loss": 1.1},
    {"step": 3, "loss": 0.123456789012345, "grad_norm": 1e-9, "lr": 3e-5, "tokens": 12288, "reward": -0.3},
]


def make(run_dir: Path, config: LoggingConfig | None = None, **options: Any) -> MetricLogger:
    defaults: dict[str, Any] = {
        "is_main": True,
        "total_steps": 3,
        "run_name": "test",
        "config_dict": {},
        "resume_step": 0,
    }
    return MetricLogger(run_dir, config or LoggingConfig(console=False), **{**defaults, **options})


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def without_none(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


def read_tensorboard(run_dir: Path) -> dict[int, dict[str, float]]:
    """{step: {name: value}} as TensorBoard itself reads the event files."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={SCALARS: 0})
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            values = steps.setdefault(event.step, {})
            assert name not in values, f"{name} at step {event.step} is there twice"
            values[name] = event.value
    return steps


def read_wandb(path: Path) -> list[dict[str, Any]]:
    """The history in an offline run's file, a LevelDB log of protobufs: 7 bytes; then (crc32, length, type, data)s."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, rows, position = path.read_bytes(), [], 7
    assert len(data) < 32768, "records are split at blocks of 32 KiB, which this reader does not follow"
    while position < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind == 1  # a whole record
        record = Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return rows


def test_metrics_jsonl_gives_back_every_float_exactly(tmp_path: Path) -> None:
    """Catches rounding: a bitwise comparison of two runs would compare six digits."""
    metrics = make(tmp_path)
    for record in RECORDS:
        metrics.log(record)
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == RECORDS


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    """Catches a buffered file: a killed run would lose its last steps."""
    metrics = make(tmp_path)
    metrics.log(RECORDS[0])
    metrics.event("checkpoint", "saved")
    assert read(tmp_path / "metrics.jsonl") == RECORDS[:1]
    assert len(read(tmp_path / "events.jsonl")) == 1
    metrics.close()


def test_tensorboard_reads_back_the_numbers_of_metrics_jsonl_in_fp32(tmp_path: Path) -> None:
    """Catches a field that is renamed, dropped, or put at another step on its way."""
    metrics = make(tmp_path, LoggingConfig(console=False, tensorboard=True))
    for record in RECORDS:
        metrics.log(record)
    metrics.close()
    expected = {
        record["step"]: {
            name: float(np.float32(value)) for name, value in without_none({**record, "step": None}).items()
        }
        for record in read(tmp_path / "metrics.jsonl")
    }
    assert read_tensorboard(tmp_path) == expected


def test_tensorboard_shows_redone_steps_once_after_a_resume(tmp_path: Path) -> None:
    """Catches a sawtooth chart: steps 2 and 3 of the first start must give way to those of the second."""
    config = LoggingConfig(console=False, tensorboard=True)
    metrics = make(tmp_path, config)
    for record in RECORDS:
        metrics.log(record)
    metrics.close()
    metrics = make(tmp_path, config, resume_step=1)
    metrics.log({"step": 2, "loss": 0.25})
    metrics.close()
    assert {step: values["loss"] for step, values in read_tensorboard(tmp_path).items()} == {
        1: float(np.float32(10 / 3)),
        2: 0.25,
    }


def test_wandb_offline_has_the_same_numbers_no_secrets_and_one_id_over_a_resume(tmp_path: Path) -> None:
    """Catches a restart that makes a second run, a field that differs, and a token in what would be uploaded."""
    import wandb

    config = LoggingConfig(console=False, wandb=True)
    config_dict = {"data": {"hub_token": "hf_verysecret", "source": "stdlib-corpus"}}
    metrics = make(tmp_path, config, config_dict=config_dict)
    for record in RECORDS:
        metrics.log(record)
    metrics.close()
    run_id = (tmp_path / "wandb_id").read_text()
    time.sleep(1.0)  # wandb names a part of a run after the second it starts in
    metrics = make(tmp_path, config, config_dict=config_dict, resume_step=3)
    metrics.log({"step": 4, "loss": math.nan})
    metrics.close()

    wandb.teardown()  # offline, finish() returns before the last records are on disk; the service's exit writes them
    assert (tmp_path / "events.jsonl").read_text() == ""  # no failed sink
    assert (tmp_path / "wandb_id").read_text() == run_id
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in files] == [f"run-{run_id.strip()}.wandb"] * 2
    assert read_wandb(files[0]) == [without_none(record) for record in RECORDS]
    (resumed,) = read_wandb(files[1])
    assert resumed["step"] == 4
    assert math.isnan(resumed["loss"])
    for path in files:
        assert b"hf_verysecret" not in path.read_bytes()
        assert b"stdlib-corpus" in path.read_bytes()  # negative control: the configuration is in there


def test_tensorboard_and_wandb_have_events_samples_ranks_and_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a straggler or a resume that only events.jsonl knows of, and a secret that goes along with it."""
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    monkeypatch.setenv("HF_TOKEN", "a1b2c3d4e5")
    config = LoggingConfig(console=False, tensorboard=True, wandb=True)
    metrics = make(tmp_path, config, config_dict={"hub": {"token": "hunter2"}, "source": "corpus"})
    metrics.log(RECORDS[0])
    metrics.log_ranks(1, {"late_seconds": [0.0, 0.25], "step_seconds": [0.5, 0.75]})
    metrics.event("resume", "with a1b2c3d4e5")  # about no step: the last one
    metrics.event("sample", "sampled", step=7, sample="# once\nupon", note=["a1b2c3d4e5"])
    metrics.close()
    wandb.teardown()
    assert "a1b2c3d4e5" not in (tmp_path / "events.jsonl").read_text()
    expected = {"ranks/late_seconds/1": 0.25, "ranks/step_seconds/0": 0.5}
    assert expected.items() <= read_tensorboard(tmp_path)[1].items()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={TENSORS: 0})
    events.Reload()
    texts = {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert texts["events/resume/text_summary"] == [(1, "with ***")]
    assert texts["events/sample/text_summary"] == [(7, "sampled\n\n    # once\n    upon\n")]
    assert texts["config/text_summary"] == [(0, "    hub:\n      token: '***'\n    source: corpus\n")]
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    first, of_ranks, resumed, sampled = read_wandb(path)
    assert first == without_none(RECORDS[0])
    assert expected.items() <= of_ranks.items()
    assert resumed == {"events/resume": "with ***", "step": 1}
    assert (sampled["step"], sampled["events/sample"]) == (7, "sampled\n\n    # once\n    upon\n")


def test_tensorboard_and_wandb_show_the_time_line_of_a_pipeline(ranks: RankPool, tmp_path: Path) -> None:
    """Catches a picture that is in the run's folder alone, or whose pixels are others."""
    import wandb
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path / "run", text_corpus(tmp_path), train__steps=3, logging__tensorboard=True)
    config.parallel = ParallelConfig(pp=2, pp_schedule="1f1b", pp_trace=True)
    ranks.run(2, run_here, config)
    path = tmp_path / "run" / "pipeline_timeline.png"
    drawn = np.asarray(Image.open(path).convert("RGB"))
    assert drawn.std() > 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (shown,) = events.Images("pipeline_timeline")
    assert shown.step == 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), drawn)

    metrics = make(tmp_path / "wandb", LoggingConfig(console=False, wandb=True))
    metrics.picture("pipeline_timeline", path, step=2)
    metrics.close()
    wandb.teardown()
    (media,) = (tmp_path / "wandb" / "wandb").glob("offline-run-*/files/media/images/pipeline_timeline*.png")
    assert media.read_bytes() == path.read_bytes()


def test_of_very_many_ranks_there_are_three_curves() -> None:
    """Catches ten thousand tags in TensorBoard."""
    found = curves_of_ranks({"late_seconds": [float(rank) for rank in range(MAX_RANKS + 1)]})
    assert found == {"ranks/late_seconds/min": 0, "ranks/late_seconds/median": 32, "ranks/late_seconds/max": 64}


def test_nonfinite_values_are_null_and_marked_in_valid_json(tmp_path: Path) -> None:
    """Catches `NaN` in a line, which is no JSON: jq and pandas stop there."""
    metrics = make(tmp_path)
    metrics.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "mfu": None})
    metrics.log({"step": 2, "loss": 1.0, "mfu": None})
    metrics.event("skipped_step", "step 1 was skipped", grad_norm=-math.inf)
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "mfu": None, "nonfinite": True},
        {"step": 2, "loss": 1.0, "mfu": None},
    ]
    assert read(tmp_path / "events.jsonl")[0]["grad_norm"] is None


def test_numpy_numbers_are_taken_and_tensors_refused(tmp_path: Path) -> None:
    """Catches a hidden device synchronisation in logging, and json failing on a numpy scalar."""
    metrics = make(tmp_path)
    metrics.log({"step": np.int64(1), "loss": np.float64(0.1)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"metric loss=.*Tensor"):
        metrics.log({"step": 2, "loss": torch.tensor(1.0)})  # type: ignore[dict-item]
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}]


@pytest.mark.parametrize("step", [1, 0, None, 2.0])
def test_a_step_that_does_not_come_after_the_last_one_is_refused(tmp_path: Path, step: Any) -> None:
    """Catches two lines for one step."""
    metrics = make(tmp_path)
    metrics.log({"step": 1, "loss": 1.0})
    with pytest.raises(ValueError, match="step="):
        metrics.log({"step": step, "loss": 1.0})
    metrics.close()


def test_resume_removes_the_lines_of_steps_that_are_redone(tmp_path: Path) -> None:
    """Catches duplicate steps after a restart from a checkpoint older than the last line."""
    metrics = make(tmp_path)
    for record in RECORDS:
        metrics.log(record)
    metrics.event("preempted", "SIGTERM")
    metrics.close()
    metrics = make(tmp_path, resume_step=2)
    assert read(tmp_path / "metrics.jsonl") == RECORDS[:2]
    metrics.log({"step": 3, "loss": 0.5})
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == [*RECORDS[:2], {"step": 3, "loss": 0.5}]
    assert [event["kind"] for event in read(tmp_path / "events.jsonl")] == ["preempted"]  # history is kept, no gap


def test_a_failed_truncation_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches truncating in place: a crash in the middle would lose the record of the whole run."""
    metrics = make(tmp_path)
    for record in RECORDS:
        metrics.log(record)
    metrics.close()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("trainer.run_info.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        make(tmp_path, resume_step=1)
    assert read(tmp_path / "metrics.jsonl") == RECORDS


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}', b"\0" * 64, b'{"loss": 1}\n'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    """Catches a crash while writing after which the run cannot resume, or joins its next line to the torn one."""
    metrics = make(tmp_path)
    for record in RECORDS[:2]:
        metrics.log(record)
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    metrics = make(tmp_path, resume_step=2)
    metrics.log(RECORDS[2])
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == RECORDS


@pytest.mark.parametrize("line", [b"garbage", b'{"step": 1, "loss": 3.0}', b'{"loss": 3.0}', b""])
def test_a_damaged_line_before_the_last_is_an_error_that_changes_nothing(tmp_path: Path, line: bytes) -> None:
    """Catches throwing away good steps behind a damaged one."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + line + b'\n{"step": 3, "loss": 1.0}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        make(tmp_path, resume_step=3)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "before", [b"", b'{"kind": "start"}\n', b'{"kind": "start", "text": "' + b"x" * 200000 + b'"}\n']
)
def test_a_torn_event_is_cut_off_before_the_next_one(tmp_path: Path, before: bytes) -> None:
    """Catches two events on one line after a crash, and half of one that every reader stumbles over."""
    for name in ("events.jsonl", "ranks.jsonl"):
        (tmp_path / name).write_bytes(before + b'{"kind": "checkp' + b"\0" * 100000)
    metrics = make(tmp_path)
    metrics.event("resume", "from step 1")
    metrics.log_ranks(2, {"late_seconds": [0.0]})
    metrics.close()
    events = read(tmp_path / "events.jsonl")
    assert [event["kind"] for event in events] == ["start"] * bool(before) + ["resume"]
    assert read(tmp_path / "ranks.jsonl")[-1]["step"] == 2


def test_lines_lost_before_the_checkpoint_are_reported(tmp_path: Path) -> None:
    """Catches a silent hole in the record after a machine died with lines in its page cache."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    make(tmp_path, resume_step=4).close()
    (event,) = read(tmp_path / "events.jsonl")
    assert (event["kind"], event["first"], event["last"]) == ("metrics_gap", 2, 4)


def test_a_fresh_run_refuses_a_folder_that_holds_steps(tmp_path: Path) -> None:
    """Catches overwriting another run's record."""
    metrics = make(tmp_path)
    metrics.log(RECORDS[0])
    metrics.close()
    with pytest.raises(ValueError, match=r"metrics\.jsonl already holds steps.*run\.dir"):
        make(tmp_path)
    assert read(tmp_path / "metrics.jsonl") == RECORDS[:1]


@pytest.mark.parametrize("content", [b"", b'{"step": 1, "lo'])
def test_a_fresh_run_takes_a_folder_without_steps(tmp_path: Path, content: bytes) -> None:
    """Catches a run that cannot be started again after it died before its first step."""
    (tmp_path / "metrics.jsonl").write_bytes(content)
    metrics = make(tmp_path)
    metrics.log(RECORDS[0])
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == RECORDS[:1]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches eight ranks appending to one file, and a resuming rank that truncates it."""
    metrics = make(tmp_path)
    metrics.log(RECORDS[0])
    metrics.close()
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    other = make(tmp_path, LoggingConfig(tensorboard=True, wandb=True), is_main=False)
    other.log(RECORDS[1])
    other.event("resume", "from step 1")
    other.close()
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", ["log", "event", "close"])
def test_a_sink_that_fails_is_switched_off_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Catches a full disk under tensorboard/ that ends a run, a warning at every step, and a silent loss of a sink."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise OSError("disk quota exceeded")

    monkeypatch.setattr(f"trainer.sinks.TensorBoardSink.{method}", fail)
    metrics = make(tmp_path, LoggingConfig(console=False, tensorboard=True))
    for record in RECORDS:
        metrics.log(record)
        metrics.event("checkpoint", "saved")
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == RECORDS
    failed = [event for event in read(tmp_path / "events.jsonl") if event["kind"] == "sink_failed"]
    assert [event["sink"] for event in failed] == ["tensorboard"]
    assert len(calls) == 1
    assert len([r for r in caplog.records if "disk quota exceeded" in r.getMessage()]) == 1


def test_an_error_in_the_writing_thread_of_tensorboard_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches trusting the mock above: TensorBoard writes in a thread, whose error comes later, at last in close."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    metrics = make(tmp_path, LoggingConfig(console=False, tensorboard=True))

    def fail(*_: Any) -> None:
        raise OSError("disk quota exceeded")

    monkeypatch.setattr(RecordWriter, "write", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the thread's own traceback on stderr
    for record in RECORDS:
        metrics.log(record)
    metrics.close()
    assert read(tmp_path / "metrics.jsonl") == RECORDS
    (event,) = read(tmp_path / "events.jsonl")
    assert (event["kind"], event["sink"]) == ("sink_failed", "tensorboard")


KILL_WANDB = """
import os, signal, subprocess, sys
from pathlib import Path
from trainer.config import LoggingConfig
from trainer.metrics import MetricLogger
from trainer.sinks import MAX_RANKS, curves_of_ranks
config = LoggingConfig(console=False, wandb=True)
metrics = MetricLogger(Path(sys.argv[1]), config, is_main=True, total_steps=3, run_name="x", config_dict={})
metrics.log({"step": 1, "loss": 1.0})
children = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
(service,) = [int(line.split()[0]) for line in children.splitlines() if "wandb" in line]
os.kill(service, signal.SIGKILL)
os.waitpid(service, 0)
metrics.log({"step": 2, "loss": 1.0})
metrics.log({"step": 3, "loss": 1.0})
metrics.close()
"""


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_training_survives_the_death_of_the_wandb_process(tmp_path: Path) -> None:
    """Catches a hang or an error after a signal to the whole job (or the out-of-memory killer) ended wandb."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", KILL_WANDB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (event,) = read(tmp_path / "events.jsonl")
    assert (event["kind"], event["sink"]) == ("sink_failed", "wandb")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_metrics_file_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    """Catches training on without a record. Every write to /dev/full fails as on a full disk."""
    metrics = make(tmp_path)
    metrics._metrics.close()
    metrics._metrics = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        metrics.log(RECORDS[0])


@pytest.mark.parametrize(("resume_step", "starts"), [(0, False), (1, True)])
def test_a_sink_that_cannot_start_stops_a_fresh_run_but_not_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume_step: int, starts: bool
) -> None:
    """Catches a wrong login found out after a week, and a network fault that keeps a run from restarting at night."""
    import wandb

    def fail(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    config = LoggingConfig(console=False, wandb=True, wandb_mode="online")
    if starts:
        metrics = make(tmp_path, config, resume_step=resume_step)
        metrics.log(RECORDS[1])
        metrics.close()
        (event,) = read(tmp_path / "events.jsonl")
        assert (event["kind"], event["sink"]) == ("sink_failed", "wandb")
    else:
        with pytest.raises(RuntimeError, match=r"logging\.wandb_mode=online.*no route to host.*logging\.wandb=false"):
            make(tmp_path, config, resume_step=resume_step)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoggingConfig(interval=0), r"logging\.interval=0 must be at least 1"),
        (LoggingConfig(wandb_mode="of"), r"logging\.wandb_mode='of'.*offline or online"),
    ],
)
@pytest.mark.parametrize("is_main", [True, False])
def test_a_wrong_setting_is_refused_on_every_rank(
    tmp_path: Path, config: LoggingConfig, message: str, is_main: bool
) -> None:
    """Catches rank 0 stopping alone while the others wait for it in a collective."""
    with pytest.raises(ValueError, match=message):
        make(tmp_path, config, is_main=is_main)


def test_optional_libraries_are_not_imported_unless_asked_for(tmp_path: Path) -> None:
    """Catches seconds of start-up, and a failing import, for people who use neither."""
    code = (
        "import sys, pathlib; from trainer.metrics import MetricLogger; from trainer.config import LoggingConfig\n"
        f"m = MetricLogger(pathlib.Path({str(tmp_path)!r}), LoggingConfig(), is_main=True, total_steps=1, run_name='x',"
        " config_dict={})\n"
        "m.log({'step': 1, 'loss': 1.0}); m.close()\n"
        "print([name for name in ('wandb', 'tensorboard', 'rich') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
