"""Weights of a model that is served, replaced where they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.decoder import Decoder
from parallel.regions import local_region, local_tensor

LISTED = 3
"""Names that an error lists of each kind."""


@torch.no_grad()
def load_in_place(model: Decoder, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, by the names of `model.state_dict()`, into its own; of each this rank's part.

    Raises ValueError, before anything is written, unless names, shapes and dtypes are exactly the model's.
    """
    own = model.state_dict()
    both = [name for name in own if name in state]
    kinds = {
        "missing": [name for name in own if name not in state],
        "not the model's": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
            for name in both
            if state[name].shape != own[name].shape
        ],
        "of another dtype": [
            f"{name} {state[name].dtype} for {own[name].dtype}" for name in both if state[name].dtype != own[name].dtype
        ],
    }
    if found := [f"{len(names)} {kind} ({_listing(names)})" for kind, names in kinds.items() if names]:
        raise ValueError(f"the weights do not fit the model that is served: {'; '.join(found)}")
    for name, located in own.items():
        local_tensor(located).copy_(state[name][local_region(located)], non_blocking=True)


def receive_weights(model: nn.Module) -> None:
    """Let what follows on this thread's stream wait for weights that are still on their way into a model.

    A trainer's updates may be gathered while other things happen, and hooks before each module's forward wait for them
    (parallel/zero.py). Those of fully_shard, which take keyword arguments, gather for a forward and not for an update:
    whoever serves its shards has gathered them.
    """
    for module in model.modules():
        for number, hook in module._forward_pre_hooks.items():
            if number not in module._forward_pre_hooks_with_kwargs:
                hook(module, ())


def _listing(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + ("" if len(names) <= LISTED else ", ...")
