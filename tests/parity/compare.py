"""A layout against one process: what `test_lattice.py` holds to its limits and `compose.py` writes down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    run_on,
    weight_deviation,
)
from tests.parity.lattice import WORLD_SIZE, Layout, config_of, default, model_of, name_of
from tests.pool import RankPool
from trainer.config import TrainConfig

LOSS, GRADIENT, WEIGHTS = 1e-6, 1e-5, 2.0
"""Limits of `Deviation`."""
SPLITS = (2, 4, 16)
"""Micro-batch sizes of the runs of one process that show how sensitive its weights are; the one compared to has 1."""


@dataclass(frozen=True)
class Deviation:
    """How far a layout is from one process."""

    loss: float  # relative, largest over steps
    gradient: float  # relative to the tensor's maximum, largest over the first step's gradients
    weights: float  # the same of the weights after the last step, in units of what another micro-batch split does

    def problems(self) -> list[str]:
        """What is over its limit."""
        limits = {"loss": LOSS, "gradient": GRADIENT, "weights": WEIGHTS}
        return [
            f"{name} deviates by {getattr(self, name):.1e}, limit {limit:.0e}"
            for name, limit in limits.items()
            if not getattr(self, name) <= limit
        ]


class Comparison:
    """Trains layouts and, once per model, one process."""

    def __init__(self, ranks: RankPool, base: TrainConfig, folder: Path) -> None:
        self.ranks, self.base, self.folder = ranks, base, folder
        self._alone: dict[str, tuple[Outcome, float]] = {}
        self._runs = 0

    def deviation(self, layout: Layout) -> Deviation:
        """Train on WORLD_SIZE ranks and compare."""
        reference, sensitivity = self._one_process(model_of(layout))
        self._runs += 1
        outcome = run_on(self.ranks, WORLD_SIZE, config_of(layout, self.base, self.folder / f"run{self._runs}"))
        return Deviation(
            loss=loss_deviation(outcome, reference),
            gradient=gradient_deviation(outcome, reference),
            weights=weight_deviation(outcome, reference) / sensitivity,
        )

    def _one_process(self, model: Layout) -> tuple[Outcome, float]:
        name = name_of(default() | model)
        if name not in self._alone:
            config = config_of(default() | model, self.base, self.folder / name)
            config.parallel.zero_stage = 0
            reference = run_on(self.ranks, 1, config)
            others = (
                run_on(self.ranks, 1, changed(config, self.folder / f"{name}-{split}", train__micro_batch_size=split))
                for split in SPLITS
            )
            self._alone[name] = reference, max(weight_deviation(other, reference) for other in others)
        return self._alone[name]
