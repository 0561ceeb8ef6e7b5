"""benchmarks/breakdown.py on a trace whose numbers are worked out by hand."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

import kernels
from benchmarks.breakdown import main
from trainer.breakdown import kind_of, profile_of, sentence, trace_path


def kernel(name: str, begin: float, end: float, *, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin}


def write_trace(run_dir: Path, events: list[dict[str, Any]]) -> None:
    path = trace_path(run_dir, 0, step=3)
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}, file)


def test_time_is_computed_exposed_or_idle(tmp_path: Path) -> None:
    """Streams counted twice, hidden communication counted as exposed, gaps lost. Two steps, in microseconds."""
    write_trace(
        tmp_path,
        [
            *(kernel("train_step", t, t + 10, cat="user_annotation") for t in (0, 10)),
            kernel("nvjet_tst_128x256", 1000, 3000),
            kernel("ncclDevKernel_AllGather", 2000, 5000),  # 2000 hidden behind the product, 2000 exposed
            kernel("triton_poi_fused_mul_silu", 5000, 6000),
            kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 5500, 8000),
            kernel("Memcpy DtoD (Device -> Device)", 9000, 11000, cat="gpu_memcpy"),
        ],
    )
    found = profile_of(tmp_path, top=2)
    assert found["steps"] == 2
    assert found["step_ms"] == pytest.approx(5.0)
    assert found["computed_ms"] == pytest.approx((2 + 3 + 2) / 2)
    assert found["communication_exposed_ms"] == pytest.approx(1.0)
    assert found["idle_ms"] == pytest.approx(0.5)
    assert found["idle_share"] == pytest.approx(0.1)
    kinds = {"attention": 1.25, "communication": 1.5, "copy": 1.0, "matrix_products": 1.0, "memory_bound": 0.5}
    assert found["kinds_ms"] == pytest.approx(kinds)
    assert [row["kind"] for row in found["kernels"]] == ["communication", "attention"]
    assert found["kernels"][0]["calls_per_step"] == 0.5
    assert sentence(found).startswith("5.0 ms a step: attention 25%, ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix_products"),
        ("triton_red_fused_rms_norm_1", "memory_bound"),
        ("triton_poi_fused_adapted_linear_backward_scaled_dot_product_cudnn_attention_view_0", "memory_bound"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int)", "attention"),
        ("Memset (Device)", "copy"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    """A kind that takes another's kernels."""
    assert kind_of(name) == kind


def launched_kernels() -> list[str]:
    """Of all modules of kernels/: what is compiled by itself, as KERNEL[grid](...), not into another."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in Path(kernels.__path__[0]).rglob("*.py"))
    taken_a_grid = set(re.findall(r"\b(\w+)\[", source))
    return [name for name in re.findall(r"^@triton\.jit.*\ndef (\w+)\(", source, re.M) if name in taken_a_grid]


KIND_OF_PREFIX = {
    "_attention_": "attention",
    "_paged_attention": "attention",
    **dict.fromkeys(("_adamw_", "_global_norm_"), "optimizer"),
    **dict.fromkeys(("_fp8_block_matmul", "_grouped_matmul", "_int4_matmul", "_int8_matmul"), "matrix_products"),
    **dict.fromkeys(("_invariant_matmul", "_low_rank_matmul", "_tiled_matmul"), "matrix_products"),
    **dict.fromkeys(("_skinny_matmul", "_skinny_normed_matmul"), "matrix_products"),
    **dict.fromkeys(("_cache_", "_cross_entropy_", "_fp8_", "_glu_", "_moe_", "_nf4_", "_norm_"), "memory_bound"),
    **dict.fromkeys(("_rope_", "_sampling_", "_softmax_", "_split_k_"), "memory_bound"),
}
"""Of kernels of kernels/, by how their names begin; the longest beginning decides."""


def test_every_kernel_of_ours_is_booked_under_what_it_does() -> None:
    """An attention or an optimizer counted as memory-bound because its kernel is called _forward or _update; two
    kernels of one name, which a trace cannot tell apart; a new one that nobody sorted."""
    names = launched_kernels()
    assert len(names) > 50
    assert len(names) == len(set(names))
    for name in names:
        beginnings = [beginning for beginning in KIND_OF_PREFIX if name.startswith(beginning)]
        assert beginnings, f"{name} has no kind here"
        assert kind_of(name) == KIND_OF_PREFIX[max(beginnings, key=len)], name


def test_a_run_without_a_trace_of_a_gpu_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A division by zero for the trace of a CPU run."""
    assert main([str(tmp_path)]) == 2
    assert "train with train.profile.steps" in capsys.readouterr().err
    write_trace(tmp_path, [kernel("train_step", 0, 10, cat="user_annotation")])
    assert main([str(tmp_path)]) == 2
    assert "1 steps and 0 kernels" in capsys.readouterr().err


def test_operations_of_a_cpu_do_not_count_what_they_call(tmp_path: Path) -> None:
    """A product counted in the layer that calls it as well. One step, in microseconds, and an operation of a worker."""

    def operation(name: str, begin: float, end: float, thread: int = 1) -> dict[str, Any]:
        return {**kernel(name, begin, end, cat="cpu_op"), "tid": thread}

    step = {**kernel("train_step", 0, 10_000, cat="user_annotation"), "tid": 1}
    within = [
        operation("aten::linear", 1000, 6000),
        operation("aten::t", 1000, 1500),
        operation("aten::mm", 2000, 5000),
    ]
    beside = [operation("aten::mul", 7000, 8000), operation("aten::mul", 2000, 9000, thread=2)]
    write_trace(tmp_path, [step, *within, *beside])
    found = profile_of(tmp_path)
    assert found["step_ms"] == pytest.approx(10.0)
    assert found["kinds_ms"] == pytest.approx({"matrix_products": 1.5 + 3.0, "memory_bound": 0.5 + 1.0})
    assert found["python_ms"] == pytest.approx(4.0)
