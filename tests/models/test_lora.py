"""Adapters beside a model: how they begin, what they cost, and how they go in and out of its weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import models.adapted_linear
from models.adapter_config import AdapterConfig, adapter_problems
from models.config import ModelConfig
from models.init import initialize
from models.lora import adapter_initializers, adapter_parameters, apply_adapters
from models.merge import Merged
from models.peft import LowRank
from models.quantized import fill_quantized, quantized_layers
from models.registry import build_model, resolve_model
from parallel.activation_checkpoint import ActivationCheckpoint, apply_activation_checkpoint
from parallel.fused import fused_parameters, separate
from tests.models.oracle import LLAMA, ours, pair
from tests.models.test_peft import TOKENS, adapted, parts

LORA = AdapterConfig("lora", rank=3, alpha=5.0)


@pytest.mark.parametrize("case", ["llama", "mixtral", "deepseek_v2"])
def test_a_model_with_adapters_begins_as_the_model(case: str, tmp_path: Path) -> None:
    """Output equal to the base, to the bit for dense layers; gradient of A 0, of B not."""
    _, base = pair(case, tmp_path)
    model = adapted(base, LORA)
    masters = parts(model)
    initialize(masters, adapter_initializers({name: m.shape for name, m in masters.items()}), seed=3)
    output = model(TOKENS)
    assert torch.equal(output, base(TOKENS))
    output.square().sum().backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith("lora_b"), name
    some = next(parameter for name, parameter in masters.items() if name.endswith("attention.o.lora_a"))
    assert some.std().item() == pytest.approx((3 * some.shape[-1]) ** -0.5, rel=0.5)


def test_frozen_weights_cost_no_product_of_their_gradient(tmp_path: Path) -> None:
    """4 N operations a token instead of 6 N, and none for the input of the first layer."""
    _, base = pair("llama", tmp_path)
    model = adapted(base, AdapterConfig("lora", rank=1, targets=["all-linear"]))
    with FlopCounterMode(display=False) as whole:
        base.train()(TOKENS).sum().backward()
    with FlopCounterMode(display=False) as frozen:
        model.train()(TOKENS).sum().backward()
    adapters = sum(parameter.numel() for parameter in adapter_parameters(model).values()) * TOKENS.numel() * 6
    assert frozen.get_total_flops() < 0.72 * whole.get_total_flops() + 1.5 * adapters


def kept_for_backward(adapter: AdapterConfig, *, full: bool) -> tuple[int, list[torch.Tensor]]:
    """Elements that compiled blocks with adapters keep besides parameters, and the gradients of the adapters."""
    torch._dynamo.reset()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    config = resolve_model(ModelConfig(vocab_size=61, max_seq_len=32, attention="sdpa", **sizes))
    with torch.device("meta"):
        model = build_model(config)
        apply_adapters(model, adapter)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)

    def drawn(_name: str, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("nf4"):
                parameter.copy_(drawn(name, parameter.shape))
        fill_quantized(model, lambda name, weight: weight.copy_(drawn(name, weight.shape)))
    if full:
        for block in model.blocks.children():
            apply_activation_checkpoint(block, ActivationCheckpoint("full"))
    for block in model.blocks.children():
        block.compile(backend="aot_eager", fullgraph=True)
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in of_parameters:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.arange(60).view(2, 30)).square().sum()
    loss.backward()
    return sum(kept), [p.grad for p in adapter_parameters(model).values() if p.grad is not None]


@pytest.mark.thorough
def test_compiled_blocks_keep_neither_dequantized_weights_nor_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in 4 bits that backward has in 16, because a compiler sees them dequantized twice; checkpointing that
    recomputes nothing. The control: the same layers as a Function, which compilers look into."""
    lora = AdapterConfig("lora", rank=4)
    four_bits = dataclasses.replace(lora, quantize="nf4")
    kept, grads = kept_for_backward(four_bits, full=False)
    assert kept <= kept_for_backward(lora, full=False)[0]
    assert kept_for_backward(four_bits, full=True)[0] < kept / 3
    monkeypatch.setattr(models.adapted_linear, "_adapted", models.adapted_linear._Adapted.apply)
    visible, wanted = kept_for_backward(four_bits, full=False)
    assert visible > 1.3 * kept
    for grad, its in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, its)


def test_rows_that_have_a_length_begin_as_the_model_and_merge_as_they_compute(tmp_path: Path) -> None:
    """m that is not the length of W's rows, or of rows of another part."""
    _, base = pair("llama_bias", tmp_path)
    model = adapted(base, dataclasses.replace(LORA, dora=True))
    matrices, weights = parts(model), base.state_dict()
    layers = {name.rpartition(".")[0] for name in matrices}
    adapters = {
        name: LowRank(*(matrices[f"{name}.lora_{m}"] for m in "ab"), LORA.scale, matrices[f"{name}.lora_m"])
        for name in layers
    }
    merged = copy.deepcopy(base)
    Merged(merged.state_dict(), adapters)
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    for name in layers:
        matrices[f"{name}.lora_b"].zero_()
        matrices[f"{name}.lora_m"].copy_(weights[f"{name}.weight"].norm(dim=1))
    torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_merged_weights_compute_the_same_and_come_out_to_the_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """W + D - D, which is not W in floating point."""
    _, base = pair(case, tmp_path)
    model = adapted(base, LORA)
    matrices = parts(model)
    names = {name.rpartition(".")[0] for name in matrices}
    found = {n: LowRank(matrices[f"{n}.lora_a"], matrices[f"{n}.lora_b"], LORA.scale) for n in names}
    merged = copy.deepcopy(base).to(dtype)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    weights = Merged(merged.state_dict(), found)
    if dtype == torch.float32:
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    else:  # negative control: subtracting gives other bits
        name = "blocks.1.attention.q"
        back = merged.state_dict()[f"{name}.weight"].float() - found[name].delta()
        assert not torch.equal(back.to(dtype), before[f"{name}.weight"])
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in names}
    weights.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())
    with pytest.raises(ValueError, match=r"blocks.9.attention.q .* there is none"):
        Merged(merged.state_dict(), {"blocks.9.attention.q": next(iter(found.values()))})


def test_parts_of_fused_layers_are_those_of_separate_ones(tmp_path: Path) -> None:
    """A checkpoint of one that the other reads differently."""
    _, base = pair("llama", tmp_path)
    some = AdapterConfig("lora", rank=2, targets=["q", "v", "up"])
    fused = adapted(base, some)
    separate_base = pair("llama", tmp_path, fused_projections=False)[1]
    apart = adapted(separate_base, some)
    assert parts(fused).keys() == parts(apart).keys()
    for name, tensor in parts(fused).items():
        parts(apart)[name].copy_(tensor)
    torch.testing.assert_close(fused(TOKENS), apart(TOKENS), rtol=1e-4, atol=1e-4)
    grads = []
    for model in (fused, apart):
        model(TOKENS).square().sum().backward()
        found = {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}
        grads.append(separate(found, fused_parameters(model)))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_targets_that_match_nothing_are_named(tmp_path: Path) -> None:
    """An adapter that is silently nowhere."""
    config = pair("llama", tmp_path)[1].config
    (problem,) = adapter_problems(AdapterConfig("lora", targets=["q_proj", "v"]), config)
    assert problem.startswith("adapter.targets=q_proj matches no linear layer; use q, k, v")
    (problem,) = adapter_problems(AdapterConfig("lora", targets=["blocks.7.*"]), config)
    assert "blocks.7.* matches no linear layer" in problem
    (problem,) = adapter_problems(AdapterConfig("lora", targets=[]), config)
    assert problem == "adapter.targets=[] adapts nothing; use adapter.targets=[all-linear]"
    assert adapter_problems(AdapterConfig("lora", targets=["experts.*"]), config) != []
    (problem,) = adapter_problems(AdapterConfig("lora"), pair("gpt2", tmp_path / "gpt2")[1].config)
    assert "is some rows of transformer.h.0.attn.c_attn.weight" in problem
    found = adapter_problems(AdapterConfig("lora", rank=0, alpha=-1.0), config)
    assert [line.partition(" ")[0] for line in found] == ["adapter.rank=0", "adapter.alpha=-1.0"]
    (problem,) = adapter_problems(AdapterConfig("lorra"), config)
    assert problem == "adapter.name=lorra is unknown; use adapter.name=none or lora"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_quantized_weights_are_those_of_bitsandbytes(family: str, tmp_path: Path) -> None:
    """Another format than the one adapters of QLoRA are used with."""
    sizes = {**LLAMA, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    torch.manual_seed(0)
    source = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        if family == "llama"
        else transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=3))
    )
    source.to(torch.bfloat16).save_pretrained(tmp_path)
    plain = ours(tmp_path)
    adapter = AdapterConfig("lora", rank=2, quantize="nf4", targets=["q", "down"])
    with torch.device("meta"):
        model = build_model(plain.config)
        apply_adapters(model, adapter, torch.bfloat16)
    model.to(torch.bfloat16).to_empty(device="cpu")
    weights = plain.state_dict()
    fill_quantized(model, lambda name, weight: weight.copy_(weights[name].view(weight.shape)))
    count = 0
    for module, names in quantized_layers(model):
        found = module.piece.dequantize(module.nf4, torch.bfloat16)
        assert not hasattr(module, "weight")
        if found.ndim == 3:  # experts, each a matrix of its own
            matrices, parts = list(weights[names[0]]), list(found)
        else:
            matrices = [weights[name] for name in names]
            parts = found.split([len(matrix) for matrix in matrices])
        for matrix, part in zip(matrices, parts, strict=True):
            packed, state = bnb.quantize_4bit(matrix.bfloat16(), compress_statistics=True, quant_type="nf4")
            theirs = bnb.dequantize_4bit(packed, state)
            # Next to the midpoint of two levels of a magnitude their search on the CPU is only near: one block or none.
            assert (part != theirs).float().mean() < 0.01
            count += 1
    assert count == 3 * (7 if family == "llama" else 4 + 3 * 3)
