"""What runs that learn from rewards cannot do: data, rewards and layouts, before any process group exists."""

from __future__ import annotations

from dataclasses import replace

from inference.config import EngineConfig, settings_problems
from models.registry import resolve_model
from parallel.problem import Problem, multiples, values
from trainer.config import TrainConfig
from trainer.reference import no_effect, reference_problems
from trainer.rl.config import WEIGHTS, weight_modes
from trainer.rl.reward_models import reward_model_problems
from trainer.rl.rewards import Rewards, import_path


def data_problems(config: TrainConfig, held_by: tuple[str, float]) -> list[str]:
    """What data, rewards and references lack. held_by: the field that weighs the divergence from the reference, and its
    value."""
    found: list[str] = []
    data, train, rl = config.data, config.train, config.recipe.rl
    name = f"recipe.name={config.recipe.name}"
    if data.source != "prompts":
        found.append(f"{name} with data.source={data.source} has nothing to answer; use data=prompts")
    elif data.tokenizer.path is None and config.model.path is None:
        found.append(
            "data.tokenizer.path is missing: prompts need the tokenizer that the model was made for; give its folder"
        )
    elif not data.mask_documents:
        found.append(
            Problem(
                "data.mask_documents=false lets the completions of a row see one another",
                values("data.mask_documents", [True]),
            )
        )
    if rl.group_size > 1 and train.global_batch_size % rl.group_size:
        size = train.global_batch_size
        found.append(
            Problem(
                f"train.global_batch_size={size} completions do not divide into groups of recipe.rl.group_size="
                f"{rl.group_size}",
                values("train.global_batch_size", multiples(rl.group_size, size), near=size),
            )
        )
    elif rl.minibatches > (prompts := train.global_batch_size // max(rl.group_size, 1)):
        found.append(
            Problem(
                f"recipe.rl.minibatches={rl.minibatches} of {prompts} prompts (train.global_batch_size="
                f"{train.global_batch_size} completions in groups of {rl.group_size}) leaves updates without any",
                values("recipe.rl.minibatches", [max(prompts, 1)]),
            )
        )
    if rl.max_tokens is not None and rl.max_tokens >= train.seq_len:
        found.append(
            f"recipe.rl.max_tokens={rl.max_tokens} leaves no room for a prompt in train.seq_len={train.seq_len}; use "
            f"at most {train.seq_len - 1}"
        )
    if train.sample_tokens:
        what = f"train.sample_tokens={train.sample_tokens} continues a text, and {name} answers prompts"
        found.append(Problem(what, values("train.sample_tokens", [0])))
    if held_by[1]:
        found += reference_problems(config)
    else:
        found += no_effect(config, ("reference", "reference_path", "reference_offload"), f"{held_by[0]}=0")
    for number, one in enumerate(rl.rewards):
        try:
            Rewards(replace(rl, rewards=[one]))
        except ValueError as error:
            found.append(str(error).replace("rewards[0]", f"rewards[{number}]"))
    found += reward_model_problems(config)
    if rl.environment is not None:
        try:
            import_path(rl.environment)
        except ValueError as error:
            found.append(f"recipe.rl.environment={error}")
    return found


def layout_problems(config: TrainConfig, *, asks: tuple[str, int] | None = None) -> list[str]:
    """What an engine cannot serve while it is trained. asks: a field, and its value, that wants one for validations
    alone and may be 0; None: the recipe trains on what is sampled."""
    found = _model_problems(config, asks)
    if asks is None:
        found += _update_problems(config)
    return found + _weights_problems(config) + _engine_problems(config)


def _model_problems(config: TrainConfig, asks: tuple[str, int] | None) -> list[str]:
    """Models and layouts that the engine does not compute."""
    found: list[str] = []
    parallel = config.parallel
    name = f"recipe.name={config.recipe.name}" if asks is None else f"{asks[0]}={asks[1]}"
    without = [] if asks is None else [values(asks[0], [0])]

    def refuse(field: str, value: object, why: str, instead: object) -> None:
        why = f"{field}={value} does not work with {name}: {why}"
        found.append(Problem(why, values(field, [instead]), *without))

    if parallel.cpu_offload:
        why = "weights on the host would be gathered for every token, or all be on the device at once"
        refuse("parallel.cpu_offload", "true", why, False)
    if config.precision.fp8:
        why = "scales are those of a whole batch, which the engine has not"
        refuse("precision.compute", config.precision.compute, why, "bf16")
    if config.model.speculator.kind != "none":
        why = "heads are trained beside a model that stays"
        refuse("model.speculator.kind", config.model.speculator.kind, why, "none")
    return found


def _update_problems(config: TrainConfig) -> list[str]:
    """Models that are served, and cannot be trained on what they said: its probabilities would be others."""
    found: list[str] = []
    try:
        model = resolve_model(config.model)  # of a folder: what is in it
    except ValueError:
        return found  # which says so itself

    def refuse(field: str, value: object, why: str, instead: object) -> None:
        why = f"{field}={value} does not work with recipe.name={config.recipe.name}: {why}"
        found.append(Problem(why, values(field, [instead])))

    if model.moe.num_experts:
        # What stands in a row with a completion depends on the layout, and must not decide what is learned from it.
        for field in ("aux_weight", "z_weight", "capacity_factor", "bias_update_rate"):
            if value := getattr(model.routing, field):
                refuse(f"model.routing.{field}", value, "rows are of completions that happened to be packed", 0.0)
        if model.moe.router == "gshard":
            why = "training leaves choices out at random, and completions are sampled with all"
            refuse("model.moe.router", "gshard", why, "softmax")
    for field in ("dropout", "attention_dropout"):
        if value := getattr(model, field):
            refuse(f"model.{field}", value, "completions are sampled without, by other probabilities", 0.0)
    if model.mtp.depth:
        refuse("model.mtp.depth", model.mtp.depth, "its losses are those of texts", 0)
    return found


def _weights_problems(config: TrainConfig) -> list[str]:
    """Ways in which an engine cannot have this layout's weights."""
    found: list[str] = []
    parallel, rl = config.parallel, config.recipe.rl
    modes = weight_modes(parallel)
    degrees = {"pp": parallel.pp, "ep": parallel.ep}
    axis = next((axis for axis, degree in degrees.items() if degree > 1), None)
    cut = f"parallel.zero_stage={parallel.zero_stage}" if axis is None else f"parallel.{axis}={degrees[axis]}"
    if rl.weights in WEIGHTS and rl.weights not in ("auto", *modes):
        if modes[0] == "in_place":
            why = f"{cut}: the model computes with whole weights already"
        elif rl.weights == "in_place":
            why = f"{cut} has no whole weights anywhere"
        elif axis is not None:
            where = "the blocks of other stages do" if axis == "pp" else "a block with the experts of other ranks does"
            why = f"{cut}: {where} not run here"
        else:
            why = "parallel.sequence_parallel=true: a block runs on slices of tokens, of which a step has any number"
        found.append(Problem(f"recipe.rl.weights={rl.weights} with {why}", values("recipe.rl.weights", modes)))
    if rl.overlap and parallel.tp > 1:
        found.append(
            Problem(
                f"recipe.rl.overlap=true with parallel.tp={parallel.tp}: each token that is sampled is a collective "
                "over tp, and would meet those of the update",
                values("recipe.rl.overlap", [False]),
                values("parallel.tp", [1]),
            )
        )
    if modes[0] == "gather":
        whole = [values("parallel.zero_stage", [2, 1, 0]) if axis is None else values(f"parallel.{axis}", [1])]
        if rl.overlap:
            found.append(
                Problem(
                    f"recipe.rl.overlap=true with {cut}: no rank has whole weights that it could copy, and gathering "
                    "them would meet the collectives of the update",
                    values("recipe.rl.overlap", [False]),
                    *whole,
                )
            )
        if rl.engine.cuda_graphs:
            found.append(
                Problem(
                    f"recipe.rl.engine.cuda_graphs=true with {cut}: gathered weights lie elsewhere each time",
                    values("recipe.rl.engine.cuda_graphs", [None, False]),
                )
            )
    return found


def _engine_problems(config: TrainConfig) -> list[str]:
    """Settings of recipe.rl.engine that are wrong, or that the run decides."""
    engine, default = config.recipe.rl.engine, EngineConfig()
    decides = {"max_seq_len": "train.seq_len", "deterministic": "train.batch_invariant"}
    found = [
        f"recipe.rl.engine.{name}={value} has no effect: {by} decides; leave it out"
        for name, by in decides.items()
        if (value := getattr(engine, name)) != getattr(default, name)
    ]
    # Whether a sequence fits is known when there are some.
    alone = replace(engine, deterministic=config.train.batch_invariant, max_seq_len=None)
    return found + [
        "recipe.rl." + problem.replace(" engine.", " recipe.rl.engine.") for problem in settings_problems(alone)
    ]
