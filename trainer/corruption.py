"""Silent corruption: bits of the training state that changed on their own, or arithmetic that came out wrong.

Nothing crashes when a bit flips in a weight, a moment or a sum, and the loss may show it weeks later or never. Three
comparisons find it, each of bits, none of tolerances:

    replicas   every part of the state that several ranks hold has the same bits on all of them
    at rest    the state before an update has the bits it had after the update before it
    recompute  a step that is done again from the same state gives the same state

The first needs replicas (DDP, HSDP, weights at ZeRO-1 and 2, what tp leaves whole); the second finds memory that
changed while nobody wrote to it, on any layout, also of a part that one rank alone holds; the third finds arithmetic
that does not repeat itself, and needs a deterministic device.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist

from parallel.regions import Located, local_tensor
from trainer.staging import local_shards
from trainer.step import TrainState

Key = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A part of the state: name of the tensor, index of the part's first element, the part's shape."""
_CHUNK = 1 << 22  # elements: 32 MiB of int64 at a time
_MULTIPLIER = 6364136223846793005  # odd: of Knuth's MMIX generator
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LISTED = 4


class StateCorrupted(RuntimeError):
    """Bits are not what they must be. The message names step, ranks and tensors; the state must not be saved."""


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """A hash of a tensor's bits: 0-d int64 on its device, the same on every device and in every run.

    The sum of elements (as integers) times odd numbers modulo 2^64. An odd number has an inverse there, so whichever
    bit of whichever element flips, the hash changes; other damage is missed with probability 2^-64 or so.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORD[tensor.element_size()])
    odd = 2 * torch.arange(min(_CHUNK, words.numel()), device=words.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK):
        total = total * _MULTIPLIER + (chunk.to(torch.int64) * odd[: chunk.numel()]).sum()
    return total


def state_parts(state: TrainState) -> dict[Key, torch.Tensor]:
    """What this rank holds: masters, moments, buffers, and what the model computes with where that is a copy."""
    held: dict[str, Located] = dict(state.state_tensors())
    for prefix, each in {"": state, **{f"{name}/": other for name, other in state.beside.items()}}.items():
        masters = {local_tensor(master).data_ptr() for master in each.data_parallel.masters.values()}
        for name, parameter in each.model.named_parameters():
            if local_tensor(parameter).data_ptr() not in masters:
                held[f"{prefix}live/{name}"] = parameter
    return {(s.name, tuple(s.offsets), tuple(s.data.shape)): s.data for s in local_shards(held)}


def at_rest(state: TrainState, found: Mapping[Key, int]) -> dict[Key, int]:
    """Of `digests`, those of parts that only an update changes, and no forward or backward (buffers, scales of fp8)."""
    buffers = {f"model/{name}" for name, _ in state.model.named_buffers()}
    return {
        key: value
        for key, value in found.items()
        if key[0] not in buffers and not key[0].startswith(("fp8/", "loss_scale/"))
    }


def digests(state: TrainState) -> dict[Key, int]:
    """A hash of every part; waits for the device once."""
    parts = state_parts(state)
    found = torch.stack([digest(part).to(state.device) for part in parts.values()])
    return dict(zip(parts, found.tolist(), strict=True))


def check_replicas(mine: Mapping[Key, int], *, step: int, group: dist.ProcessGroup | None) -> None:
    """Raise StateCorrupted, on every rank, unless all holders of a part have the same bits. Collective over group.

    mine: of `digests`. Of three holders or more the minority is named; of two, both.
    """
    names = {_short(key): key[0] for key in mine}  # of a thousand ranks, keys would be most of what is sent
    holders: dict[int, dict[int, int]] = {}
    for rank, theirs in enumerate(_gather({_short(key): value for key, value in mine.items()}, group)):
        for short, value in theirs.items():
            holders.setdefault(short, {})[rank] = value
    wrong = {short: _minority(values) for short, values in holders.items() if len(set(values.values())) > 1}
    if wrong:
        here = {short: names[short] for short in wrong if short in names}
        known = {short: name for theirs in _gather(here, group) for short, name in theirs.items()}
        ranks = sorted({rank for found in wrong.values() for rank in found})
        raise StateCorrupted(
            f"step {step}: replicas of {_listing(sorted(known.values()))} have different bits; wrong on rank "
            f"{' or '.join(map(str, ranks))}"
        )


def check_same(
    before: Mapping[Key, int], after: Mapping[Key, int], *, what: str, step: int, group: dist.ProcessGroup | None
) -> None:
    """Raise StateCorrupted, on every rank, unless on each of them both have the same hashes. Collective over group.

    what: has happened to the tensors if not, for the message.
    """
    names = [key[0] for key, value in before.items() if after.get(key) != value]
    changed = {rank: theirs for rank, theirs in enumerate(_gather(names, group)) if theirs}
    if changed:
        listing = "; ".join(f"rank {rank}: {_listing(theirs)}" for rank, theirs in changed.items())
        raise StateCorrupted(f"step {step}: {what}: {listing}")


class Snapshot:
    """The state before a step, on the host, to do the step again from."""

    def __init__(self, state: TrainState) -> None:
        self._step = state.step
        self._parts = {
            name: local_tensor(tensor).detach().to("cpu", copy=True) for name, tensor in state.state_tensors().items()
        }

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        """Collective: the model is given the weights again."""
        for name, tensor in state.state_tensors().items():
            local_tensor(tensor).copy_(self._parts[name])
        state.set_step(self._step)
        state.publish()


def _short(key: Key) -> int:
    """64 bits for a key, the same on every rank."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _gather(value: object, group: dist.ProcessGroup | None) -> list:
    """An object of every rank, in rank order; group None: this process alone."""
    if group is None:
        return [value]
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _minority(values: Mapping[int, int]) -> list[int]:
    """Ranks whose value is not the most common one; all of them when no value is."""
    (common, times), *others = Counter(values.values()).most_common()
    if others and others[0][1] == times:
        return list(values)
    return [rank for rank, value in values.items() if value != common]


def _listing(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
