"""What each step was: numbers that come from the device a step late, joined with what the host knew, and judged."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.routing import LEFT_OVER
from trainer.step import StepMetrics
from trainer.throughput import StepClock, Throughput


class TrainingDiverged(Exception):
    """A step cannot be used and the configuration says to stop: not finite, or without all choices of experts."""


@dataclass
class _Pending:
    """A step whose numbers are still on their way to the host."""

    record: dict[str, Any]  # what the host knew when it launched the step
    values: torch.Tensor  # fp64 on the host: loss, grad_norm, skipped, valid_tokens, loss_scale, then `extra`
    extra: list[str]  # names of more metrics
    end: torch.cuda.Event | float  # of the step, and of the copy of its values
    positions: int  # that it trained on


class StepRecords:
    """Records of steps (docs/METRICS.md), in their order."""

    def __init__(
        self, config: TrainConfig, throughput: Throughput, device: torch.device, *, dynamic_scale: bool
    ) -> None:
        """dynamic_scale: the loss scale is found by steps that are skipped (fp16)."""
        self.clock = StepClock(device)
        self.seconds: deque[float] = deque(maxlen=1000)  # of the newest steps
        self._config = config
        self._throughput = throughput
        self._device = device
        self._dynamic_scale = dynamic_scale
        self._pending: deque[_Pending] = deque()
        self._skipped = 0  # since step 1
        self._skipped_before = 0  # in the steps judged so far
        self._skipped_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """Fields of a checkpoint's extra.json."""
        return {"skipped_steps": self._skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, extra: Mapping[str, Any]) -> None:
        self._skipped = self._skipped_before = extra["skipped_steps"]
        self._skipped_in_a_row = extra["skipped_in_a_row"]

    def launched(self, record: dict[str, Any], metrics: StepMetrics, *, positions: int) -> None:
        """A step has been enqueued, by which so many positions are trained on. record: what the host knows of it."""
        self._pending.append(_Pending(record, _to_host(metrics), list(metrics.extra), self.clock.mark(), positions))

    def collect(self, *, keep: int) -> list[dict[str, Any]]:
        """Wait for all pending steps but the newest `keep`; their records."""
        records = []
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            seconds = self.clock.seconds_to(pending.end)
            loss, grad_norm, skipped, valid_tokens, loss_scale, *extra = pending.values.tolist()
            self.seconds.append(seconds)
            self._skipped += int(skipped)
            record = pending.record | {"loss": loss, "grad_norm": grad_norm, "valid_tokens": int(valid_tokens)}
            record |= self._throughput.of_step(pending.positions, seconds)
            record |= {"peak_memory_gib": self.peak_memory_gib(), "skipped_steps": self._skipped}
            record |= dict(zip(pending.extra, extra, strict=True))
            if self._dynamic_scale:
                record["loss_scale"] = loss_scale
            records.append(record)
        return records

    def peak_memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

    def judge(self, record: dict[str, Any]) -> str | None:
        """What to say of a step that was skipped: loss or gradients not finite, or choices left over; None: it was not.

        Call it for every step, and `check_skipped` once what it says has been said. Raises TrainingDiverged for choices
        that are left over, which every further step would leave over as well.
        """
        if record.get(LEFT_OVER, 0) > 0:
            raise TrainingDiverged(self._left_over(record))
        if record["skipped_steps"] == self._skipped_before:
            self._skipped_in_a_row = 0
            return None
        self._skipped_before = record["skipped_steps"]
        self._skipped_in_a_row += 1
        step = record["step"]
        return f"step {step}: loss {record['loss']}, grad_norm {record['grad_norm']}; the update was skipped"

    def check_skipped(self, what: str) -> None:
        """Raises TrainingDiverged where `judge`, which said `what`, said it once too often."""
        train = self._config.train
        # Under fp16 a skipped step is how the loss scale finds its size, not a fault.
        if train.nonfinite == "stop" and not self._dynamic_scale:
            raise TrainingDiverged(f"{what}; the run stops because train.nonfinite=stop")
        if self._skipped_in_a_row >= train.max_skipped_steps:
            raise TrainingDiverged(
                f"{what}; {self._skipped_in_a_row} in a row (train.max_skipped_steps={train.max_skipped_steps}): "
                "lower optim.lr or look at the data"
            )

    def _left_over(self, record: dict[str, Any]) -> str:
        parallel = self._config.parallel
        exact = "" if self._config.train.compile else ", and 0 has exact sizes"
        return (
            f"step {record['step']}: {record[LEFT_OVER]:.0f} choices of experts found no room in the buffers of "
            f"parallel.ep_buffer={parallel.ep_buffer}, and no update was made; go on with more, of which results "
            f"do not depend ({parallel.ep} is always enough{exact}): from the last checkpoint, or in a new run.dir "
            "where there is none yet"
        )


def _to_host(metrics: StepMetrics) -> torch.Tensor:
    """Start copying a step's numbers to the host, in fp64, which holds all of them exactly: `_Pending.values`."""
    fields = (metrics.loss, metrics.grad_norm, metrics.skipped, metrics.valid_tokens, metrics.loss_scale)
    values = torch.stack([field.double() for field in (*fields, *metrics.extra.values())])
    if values.device.type == "cpu":
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
