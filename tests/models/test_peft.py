"""Adapters against the `peft` package: what they compute, their gradients, and files both ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from models.adapter_config import AdapterConfig, linear_layers
from models.config import ModelConfig
from models.decoder import Decoder
from models.lora import adapter_parameters, apply_adapters
from models.peft import (
    CONFIG,
    LENGTHS,
    MATRICES,
    PREFIX,
    LowRank,
    _modules_of_experts,
    _unstacked,
    load_peft,
    save_peft,
)
from models.registry import build_model
from parallel.fused import fused_parameters, separate
from tests.models.oracle import pair

TOKENS = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(5))


def adapted(base: Decoder, adapter: AdapterConfig) -> Decoder:
    """A copy of a model with random adapters, none of them 0."""
    with torch.device("meta"):
        model = build_model(base.config)
        apply_adapters(model, adapter)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parts(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, tensor in model.state_dict().items():
            if name in base.state_dict():
                tensor.copy_(base.state_dict()[name])
    return model


def parts(model: Decoder) -> dict[str, Any]:
    """Its adapters' parameters, under the names of separate layers."""
    return separate({n: p.detach() for n, p in adapter_parameters(model).items()}, fused_parameters(model))


def their_gradients(model: Any, config: ModelConfig) -> dict[str, Tensor]:
    """Gradients of PEFT's matrices by our names."""
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if "lora_" in n}
    found: dict[str, Tensor] = {}
    for name, places in linear_layers(config).items():
        module = f"{PREFIX}{places[0].theirs.removesuffix('.weight')}"
        if places[0].stack is None and f"{module}{MATRICES['A']}" in grads:
            found |= {f"{name}.lora_{m.lower()}": grads[f"{module}{MATRICES[m]}"] for m in MATRICES}
            if f"{module}{LENGTHS}.weight" in grads:
                found[f"{name}.lora_m"] = grads[f"{module}{LENGTHS}.weight"]
    for name, module in _modules_of_experts(config).items():
        for inner in (".base_layer", ""):
            if (a := grads.get(f"{PREFIX}{module}{inner}{MATRICES['A']}")) is None:
                continue
            a, b = _unstacked(a, grads[f"{PREFIX}{module}{inner}{MATRICES['B']}"], config.moe.num_experts)
            if a.shape[2] == config.moe.intermediate_size:
                found |= {f"{name}.down.lora_a": a, f"{name}.down.lora_b": b}
                continue
            r, f = a.shape[1] // 2, b.shape[1] // 2
            found |= {f"{name}.gate.lora_a": a[:, :r], f"{name}.gate.lora_b": b[:, :f, :r]}
            found |= {f"{name}.up.lora_a": a[:, r:], f"{name}.up.lora_b": b[:, f:, r:]}
    return found


def loaded_by_peft(reference: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")  # else PEFT goes on without them
        return peft.PeftModel.from_pretrained(reference, str(folder), is_trainable=True)


CASES: dict[str, tuple[str, AdapterConfig]] = {
    "llama": ("llama_bias", AdapterConfig("lora", rank=3, alpha=5.0)),
    "some": ("llama", AdapterConfig("lora", rank=3, alpha=5.0, targets=["q", "v", "blocks.1.mlp.down"])),
    "rslora": ("qwen3", AdapterConfig("lora", rank=4, alpha=5.0, rank_stabilized=True)),
    "gpt2": ("gpt2", AdapterConfig("lora", rank=3, alpha=5.0, targets=["o", "up", "down"])),
    "mixtral": ("mixtral", AdapterConfig("lora", rank=3, alpha=5.0)),
    "mixtral_down": ("mixtral", AdapterConfig("lora", rank=3, alpha=5.0, targets=["down", "o"])),
    "mixtral_up": ("mixtral", AdapterConfig("lora", rank=3, alpha=5.0, targets=["gate", "up"])),
    "qwen3_moe_rslora": ("qwen3_moe", AdapterConfig("lora", rank=4, alpha=5.0, rank_stabilized=True)),
    "dora": ("llama_bias", AdapterConfig("lora", rank=3, alpha=5.0, dora=True)),
    "dora_some": ("llama", AdapterConfig("lora", rank=3, alpha=5.0, dora=True, targets=["k", "up", "o"])),
    "latent": ("deepseek_v2", AdapterConfig("lora", rank=3, alpha=5.0, targets=["attention.*"])),
}


@pytest.mark.parametrize("case", list(CASES))
def test_peft_loads_what_is_written_and_computes_the_same(case: str, tmp_path: Path) -> None:
    """A transposed matrix, a scale of another rank, gate for up, an adapter in a layer that was not named."""
    name, adapter = CASES[case]
    reference, base = pair(name, tmp_path / "base")
    model = adapted(base, adapter)
    save_peft(tmp_path / "adapter", adapter, model.config, parts(model).__getitem__, base=str(tmp_path / "base"))
    theirs = loaded_by_peft(reference, tmp_path / "adapter")
    ours, wanted = model(TOKENS), theirs(TOKENS).logits
    assert not torch.allclose(base(TOKENS), ours, atol=1e-2)  # the adapters do something
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (wanted * weights).sum().backward()
    found = their_gradients(theirs, model.config)
    mine = separate({n: p.grad for n, p in adapter_parameters(model).items()}, fused_parameters(model))  # type: ignore[misc]
    assert found.keys() == mine.keys()
    for key, grad in found.items():
        torch.testing.assert_close(mine[key], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())
    frozen = {n: p for n, p in model.named_parameters() if n not in adapter_parameters(model)}
    assert all(p.grad is None and not p.requires_grad for p in frozen.values())


def same(found: dict[str, LowRank], wanted: dict[str, Tensor], scale: float) -> None:
    """Each product of an adapter that was read is that of the parameters."""
    names = {name.rpartition(".")[0] for name in wanted}
    assert found.keys() == names
    for name in names:
        product = scale * wanted[f"{name}.lora_b"] @ wanted[f"{name}.lora_a"]
        torch.testing.assert_close(found[name].delta(), product, rtol=1e-5, atol=1e-6)
        if f"{name}.lora_m" in wanted:
            assert torch.equal(found[name].lengths, wanted[f"{name}.lora_m"])


@pytest.mark.parametrize("case", list(CASES))
def test_what_peft_writes_is_read_as_it_was(case: str, tmp_path: Path) -> None:
    """A round trip through the other package's own loading and saving."""
    name, adapter = CASES[case]
    reference, base = pair(name, tmp_path / "base")
    model = adapted(base, adapter)
    save_peft(tmp_path / "adapter", adapter, model.config, parts(model).__getitem__, base=str(tmp_path / "base"))
    same(load_peft(tmp_path / "adapter", model.config), parts(model), adapter.scale)
    loaded_by_peft(reference, tmp_path / "adapter").save_pretrained(str(tmp_path / "again"))
    same(load_peft(tmp_path / "again", model.config), parts(model), adapter.scale)


def test_folders_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    """An adapter that is half read, or read as what it is not."""
    adapter = AdapterConfig("lora", rank=3, alpha=5.0)
    _, base = pair("llama", tmp_path / "base")
    model, folder = adapted(base, adapter), tmp_path / "adapter"
    save_peft(folder, adapter, model.config, parts(model).__getitem__, base="x")
    description = json.loads((folder / CONFIG).read_text())
    for field, value in (("modules_to_save", ["lm_head"]), ("bias", "all"), ("peft_type", "IA3")):
        (folder / CONFIG).write_text(json.dumps({**description, field: value}))
        with pytest.raises(ValueError, match=rf"{CONFIG} has {field}="):
            load_peft(folder, model.config)
    (folder / CONFIG).write_text(json.dumps(description))
    other = pair("gpt2", tmp_path / "other")[1]
    with pytest.raises(ValueError, match="no linear layer for"):
        load_peft(folder, other.config)
    with pytest.raises(ValueError, match="cannot be read"):
        load_peft(tmp_path / "base", model.config)
