"""Rates of hardware files, and what operators move and compute: beside torch's dispatcher and what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear_cross_entropy.op import _chunk_loss_and_gradient
from launch.compose import compose_for, compose_one
from launch.plan import PLAN
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers.attention import build_context
from models.layers.rope import rotate
from models.registry import resolve_model
from parallel.activation_checkpoint import ActivationCheckpoint, apply_activation_checkpoint
from parallel.groups import NO_GROUPS
from parallel.parallelize import compile_block
from planner import eager
from planner.activations import block_bytes
from planner.hardware import Hardware, problems
from planner.hardware_files import read_hardware
from planner.operators import Operator, operators_of_stage
from planner.steptime import step_time
from trainer.predicted import job_of
from trainer.validate import finalize

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
H200, _ = read_hardware("h200")


# ---- rates


def test_between_two_lengths_the_time_of_a_token_is_linear() -> None:
    """A rate interpolated by itself, which is neither a line in time nor level at long sequences."""
    hardware = Hardware(attention_tflops=[[64, 1000, 100, 50], [64, 5000, 250, 125], [128, 1000, 400, 200]])
    assert hardware.attention(64, 1000) == pytest.approx((100e12, 50e12))
    assert hardware.attention(64, 5000) == pytest.approx((250e12, 125e12))
    at = {length: [length / rate for rate in hardware.attention(64, length)] for length in (1000, 2000, 4000, 5000)}
    for way in (0, 1):
        assert at[2000][way] - at[1000][way] == pytest.approx(at[5000][way] - at[4000][way])
        assert at[1000][way] < at[2000][way] < at[4000][way]
    assert hardware.attention(64, 10) == hardware.attention(64, 1000)  # outside: the nearest
    assert hardware.attention(64, 1e6) == hardware.attention(64, 5000)
    assert hardware.attention(32, 2000) == hardware.attention(64, 2000)  # narrower than all
    assert hardware.attention(256, 2000) == pytest.approx((400e12, 200e12))
    assert hardware.attention(96, 5000) == pytest.approx((250e12, 125e12))
    hardware.attention_tflops.reverse()
    assert hardware.attention(64, 2000) == pytest.approx([2000 / t for t in at[2000]])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "=[] has no rate"),
        ([[128, 566, 484]], "has [128, 566, 484] without the length"),
        ([[128, 8192, 566, 0]], "not four positive numbers"),
        ([[128, 8192, 566, float("nan")]], "not four positive numbers"),
        ([[128]], "not four positive numbers"),
        ([[128, 8192, 566, 484], [128, 8192, 600, 500]], "two rows of width 128 and length 8192; keep one"),
    ],
)
def test_rows_of_attention_that_cannot_be_read_are_named(rows: list[list[float]], words: str) -> None:
    """A file of before, without lengths, of which a rate would be read as a length."""
    hardware, _ = read_hardware("h200")
    hardware.attention_tflops = rows
    (found,) = problems(hardware)
    assert found.startswith("hardware.attention_tflops")
    assert words in found


def _measured_steps() -> dict[str, float]:
    rows = json.loads((RESULTS / "predictions_h200.json").read_text())["configurations"]
    return {name: row["step_seconds_measured"] for name, row in rows.items() if "error" not in row}


def test_fitted_rates_of_attention_are_those_of_the_differences_of_steps() -> None:
    """A row of the file that nobody can make again. Of two runs of the same tokens in sequences of 8k and 32k, only
    attention differs (and a micro-batch's copies, 3.2 ms); of what these lose by recomputation, its forward."""
    seconds = _measured_steps()
    flops = 4 * 64 * 32 * (32768 - 8192) / 2 * 32768 * 16  # of pairs that 32k has and 8k has not, forward
    both = seconds["1x 1b-32k"] - seconds["1x 1b-8k-2"] + 0.0032
    again = {length: seconds[f"1x 1b-{length}-full"] for length in ("8k", "32k")}
    forward = again["32k"] - seconds["1x 1b-32k"] - (again["8k"] - seconds["1x 1b-8k-2"])
    (base,) = (row for row in H200.attention_tflops if row[:2] == [64, 4096])
    slopes = (flops / forward / 1e12, 2.5 * flops / (both - forward) / 1e12)  # TFLOP/s of a pair more
    for way, slope in enumerate(slopes):
        for length in (2048, 32768):
            expected = 1 / (1 / slope + (1 / base[2 + way] - 1 / slope) * 4096 / length)
            assert H200.attention(64, length)[way] / 1e12 == pytest.approx(expected, rel=0.01)


def test_the_rate_of_what_is_not_compiled_is_that_of_measured_kernels() -> None:
    """eager_share of the file: bytes counted here over what rope, gated units and norms took, at the shapes of 1B."""
    listed = json.loads((RESULTS / "kernels_h200.json").read_text())["problems"]
    tokens, moved, milliseconds = 32768, 0.0, 0.0
    for way, direction in enumerate(("forward", "backward")):
        found = {
            problem["op"]: problem["candidates"]["eager"]["ms"]
            for problem in listed
            if problem["direction"] == direction
            and (problem["op"], problem["shape"])
            in (("rope", "4x8192x32/8x64"), ("swiglu", "fused 32768x8192"), ("rms_norm", "add 32768x2048"))
        }
        moved += tokens * (eager.ROPE_BYTES[way] * 40 * 64 + 2 * (5, 13)[way] * 8192 + 2 * 2 * (5, 8)[way] * 2048)
        milliseconds += found["rope"] + found["swiglu"] + 2 * found["rms_norm"]
    assert H200.eager == pytest.approx(moved / milliseconds * 1e3, rel=0.01)


# ---- what moves


class _Moved(TorchDispatchMode):
    """Bytes that operations read and write; those that only view cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._opname != "detach":
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)  # in place: read and written
        return result


def _moved(run: Callable[[], Any]) -> int:
    with _Moved() as counted:
        run()
    return counted.bytes


def test_bytes_of_rope_are_those_of_its_operations() -> None:
    """Counted by hand in planner/eager.py, of all features; the angles of one head are a 64th here."""
    x = torch.randn(1, 32, 64, 32).bfloat16().requires_grad_()
    angles = torch.rand(1, 32, 1, 16)
    gradient = torch.randn_like(x)
    forward = _moved(lambda: rotate(x, angles, angles)) / x.numel()
    y = rotate(x, angles, angles)
    backward = _moved(lambda: torch.autograd.grad(y, x, gradient)) / x.numel()
    assert (forward, backward) == pytest.approx(eager.ROPE_BYTES, rel=0.01)


@pytest.mark.parametrize("fused", [True, False])
def test_elements_of_a_gated_unit_are_those_of_its_operations(fused: bool) -> None:
    """As Experts and MLP compute it; gradients of the halves of one tensor are put together, of two are not."""
    gate_up = torch.randn(64, 512).bfloat16().requires_grad_()
    parts = gate_up.chunk(2, dim=-1) if fused else [torch.randn(64, 256).bfloat16().requires_grad_() for _ in range(2)]
    inputs, elements = ([gate_up] if fused else parts), 64 * 256 * 2
    y = F.silu(parts[0]) * parts[1]
    gradient = torch.randn_like(y)
    forward = _moved(lambda: F.silu(parts[0]) * parts[1]) / elements
    backward = _moved(lambda: torch.autograd.grad(y, inputs, gradient)) / elements
    assert (forward, backward) == eager.activation_elements(ModelConfig(fused_projections=fused), experts=False)
    assert eager.activation_elements(ModelConfig(), experts=True) == (5, 9)


def test_bytes_of_the_loss_are_those_of_its_operations() -> None:
    """Beside what the dispatcher sees: gather reads a word of each row, and log-softmax casts inside on a GPU, whose
    kernel reads rows that long three times."""
    logits, labels = torch.randn(64, 8192).bfloat16(), torch.randint(0, 8192, (64,))
    counted = _moved(lambda: _chunk_loss_and_gradient(logits, labels, -100, 1.0)) / logits.numel()
    gather, log_softmax_on_cpu, log_softmax = 4, 6 + 8, 3 * 2 + 4
    assert counted - gather - log_softmax_on_cpu + log_softmax == pytest.approx(eager.LOSS_BYTES, rel=0.01)


# ---- of a step


def _operators(*overrides: str, gpus: int = 1) -> tuple[dict[str, Operator], float, float]:
    """By name, of the first stage; seconds of the step, and of what it computes again."""
    common = ["+exp=llama3_1b", "data.validation_fraction=0", "train.global_batch_size=2", "train.micro_batch_size=1"]
    job = job_of(finalize(compose_one([*common, *overrides]), world_size=gpus), world_size=gpus)
    time = step_time(job, H200)
    return {o.name: o for o in operators_of_stage(job, H200, job.stages[0])}, time.step, time.recompute


def _attention_projections(*overrides: str, tp: int) -> float:
    """FLOPs forward of all ranks of tp together."""
    sizes = ["train.seq_len=4096", "train.global_batch_size=1", "model.num_layers=2", "data.validation_fraction=0"]
    layout = [f"parallel.tp={tp}", "parallel.zero_stage=1"]
    job = job_of(finalize(compose_one([*overrides, *sizes, *layout]), world_size=tp), world_size=tp)
    operators = {o.name: o for o in operators_of_stage(job, H200, job.stages[0])}
    return tp * operators["attention projections"].forward_flops


@pytest.mark.parametrize(("model", "most"), [("llama3_8b", 8), ("qwen3_30b_a3b", 4)])
def test_ranks_of_tp_share_out_the_attention_projections(model: str, most: int) -> None:
    """Keys and values of fewer heads than ranks charged whole to each: of 16 ranks that share 8 heads, two compute the
    same, and not 16."""
    alone = _attention_projections(f"model={model}", tp=1)
    assert _attention_projections(f"model={model}", tp=most) == pytest.approx(alone)
    config = resolve_model(compose_for(PLAN, [f"model={model}", "model.num_layers=2"]).model)
    assert config.num_kv_heads == most
    keys_and_values = 2 * 2 * 4096 * 2 * config.hidden_size * most * (config.head_dim or 0)  # of 2 layers
    shared = _attention_projections(f"model={model}", tp=2 * most)
    assert shared - alone == pytest.approx(keys_and_values)


def test_sequence_parallelism_shares_out_what_every_rank_has_whole() -> None:
    """Latents, which each rank makes of its own tokens; without it all make all of them."""
    latent = ["model=deepseek_v3", "model.moe.first_dense=1"]
    alone = _attention_projections(*latent, tp=1)
    sequence = "parallel.sequence_parallel=true"
    assert _attention_projections(*latent, sequence, tp=8) == pytest.approx(alone)
    low_ranks = 2 * 2 * 4096 * 7168 * (1536 + 512 + 64)  # of 2 layers
    assert _attention_projections(*latent, tp=8) - alone == pytest.approx(7 * low_ranks)


def test_latent_attention_keeps_no_input_that_it_does_not_gather() -> None:
    """7168 features of all tokens, where a rank has its own and 2112 of all."""
    sizes = ["train.seq_len=4096", "train.global_batch_size=1", "model.num_layers=2", "data.validation_fraction=0"]
    common = ["model=deepseek_v3", "precision=bf16", "train.compile=true", "model.moe.first_dense=1", *sizes]
    layout = ["parallel.tp=8", "parallel.zero_stage=1", "parallel.sequence_parallel=true"]
    job = job_of(finalize(compose_one([*common, *layout]), world_size=8), world_size=8)
    T, D, latents, heads = 4096, 7168, 1536 + 512, 128 / 8
    of_stream = 3 * D + latents  # of a token here: residual stream twice, input of attention; latents before norms
    of_all = D + latents + 64 + heads * (2 * 192 + 128) + heads * 128 + 3 * 18432 / 8
    kept = 2 * (T / 8 * of_stream + T * of_all) + 4 * T * heads
    assert block_bytes(job, 0).kept == pytest.approx(kept)


TINY = ["+exp=llama3_1b", "model.hidden_size=64", "model.intermediate_size=160", "model.num_layers=1",
        "model.num_heads=4", "model.num_kv_heads=2", "model.max_seq_len=32"]  # fmt: skip
TINY_DOWN = 2 * 32 * 64 * 160
"""FLOPs of the last product of its block, of 32 tokens."""


def _block(mode: str, *overrides: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A block that recomputes, and its forward of 32 tokens."""
    config = resolve_model(compose_for(PLAN, [*TINY, *overrides]).model)
    block = Decoder(config).to_empty(device="cpu").blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    apply_activation_checkpoint(block, ActivationCheckpoint(mode))
    x = torch.randn(1, 32, 64, requires_grad=True)
    context = build_context(
        config, seq_len=32, device=x.device, dtype=x.dtype, positions=None, documents=None,
        samples=torch.zeros(1, dtype=torch.int64), groups=NO_GROUPS,
    )  # fmt: skip
    return block, lambda: block(x, context=context)


def _flops_of_block(mode: str, *overrides: str) -> tuple[int, int]:
    """Forward and backward of its products, as torch counts them."""
    _, run = _block(mode, *overrides)
    with FlopCounterMode(display=False) as forward:
        y = run()
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_torch_leaves_out_the_last_product_of_a_block() -> None:
    """What `_not_again` of planner/steptime.py says, by torch's own count of what is computed again."""
    forward, backward = _flops_of_block("none")
    _, with_recomputation = _flops_of_block("full")
    assert with_recomputation - backward == forward - TINY_DOWN


def test_compiled_graphs_leave_out_the_last_product_too() -> None:
    """Of qkv, o, gate_up and down backward makes three again, beside two gradients of each."""
    products: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        products.append(sum("aten.mm" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    block, run = _block("full")
    compile_block(block, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    run().sum().backward()
    assert products == [4, 8 + 3]


@pytest.mark.parametrize(
    "overrides",
    [["model.norm_first=false"], ["model.dropout=0.1"],
     ["model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.intermediate_size=80"]],
    ids=["norm behind", "dropout", "experts"],
)  # fmt: skip
def test_torch_computes_again_what_something_behind_needs(overrides: list[str]) -> None:
    """Where `_not_again` is nothing."""
    forward, backward = _flops_of_block("none", *overrides)
    _, with_recomputation = _flops_of_block("full", *overrides)
    assert with_recomputation - backward == forward


@pytest.mark.parametrize("compiled", [True, False])
def test_a_block_computed_again_leaves_out_its_last_product(compiled: bool) -> None:
    """1B in full on H200: 121 ms of recomputation measured, where all of forward would be 148."""
    flags = [f"train.compile={str(compiled).lower()}", "train.global_batch_size=1"]
    operators, without, _ = _operators(*flags)
    _, step, again = _operators(*flags, "model.activation_checkpoint=full")
    blocks = sum(o.forward_seconds for name, o in operators.items() if name not in ("head", "loss"))
    assert again == pytest.approx(blocks - operators["mlp"].forward_seconds / 3)
    assert step - without == pytest.approx(again)


def test_compiled_graphs_over_tp_are_computed_again_as_a_whole() -> None:
    """There the checkpoint is around the graph (parallel/parallelize.py); without compilation torch stops early."""
    for compiled, left_out in ((True, 0), (False, 1 / 3)):
        flags = ["parallel.tp=2", f"train.compile={str(compiled).lower()}", "train.global_batch_size=1"]
        operators, *_ = _operators(*flags, gpus=2)
        *_, again = _operators(*flags, "model.activation_checkpoint=full", gpus=2)
        blocks = sum(o.forward_seconds for name, o in operators.items() if name not in ("head", "loss"))
        assert again == pytest.approx(blocks - left_out * operators["mlp"].forward_seconds)


def test_layers_with_a_window_attend_at_the_rate_of_what_they_see() -> None:
    """Half of the layers see 1024 keys of 32k: few pairs, at the rate of short sequences."""
    sizes = ["train.seq_len=32768", "model.max_seq_len=32768", "train.global_batch_size=1"]
    whole = _operators(*sizes)[0]["attention"]
    windows = _operators(*sizes, "model.sliding_window=1024")[0]["attention"]
    rate = {name: o.forward_flops / o.forward_seconds / 1e12 for name, o in (("whole", whole), ("windows", windows))}
    assert rate["whole"] == pytest.approx(477)
    assert rate["windows"] == pytest.approx(355)  # of 2048 tokens, the shortest that the file has
    assert windows.forward_flops < whole.forward_flops / 10


def test_routers_that_are_not_compiled_cost_their_kernels() -> None:
    experts = ["model.moe.num_experts=8", "model.moe.top_k=2", "model.moe.intermediate_size=4096"]
    found, *_ = _operators(*experts, "train.compile=false")
    router = found["small kernels of routers"]
    assert router.forward_seconds == pytest.approx(16 * 50 * 5e-6)
    assert router.binds == "latency"
    for overrides in ([*experts], ["train.compile=false"]):
        assert "small kernels of routers" not in _operators(*overrides)[0]
