"""All ranks succeed, or all ranks raise the same error: a failure on one rank must not leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from trainer.config import ConfigError

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read. The message names the file or tensor and what to do."""


class Ranks:
    """The ranks that make a checkpoint together; one rank where no process group exists."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """group: a group with a CPU backend; None: the default group, if one is initialised."""
        distributed = dist.is_available() and dist.is_initialized()
        self.group = (group or dist.group.WORLD) if distributed else None
        self.rank = dist.get_rank(self.group) if distributed else 0
        self.size = dist.get_world_size(self.group) if distributed else 1

    def everywhere(self, function: Callable[[], T]) -> list[T]:
        """function() on every rank; the results in rank order. Raises CheckpointError on all ranks if one fails."""
        outcomes = self._outcomes(function)
        failures = [(rank, message) for rank, (_, message) in enumerate(outcomes) if message is not None]
        if failures:
            raise CheckpointError(_summary(failures, self.size))
        return [value for value, _ in outcomes]

    def on_first(self, function: Callable[[], T]) -> T:
        """function() on rank 0 only; its result on every rank. Raises CheckpointError on all ranks if it fails."""
        value, message = self._outcomes(lambda: function() if self.rank == 0 else cast(T, None))[0]
        if message is not None:
            raise CheckpointError(message)
        return value

    def _outcomes(self, function: Callable[[], T]) -> list[tuple[T, str | None]]:
        """(result, None) or (undefined, error) of every rank."""
        try:
            outcome: tuple[Any, str | None] = (function(), None)
        except (Exception, CheckpointException) as error:
            outcome = (None, describe(error))
        if self.group is None:
            return [outcome]
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.group)
        return outcomes


def check_same_on_all_ranks(values: Mapping[str, Any]) -> None:
    """Raise ConfigError on every rank, naming what differs, unless all of them pass equal values. Collective.

    A node with another checkout, another command line or other files would otherwise train its part of every batch on
    something else, and nothing but the loss would show it. values: nested mappings and lists of what JSON can hold.
    """
    mine = dict(_flat(values))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = []
    for rank, theirs in enumerate(everyone):
        different = sorted(key for key in everyone[0].keys() | theirs.keys() if everyone[0].get(key) != theirs.get(key))
        if different:
            listing = ", ".join(f"{key} {theirs.get(key)} (rank 0: {everyone[0].get(key)})" for key in different[:3])
            found.append(f"rank {rank} was started differently: {listing}; give all nodes the same command and files")
            break  # one names the cause; a whole node would repeat it
    if found:
        raise ConfigError(found)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, repr) of every leaf."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}[{number}]")
    else:
        yield name, repr(value)


def describe(error: BaseException) -> str:
    """One line for an error; for one that torch.distributed.checkpoint gathered, a line for each rank's."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, CheckpointException):
        failures = [(rank, describe(cause)) for rank, (cause, _) in sorted(error.failures.items())]
        return _summary(failures, 0)
    return f"{type(error).__name__}: {error}"


def _summary(failures: list[tuple[int, str]], size: int) -> str:
    """One line of all messages, each with its ranks, which are left out when they are all the `size` ranks."""
    messages: dict[str, list[int]] = {}
    for rank, message in failures:
        messages.setdefault(message, []).append(rank)
    if len(messages) == 1 and len(failures) == size:
        return next(iter(messages))
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {message}" for message, ranks in messages.items())
