"""Health: what looks after a run while it trains. The trainer says what it does; everything else is here.

watchdog.py     no progress: all ranks report where they stand, and end
corruption.py   bits that changed on their own
stragglers.py   ranks that keep the others waiting
peers.py        copies of the state in memory, from which a restart loses a step
injection.py    planned faults, for the drill
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer.config import ConfigError, ResilienceConfig, TrainConfig
from trainer.corruption import Key, Snapshot, at_rest, check_replicas, check_same, digests
from trainer.step import TrainState
from trainer.stragglers import RankTimes, Straggler
from trainer.watchdog import Watchdog

T = TypeVar("T")


def watchdog_of(config: TrainConfig) -> Watchdog:
    """The watchdog of this start of the run. Collective."""
    names: list[str | None] = [datetime.now(UTC).strftime("%Y%m%dT%H%M%S")]
    dist.broadcast_object_list(names, src=0)
    return Watchdog(
        Path(config.run.dir),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        start=str(names[0]),
        timeout=config.train.timeout_seconds,
    )


class Health:
    """All ranks build it together, and call its methods in the same order."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None,
        watchdog: Watchdog,
    ) -> None:
        """group: all ranks over gloo; None: this process is alone. watchdog: from `watchdog_of`."""
        self._config: ResilienceConfig = config.resilience
        if device.type == "cuda" and self._config.rerun_interval > 0 and not config.train.deterministic:
            raise ConfigError(
                [
                    f"resilience.rerun_interval={self._config.rerun_interval} compares bits, which on CUDA are the "
                    "same twice only with train.deterministic=true; set it, or resilience.rerun_interval=0"
                ]
            )
        self._timeout = config.train.timeout_seconds
        self._state, self._group = state, group
        self._first_step = True
        self._watchdog = watchdog
        self._times = RankTimes(device, group)
        self._since = self._step_end = time.perf_counter()
        self._steps = 0  # since stragglers were looked for
        self._sealed: dict[Key, int] | None = None  # hashes of the state after the last step, if it was checked
        if self._config.check_interval > 0:
            state.before_update = self._check_at_rest

    def start(self) -> None:
        """The loop begins."""
        self.begin("data", 0)
        self._watchdog.start()
        self._since = self._step_end = time.perf_counter()

    def begin(self, phase: str, step: int) -> None:
        """The main thread has made progress, and begins this: data, step, results, validation, checkpoint or sample."""
        seconds = self._timeout
        if phase == "checkpoint":
            seconds = max(seconds, self._config.checkpoint_seconds)
        elif self._first_step or phase == "sample":
            seconds = max(seconds, self._config.first_step_seconds)
        self._watchdog.begin(phase, step=step, seconds=seconds)
        if phase == "step":
            self._times.add_late(time.perf_counter() - self._step_end)

    def computed(self, compute: Callable[[], T]) -> T:
        """compute(), which is a step; now and then twice, from the same state, with the same result to the bit.

        Raises StateCorrupted on every rank when it is not.
        """
        step, every = self._state.step + 1, self._config.rerun_interval
        if every == 0 or step % every:
            return compute()
        before = Snapshot(self._state)
        compute()
        first = digests(self._state)
        before.restore(self._state)
        self._watchdog.begin("step, again", step=step, seconds=self._timeout)
        result = compute()
        what = "computed twice, it gave different bits"
        check_same(first, digests(self._state), what=what, step=step, group=self._group)
        return result

    def check(self, step: int, *, save: bool) -> bool:
        """After a step: compare replicas if it is time, or before a checkpoint; whether it was.

        Raises StateCorrupted on every rank.
        """
        every = self._config.check_interval
        if every == 0 or not (save or step % every == 0):
            return False
        found = digests(self._state)
        check_replicas(found, step=step, group=self._group)
        self._sealed = at_rest(self._state, found)
        return True

    def _check_at_rest(self) -> None:
        sealed, self._sealed = self._sealed, None
        if sealed is not None:
            step, what = self._state.step + 1, "the state changed between two updates"
            check_same(sealed, digests(self._state), what=what, step=step, group=self._group)

    def add_step(self, seconds: float) -> None:
        """How long a step took on this rank, when that is known; on a GPU after the next was launched."""
        self._times.add_step(seconds)

    def times_of_ranks(self, step: int) -> dict[str, list[float]]:
        """Times of each rank by name (RankTimes.of_ranks), after a step at which these were compared; else empty."""
        every = self._config.straggler_interval
        return self._times.of_ranks if every and step % every == 0 else {}

    def end_step(self, step: int) -> list[Straggler]:
        """All ranks have agreed to go on. Who keeps the others waiting, if it is time to look."""
        self._first_step = False
        self._step_end = time.perf_counter()
        self._steps += 1
        every = self._config.straggler_interval
        if every == 0 or step % every:
            return []
        mean = (self._step_end - self._since) / self._steps
        found = self._times.compare(step_seconds=mean, share=self._config.straggler_share)
        self._since, self._steps = self._step_end, 0
        return found

    def stop(self) -> None:
        """Nothing is watched any more."""
        self._watchdog.close()
        self._state.before_update = None
