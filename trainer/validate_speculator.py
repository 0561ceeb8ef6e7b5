"""What heads for a model (model.speculator) cannot be trained with yet."""

from __future__ import annotations

from models.config import ModelConfig
from parallel.problem import Problem, values
from trainer.config import TrainConfig


def speculator_run_problems(config: TrainConfig, model: ModelConfig) -> list[str]:
    """One line each. The model is whole on every rank: only its batch is shared out."""
    kind = model.speculator.kind
    if kind == "none":
        return []
    found: list[str] = []
    if config.model.path is None:
        found.append(
            f"model.speculator.kind={kind} trains heads for a model that is there already: set model.path=DIR, its "
            "Hugging Face folder (launch/convert.py export makes one of a run)"
        )
    trains = f"does not work with model.speculator.kind={kind}"
    for name in ("tp", "pp", "cp", "ep"):
        if (size := getattr(config.parallel, name)) > 1:
            why = f"parallel.{name}={size} {trains}, which has the whole model on every rank"
            found.append(Problem(why, values(f"parallel.{name}", [1])))
    if config.parallel.zero_stage == 3:
        found.append(
            Problem(
                f"parallel.zero_stage=3 {trains}, whose heads are read outside of their forward",
                values("parallel.zero_stage", [0, 1, 2]),
            )
        )
    if config.train.batch_invariant:
        why = f"train.batch_invariant=true {trains}, of which nothing is served that this would hold equal"
        found.append(Problem(why, values("train.batch_invariant", [False])))
    if config.precision.compute == "fp8":
        why = f"precision.compute=fp8 {trains}, whose model computes nothing that needs a gradient"
        found.append(Problem(why, values("precision.compute", ["bf16", "fp32"])))
    if model.activation_checkpoint != "none":
        why = f"model.activation_checkpoint={model.activation_checkpoint} {trains}, where little is kept for backward"
        found.append(Problem(why, values("model.activation_checkpoint", ["none"])))
    if model.mtp.depth:
        why = f"model.mtp.depth={model.mtp.depth} {trains}: these blocks would neither be trained nor used"
        found.append(Problem(why, values("model.mtp.depth", [0])))
    return found
