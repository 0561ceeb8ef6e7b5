"""Linear layers in fp8 against the layer of kernels.fp8, which knows nothing of models and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.fp8 import E4M3, E5M2, DelayedScaling, ScalingRecipe, fp8_linear
from kernels.fp8.scaling import KINDS
from models.fp8 import Fp8Linears, apply_fp8, linears_in_fp8
from parallel.precision import FP8_GRADIENTS, FP8_RECIPES
from parallel.tensor import project

NAMES = ["blocks.0.a", "blocks.0.b"]


class Pair(nn.Module):
    """Two layers of one input, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 32), nn.Linear(48, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return project(x, (self.a, self.b))


def pair(recipe: ScalingRecipe, names: list[str] = NAMES) -> tuple[Pair, Fp8Linears]:
    torch.manual_seed(0)
    linears = Fp8Linears(recipe, names=names, history_length=2)
    layers = Pair()
    apply_fp8(nn.ModuleList([layers]), linears)
    return layers, linears


def gradients(ys: tuple[Tensor, ...], *of: Tensor) -> list[Tensor]:
    for tensor in of:
        tensor.grad = None
    torch.autograd.backward(ys, [torch.sin(torch.arange(y.numel()) * 1.0).view_as(y) for y in ys])
    return [tensor.grad for tensor in of if tensor.grad is not None]


@pytest.mark.parametrize("gradient", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_the_kernel(kind: str, gradient: torch.dtype) -> None:
    """A transpose, a scale or a history of the wrong tensor; two layers of one input that mix their gradients up. Odd
    numbers of rows, and for delayed scaling a step with scales of the past."""
    recipe = ScalingRecipe(kind, gradient=gradient)
    layers, linears = pair(recipe)
    delayed = kind == "tensorwise_delayed"
    scaling = DelayedScaling(2, recipe=recipe, history_length=2) if delayed else None
    parameters = [layers.a.weight, layers.a.bias, layers.b.weight]
    for step in range(3 if delayed else 1):
        x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(step)).requires_grad_()
        linears.begin_step(first=step == 0)
        ys = layers(x)
        ours = [*ys, *gradients(ys, x, *parameters)]
        if scaling is not None and step == 0:  # the kernel's own first step has scales of 1
            assert linears.scaling is not None
            scaling.load_state_dict(linears.scaling.state_dict())
            for mine, its in zip(scaling.layers, linears.scaling.layers, strict=True):
                mine.amax.copy_(its.amax)
        else:
            ys = tuple(
                fp8_linear(x, layer.weight, layer.bias, recipe=recipe, scaling=scaling and scaling.layers[index])
                for index, layer in enumerate((layers.a, layers.b))
            )
            for y, expected in zip(ours, [*ys, *gradients(ys, x, *parameters)], strict=True):
                torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        if scaling is not None:
            assert linears.scaling is not None
            assert torch.equal(linears.scaling.amax(), scaling.amax())
            assert (scaling.amax() > 0).all()
            linears.scaling.update()  # what end_step does after its all-reduce
            scaling.update()


def test_layers_of_one_input_keep_it_once_and_in_fp8() -> None:
    """Activations in bf16 beside those in fp8, or once per projection: the memory that fp8 saves. The weights are
    kept as they came, because a copy would outlive what fully_shard frees."""
    layers, _ = pair(ScalingRecipe("rowwise"))
    kept: list[Tensor] = []
    x = torch.randn(64, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layers(x)
    assert sum(t.numel() for t in kept if t.dtype == E4M3) == 64 * 48
    wide = [t for t in kept if t.dtype != E4M3 and t.numel() > 64]
    assert [t.data_ptr() for t in wide] == [layers.a.weight.data_ptr(), layers.b.weight.data_ptr()]


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:]], ids=["first", "second"])
def test_a_layer_that_is_left_out_multiplies_as_before(names: list[str]) -> None:
    """A layer that its neighbour, evaluated together with it, takes into fp8, or out of it."""
    layers, _ = pair(ScalingRecipe("rowwise"), names)
    x = torch.randn(5, 48)
    for name, y in zip(NAMES, layers(x), strict=True):
        layer = layers.a if name.endswith("a") else layers.b
        exact = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(y, exact) == (name not in names)


def test_nothing_is_recorded_without_gradients() -> None:
    """A validation whose activations move the scales of training, so that a resumed run differs."""
    layers, linears = pair(ScalingRecipe("tensorwise_delayed"))
    with torch.no_grad():
        layers(torch.randn(5, 48))
    assert linears.scaling is not None
    assert not linears.scaling.amax().any()


def test_names_and_formats_of_the_configuration_are_the_kernels() -> None:
    """A recipe that validation refuses, or lets through to a traceback."""
    assert set(FP8_RECIPES) == set(KINDS)
    assert set(FP8_GRADIENTS.values()) == {E4M3, E5M2}
    blocks: Any = nn.ModuleList([Pair()])
    assert linears_in_fp8(blocks, skip=()) == NAMES
    assert linears_in_fp8(blocks, skip=("0.b", "nothing")) == NAMES[:1]
