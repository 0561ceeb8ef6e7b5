"""Stragglers: ranks that keep the others waiting, by name.

All ranks leave a step together, so a step takes as long as its slowest rank and its time does not say whose fault that
was. What differs is measured on each rank by itself, without a collective inside, and compared now and then:

    late     host seconds from the end of a step to the first collective of the next: data, Python, a busy CPU
    probe    seconds for a fixed matrix product (on CUDA only): a device that is throttled or shared

Step times of all ranks are gathered beside these, for the record: alike while ranks leave steps together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

PROBE_SHARE = 0.25
"""Of the median's time that a probe may take longer. Devices of one kind differ by some percent."""
LEAST_SECONDS = 0.01
"""That a rank is later than the median: less is the noise of a host."""
_PROBE_SIZE, _PROBE_TIMES = 4096, 10


@dataclass(frozen=True)
class Straggler:
    """A rank that keeps the others waiting; filled by `stragglers`."""

    rank: int
    measure: str  # late or probe
    seconds: float  # of this rank: mean per step, or of the probe
    usual: float  # the median of all ranks

    def __str__(self) -> str:
        mine, usual = f"{self.seconds * 1e3:.0f} ms", f"the median rank {self.usual * 1e3:.0f} ms"
        if self.measure == "late":
            return f"rank {self.rank} begins its steps {mine} late; {usual}"
        return f"rank {self.rank} takes {mine} for a fixed product; {usual}"


class RankTimes:
    """Collects the times of this rank, and compares them with those of the others."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._device, self._group = device, group
        self._late: list[float] = []
        self._steps: list[float] = []
        self.of_ranks: dict[str, list[float]] = {}
        """Of each rank at the newest comparison, in seconds: `late_seconds`, and `step_seconds` once a step has ended
        (each a median over the steps in between). Empty before, or alone."""

    def add_late(self, seconds: float) -> None:
        """Of one step: from the end of the step before to the first collective."""
        self._late.append(seconds)

    def add_step(self, seconds: float) -> None:
        """Of one step, by this rank's clock (trainer.throughput.StepClock)."""
        self._steps.append(seconds)

    def compare(self, *, step_seconds: float, share: float) -> list[Straggler]:
        """The stragglers since the last call, the same on every rank. Collective: one gather of three numbers.

        step_seconds: mean of a step. share: of it, that a rank may be later than the median.
        """
        late = median(self._late) if self._late else 0.0
        step = median(self._steps) if self._steps else math.nan
        self._late.clear()
        self._steps.clear()
        mine = [late, probe_seconds(self._device), step]
        if self._group is None:
            return []
        numbers = torch.tensor(mine, dtype=torch.float64)
        everyone = [torch.empty_like(numbers) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, numbers, group=self._group)
        lates, probes, steps = (list(column) for column in zip(*(row.tolist() for row in everyone), strict=True))
        self.of_ranks = {"late_seconds": lates}
        if not any(math.isnan(seconds) for seconds in steps):
            self.of_ranks["step_seconds"] = steps
        return stragglers(lates, probes, step_seconds=step_seconds, share=share)


def stragglers(late: list[float], probes: list[float], *, step_seconds: float, share: float) -> list[Straggler]:
    """From the numbers of all ranks, in rank order. Of two ranks the usual one is the faster."""
    found = []
    margins = {"late": max(share * step_seconds, LEAST_SECONDS), "probe": PROBE_SHARE * _usual(probes)}
    for measure, values in (("late", late), ("probe", probes)):
        usual, margin = _usual(values), margins[measure]
        found += [Straggler(r, measure, v, usual) for r, v in enumerate(values) if v > usual + margin and v > 0]
    return found


def _usual(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def probe_seconds(device: torch.device) -> float:
    """Time of matrix products of a fixed size on the device, about ten milliseconds; 0 on the CPU.

    There, ranks of one host take turns on its cores, and the probe would measure the others.
    """
    if device.type != "cuda":
        return 0.0
    a = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.bfloat16, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a @ a
    begin.record()
    for _ in range(_PROBE_TIMES):
        a @ a
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
