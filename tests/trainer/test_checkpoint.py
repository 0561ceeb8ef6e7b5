"""CheckpointManager: what is saved is what is loaded, on any layout, and nothing else is accepted."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, init_device_mesh
from torch.testing import assert_close

import trainer.checkpoint
import trainer.staging
from tests.pool import RankPool
from tests.trainer.checkpoint_states import (
    LAYOUTS,
    full_state,
    laid_out,
    manager,
    same_bits,
    save_states,
    zeros,
)
from trainer.checkpoint import CheckpointError, read_extra, read_tensor, resolve_resume, tensor_shapes, verify


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """One checkpoint, full_state(0), written by every layout."""
    paths = {}
    for size, kind in LAYOUTS:
        directory = tmp_path_factory.mktemp(f"{kind}-{size}")
        ranks.run(size, save_states, directory, kind, {1: 0})
        paths[size, kind] = directory / "step_1"
    return paths


def load_and_compare(kind: str, paths: list[Path]) -> list[list[str]]:
    """For each path: load it into tensors that hold something else; names of those that are not full_state(0)."""
    checkpoints = manager(paths[0].parent)
    wrong = []
    for path in paths:
        tensors = laid_out(kind, full_state(seed=1))
        extra = checkpoints.load(path, tensors)
        assert extra == {"seed": 0}
        names = []
        for name, expected in full_state(0).items():
            tensor = tensors[name].detach()
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if not same_bits(full, expected):
                names.append(name)
        wrong.append(names)
    checkpoints.close()
    return wrong


@pytest.mark.some(3)
@pytest.mark.parametrize(("size", "kind"), LAYOUTS)
def test_a_checkpoint_of_any_layout_loads_bitwise_into_any_other(
    ranks: RankPool, saved: dict[tuple[int, str], Path], size: int, kind: str
) -> None:
    """Would catch: a shard written at the wrong offset, a replica written twice, an uneven or empty shard lost."""
    for wrong in ranks.run(size, load_and_compare, kind, list(saved.values())):
        assert dict(zip(saved, wrong, strict=True)) == {layout: [] for layout in saved}


def test_a_checkpoint_is_read_without_a_process_group(saved: dict[tuple[int, str], Path]) -> None:
    """Would catch: export that works only on the number of ranks that trained."""
    assert not torch.distributed.is_initialized()
    for path in saved.values():
        assert verify(path) == []
        assert read_extra(path) == {"seed": 0}
        expected = full_state(0)
        assert tensor_shapes(path) == {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
        assert all(same_bits(read_tensor(path, name), tensor) for name, tensor in expected.items())


def test_an_unknown_tensor_is_an_error_that_offers_the_nearest(saved: dict[tuple[int, str], Path]) -> None:
    """Would catch: an export that writes uninitialised memory for a misspelt name."""
    with pytest.raises(CheckpointError, match=r"no tensor model\.weigth; it holds model\.weight"):
        read_tensor(saved[1, "plain"], "model.weigth")


def save_replicated(directory: Path) -> None:
    checkpoints = manager(directory)
    checkpoints.save(1, {f"weight{i}": torch.full((4096,), float(i)) for i in range(8)}, {})
    checkpoints.close()


def test_replicated_tensors_are_written_once_and_by_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: every rank writing every replica, or rank 0 writing all of them while the others wait."""
    ranks.run(4, save_replicated, tmp_path)
    sizes = [file.stat().st_size for file in (tmp_path / "step_1").glob("*.distcp")]
    payload = 8 * 4096 * 4
    assert len(sizes) == 4
    assert payload < sum(sizes) < 1.2 * payload
    assert max(sizes) < 1.1 * min(sizes)


# Asynchrony


class HeldWriter:
    """write_shards that waits for `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self._write = trainer.checkpoint.write_shards

    def __call__(self, *args: object) -> object:
        assert self.go.wait(30)
        return self._write(*args)  # type: ignore[arg-type]


def save_then_change(directory: Path, kind: str, staged: bool) -> list[str]:
    """Save full_state(0), change every tensor while the writer is held; names of tensors saved wrongly."""
    writer = HeldWriter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.checkpoint, "write_shards", writer)
        if not staged:
            patch.setattr(trainer.staging.HostArena, "stage", lambda self, shards: shards)
        checkpoints = manager(directory)
        tensors = laid_out(kind, full_state(0))
        checkpoints.save(1, tensors, {})
        assert not (directory / "step_1").exists()
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
        writer.go.set()
        checkpoints.close()
    return [n for n, full in full_state(0).items() if not same_bits(read_tensor(directory / "step_1", n), full)]


@pytest.mark.parametrize(("size", "kind"), [(1, "plain"), (2, "plain"), (2, "shard")])
def test_tensors_changed_right_after_save_do_not_change_what_is_saved(
    ranks: RankPool, tmp_path: Path, size: int, kind: str
) -> None:
    """Would catch: a writer thread that reads live weights, so that a checkpoint mixes two steps.

    Control: without the staging copy the change does reach the file, so the test can fail.
    """
    assert ranks.run(size, save_then_change, tmp_path, kind, True) == [[]] * size
    changed = [name for name, full in full_state(0).items() if full.count_nonzero()]
    for wrong in ranks.run(size, save_then_change, tmp_path / "control", kind, False):
        assert wrong == changed


def save_twice(directory: Path) -> list[bool]:
    """A save asked for while another is under way; whether the first was complete when the second returned."""
    writer = HeldWriter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.checkpoint, "write_shards", writer)
        checkpoints = manager(directory)
        checkpoints.save(1, laid_out("shard", full_state(1)), {"seed": 1})
        timer = threading.Timer(0.2, writer.go.set)
        timer.start()
        checkpoints.save(2, laid_out("shard", full_state(2)), {"seed": 2})
        first_done = (directory / "step_1").exists()
        checkpoints.close()
    return [first_done] + [
        same_bits(read_tensor(directory / f"step_{seed}", name), full)
        for seed in (1, 2)
        for name, full in full_state(seed).items()
    ]


def test_a_second_save_waits_for_the_first(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: the second save's copy overwriting the host memory that the first is still written from."""
    for outcome in ranks.run(2, save_twice, tmp_path):
        assert all(outcome)


def save_blocking(directory: Path, asynchronous: bool, blocking: bool) -> bool:
    checkpoints = manager(directory, asynchronous=asynchronous)
    checkpoints.save(1, laid_out("shard", full_state(0)), {}, blocking=blocking)
    done = verify(directory / "step_1") == []
    checkpoints.close()
    return done


@pytest.mark.parametrize(("asynchronous", "blocking"), [(True, True), (False, False)])
def test_a_blocking_save_is_committed_on_return(
    ranks: RankPool, tmp_path: Path, asynchronous: bool, blocking: bool
) -> None:
    """Would catch: a preempted run that exits before its last checkpoint is in place."""
    assert ranks.run(2, save_blocking, tmp_path, asynchronous, blocking) == [True, True]


# Strictness


def load_mismatched(path: Path, only_on_rank: int | None) -> tuple[str, bool]:
    """Load into tensors that differ in all four ways (on one rank: in one); the error, and whether all stayed zero."""
    checkpoints = manager(path.parent)
    tensors = zeros(laid_out("shard", full_state(0)))
    if only_on_rank is None:
        del tensors["model.bias"]
        tensors["model.extra"] = torch.zeros(3)
        tensors["exp_avg.weight"] = torch.zeros(3, 5)
        tensors["model.half"] = tensors["model.half"].float()
    elif torch.distributed.get_rank() == only_on_rank:
        tensors["optimizer.step"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(path, tensors)
    checkpoints.close()
    untouched = all((t.to_local() if isinstance(t, DTensor) else t).count_nonzero() == 0 for t in tensors.values())
    return str(error.value), untouched


def test_loading_another_models_checkpoint_is_one_error_that_lists_every_difference(
    ranks: RankPool, saved: dict[tuple[int, str], Path]
) -> None:
    """Would catch: keys ignored or dtypes cast in silence, which torch.distributed.checkpoint does."""
    for message, untouched in ranks.run(2, load_mismatched, saved[4, "shard"], None):
        assert untouched
        for part in (
            "1 missing in the checkpoint: model.extra",
            "1 only in the checkpoint: model.bias",
            "1 of another shape: exp_avg.weight [5, 3], here [3, 5]",
            "1 of another dtype: model.half torch.bfloat16, here torch.float32",
        ):
            assert part in message


def test_a_difference_on_one_rank_is_an_error_on_all(ranks: RankPool, saved: dict[tuple[int, str], Path]) -> None:
    """Would catch: the other ranks entering the load's collectives and waiting for ever."""
    for message, untouched in ranks.run(2, load_mismatched, saved[2, "shard"], 1):
        assert untouched
        assert message.startswith("rank 1: ")
        assert "1 of another shape: optimizer.step [], here [1]" in message


def save_refused(directory: Path) -> list[str]:
    checkpoints = manager(directory)
    partial = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()])
    messages = []
    for tensors, extra in (
        ({"grad": partial}, {}),
        ({}, {"cursor": {"epoch": [1, torch.tensor(2)]}}),
        ({}, {"cursor": {3: "epoch"}}),
    ):
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(1, tensors, extra)
        messages.append(str(error.value))
    checkpoints.close()
    return messages


def test_what_cannot_be_saved_faithfully_is_refused_by_name(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: one rank's part of a sum saved as the value; an integer key that comes back as a string."""
    for partial, value, key in ranks.run(2, save_refused, tmp_path):
        assert "tensor grad is a partial sum" in partial
        assert "extra.cursor.epoch[1] (Tensor)" in value
        assert "extra.cursor: the key 3 (int)" in key
    assert list(tmp_path.iterdir()) == []


def test_the_extra_comes_back_exactly(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: floats rounded in the file (a learning rate, a loss scale), which breaks bitwise resumption."""
    extra = {"lr": 0.1 + 0.2, "tiny": 5e-324, "huge": 2**70, "nested": {"list": [1, None, True, "ü"]}}
    ranks.run(1, save_extra, tmp_path, extra)
    assert read_extra(tmp_path / "step_3") == extra


def save_extra(directory: Path, extra: dict[str, object]) -> None:
    checkpoints = manager(directory)
    checkpoints.save(3, {"weight": torch.ones(2)}, extra)
    checkpoints.close()


# Untrusted files


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self._target), 0o777)


def test_a_checkpoint_cannot_run_code(saved: dict[tuple[int, str], Path], tmp_path: Path) -> None:
    """Would catch: pickle.load on a downloaded .metadata. Control: pickle.load does run it."""
    copy = shutil.copytree(saved[1, "plain"], tmp_path / "step_1")
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    (copy / ".metadata").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it refers to posix\.mkdir"):
        tensor_shapes(copy)
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)
    assert (tmp_path / "executed").exists()


# Retention and resumption


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (2, 0, [5, 6]),
        (1, 0, [6]),
        (0, 0, [1, 2, 3, 4, 5, 6]),
        (1, 2, [2, 4, 6]),
        (2, 3, [3, 5, 6]),
    ],
)
def test_the_newest_and_every_mth_checkpoint_are_kept(
    ranks: RankPool, tmp_path: Path, keep_last: int, keep_every: int, left: list[int]
) -> None:
    """Would catch: off by one in either rule, or one rule deleting what the other keeps."""
    steps = {step: step for step in range(1, 7)}
    ranks.run(1, save_states, tmp_path, "plain", steps, keep_last=keep_last, keep_every=keep_every)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step}" for step in left]


def test_a_checkpoint_later_than_the_one_committed_is_not_deleted(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: a run that goes back to an earlier step deleting the only later checkpoint there is."""
    ranks.run(1, save_states, tmp_path, "plain", {20: 0})
    ranks.run(1, save_states, tmp_path, "plain", {5: 0, 6: 0}, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_20", "step_6"]


def test_saving_a_step_again_replaces_it(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: a rename onto a folder that is not empty failing, or files of both saves mixed."""
    ranks.run(4, save_states, tmp_path, "shard", {7: 1})
    ranks.run(2, save_states, tmp_path, "shard", {7: 2})
    path = tmp_path / "step_7"
    assert verify(path) == []
    assert len(list(path.glob("*.distcp"))) == 2
    assert_close(read_tensor(path, "model.weight"), full_state(2)["model.weight"], rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_7"]


def test_resume_finds_what_each_setting_means(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: a run directory taken for a checkpoint, or `auto` failing on a run that has none yet."""
    checkpoints = tmp_path / "run" / "checkpoints"
    assert resolve_resume("auto", checkpoints) is None
    ranks.run(2, save_states, checkpoints, "shard", {2: 0, 10: 0})
    newest = checkpoints / "step_10"
    assert resolve_resume("never", checkpoints) is None
    assert resolve_resume("auto", checkpoints) == newest
    for given in (newest, checkpoints, tmp_path / "run"):
        assert resolve_resume(str(given), tmp_path / "elsewhere") == newest
    assert resolve_resume(str(checkpoints / "step_2"), checkpoints) == checkpoints / "step_2"


def test_a_resume_path_without_a_good_checkpoint_is_an_error_that_names_it(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: a mistyped path, or a run whose checkpoints are all damaged, silently training from the start."""
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=.*absent does not exist"):
        resolve_resume(str(tmp_path / "absent"), tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="nothing holds no checkpoint"):
        resolve_resume(str(tmp_path / "nothing"), tmp_path)
    ranks.run(1, save_states, tmp_path, "plain", {1: 0})
    (tmp_path / "step_1" / "extra.json").write_text("{}")
    for resume in (str(tmp_path / "step_1"), str(tmp_path), "auto"):
        with pytest.raises(CheckpointError, match=r"damaged: .*extra\.json"):
            resolve_resume(resume, tmp_path)
    assert resolve_resume("never", tmp_path) is None
