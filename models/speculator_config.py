"""SpeculatorConfig: heads that are trained to draft tokens for a model (models/speculator.py)."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.problem import Problem, values

KINDS = ("medusa", "eagle")


@dataclass
class SpeculatorConfig:
    """`model.speculator`: heads to train for a model that stays as it is. kind=none: train the model itself."""

    kind: str = "none"  # none, or one of KINDS
    num_heads: int = 4  # medusa: tokens that are predicted behind the next one
    num_layers: int = 1  # medusa: residual layers of a head
    decay: float = 0.8  # medusa: head j weighs decay^j in the loss (2401.10774, section 2.2.1)
    token_weight: float = 0.1  # eagle: of the cross entropy beside the regression of states (2401.15077, section 4.2)


def speculator_problems(config: SpeculatorConfig, *, seq_len: int | None) -> list[str]:
    """Every reason why such heads cannot be built, or trained on sequences of seq_len tokens; one line each."""
    found: list[str] = []
    if config.kind not in ("none", *KINDS):
        why = f"model.speculator.kind={config.kind} is unknown"
        found.append(Problem(why, values("model.speculator.kind", ("none", *KINDS))))
    for name in ("num_heads", "num_layers"):
        if getattr(config, name) < 1:
            found.append(f"model.speculator.{name}={getattr(config, name)} must be at least 1")
    for name in ("decay", "token_weight"):
        if not 0.0 < getattr(config, name) < float("inf"):
            found.append(f"model.speculator.{name}={getattr(config, name)} must be positive and finite")
    ahead = config.num_heads if config.kind == "medusa" else 1
    if config.kind in KINDS and seq_len is not None and seq_len <= ahead:
        found.append(
            f"train.seq_len={seq_len} leaves no target to heads that look {ahead} tokens beyond the next one "
            f"(model.speculator.kind={config.kind}); use more than {ahead}"
        )
    return found
