"""A layout against one process: what `test_lattice.py` holds to its limits and `compose.py` writes down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from tests.parity.harness import (
    Outcome,
    Reference,
    References,
    gradient_deviation,
    largest,
    loss_deviation,
    norm_deviation,
    run_on,
    weight_deviation,
)
from tests.parity.lattice import MODEL_FEATURES, SHAPE, WORLD_SIZE, Changes, Layout, config_of, model_of, models
from tests.pool import RankPool

LOSS, GRADIENT, WEIGHTS = 1e-6, 1e-5, 2.0
"""Limits of `Deviation`; tests/parity/harness.py says why these."""


@dataclass(frozen=True)
class Deviation:
    """How far a layout is from one process."""

    loss: float  # relative, largest over steps
    gradient: float  # relative to the tensor's maximum, largest over the first step's gradients; or of any step's norm
    weights: float  # the same of the weights after the last step, in units of what another order of sums does

    @classmethod
    def of(cls, outcome: Outcome, reference: Reference) -> Deviation:
        return cls(
            loss=loss_deviation(outcome, reference.outcome),
            gradient=largest(f(outcome, reference.outcome) for f in (gradient_deviation, norm_deviation)),
            weights=weight_deviation(outcome, reference.outcome) / reference.sensitivity,
        )

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

    def __init__(self, ranks: RankPool, corpus: DataConfig, folder: Path, *, timeout: float = 120.0) -> None:
        """timeout: seconds that a layout may take."""
        self.ranks, self.folder, self.timeout = ranks, folder, timeout
        variants = {_name(model): _changes(model) for model in models()}
        self._references = References(ranks, corpus, folder, variants, splits=(3, 1), feature_parts=(2, 3, 4, 5, 8))
        self._runs = 0

    def deviation(self, layout: Layout) -> Deviation:
        """Train on WORLD_SIZE ranks and compare."""
        reference = self._references.of(_name(model_of(layout)))
        self._runs += 1
        config = config_of(layout, reference.config, self.folder / f"run{self._runs}")
        return Deviation.of(run_on(self.ranks, WORLD_SIZE, config, timeout=self.timeout), reference)


def _name(model: Layout) -> str:
    return "-".join(model.values())


def _changes(model: Layout) -> Changes:
    """Of tiny_config, for one process."""
    changes = SHAPE | {"train__micro_batch_size": SHAPE["train__global_batch_size"]}
    for feature, value in model.items():
        changes |= MODEL_FEATURES[feature][value]
    return changes
