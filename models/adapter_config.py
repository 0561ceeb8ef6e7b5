"""AdapterConfig: small trainable matrices beside the linear layers of a model that stays as it is (models/lora.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from models.config import ModelConfig
from models.family import HFWeight
from models.registry import FAMILIES
from parallel.problem import Problem, values

KINDS = ("none", "lora")
QUANTIZED = ("none", "nf4")
INITS = ("lora", "pissa")
ALL_LINEAR = "all-linear"


@dataclass
class AdapterConfig:
    """`adapter`: what is trained instead of the model. name=none: the model itself."""

    name: str = "none"  # one of KINDS
    rank: int = 16  # r: columns of B and rows of A of each adapted layer
    alpha: float = 32.0  # the product B A counts alpha / r times
    rank_stabilized: bool = False  # alpha / sqrt(r) times instead (rsLoRA, 2312.03732)
    dora: bool = (
        False  # the length of each row of W + s B A is a parameter of its own (DoRA, 2402.09353); not of experts
    )
    # Layers by name, with * for anything: q, attention.o, blocks.3.mlp.*; or all-linear, every one in the blocks but
    # routers.
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    quantize: str = "none"  # nf4: linear layers of the blocks in 4 bits (QLoRA, 2305.14314), experts too
    # lora: A at random and B 0; pissa: the largest singular values of the weights, which lose them (2404.02948)
    init: str = "lora"  # one of INITS
    path: str | None = None  # a PEFT folder whose adapters a new run begins with instead
    lr_ratio: float = 1.0  # learning rate of B as a multiple of that of A, which is optim.lr (LoRA+, 2402.12354)

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def linear_layers(config: ModelConfig) -> dict[str, list[HFWeight]]:
    """The layers of a resolved model that adapters can be for, by the names of separate projections, and where a
    Hugging Face folder has the weight of each: one, or one per expert."""
    found: dict[str, list[HFWeight]] = {}
    for weight in FAMILIES[config.family].weights(config):
        layer, _, kind = weight.ours.rpartition(".")
        parts = layer.split(".")
        inside = parts[0] == "blocks" and int(parts[1]) < config.num_layers
        if inside and kind == "weight" and not weight.copy and not layer.endswith(("norm", "router")):
            found.setdefault(layer, []).append(weight)
    return found


def matches(target: str, layer: str) -> bool:
    """Whether a target of `AdapterConfig.targets` names this layer: by all of its name, or by the end of it."""
    return target == ALL_LINEAR or fnmatchcase(layer, target) or fnmatchcase(layer, f"*.{target}")


def adapted_layers(adapter: AdapterConfig, config: ModelConfig) -> list[str]:
    """Names of the layers of a resolved model that have an adapter, in the model's order."""
    if adapter.name == "none":
        return []
    return [layer for layer in linear_layers(config) if any(matches(target, layer) for target in adapter.targets)]


def adapter_problems(adapter: AdapterConfig, config: ModelConfig) -> list[str]:
    """Every reason why a resolved model cannot have such adapters, one line each."""
    if adapter.name not in KINDS:
        return [Problem(f"adapter.name={adapter.name} is unknown", values("adapter.name", KINDS))]
    if adapter.name == "none":
        return []
    found: list[str] = []
    if adapter.rank < 1:
        found.append(Problem(f"adapter.rank={adapter.rank} must be at least 1", values("adapter.rank", [1, 8, 16])))
    if adapter.quantize not in QUANTIZED:
        why = f"adapter.quantize={adapter.quantize} is unknown"
        found.append(Problem(why, values("adapter.quantize", QUANTIZED)))
    if adapter.init not in INITS:
        found.append(Problem(f"adapter.init={adapter.init} is unknown", values("adapter.init", INITS)))
    for name, set_to in (("path", adapter.path is not None), ("dora", adapter.dora)):
        if adapter.init == "pissa" and set_to:
            because = "adapters begin in one way" if name == "path" else "lengths are those of weights that are whole"
            why = f"adapter.init=pissa does not work with adapter.{name}={getattr(adapter, name)}: {because}"
            found.append(Problem(why, values("adapter.init", ["lora"])))
    for name in ("alpha", "lr_ratio"):
        if not 0 < (value := getattr(adapter, name)) < math.inf:
            found.append(f"adapter.{name}={value} must be positive and finite")
    found += _target_problems(adapter.targets, config)
    stacked = [name for name in adapted_layers(adapter, config) if linear_layers(config)[name][0].stack is not None]
    if adapter.dora and stacked:
        found.append(
            Problem(
                f"adapter.dora=true has no form for experts, and adapter.targets={','.join(adapter.targets)} has "
                f"{stacked[0]}",
                values("adapter.dora", [False]),
                words="name other layers",
            )
        )
    return found


def _target_problems(targets: Sequence[str], config: ModelConfig) -> list[str]:
    layers = linear_layers(config)
    if not targets:
        return ["adapter.targets=[] adapts nothing; use adapter.targets=[all-linear]"]
    found: list[str] = []
    for target in targets:
        if not any(matches(target, layer) for layer in layers):
            found.append(f"adapter.targets={target} matches no linear layer; {_nearest(target, layers)}")
    chosen = {name: layers[name] for name in layers if any(matches(target, name) for target in targets)}
    unsaid = [name for name, places in chosen.items() if any(place.rows for place in places)]
    if unsaid:
        found.append(
            f"adapter.targets={','.join(targets)} has {unsaid[0]}, which in files of model.family={config.family} is "
            f"some rows of {chosen[unsaid[0]][0].theirs}: PEFT has no adapter for a part; use targets without "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in unsaid}))}"
        )
    return found


def _nearest(target: str, layers: Mapping[str, object]) -> str:
    """Advice: the names of this model that are most like a target."""
    ends = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    near = get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.5) or ends
    return f"use {', '.join(near)} or {ALL_LINEAR}"
