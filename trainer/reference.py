"""The reference of a policy, whose log-probabilities it is compared with: `recipe.reference`.

model         a frozen model beside the policy (trainer/frozen.py), from recipe.reference_path or, without one, from
              the folder or the seed that the policy begins with
adapter       the policy itself with its adapters switched off: the model they are for, of which there is then no
              second copy. Quantized weights are the reference as they are
precomputed   numbers in the rows of the data (recipe.dpo)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from data.batch import Batch
from models.decoder import Decoder
from models.lora import adapters_off
from parallel.mesh import Meshes
from parallel.problem import Problem, values
from trainer.config import RecipeConfig, TrainConfig, configuration_errors
from trainer.frozen import Beside, load_frozen, problems_beside, resolve_beside
from trainer.step import Passes, TrainState

REFERENCES = ("model", "precomputed", "adapter")


class Reference(Protocol):
    """What a policy is compared with."""

    def token_logprobs(self, microbatches: list[Batch], *, temperature: float = 1.0) -> list[torch.Tensor]:
        """As `Passes.token_logprobs`."""
        ...


@dataclass(frozen=True)
class WithoutAdapters:
    """The trained model, as it is without its adapters."""

    model: Decoder
    passes: Passes

    def token_logprobs(self, microbatches: list[Batch], *, temperature: float = 1.0) -> list[torch.Tensor]:
        with adapters_off(self.model):
            return self.passes.token_logprobs(self.model, microbatches, temperature=temperature)


def reference_beside(config: TrainConfig) -> Beside | None:
    """The model that `load_reference` makes; None: it makes none. Raises ValueError."""
    recipe = config.recipe
    if recipe.reference != "model":
        return None
    return Beside(resolve_beside(recipe.reference_path, config), recipe.reference_offload)


def load_reference(config: TrainConfig, state: TrainState, mesh: Meshes) -> Reference:
    """The reference that a validated configuration names, which is a model. Collective. Raises ConfigError."""
    if config.recipe.reference == "adapter":
        assert isinstance(state.model, Decoder)
        return WithoutAdapters(state.model, state.passes)
    with configuration_errors():
        beside = reference_beside(config)
        assert beside is not None
        return load_frozen(beside.model, config, mesh, state.device, offload=beside.offload)


def reference_problems(config: TrainConfig, *, kinds: Collection[str] = ("model", "adapter")) -> list[str]:
    """What is wrong with the reference of a recipe that has one, of these kinds; one line each."""
    recipe = config.recipe
    if recipe.reference not in kinds:
        known = "unknown" if recipe.reference not in REFERENCES else f"not there for recipe.name={recipe.name}"
        why = f"recipe.reference={recipe.reference} is {known}"
        return [Problem(why, values("recipe.reference", list(kinds)))]
    if recipe.reference != "model":
        found = no_effect(config, ("reference_path", "reference_offload"), f"recipe.reference={recipe.reference}")
        return found + (_adapter_problems(config) if recipe.reference == "adapter" else [])
    if config.adapter.path is not None and recipe.reference_path is None:
        why = f"recipe.reference=model would be the model without the adapters in adapter.path={config.adapter.path}"
        return [
            f"{why}, and so would recipe.reference=adapter; give recipe.reference_path, a folder they are merged into"
        ]
    return _begins_elsewhere(config) + problems_beside("recipe.reference_path", recipe.reference_path, config)


def no_effect(config: TrainConfig, fields: Collection[str], because: str) -> list[str]:
    """A line for each field of the recipe that is set and not read."""
    found: list[str] = []
    for name in fields:
        value, default = getattr(config.recipe, name), getattr(RecipeConfig(), name)
        if value != default:
            why = f"recipe.{name}={value} has no effect with {because}"
            found.append(Problem(why, values(f"recipe.{name}", [default])))
    return found


def _adapter_problems(config: TrainConfig) -> list[str]:
    if config.adapter.name == "none":
        why = "recipe.reference=adapter is the policy with its adapters switched off, and adapter.name=none has none"
        return [Problem(why, values("recipe.reference", ["model"]))]
    if config.adapter.init == "pissa":
        why = "recipe.reference=adapter with adapter.init=pissa: without them the model lacks what they began with"
        return [Problem(why, values("recipe.reference", ["model"]), values("adapter.init", ["lora"]))]
    return []


def _begins_elsewhere(config: TrainConfig) -> list[str]:
    """Whether the reference cannot be what the policy begins with."""
    if config.recipe.reference_path is not None or config.checkpoint.resume in ("auto", "never"):
        return []
    return [
        f"recipe.reference_path is missing: the policy begins with checkpoint.resume={config.checkpoint.resume}, which "
        "no reference can be read from; give a Hugging Face folder (launch/convert.py export makes one)"
    ]
