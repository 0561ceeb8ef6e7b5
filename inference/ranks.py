"""Serving over several ranks: rank 0 takes requests, the others follow it step by step.

What travels is what was asked of the engine since its last step: requests that were added, with their tokens and
settings, and the numbers of those that were aborted. Every rank has the whole engine and schedules for itself. The
other way would be to send the plan of each step: which tokens of which sequences, in which blocks, sampled how. Then

    bytes   every step would have a token, a place and perhaps a block for each running sequence (and its table of
            blocks, where followers are to remember nothing). So a step without news is a message of some bytes,
            and a prompt travels once
    time    a plan needs the tokens that the last step sampled, so it would be waited for behind each step; what was
            asked does not
    code    whatever changes a plan (chunks, prefix cache, preemption, copies to the host) would have to be written
            down in it. Here it is the same code on all ranks

and the price is that all ranks must decide alike. They do: scheduler, block manager and stops are functions of what
was asked and of the sampled tokens, with neither time nor chance in them, and these tokens are rank 0's on every rank
by construction (`agreed`). Whatever else decides (a clock, free memory) has to be rank 0's as well, or agreed upon.
A checksum of all that was computed travels with every message: a follower that has done something else says so.

Where all ranks ask the same themselves, such as those of a trainer that make rollouts, nothing has to travel: an engine
without a channel.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from inference.sampling import Sampled

MESSAGE_BYTES = 4096
"""Of the one broadcast of a message; of a longer one, what is missing follows in a second."""
LENGTH_BYTES = 8
PATIENCE = timedelta(days=365)


class RankError(RuntimeError):
    """A rank of several that serve together has ended, hangs, or has done something else than the others."""


class Channel:
    """Messages from rank 0 to all other processes. Each `tell` of rank 0 meets one `hear` of every other rank.

    A server may have nothing to do for days, so `hear` waits as long as it takes; that rank 0 has ended is seen at
    once, by its connections.
    """

    def __init__(self) -> None:
        """Collective over all processes."""
        self.group = group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._buffer = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, message: object) -> None:
        """Rank 0: send anything that can be pickled. Raises RankError where a rank is gone."""
        data = pickle.dumps(message)
        first, rest = data[: MESSAGE_BYTES - LENGTH_BYTES], data[MESSAGE_BYTES - LENGTH_BYTES :]
        head = len(data).to_bytes(LENGTH_BYTES, "little") + first
        self._buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        with lost_ranks_named("a rank that follows has ended"):
            dist.broadcast(self._buffer, group=self.group, group_src=0)
            if rest:
                dist.broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8), group=self.group, group_src=0)

    def hear(self) -> Any:
        """Another rank: the next message. Raises RankError where rank 0 is gone."""
        with lost_ranks_named("rank 0 has ended"):
            dist.broadcast(self._buffer, group=self.group, group_src=0)
            length = int.from_bytes(self._buffer[:LENGTH_BYTES].numpy().tobytes(), "little")
            data = self._buffer[LENGTH_BYTES : LENGTH_BYTES + length].numpy().tobytes()
            if length > len(data):
                rest = torch.empty(length - len(data), dtype=torch.uint8)
                dist.broadcast(rest, group=self.group, group_src=0)
                data += rest.numpy().tobytes()
        return pickle.loads(data)

    def close(self) -> None:
        """Collective: every rank is done. Ends the group's threads, which must not outlive the interpreter: one that
        still lets go of the last message's tensors then would end the process with an error."""
        group = self.group
        del self.group
        dist.destroy_process_group(group)


@dataclass
class Orders:
    """What leads to an engine's next step. Filled by `Engine.step` of rank 0."""

    engine: int  # number of the engine, of those on one channel
    calls: list[tuple[str, tuple[Any, ...]]]  # methods of Engine and their arguments, in order
    checksum: int  # of all steps, and of what is left of the cache and of requests


def checksum(numbers: Iterable[int], *, before: int) -> int:
    """A number for a sequence of numbers and for what came before them."""
    return zlib.crc32(np.fromiter(numbers, dtype=np.int64).tobytes(), before)


def agreed(sampled: Sampled, tp: DeviceMesh | None) -> Sampled:
    """With the first rank's tokens on every rank: a sum of probabilities may round otherwise on another device.

    On the device; the host does not wait.
    """
    agreed_tokens(sampled.tokens, tp)
    return sampled


def agreed_tokens(tokens: Tensor, tp: DeviceMesh | None) -> Tensor:
    """The first rank's tokens, in place of every rank's own."""
    if tp is not None:
        dist.broadcast(tokens, group=tp.get_group(), group_src=0)
    return tokens


def smallest(number: int, tp: DeviceMesh | None) -> int:
    """The smallest of all ranks' numbers, on every one. Collective."""
    if tp is None:
        return number
    each = torch.tensor(number, device=tp.device_type)
    dist.all_reduce(each, dist.ReduceOp.MIN, group=tp.get_group())
    return int(each)


@contextmanager
def lost_ranks_named(what: str) -> Iterator[None]:
    """Inside, what collectives raise where a rank is gone becomes one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not _is_of_a_lost_rank(error):
            raise
        raise RankError(f"{what}: {str(error).splitlines()[0]}") from error


def _is_of_a_lost_rank(error: RuntimeError) -> bool:
    """torch's own kinds, and gloo's, which are known by their words alone."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo")
    return isinstance(error, kinds) or any(word in str(error) for word in words)
