"""Heads that draft tokens for a model they were trained for, beside it: the model itself does not change.

Medusa (Cai et al., 2401.10774): head j predicts, from the hidden state that gives the next token, the token j places
behind that. EAGLE-style (Li et al., 2401.15077): one block continues the model's hidden states token by token, and the
model's own output layer reads them; it is the block of multi-token prediction (models/layers/mtp.py), dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.config import ModelConfig
from models.decoder import RESIDUAL_OUTPUTS, MTPBlock
from models.initializers import Constant, Initializer, Normal
from models.layers.attention import Context
from models.moe_config import MoEConfig
from models.speculator_config import KINDS, SpeculatorConfig
from parallel.groups import NO_GROUPS

FILES = ("speculator.json", "speculator.safetensors")


class MedusaHead(nn.Module):
    """Residual layers x + SiLU(W x + b), and an output layer of its own (2401.10774, section 2.1.1)."""

    def __init__(self, model: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(model.hidden_size, model.hidden_size) for _ in range(num_layers))
        self.output = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to what the output layer reads, [..., D]."""
        for layer in self.layers:
            hidden = hidden + torch.nn.functional.silu(layer(hidden))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        return self.output(self(hidden))


class Speculator(nn.Module):
    """The heads for a model of this (resolved) config; `blocks` are Medusa's heads, or EAGLE's one block."""

    batch_invariant = False

    def __init__(self, config: SpeculatorConfig, model: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.model_config = config, model
        self.blocks = nn.ModuleList()
        if config.kind == "medusa":
            self.blocks.extend(MedusaHead(model, config.num_layers) for _ in range(config.num_heads))
        else:
            # Behind the model's layers, in the shape of a dense one of them.
            dense = replace(model, moe=MoEConfig(), norm_first=True, dropout=0.0, attention_dropout=0.0)
            self.blocks.append(MTPBlock(dense, model.num_layers, seed, NO_GROUPS))

    def continue_states(self, hidden: Tensor, embedded: Tensor, context: Context) -> Tensor:
        """EAGLE: from hidden states and the embeddings of the tokens they gave, [B, T, D], to the next states."""
        return self.blocks[0](hidden, embedded, context=context)

    def initializers(self) -> dict[str, Initializer]:
        """How parameters start. A Medusa head is the model's output layer at first, where that is loaded into it:
        its residual layers add nothing."""
        std = self.model_config.init_std
        residual_std = std / math.sqrt(2 * self.model_config.num_layers)

        def of(name: str) -> Initializer:
            if name.endswith("norm.weight"):
                return Constant(1.0)
            if name.endswith(".bias") or ".layers." in name:
                return Constant(0.0)
            return Normal(residual_std if name.endswith(RESIDUAL_OUTPUTS) else std)

        return {name: of(name) for name in self.state_dict()}


def save_speculator(folder: Path, config: SpeculatorConfig, model: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Write heads beside whatever is in `folder`, such as the Hugging Face folder of their model."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(model, name) for name in ("hidden_size", "vocab_size", "num_layers")}
    (folder / FILES[0]).write_text(json.dumps({**asdict(config), "model": sizes}, indent=2) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / FILES[1])


def load_speculator(folder: Path, model: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Speculator:
    """The heads in `folder`, for a model of this config. Raises ValueError for a folder without any, a damaged one, or
    heads of another model."""
    name = f"model.speculator_path={folder}"
    try:
        said = json.loads((folder / FILES[0]).read_text())
        sizes = said.pop("model")
        config = SpeculatorConfig(**said)
        weights = load_file(folder / FILES[1])
    except FileNotFoundError as error:
        raise ValueError(f"{name} holds no heads ({error.filename} is missing); give the folder of an export") from None
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{name} is damaged ({error}); export the heads again") from error
    different = [
        f"{field} {value} (here {getattr(model, field)})"
        for field, value in sizes.items()
        if getattr(model, field) != value
    ]
    if config.kind not in KINDS or different:
        what = ", ".join(different) or f"kind {config.kind}"
        raise ValueError(f"{name} has heads of another model: {what}; train heads for this one")
    with torch.device("meta"):
        heads = Speculator(config, model)
    wanted = {key: tensor.shape for key, tensor in heads.state_dict().items()}
    if wanted != {key: tensor.shape for key, tensor in weights.items()}:
        key = next(k for k in {**wanted, **weights} if k not in weights or wanted.get(k) != weights[k].shape)
        raise ValueError(f"{name}: tensor {key} is missing, left over or of another shape; export the heads again")
    heads.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for key, tensor in heads.state_dict().items():
            tensor.copy_(weights[key])
    return heads.eval()
