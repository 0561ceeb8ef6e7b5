"""Checkpoints of tensors on a GPU: the copy to page-locked memory is complete before anything can change them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import trainer.staging
from tests.pool import RankPool
from tests.trainer.checkpoint_states import same_bits
from trainer.checkpoint import CheckpointManager, read_tensor, verify
from trainer.config import CheckpointConfig
from trainer.staging import HostArena, local_shards

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 4096, 8191  # 134 MB in fp32 per tensor: a copy takes milliseconds, long enough to be overtaken


def full(name: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((len(name), seed)) % 2**31)
    return torch.randn(ROWS, COLUMNS, generator=generator)


def on_gpu(seed: int) -> dict[str, torch.Tensor]:
    """One tensor on every rank, and one in shards. All ranks share a GPU; gloo carries what little is said."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    rows = full("sharded", seed).chunk(dist.get_world_size())[dist.get_rank()].cuda()
    sharded = DTensor.from_local(rows, mesh, [Shard(0)], shape=torch.Size([ROWS, COLUMNS]), stride=(COLUMNS, 1))
    return {"replicated": full("replicated", seed).cuda(), "sharded": sharded, "step": torch.tensor(3.0, device="cuda")}


def save_and_overwrite(directory: Path, synchronised: bool) -> dict[str, bool]:
    """Save twice; each time overwrite the tensors on another stream at once. Which names were saved as they were."""
    torch.cuda.set_device(0)
    # A tensor still being computed when save is called, and written to from a second stream as soon as it returns.
    checkpoints = CheckpointManager(directory, CheckpointConfig(), device=torch.device("cuda"))
    other = torch.cuda.Stream()
    right = {}
    with pytest.MonkeyPatch.context() as patch:
        if not synchronised:
            patch.setattr(trainer.staging.torch.cuda, "synchronize", lambda device=None: None)
        for step in (1, 2):
            tensors = on_gpu(seed=step)
            torch.cuda.current_stream().synchronize()
            torch.cuda._sleep(1_000_000_000)  # half a second of work, behind which the copies wait
            checkpoints.save(step, tensors, {})
            with torch.cuda.stream(other), torch.no_grad():
                for tensor in tensors.values():
                    (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
            checkpoints.wait()
            torch.cuda.current_stream().synchronize()
    checkpoints.close()
    for step in (1, 2):
        assert verify(directory / f"step_{step}") == []
        for name in ("replicated", "sharded"):
            right[f"{name} {step}"] = same_bytes(read_tensor(directory / f"step_{step}", name), full(name, step))
    return right


def same_bytes(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(tensor.view(torch.int32), other.view(torch.int32))


def test_gpu_tensors_overwritten_from_another_stream_are_saved_as_they_were(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: save() returning before the copy is done. Control: without synchronising, data is lost."""
    for right in ranks.run(2, save_and_overwrite, tmp_path / "good", True):
        assert all(right.values()), right
    assert not all(ranks.run(1, save_and_overwrite, tmp_path / "control", False)[0].values())


def load_on_gpu(path: Path) -> bool:
    torch.cuda.set_device(0)
    tensors = on_gpu(seed=9)
    checkpoints = CheckpointManager(path.parent, CheckpointConfig(), device=torch.device("cuda"))
    checkpoints.load(path, tensors)
    checkpoints.close()
    expected = on_gpu(seed=2)
    return all(
        same_bits(got, want) if got.dim() == 0 else same_bytes(got, want)
        for got, want in zip(map(local, tensors.values()), map(local, expected.values()), strict=True)
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).cpu()


def save_on_gpu(directory: Path) -> None:
    torch.cuda.set_device(0)
    checkpoints = CheckpointManager(directory, CheckpointConfig(), device=torch.device("cuda"))
    checkpoints.save(1, on_gpu(seed=2), {})
    checkpoints.close()


def test_gpu_tensors_load_bitwise_on_another_number_of_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Would catch: the loaded part landing on the CPU copy, or at the wrong offset of a device tensor."""
    ranks.run(2, save_on_gpu, tmp_path)
    assert ranks.run(1, load_on_gpu, tmp_path / "step_1") == [True]
    assert ranks.run(2, load_on_gpu, tmp_path / "step_1") == [True, True]


def stage_twice() -> tuple[bool, bool, bool]:
    arena = HostArena(torch.device("cuda"))
    shards = local_shards({"a": torch.ones(1000, 1000, device="cuda"), "b": torch.ones(7, device="cuda")})
    first, second = arena.stage(shards), arena.stage(shards)
    pinned = all(shard.data.is_pinned() for shard in first)
    reused = first[0].data.data_ptr() == second[0].data.data_ptr()
    arena.release()
    again = HostArena(torch.device("cuda")).stage(shards)  # what was released can be page-locked again
    return pinned, reused, all(bool((shard.data == 1).all()) for shard in again)


def test_host_memory_is_page_locked_and_reused_between_saves(ranks: RankPool) -> None:
    """Would catch: pageable memory, at a third of the bandwidth, or new gigabytes page-locked for every save."""
    assert ranks.run(1, stage_twice) == [(True, True, True)]
