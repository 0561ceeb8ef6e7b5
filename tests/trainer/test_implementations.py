"""What run.json says of kernels, and what chooses them, as it would be on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.attention import sdpa
from kernels.backend import interpreted
from kernels.swiglu import swiglu_fused
from launch.compose import compose_one
from models.adapted_linear import Adaptation
from models.layers import mlp as mlp_module
from models.layers.mlp import MLP, gated_kernel
from parallel.dims import ParallelDims
from planner.activations import loss_bytes
from trainer import implementations
from trainer.build import check_loss_runs
from trainer.config import ConfigError, TrainConfig
from trainer.loss import choose_loss_kernel, token_loss_sum
from trainer.predicted import job_of
from trainer.validate import finalize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config_of(*overrides: str) -> TrainConfig:
    return finalize(compose_one(["model=llama_tiny", *overrides]), world_size=1)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"activation": "silu"}, "triton"),
        ({"activation": "gelu_tanh"}, "triton"),
        ({"activation": "gelu"}, "triton"),
        ({"activation": "relu"}, "torch"),
        ({"compiled": False}, "torch"),
        ({"fused": False}, "torch"),
        ({"device_type": "cpu"}, "torch"),
    ],
)
def test_a_gated_unit_has_a_kernel_where_it_is_faster(changes: dict[str, Any], kernel: str) -> None:
    """A kernel that loses in every training step; one that is left out where it wins."""
    chosen = gated_kernel(**{"activation": "silu", "fused": True, "device_type": "cuda", "compiled": True, **changes})
    assert ("torch" if chosen is None else "triton") == kernel


def test_the_kernel_of_a_gated_unit_is_what_a_compiled_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that run.json tells and the layer does not ask for."""
    asked: list[dict[str, Any]] = []

    def chosen(activation: str, **how: Any) -> Any:
        asked.append({"activation": activation, **how})
        return swiglu_fused

    network, x = MLP(config_of().model), torch.randn(2, 3, config_of().model.hidden_size)
    nn.init.normal_(network.gate_up.weight)
    nn.init.normal_(network.down.weight)
    expected = network(x)
    monkeypatch.setattr(mlp_module, "gated_kernel", chosen)
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.testing.assert_close(torch.compile(network, backend=backend, fullgraph=True)(x), expected)
    assert asked == [{"activation": "silu", "fused": True, "device_type": "cpu", "compiled": True}]
    assert "lattice.glu_fused" in graphs[0]


def test_networks_that_write_fp8_are_told_from_others() -> None:
    """triton in run.json for a kernel that no block runs any more, because norms and activations quantize."""
    config = config_of("train.compile=true")
    networks = nn.ModuleList([MLP(config.model), MLP(config.model)])
    state: Any = SimpleNamespace(model=networks)
    assert implementations._gated(config, state, CUDA) == "triton"
    networks[0].forward = lambda x: x  # type: ignore[method-assign]  # models/fp8_producers.py
    assert implementations._gated(config, state, CUDA) == "triton, to fp8 (1 of 2); triton"
    networks[1].forward = lambda x: x  # type: ignore[method-assign]
    assert implementations._gated(config, state, CUDA) == "triton, to fp8 (2 of 2)"


@pytest.mark.parametrize(
    ("changes", "device_type", "kernel"),
    [
        ([], "cuda", "triton"),
        ([], "cpu", "torch"),
        (["loss_kernel=torch"], "cuda", "torch"),
        (["compile=true"], "cuda", "triton"),
        (["compile=true"], "cpu", "compiled"),
        (["compile=true", "loss_kernel=torch"], "cuda", "compiled"),
        (["compile=true", "loss_kernel=triton"], "cuda", "triton"),
        (["compile=true", "compile_backend=aot_eager"], "cuda", "triton"),
        (["batch_invariant=true"], "cuda", "torch"),
    ],
)
def test_the_loss_has_the_kernel_that_was_measured(changes: list[str], device_type: str, kernel: str) -> None:
    """The kernel that is faster and takes half the memory, which nothing ever ran; a compiled loss that it replaces."""
    config = config_of(*(f"train.{change}" for change in changes))
    assert choose_loss_kernel(config, device_type) == kernel
    said = implementations._loss(config, torch.device(device_type))
    assert said == "linear_cross_entropy" + {"torch": ""}.get(kernel, f", {kernel}")


@pytest.mark.parametrize(("compiled", "kernel"), [(True, "compiled"), (False, "torch")])
def test_a_vocabulary_in_parts_has_no_kernel_that_was_not_timed_on_it(compiled: bool, kernel: str) -> None:
    """A choice by a measurement of something else."""
    config = config_of(f"train.compile={compiled}")
    config.parallel.tp = 2
    assert choose_loss_kernel(config, "cuda") == kernel


@pytest.mark.interpreter
def test_every_loss_kernel_computes_the_loss() -> None:
    """A name that chooses another function, or none."""
    hidden, labels = torch.randn(2, 3, 8), torch.tensor([[1, 5, -100], [0, 2, 9]])
    weight = torch.randn(10, 8, requires_grad=True)

    def both(kernel: str) -> tuple[Tensor, Tensor]:
        loss = token_loss_sum(hidden, weight, labels, kernel)
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    with interpreted():
        torch.testing.assert_close(both("triton"), both("torch"))


def test_the_kernel_of_the_loss_is_refused_where_it_does_not_run() -> None:
    """A run that was asked for the kernel and silently takes its reference."""
    config = config_of("train.loss_kernel=triton")
    check_loss_runs(config, CUDA)
    with pytest.raises(ValueError, match=r"train.loss_kernel=triton needs CUDA, and this runs on cpu; use train.loss_"):
        check_loss_runs(config, CPU)
    with pytest.raises(
        ConfigError, match=r"train.loss_kernel=torch has no effect with recipe.name=dpo; use train.loss"
    ):
        config_of("recipe=dpo", "train.loss_kernel=torch")


def test_the_planner_counts_the_logits_that_the_chosen_kernel_keeps() -> None:
    """A run that fits because of the kernel, and is said not to."""
    kernels = ("torch", "triton", "auto")
    configs = [config_of("precision=bf16", f"train.loss_kernel={kernel}", "train.device=cuda") for kernel in kernels]
    jobs = [job_of(config, world_size=1) for config in configs]
    found = {kernel: loss_bytes(job) for kernel, job in zip(kernels, jobs, strict=True)}
    config = configs[0]
    tokens = min(config.train.micro_batch_size * config.train.seq_len, 4096)
    assert found["torch"] - found["triton"] == 7 * tokens * config.model.vocab_size
    assert found["auto"] == found["triton"]


def test_losses_of_single_tokens_say_what_computes_them() -> None:
    """The name of a function for what kernels compute on a GPU."""
    config: Any = SimpleNamespace(recipe=SimpleNamespace(name="dpo"), precision=config_of().precision)
    assert implementations._loss(config, CPU) == "linear_token_losses"
    with interpreted():
        assert implementations._loss(config, CPU) == "linear_token_losses, triton"


@pytest.mark.parametrize(("rank", "said"), [(8, "triton"), (4, "triton (adapters of rank 4: masked)")])
def test_adapters_of_experts_say_what_multiplies_with_them(rank: int, said: str) -> None:
    """triton for products that every expert computes over all rows, because their rank is not of 16 bytes."""
    config = config_of("model=moe_tiny", "precision=bf16")
    config.adapter.name, config.adapter.rank, config.adapter.targets = "lora", rank, ["up"]
    dims = ParallelDims.resolve(config.parallel, 1)
    assert implementations._experts(config, dims, CUDA) == said
    config.adapter.name = "none"
    assert implementations._experts(config, dims, CUDA) == "triton"


def test_adapters_say_which_kernels_add_and_unpack_them() -> None:
    """A run whose adapters are wider than the kernel takes, which looks like one that runs it."""
    config = config_of("precision=bf16")
    config.adapter.name, config.adapter.quantize = "lora", "nf4"
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    for layer, parts in zip(layers, (1, 3), strict=True):
        layer.adaptation = Adaptation(rank=64, scale=1.0, rows=((0, 1),) * parts)  # type: ignore[assignment]
    state: Any = SimpleNamespace(model=layers)
    assert implementations._adapters(config, state, CPU).items() >= {"low_rank": "torch", "nf4": "reference"}.items()
    with interpreted():
        used = implementations._adapters(config, state, CPU)
    assert used.items() >= {"low_rank": "triton (1 of 2 layers), backward; forward: torch", "nf4": "triton"}.items()


def test_torch_is_asked_which_attention_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa in run.json, which may be any of four kernels; another question than the layer's own."""
    shapes: list[Any] = []

    def choice(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> int:
        shapes.append((q.shape, k.shape, v.shape, how["is_causal"], how["enable_gqa"]))
        return int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)

    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    assert sdpa.backend(q, k, k, None) in ("flash_attention", "math")
    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    config = config_of()
    said = implementations._sdpa_backend(config, ParallelDims.resolve(config.parallel, 1), CPU)
    assert said == "cudnn_attention"
    model, T = config.model, min(config.train.seq_len, implementations.PROBE_TOKENS)
    heads, key_heads = model.num_heads, model.num_kv_heads
    expected = [(1, heads, T, model.head_dim), (1, key_heads, T, model.head_dim), (1, key_heads, T, model.value_dim)]
    assert [tuple(shape) for shape in shapes[0][:3]] == expected
    assert shapes[0][3:] == (True, heads != key_heads)
