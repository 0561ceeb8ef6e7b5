"""What adapters cannot be trained with."""

from __future__ import annotations

from kernels.nf4.reference import BLOCK
from models.adapter_config import adapted_layers, adapter_problems, linear_layers
from models.config import ModelConfig
from models.lora import ABSORBED
from models.registry import FAMILIES, resolve_model
from parallel.pipeline.schedules import SCHEDULES, SPLIT_BACKWARD
from parallel.problem import Advice, Problem, values
from trainer.adapter_start import folder_problems
from trainer.config import TrainConfig
from trainer.frozen import resolve_beside


def adapter_run_problems(config: TrainConfig, model: ModelConfig) -> list[str]:
    """Every reason why a run cannot train its adapters, one line each. model: resolved, without problems of its own."""
    adapter, parallel = config.adapter, config.parallel
    if model.family not in FAMILIES:
        return []  # the folder that would say has been named
    found = adapter_problems(adapter, model)
    if adapter.name == "none" or found:
        return found
    trains = f"does not work with adapter.name={adapter.name}"

    def refuse(what: str, because: str, *instead: Advice | None) -> None:
        found.append(Problem(f"{what} {trains}: {because}", *instead))

    if config.model.path is None:
        found.append(
            f"adapter.name={adapter.name} trains beside a model that is there already: set model.path=DIR, its Hugging "
            "Face folder (launch/convert.py export makes one of a run)"
        )
    found += _quantization_problems(config, model) + _invariance_problems(config, model)
    found += folder_problems(adapter, model)
    if parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD:
        others = [name for name in SCHEDULES if name not in SPLIT_BACKWARD]
        because = "there are next to no weight gradients to put off"
        refuse(f"parallel.pp_schedule={parallel.pp_schedule}", because, values("parallel.pp_schedule", others))
    if parallel.pp > 1:
        blocks = {int(layer.split(".")[1]) for layer in adapted_layers(adapter, model)}
        if empty := sorted(set(range(model.num_layers)) - blocks):
            found.append(
                Problem(
                    f"adapter.targets={','.join(adapter.targets)} leaves block {empty[0]} without an adapter, and a "
                    f"stage of parallel.pp={parallel.pp} could have none",
                    values("parallel.pp", [1]),
                    words="name layers of every block",
                )
            )
    if parallel.sp_chunks > 1:
        because = "the products of pieces of a sequence know nothing of adapters"
        refuse(f"parallel.sp_chunks={parallel.sp_chunks}", because, values("parallel.sp_chunks", [1]))
    if config.precision.fp8:
        because = "its layers multiply by themselves"
        refuse(f"precision.compute={config.precision.compute}", because, values("precision.compute", ["bf16"]))
    if config.data.source == "prompts" and _absorbed(config, model):
        because = f"rollouts attend through pages, which reads the weight of {ABSORBED} and not its layer"
        refuse(f"recipe.name={config.recipe.name}", because, values("adapter.name", ["none"]))
    if (prompts := config.recipe.answers.prompts) and _absorbed(config, model):
        because = f"answers attend through pages, which reads the weight of {ABSORBED} and not its layer"
        refuse(f"recipe.answers.prompts={prompts}", because, values("recipe.answers.prompts", [0]))
    if model.speculator.kind != "none":
        because = "heads for a model are trained alone"
        refuse(f"model.speculator.kind={model.speculator.kind}", because, values("model.speculator.kind", ["none"]))
    if model.mtp.depth:
        because = "blocks of multi-token prediction would neither be trained nor used"
        refuse(f"model.mtp.depth={model.mtp.depth}", because, values("model.mtp.depth", [0]))
    if model.activation_checkpoint == "budget":
        because = "what it measures blocks by has no adapters"
        others = ["none", "full", "selective", "offload"]
        refuse("model.activation_checkpoint=budget", because, values("model.activation_checkpoint", others))
    if config.optim.name == "muon":
        because = "it orthogonalises updates of whole matrices, and B A is one in two pieces"
        refuse("optim.name=muon", because, values("optim.name", ["adamw"]))
    return found


def adapter_problems_beside(field: str, path: str | None, config: TrainConfig) -> list[str]:
    """Why the reward model in a Hugging Face folder cannot have the adapters of the trained one, one line each.

    config: not resolved. What is wrong with the trained one's as well, or with the folder, is named elsewhere.
    """
    if path is None or config.adapter.name == "none":
        return []
    try:
        beside, model = resolve_beside(path, config, score=True), resolve_model(config.model)
    except ValueError:
        return []
    ours = _problems_of_base(config, model)
    return [_of_folder(field, path, problem) for problem in _problems_of_base(config, beside) if problem not in ours]


def _problems_of_base(config: TrainConfig, model: ModelConfig) -> list[str]:
    """What a model itself lacks for adapters to be trained on it. model: resolved."""
    found = adapter_problems(config.adapter, model)
    return found or _quantization_problems(config, model) + _invariance_problems(config, model)


def _of_folder(field: str, path: str, problem: str) -> str:
    if not isinstance(problem, Problem):
        return f"{field}={path}: {problem}"
    return Problem(f"{field}={path}: {problem.what}", *problem.advice, words=problem.words or "give another model")


def _invariance_problems(config: TrainConfig, model: ModelConfig) -> list[str]:
    if not (config.train.batch_invariant and _absorbed(config, model)):
        return []
    why = f"does not work with adapter.name={config.adapter.name}: attention through pages reads the weight of"
    what = f"train.batch_invariant=true {why} {ABSORBED} and not its layer"
    return [Problem(what, values("train.batch_invariant", [False]))]


def _absorbed(config: TrainConfig, model: ModelConfig) -> bool:
    """Whether a layer that latent attention does not call has more than a weight: an adapter, or 4 bits."""
    quantized = config.adapter.quantize != "none" and bool(model.mla.kv_rank)
    return quantized or any(layer.endswith(ABSORBED) for layer in adapted_layers(config.adapter, model))


def _quantization_problems(config: TrainConfig, model: ModelConfig) -> list[str]:
    """Rows of this rank's matrices that are no whole blocks of NF4."""
    if config.adapter.quantize != "nf4":
        return []
    found: list[str] = []
    if config.precision.compute == "fp16":
        found.append(
            Problem(
                "precision.compute=fp16 does not work with adapter.quantize=nf4: bf16 holds what it makes as well",
                values("precision.compute", ["bf16", "fp32"]),
            )
        )
    tp = config.parallel.tp
    for name, (columns, cut) in _columns(model).items():
        here = columns // tp if cut else columns
        if here % BLOCK and columns % BLOCK:
            found.append(
                Problem(
                    f"adapter.quantize=nf4 quantizes blocks of {BLOCK} values of a row, and rows of {name} have "
                    f"{columns}",
                    values("adapter.quantize", ["none"]),
                )
            )
        elif here % BLOCK:
            fitting = [size for size in range(1, tp) if columns % (size * BLOCK) == 0]
            found.append(
                Problem(
                    f"parallel.tp={tp} cuts the {columns} columns of {name} into pieces of {here}, and adapter.quantize"
                    f"=nf4 has blocks of {BLOCK}",
                    values("parallel.tp", fitting, near=tp),
                    values("adapter.quantize", ["none"]),
                )
            )
    return found


def _columns(model: ModelConfig) -> dict[str, tuple[int, bool]]:
    """Features into each kind of linear layer, and whether tp cuts them."""
    assert model.head_dim is not None  # resolved
    assert model.value_dim is not None
    ends = {name.partition(".")[2].partition(".")[2] for name in linear_layers(model)}
    shared = model.moe.num_shared * model.moe.intermediate_size
    cut = {
        "attention.o": model.num_heads * model.value_dim,
        "mlp.down": model.intermediate_size,
        "mlp.shared.down": shared,
        "mlp.experts.down": model.moe.intermediate_size,
    }
    latent = {"attention.q_b": model.mla.q_rank or 0, "attention.kv_b": model.mla.kv_rank}
    return {
        end: (cut[end], True) if end in cut else (latent.get(end, model.hidden_size), False) for end in sorted(ends)
    }
