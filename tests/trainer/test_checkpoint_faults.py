"""Damage, crashes and full disks: the good checkpoint before is found, and what is wrong with the bad one is said."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import trainer.checkpoint
from tests.pool import RankError, RankPool
from tests.trainer.checkpoint_states import full_state, laid_out, manager, same_bits, save_states
from trainer.agreement import Ranks
from trainer.checkpoint import CheckpointError, read_extra, read_tensor, verify
from trainer.manifest import ChecksummedFile, FileRecord, read_manifest, write_manifest


def newest_good(directory: Path) -> tuple[Path | None, list[str]]:
    """On ranks: newest_good, and what it logged on this rank."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trainer.checkpoint")
    logger.addHandler(handler)
    try:
        checkpoints = manager(directory)
        found = checkpoints.newest_good()
        checkpoints.close()
    finally:
        logger.removeHandler(handler)
    return found, messages


def holds(path: Path, seed: int) -> bool:
    """Whether a checkpoint is good and is save_states' of that seed."""
    tensors = full_state(seed).items()
    return (
        verify(path) == []
        and read_extra(path) == {"seed": seed}
        and all(same_bits(read_tensor(path, name), tensor) for name, tensor in tensors)
    )


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_steps(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    ranks.run(2, save_states, directory, "shard", {1: 1, 2: 2})
    return directory


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("__0_0.distcp", truncate, "truncated"),
        ("__1_0.distcp", lengthen, "bytes, "),
        ("__1_0.distcp", flip_a_bit, "checksum mismatch"),
        ("__1_0.distcp", Path.unlink, "missing"),
        (".metadata", flip_a_bit, "checksum mismatch"),
        (".metadata", Path.unlink, "missing"),
        ("extra.json", flip_a_bit, "checksum mismatch"),
        ("manifest.json", truncate, "damaged"),
        ("manifest.json", Path.unlink, "missing"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_is_used(
    ranks: RankPool, two_steps: Path, tmp_path: Path, file: str, damage: Callable[[Path], None], reason: str
) -> None:
    """Would catch: a damaged newest checkpoint loaded, or one that stops the run although an older one is good."""
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    assert ranks.run(2, newest_good, directory) == [(directory / "step_2", [])] * 2
    damage(directory / "step_2" / file)
    (found, messages), (found_on_one, silent) = ranks.run(2, newest_good, directory)
    assert found == found_on_one == directory / "step_1"
    (message,) = messages
    assert f"{directory / 'step_2'} is damaged" in message
    assert f"{file}: " in message
    assert reason in message
    assert silent == []  # one rank speaks for all
    assert [problem.split(":")[0] for problem in verify(directory / "step_2")] == [file]


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_noticed(two_steps: Path, tmp_path: Path) -> None:
    """Would catch: a manifest that vouches for the files but not for itself."""
    good = read_manifest(two_steps / "step_2")
    content = (two_steps / "step_2" / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(content)
    assert read_manifest(tmp_path) == good
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (tmp_path / "manifest.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"^manifest\.json: "):
            read_manifest(tmp_path)


def test_when_every_checkpoint_is_damaged_all_are_named(ranks: RankPool, two_steps: Path, tmp_path: Path) -> None:
    """Would catch: only the newest one's damage reported, so that the reason for starting anew stays unknown."""
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    truncate(directory / "step_2" / "__0_0.distcp")
    (directory / "step_1" / "manifest.json").unlink()
    found, messages = ranks.run(1, newest_good, directory)[0]
    assert found is None
    assert "step_2 is damaged and not used: __0_0.distcp: truncated" in messages[0]
    assert "step_1 is damaged and not used: manifest.json: missing" in messages[1]


# Crashes. Operations of rank 0 on the way to a commit, in order; the process dies before the one of a given number.


def replace_and_die(directory: Path, log: Path, survives: int) -> None:
    """Save step 2 again (seed 3), dying before operation number `survives`; the others are written to log."""
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == survives:
                os._exit(1)
            result = operation(*args, **kwargs)
            with open(log, "a") as file:
                file.write(" ".join([operation.__name__, *(a.name for a in args if isinstance(a, Path))]) + "\n")
            done += 1
            return result

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        checkpoints = manager(directory)
        patch.setattr(ChecksummedFile, "create", counted(ChecksummedFile.create))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(trainer.checkpoint, "sync_folder", counted(trainer.checkpoint.sync_folder))
        patch.setattr(trainer.checkpoint.shutil, "rmtree", counted(shutil.rmtree))
        checkpoints.save(2, laid_out("plain", full_state(3)), {"seed": 3})
        checkpoints.close()


COMMIT = [
    "create __0_0.distcp",
    "create .metadata.tmp",
    "rename .metadata.tmp .metadata",
    "create extra.json",
    "create manifest.json",
    "sync_folder .step_2.tmp",
    "rename step_2 .step_2.old",
    "rename .step_2.tmp step_2",
    "sync_folder checkpoints",
    "rmtree .step_2.old",
]


@pytest.mark.some(5)
@pytest.mark.parametrize("survives", range(len(COMMIT)))
def test_a_crash_before_any_operation_of_a_save_leaves_complete_checkpoints_only(
    ranks: RankPool, two_steps: Path, tmp_path: Path, survives: int
) -> None:
    """Would catch: a moment at which step_2 is half written, or the old one is gone and the new one not yet there."""
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    with pytest.raises(RankError, match="rank 0 died"):
        ranks.run(1, replace_and_die, directory, tmp_path / "log", survives)
    done = (tmp_path / "log").read_text().splitlines() if survives else []
    assert done == COMMIT[:survives]
    for path in directory.glob("step_*"):
        assert verify(path) == []

    found, _ = ranks.run(2, newest_good, directory)[0]  # a new start
    assert found == directory / "step_2"
    assert holds(directory / "step_2", seed=3 if "rename .step_2.tmp step_2" in done else 2)
    assert holds(directory / "step_1", seed=1)
    assert sorted(path.name for path in directory.iterdir()) == ["step_1", "step_2"]


def test_the_listed_operations_are_all_there_are(ranks: RankPool, two_steps: Path, tmp_path: Path) -> None:
    """Would catch: the crash test passing because it no longer covers an operation that was added to a save."""
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    ranks.run(1, replace_and_die, directory, tmp_path / "log", -1)
    assert (tmp_path / "log").read_text().splitlines() == COMMIT
    assert holds(directory / "step_2", seed=3)


# Failures of the writer


def save_on_a_full_disk(directory: Path, full_rank: int, suffix: str, surfaces_at: str) -> str:
    """Step 1 is saved; while step 2 is, writing files of that suffix fails on one rank; step 3 is saved. The error."""
    write = ChecksummedFile.write

    def no_space(file: ChecksummedFile, data: Any) -> int:
        if dist.get_rank() == full_rank and str(file.name).endswith(suffix):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
        return write(file, data)

    checkpoints = manager(directory)
    checkpoints.save(1, laid_out("shard", full_state(1)), {"seed": 1}, blocking=True)
    tensors = laid_out("shard", full_state(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChecksummedFile, "write", no_space)
        checkpoints.save(2, tensors, {"seed": 2})
        calls = {
            "save": lambda: checkpoints.save(3, tensors, {}),
            "wait": checkpoints.wait,
            "newest_good": checkpoints.newest_good,
            "close": checkpoints.close,
        }
        with pytest.raises(CheckpointError) as error:
            calls[surfaces_at]()
    if surfaces_at != "close":
        checkpoints.wait()  # the error was told once
        dist.barrier()
        assert sorted(os.listdir(directory)) == ["step_1"]
        dist.barrier()
        checkpoints.save(3, tensors, {"seed": 2})
        checkpoints.close()
    return str(error.value)


@pytest.mark.parametrize(
    ("full_rank", "suffix", "surfaces_at"),
    [(1, ".distcp", "wait"), (0, ".distcp", "save"), (0, ".metadata.tmp", "newest_good"), (0, "extra.json", "close")],
)
def test_a_full_disk_is_one_error_on_all_ranks_and_spares_earlier_checkpoints(
    ranks: RankPool, tmp_path: Path, full_rank: int, suffix: str, surfaces_at: str
) -> None:
    """Would catch: an error lost in the thread, a rank left waiting, a half-written folder taken for a checkpoint."""
    for message in ranks.run(2, save_on_a_full_disk, tmp_path, full_rank, suffix, surfaces_at):
        assert f"checkpoint {tmp_path / 'step_2'} could not be written" in message
        assert "No space left on device" in message
        assert "\n" not in message
        if suffix == ".distcp":
            assert f"rank {full_rank}: " in message
    assert holds(tmp_path / "step_1", seed=1)
    assert not (tmp_path / "step_2").exists()
    if surfaces_at != "close":
        assert holds(tmp_path / "step_3", seed=2)


def fail_on(failing: tuple[int, ...]) -> str:
    def work() -> int:
        if dist.get_rank() in failing:
            raise ValueError("no")
        return dist.get_rank()

    try:
        return str(Ranks().everywhere(work))
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize(
    ("failing", "message"),
    [((), "[0, 1, 2, 3]"), ((2,), "rank 2: ValueError: no"), ((0, 3), "rank 0, 3: ValueError: no")],
)
def test_a_failure_on_some_ranks_is_raised_on_all(ranks: RankPool, failing: tuple[int, ...], message: str) -> None:
    """Would catch: an error that only the rank it happened on can see."""
    assert ranks.run(4, fail_on, failing) == [message] * 4


def test_a_failure_common_to_all_ranks_is_told_once_without_ranks(ranks: RankPool) -> None:
    """Would catch: a thousand ranks' copies of one message in one line."""
    assert ranks.run(2, fail_on, (0, 1)) == ["ValueError: no"] * 2


def test_names_in_a_manifest_cannot_leave_the_checkpoint(two_steps: Path, tmp_path: Path) -> None:
    """A checkpoint from elsewhere that makes verification read, and time, files of this machine."""
    folder = shutil.copytree(two_steps / "step_2", tmp_path / "step_2")
    for name in ("../secret", "/etc/passwd", "a/b", "..", ""):
        manifest = read_manifest(two_steps / "step_2")
        write_manifest(folder, replace(manifest, files={name: FileRecord(size=1, crc32=0)}))
        assert "outside of the checkpoint" in verify(folder)[0]


@pytest.mark.parametrize("wrong", ["1", 1.5, -1, True, None])
def test_numbers_in_a_manifest_are_numbers(two_steps: Path, tmp_path: Path, wrong: object) -> None:
    """A checkpoint from elsewhere that ends verification with a TypeError, on one rank of many."""
    folder = shutil.copytree(two_steps / "step_2", tmp_path / "step_2")
    manifest = read_manifest(folder)
    name, record = next(iter(manifest.files.items()))
    write_manifest(folder, replace(manifest, files={name: replace(record, size=wrong)}))
    assert "damaged" in verify(folder)[0]
