"""What train.batch_invariant asks of a run."""

from __future__ import annotations

from models.config import WITHOUT_BUDGET, ModelConfig
from parallel.pipeline.schedules import SCHEDULES, SPLIT_BACKWARD
from parallel.problem import Advice, Problem, values
from trainer.config import TrainConfig


def invariant_problems(config: TrainConfig, model: ModelConfig) -> list[str]:
    """Every reason why a token's forward cannot have the same bits whatever lies beside it, one line each."""
    if not config.train.batch_invariant:
        return []
    parallel, compute = config.parallel, config.precision.compute
    found: list[str] = []

    def refuse(what: str, because: str, *instead: Advice | None) -> None:
        found.append(
            Problem(
                f"{what} does not work with train.batch_invariant=true: {because}",
                *instead,
                values("train.batch_invariant", [False]),
            )
        )

    if parallel.tp > 1:
        because = "ranks' partial sums are added up in an order that depends on the size of the batch"
        refuse(f"parallel.tp={parallel.tp}", because, values("parallel.tp", [1]))
    if parallel.cp > 1:
        refuse(f"parallel.cp={parallel.cp}", "a query's keys arrive in pieces", values("parallel.cp", [1]))
    if parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD:
        others = [name for name in SCHEDULES if name not in SPLIT_BACKWARD]
        because = "layers that put their weight gradients off multiply by themselves"
        refuse(f"parallel.pp_schedule={parallel.pp_schedule}", because, values("parallel.pp_schedule", others))
    if config.precision.fp8:
        because = "scales are those of a whole batch"
        refuse(f"precision.compute={compute}", because, values("precision.compute", ["bf16"]))
    if config.train.compile:
        because = "compiled blocks keep between operations what the engine rounds"
        refuse("train.compile=true", because, values("train.compile", [False]))
    if config.train.loss_kernel == "triton":
        because = "losses that do not depend on the batch have kernels of their own"
        refuse("train.loss_kernel=triton", because, values("train.loss_kernel", ["auto"]))
    if model.attention_dropout > 0:
        because = "paged attention, whose bits are wanted, drops nothing"
        refuse(f"model.attention_dropout={model.attention_dropout}", because, values("model.attention_dropout", [0.0]))
    if model.moe.num_experts and model.routing.capacity_factor > 0:
        because = "which choices an expert takes depends on the other tokens"
        factor = model.routing.capacity_factor
        refuse(f"model.routing.capacity_factor={factor}", because, values("model.routing.capacity_factor", [0.0]))
    if model.activation_checkpoint == "budget":
        refuse("model.activation_checkpoint=budget", "it has no cost of these products", WITHOUT_BUDGET)
    return found
