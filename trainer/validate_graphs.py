"""What train.cuda_graphs asks of a run: that a micro-batch is the same launches each time, and no collective."""

from __future__ import annotations

from parallel.problem import Problem, values
from trainer.config import TrainConfig

RECIPES_WITH_GRAPHS = ("pretrain", "sft")


def graph_problems(config: TrainConfig) -> list[str]:
    """Every reason why micro-batches of this run are no CUDA graphs, one line each."""
    if not config.train.cuda_graphs:
        return []
    found: list[str] = []
    parallel, model, recipe = config.parallel, config.model, config.recipe

    def refuse(field: str, value: object, why: str, instead: list[object]) -> None:
        why = f"train.cuda_graphs=true does not work with {field}={value}: {why}"
        found.append(Problem(why, values(field, instead), values("train.cuda_graphs", [False])))

    for axis in ("tp", "cp", "pp", "ep"):
        if (degree := getattr(parallel, axis)) > 1:
            refuse(f"parallel.{axis}", degree, "collectives inside a graph are not supported", [1])
    if parallel.zero_stage > 1:
        why = "gradients or weights travel in every micro-batch"
        refuse("parallel.zero_stage", parallel.zero_stage, why, [1, 0])
    if model.moe.num_experts:
        refuse("model.moe.num_experts", model.moe.num_experts, "routers report to the host", [0])
    if model.activation_checkpoint == "offload":
        why = "activations travel to host memory that is another each time"
        refuse("model.activation_checkpoint", "offload", why, ["none", "selective", "full"])
    if model.speculator.kind != "none":
        why = "its heads are trained by passes of their own"
        refuse("model.speculator.kind", model.speculator.kind, why, ["none"])
    if recipe.name not in RECIPES_WITH_GRAPHS:
        why = (
            "its passes are of other shapes each time, its loss is one over all ranks, or nobody has shown that it does"
        )
        refuse("recipe.name", recipe.name, why, list(RECIPES_WITH_GRAPHS))
    if config.train.device == "cpu":
        refuse("train.device", "cpu", "there are none", ["cuda"])
    return found
