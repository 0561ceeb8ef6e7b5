"""Norms and SwiGLU that write fp8, in blocks: the results and gradients of layers that quantize for themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.fp8 import E4M3, E5M2, ScalingRecipe
from kernels.rms_norm import rms_norm
from models.config import ModelConfig
from models.decoder import Decoder
from models.fp8 import Fp8Linears, apply_fp8, linears_in_fp8
from models.fp8_producers import apply_producers
from models.registry import build_model, resolve_model

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "max_seq_len": 16,
}
RECIPES = ["tensorwise_delayed", "rowwise"]


def model_of(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    model = build_model(resolve_model(ModelConfig(**SIZES | changes)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def in_fp8(model: Decoder, recipe: ScalingRecipe, *, fused: bool, skip: tuple[str, ...] = ()) -> Fp8Linears:
    linears = Fp8Linears(recipe, names=linears_in_fp8(model.blocks, skip=skip), history_length=2)
    apply_fp8(model.blocks, linears)
    if fused:
        linears.producers = apply_producers(model.blocks, linears, activation=model.config.activation)
    return linears


def step(model: Decoder, linears: Fp8Linears, number: int, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Logits and all gradients of a step; of odd numbers of tokens."""
    model.zero_grad()
    linears.begin_step(first=number == 0)
    tokens = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(number))
    logits = (run or model)(tokens)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(10 + number)).to(logits))
    found = [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    if linears.scaling is not None:
        found.append(linears.scaling.amax())
        linears.scaling.update()
    return found


def with_norms_of_the_kernel(model: Decoder) -> Decoder:
    """torch's norm on the CPU is several steps, whose gradients are added to that of the stream in another order, and
    it rounds bf16 otherwise."""

    for norm in model.modules():
        if isinstance(norm, nn.RMSNorm):
            norm.forward = lambda x, norm=norm: rms_norm(x, norm.weight, norm.eps)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", RECIPES)
def test_blocks_give_the_bits_of_layers_that_quantize(kind: str, gradient: torch.dtype, dtype: torch.dtype) -> None:
    """Another scale, another rounding, a gradient of the stream that is lost or counted twice, a history that is not
    written, over steps with scales of the past."""
    plain, fused = (with_norms_of_the_kernel(model_of().to(dtype)) for _ in range(2))
    recipe = ScalingRecipe(kind, gradient=gradient)
    ours, theirs = in_fp8(fused, recipe, fused=True), in_fp8(plain, recipe, fused=False)
    assert ours.producers.startswith("written by 4 norms and " + ("2" if kind == "tensorwise_delayed" else "0"))
    for number in range(3):
        expected = step(plain, theirs, number)
        for y, truth in zip(step(fused, ours, number), expected, strict=True):
            assert torch.equal(y, truth)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_scale_of_another_layer_would_be_seen(kind: str) -> None:
    """Negative control: SwiGLU and norms by scales twice as large; by rows, weights quantized with another format."""
    plain = model_of()
    fused = copy.deepcopy(plain)
    recipe = ScalingRecipe(kind)
    ours, theirs = in_fp8(fused, recipe, fused=True), in_fp8(plain, recipe, fused=False)
    step(plain, theirs, 0)
    step(fused, ours, 0)
    if ours.scaling is not None:
        ours.scaling.scale.mul_(1.3)
    else:
        fused.blocks.get_submodule("0.mlp_norm").eps = 1e-2
    assert not all(torch.equal(y, z) for y, z in zip(step(fused, ours, 1), step(plain, theirs, 1), strict=True))


@pytest.mark.parametrize("kind", RECIPES)
def test_recomputed_and_compiled_blocks_are_the_same(kind: str) -> None:
    """A stand-in that recomputation reads, amax recorded twice, a graph break in what replaces methods."""
    recipe = ScalingRecipe(kind)
    model = model_of()
    plain, recomputed, compiled = (copy.deepcopy(model) for _ in range(3))
    linears = [in_fp8(m, recipe, fused=True) for m in (plain, recomputed, compiled)]
    for block in recomputed.blocks.children():
        own = block.forward
        block.forward = lambda x, own=own, **kw: checkpoint(own, x, use_reentrant=False, **kw)  # type: ignore[method-assign]
    for block in compiled.blocks.children():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    for number in range(2):
        expected = step(plain, linears[0], number)
        for y, truth in zip(step(recomputed, linears[1], number), expected, strict=True):
            assert torch.equal(y, truth)
        for y, truth in zip(step(compiled, linears[2], number), expected, strict=True):
            torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_less_is_kept_for_backward_and_nothing_normalised_in_16_bits() -> None:
    """A copy of what producers no longer write, or a stand-in with memory."""

    def kept(fused: bool, kind: str) -> tuple[int, int]:
        model = model_of()
        linears = in_fp8(model, ScalingRecipe(kind), fused=fused)
        step(model, linears, 0)
        linears.begin_step(first=False)
        storages: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits = model(torch.zeros(2, 16, dtype=torch.int64))
        assert logits.requires_grad
        return sum(storages.values()), len(storages)

    for kind in RECIPES:
        assert kept(True, kind)[0] <= kept(False, kind)[0]
    assert kept(True, "tensorwise_delayed")[0] < kept(False, "tensorwise_delayed")[0]


def test_nothing_is_recorded_without_gradients() -> None:
    """A validation whose activations move the scales of training."""
    model = model_of()
    linears = in_fp8(model, ScalingRecipe("tensorwise_delayed"), fused=True)
    step(model, linears, 0)
    linears.begin_step(first=False)
    with torch.no_grad():
        model(torch.zeros(2, 16, dtype=torch.int64))
    assert linears.scaling is not None
    assert not linears.scaling.amax().any()


@pytest.mark.parametrize(
    ("changes", "skip", "kind", "norms", "activations", "why"),
    [
        ({}, ("mlp.gate_up", "mlp.gate"), "tensorwise_delayed", 2, 0, "a layer behind it is not in fp8"),
        ({}, ("mlp.down",), "tensorwise_delayed", 4, 0, "a layer beside it is not in fp8"),
        ({"fused_projections": False}, (), "tensorwise_delayed", 4, 0, "model.fused_projections=false"),
        ({"mlp_bias": True}, (), "tensorwise_delayed", 4, 0, "model.mlp_bias=true"),
        ({"activation": "gelu"}, (), "tensorwise_delayed", 4, 0, "not SwiGLU"),
        ({"norm": "layernorm"}, (), "tensorwise_delayed", 0, 2, "not RMSNorm"),
        ({"norm_first": False}, (), "tensorwise_delayed", 0, 2, "model.norm_first=false"),
        ({}, (), "rowwise", 4, 0, "rowwise finds scales in what is written"),
    ],
)
def test_what_cannot_write_fp8_is_left_and_said(
    changes: dict[str, Any], skip: tuple[str, ...], kind: str, norms: int, activations: int, why: str
) -> None:
    """A silent choice, or a model of another kind that is changed."""
    plain = model_of(**changes)
    fused = copy.deepcopy(plain)
    ours = in_fp8(fused, ScalingRecipe(kind), fused=True, skip=skip)
    theirs = in_fp8(plain, ScalingRecipe(kind), fused=False, skip=skip)
    assert ours.producers.startswith(f"written by {norms} norms and {activations} activations")
    assert why in ours.producers
    for number in range(2):
        for y, truth in zip(step(fused, ours, number), step(plain, theirs, number), strict=True):
            torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
