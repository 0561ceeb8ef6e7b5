"""Adapters in the format of the `peft` package: a folder of adapter_config.json and adapter_model.safetensors.

    base_model.model.MODULE.lora_A.weight    A [r, in] of a linear layer, MODULE its name in transformers
    base_model.model.MODULE.lora_B.weight    B [out, r]

Experts are parameters of one module in transformers, stacked, gate and up as one matrix. PEFT wraps the module once for
each, from the inside out, and has all experts in one A and one B, in which numbers of experts vary slowest and fastest:

    MODULE.base_layer.lora_A, lora_B    of gate_up_proj: A [E R, in], B [2 F, R E], R = 2 r: that of gate beside that of
                                        up, each with its own half of A
    MODULE.lora_A, lora_B               of down_proj: A [E r, F], B [D, r E]

Where only one of both has adapters, there is no base_layer.

The head of a reward model is whole: modules_to_save=["score"], and

    base_model.model.score.weight            [1, D]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.adapter_config import AdapterConfig, adapted_layers, linear_layers
from models.config import ModelConfig
from models.init import SCORE_HEAD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
GATE_UP, DOWN = "gate_up_proj", "down_proj"
MATRICES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
LENGTHS = ".lora_magnitude_vector"
SCORE = f"{PREFIX}score.weight"
HEADS = {"score", "classifier"}
"""What PEFT says is saved whole of a model for sequence classification; score is what such a model has."""
ADVICE = "give a folder that PEFT or launch/convert.py export wrote"
REFUSED = {
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}
"""Settings that change what an adapter computes, and the one value of each that is understood here."""
CHANGE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How values of init_lora_weights begin that take from the weights what the adapter begins with."""


@dataclass(frozen=True)
class LowRank:
    """An adapter of one layer: s B A. a [r, in], b [out, r]; of experts [E, r, in] and [E, out, r]."""

    a: Tensor
    b: Tensor
    scale: float
    lengths: Tensor | None = None  # [out], of the rows of W + s B A (DoRA); None: as they come

    def delta(self) -> Tensor:
        """s B A, [out, in] or [E, out, in], fp32."""
        return self.scale * (self.b.float() @ self.a.float())


def save_peft(
    folder: Path,
    adapter: AdapterConfig,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    base: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapters of a resolved model. read(name): a whole parameter by its name, as of separate layers.

    base: where the model is that they are for. dtype: of the file; None: that of the parameters. The folder appears
    under its name when all of it is there. Raises ValueError for adapters that the format has no words for.
    """
    layers = {name: linear_layers(config)[name] for name in adapted_layers(adapter, config)}
    tensors: dict[str, Tensor] = {}
    for name, places in layers.items():
        if places[0].stack is None:
            module = places[0].theirs.removesuffix(".weight")
            tensors |= {f"{PREFIX}{module}{MATRICES[m]}": read(f"{name}.lora_{m.lower()}") for m in MATRICES}
            if adapter.dora:
                tensors[f"{PREFIX}{module}{LENGTHS}"] = read(f"{name}.lora_m")
    experts = {
        name.rpartition(".")[0]: places[0].theirs for name, places in layers.items() if places[0].stack is not None
    }
    for name, theirs in experts.items():
        kinds = [kind for kind in ("gate", "up", "down") if f"{name}.{kind}" in layers]
        if ("gate" in kinds) != ("up" in kinds):
            raise ValueError(f"{name}: the format has gate and up as one matrix; give adapters to both or to neither")
        found = {kind: LowRank(read(f"{name}.{kind}.lora_a"), read(f"{name}.{kind}.lora_b"), 1.0) for kind in kinds}
        tensors |= _stacked(f"{PREFIX}{_experts_module(theirs)}", found)
    if config.score:
        tensors[SCORE] = read(SCORE_HEAD)
    description = _description(adapter, config, base=base, has_experts=bool(experts))
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    stored = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, partial / WEIGHTS, metadata={"format": "pt"})
    partial.rename(folder)


def _experts_module(theirs: str) -> str:
    """The module of all experts in transformers, from the name of one's weight in files."""
    module = re.sub(r"\.experts\.\d+\..*", ".experts", theirs)
    return module.replace(".block_sparse_moe.", ".mlp.")


def _stacked(module: str, of: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of a module of experts, of whose layers some have adapters."""
    found: dict[str, Tensor] = {}
    if "gate" in of:
        gate, up = of["gate"], of["up"]
        a = torch.cat([gate.a, up.a], dim=1)
        b = torch.stack([torch.block_diag(one, two) for one, two in zip(gate.b, up.b, strict=True)])
        found |= _one_stack(f"{module}.base_layer" if "down" in of else module, a, b)
    if "down" in of:
        found |= _one_stack(module, of["down"].a, of["down"].b)
    return found


def _one_stack(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """a [E, r, in] and b [E, out, r] as the format has them."""
    return {f"{module}{MATRICES['A']}": a.flatten(0, 1), f"{module}{MATRICES['B']}": b.permute(1, 2, 0).flatten(1, 2)}


def _description(adapter: AdapterConfig, config: ModelConfig, *, base: str, has_experts: bool) -> dict[str, Any]:
    """adapter_config.json."""
    every, chosen = linear_layers(config), adapted_layers(adapter, config)

    def module(name: str) -> str:
        return every[name][0].theirs.removesuffix(".weight")

    dense = [name for name in chosen if every[name][0].stack is None]
    ends = {module(name).rpartition(".")[2] for name in dense}
    # PEFT finds modules by the ends of their names. Where some of one end have none, all are named in full.
    others = {module(name).rpartition(".")[2] for name in every.keys() - set(chosen) if every[name][0].stack is None}
    targets = sorted(ends) if not ends & others else [module(name) for name in dense]
    parameters: list[str] = []
    if has_experts:
        stacked = {name.rpartition(".")[2] for name in chosen if every[name][0].stack is not None}
        parameters = [f"mlp.experts.{name}" for name, kind in ((GATE_UP, "gate"), (DOWN, "down")) if kind in stacked]
    both = has_experts and any(name.endswith(GATE_UP) for name in parameters)
    factor = math.sqrt(2) if adapter.rank_stabilized else 2  # so that alpha by (the root of) 2 r is what alpha by r was
    pattern = rf".*\.{GATE_UP}"
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.score else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.rank_stabilized,
        "use_dora": adapter.dora,
        "bias": "none",
        "fan_in_fan_out": any(every[name][0].transpose for name in dense),
        "init_lora_weights": True,
        "target_modules": targets,
        "target_parameters": parameters or None,
        "rank_pattern": {pattern: 2 * adapter.rank} if both else {},
        "alpha_pattern": {pattern: factor * adapter.alpha} if both else {},
        "modules_to_save": ["score"] if config.score else None,
    }


# ---- reading


def load_peft(folder: Path, config: ModelConfig) -> dict[str, LowRank]:
    """The adapters in a folder, by the names of a resolved model's layers; of any rank each, on the CPU.

    Raises ValueError, naming file and field or tensor, for what is missing, damaged, of another model, or not LoRA.
    """
    description = _read_description(folder, score=config.score)
    file, tensors = folder / WEIGHTS, _read_tensors(folder)
    if config.score:
        tensors.pop(SCORE, None)  # `load_score` reads it
    unread, found = set(tensors), dict[str, LowRank]()

    def take(module: str, parameter: str = "") -> tuple[Tensor, Tensor, float] | None:
        keys = [f"{PREFIX}{module}{suffix}" for suffix in MATRICES.values()]
        if not any(key in tensors for key in keys):
            return None
        if missing := [key for key in keys if key not in tensors]:
            raise ValueError(f"{file} has no tensor {missing[0]}; the other matrix of its product is there")
        unread.difference_update(keys)
        a, b = (tensors[key] for key in keys)
        return a, b, _alpha_of(f"{module.removesuffix('.base_layer')}{parameter}", description)

    for name, places in linear_layers(config).items():
        if places[0].stack is not None or (pair := take(module := places[0].theirs.removesuffix(".weight"))) is None:
            continue
        a, b, alpha = pair
        keys = {f"{PREFIX}{module}{LENGTHS}{end}" for end in ("", ".weight")} & tensors.keys()
        unread -= keys
        lengths = tensors[keys.pop()] if keys else None
        if description.get("use_dora") and lengths is None:
            raise ValueError(f"{file} has no tensor {PREFIX}{module}{LENGTHS}, and {CONFIG} says use_dora")
        found[name] = LowRank(a, b, _scale(alpha, len(a), description), lengths)
        _check_shape(file, module, a, b)
    for name, module in _modules_of_experts(config).items():
        found |= _read_experts(name, module, take, config.moe.num_experts, description)
    if unread:
        raise ValueError(
            f"{file} has tensors that model.family={config.family} has no linear layer for ({len(unread)}): "
            f"{', '.join(sorted(unread)[:3])}; is it an adapter of this model?"
        )
    if not found:
        raise ValueError(f"{file} has no adapter of any layer of model.family={config.family}")
    return found


def load_score(folder: Path, config: ModelConfig) -> Tensor | None:
    """The head of a resolved reward model [1, D] in a folder of adapters; None: it has none.

    Raises ValueError for what cannot be read, and for a head of another shape.
    """
    found = _read_tensors(folder).get(SCORE)
    if found is not None and found.shape != (1, config.hidden_size):
        raise ValueError(f"{folder / WEIGHTS}: {SCORE} has shape {list(found.shape)}, not [1, {config.hidden_size}]")
    return found


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {ADVICE}") from None


def _modules_of_experts(config: ModelConfig) -> dict[str, str]:
    layers = {name: places[0] for name, places in linear_layers(config).items() if places[0].stack is not None}
    return {name.rpartition(".")[0]: _experts_module(place.theirs) for name, place in layers.items()}


def _read_experts(
    name: str,
    module: str,
    take: Callable[[str, str], tuple[Tensor, Tensor, float] | None],
    num_experts: int,
    description: Mapping[str, Any],
) -> dict[str, LowRank]:
    """Adapters of a module of experts, by our names."""
    found: dict[str, LowRank] = {}
    inner = take(f"{module}.base_layer", f".{GATE_UP}")
    targets = " ".join(description.get("target_parameters") or [])
    alone = GATE_UP if inner is None and GATE_UP in targets and DOWN not in targets else DOWN
    outer = take(module, f".{alone}")
    gate_up, down = (outer, None) if alone == GATE_UP else (inner, outer)
    if gate_up is not None:
        a, b = _unstacked(*gate_up[:2], num_experts)
        scale = _scale(gate_up[2], a.shape[1], description)
        parts = dict(zip(("gate", "up"), zip(_halves(a, b), b.chunk(2, dim=1), strict=True), strict=True))
        for kind, (columns, rows) in parts.items():
            found[f"{name}.{kind}"] = LowRank(a[:, columns].contiguous(), rows[:, :, columns].contiguous(), scale)
    if down is not None:
        a, b = _unstacked(*down[:2], num_experts)
        found[f"{name}.down"] = LowRank(a, b, _scale(down[2], a.shape[1], description))
    return found


def _unstacked(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[E r, in] and [out, r E] as [E, r, in] and [E, out, r]."""
    return a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1).contiguous()


def _halves(a: Tensor, b: Tensor) -> tuple[slice, slice]:
    """Which rows of A gate and up read: each its half where B is block-diagonal, as written here, else both all."""
    rank, rows = a.shape[1], b.shape[1]
    half, middle = rank // 2, rows // 2
    if rank % 2 == 0 and not b[:, :middle, half:].any() and not b[:, middle:, :half].any() and b.any():
        return slice(0, half), slice(half, rank)
    return slice(0, rank), slice(0, rank)


def _scale(alpha: float, rank: int, description: Mapping[str, Any]) -> float:
    return alpha / (math.sqrt(rank) if description.get("use_rslora") else rank)


def _alpha_of(name: str, description: Mapping[str, Any]) -> float:
    patterns = description.get("alpha_pattern") or {}
    found = [alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", name)]
    return float(found[0] if found else description["lora_alpha"])


def _check_shape(file: Path, module: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{file}: A and B of {module} have shapes {list(a.shape)} and {list(b.shape)}, not [r, in] and [out, r]"
        )


def _read_description(folder: Path, *, score: bool = False) -> dict[str, Any]:
    """adapter_config.json; score: of a reward model, whose head may be saved whole."""
    file = folder / CONFIG
    try:
        description = json.loads(file.read_text())
        assert isinstance(description, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {ADVICE}") from None
    if description.get("peft_type") != "LORA":
        raise ValueError(f"{file} has peft_type={description.get('peft_type')}; only LORA is supported")
    for field, understood in REFUSED.items():
        value = description.get(field, understood)
        if field == "modules_to_save" and score and isinstance(value, list) and HEADS.issuperset(value):
            continue
        if value != understood and value not in (None, [], {}):
            raise ValueError(f"{file} has {field}={value!r}, which is not supported; it has to be {understood!r}")
    begun = description.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(CHANGE_WEIGHTS):
        raise ValueError(
            f"{file} has init_lora_weights={begun!r}: it is for weights that were changed when it began; save it by "
            "PEFT with path_initial_model_for_weight_conversion, and it is for the model's own"
        )
    if "lora_alpha" not in description:
        raise ValueError(f"{file} has no lora_alpha; the file is damaged")
    return description
