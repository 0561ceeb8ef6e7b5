"""The optimizer's, the loss's and the experts' kernels compiled for an H200, on whatever machine this runs."""

from __future__ import annotations

from typing import Any

from tests.kernels.cross_compile import Compilation, report

ADAMW = {
    **dict.fromkeys(("addresses_ptr", "constants_ptr"), "*i64:16"),
    "chunks_ptr": "*i32:16",
    **dict.fromkeys(("decays_ptr", "step_ptr", "grad_scale_ptr", "skip_ptr"), "*fp32:16"),
    **dict.fromkeys(("lr_ptr", "log_beta1", "log_beta2", "rest1", "rest2", "eps"), "fp32"),
}


NARROW = ("kernels.global_norm.kernel:_total", "kernels.moe_permute.kernel:_count", "kernels.moe_permute.kernel:_place")
"""Kernels whose time does not matter."""


def adamw(rows: int, num_warps: int, **changes: Any) -> Compilation:
    constants: dict[str, Any] = {
        "CHUNK": 16384,
        "ROWS": rows,
        "PARAMETER": "tl.float32",
        "GRADIENT": "tl.float32",
        "MOMENT": "tl.float32",
        "COPY": "tl.bfloat16",
        "STOCHASTIC": False,
        "RUN": True,
        "LR_ON_DEVICE": False,
    }
    return Compilation("kernels.adamw.kernel:_update", ADAMW, constants | changes, num_warps)


def cross_entropy(name: str, rows: int, columns: int, num_warps: int, stages: int, **constants: Any) -> Compilation:
    numbers = ("num_words", "num_rows", "stride", "d_stride")
    signature = {
        **dict.fromkeys(("logits_ptr", "d_logits_ptr"), "*bf16:16"),
        "labels_ptr": "*i64:16",
        **dict.fromkeys(("losses_ptr", "lse_ptr", "scale_ptr", "grad_ptr", "statistics_ptr"), "*fp32:16"),
        **dict.fromkeys(numbers, "i32:16"),
        **dict.fromkeys(("first", "ignore_index", "grad_stride"), "i32"),
        **dict.fromkeys(("smoothing", "z_loss"), "fp32"),
    }
    constants = {"ROWS": rows, "COLUMNS": columns, "STAGES": stages} | constants
    return Compilation(f"kernels.cross_entropy.kernel:{name}", signature, constants, num_warps)


def moe(name: str, block: int, num_warps: int, **constants: Any) -> Compilation:
    pointers = ("x_ptr", "rows_ptr", "y_ptr", "d_y_ptr", "d_rows_ptr")
    numbers = ("choice_of_row_ptr", "row_of_choice_ptr", "ends_ptr", "counts_ptr", "running_ptr")
    signature = {
        **dict.fromkeys(pointers, "*bf16:16"),
        **dict.fromkeys(("weights_ptr", "d_weights_ptr"), "*fp32:16"),
        **dict.fromkeys(numbers, "*i32:16"),
        "experts_ptr": "*i64:16",
        **dict.fromkeys(("num_features", "num_tokens", "num_rows"), "i32:16"),
        **dict.fromkeys(("num_choices", "num_experts", "num_blocks"), "i32"),
    }
    return Compilation(f"kernels.moe_permute.kernel:{name}", signature, {"BLOCK": block} | constants, num_warps)


def grouped(name: str, tile: tuple[int, int, int], num_warps: int, num_stages: int, **constants: Any) -> Compilation:
    m, n, k = tile
    if name == "_weight_gradient":
        blocks = {"grad_desc": (k, m), "x_desc": (k, n)}
    else:
        blocks = {"rows_desc": (m, k), "weight_desc": (n, k) if constants["TRANSPOSED"] else (k, n)}
    numbers = ("num_rows", "num_terms", "width", "group_rows")
    signature = {
        **{key: f"tensordesc<bf16[{rows},{columns}]>" for key, (rows, columns) in blocks.items()},
        **dict.fromkeys(("y_ptr", "grad_ptr", "x_ptr", "d_weight_ptr"), "*bf16:16"),
        "ends_ptr": "*i32:16",
        **dict.fromkeys(numbers, "i32:16"),
        "num_groups": "i32",
    }
    tiles = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BAND": 8, "PRECISION": "ieee"}
    kernel = f"kernels.grouped_linear.kernel:{name}"
    return Compilation(kernel, signature, tiles | constants, num_warps, num_stages)


def test_kernels_compile_for_an_h200_without_spilling() -> None:
    """What the interpreter accepts and the compiler does not; memory read four bytes at a time."""
    bf16 = {"PARAMETER": "tl.bfloat16", "GRADIENT": "tl.bfloat16", "COPY": None, "STOCHASTIC": True}
    compilations = [
        adamw(8, 4),
        adamw(8, 8, MOMENT="tl.int8", **bf16),
        adamw(8, 4, MOMENT="tl.bfloat16", **bf16, RUN=False),
        Compilation(
            "kernels.global_norm.kernel:_partial_sums",
            {
                "chunks_ptr": "*i32:16",
                **dict.fromkeys(("addresses_ptr", "sizes_ptr"), "*i64:16"),
                "partial_ptr": "*fp32",
            },
            {"CHUNK": 16384, "BLOCK": 4096, "TYPE": "tl.bfloat16"},
            num_warps=8,
        ),
        Compilation(
            "kernels.global_norm.kernel:_total",
            {"partial_ptr": "*fp32:16", "total_ptr": "*fp64:16", "num_partials": "i32"},
            {"BLOCK": 4096},
            num_warps=16,
        ),
        cross_entropy("_forward", 4, 4096, 16, 1, SMOOTH=True, GRADIENT=True),
        cross_entropy("_gradient", 2, 8192, 32, 2),
        moe("_gather", 2048, 4, K=8),
        moe("_combine", 2048, 4, K=8, WEIGHTED=True),
        moe("_combine_backward", 2048, 4, K=8, CLEARED=64),
        moe("_count", 64, 4, EXPERTS=128),
        grouped("_rows_times_weights", (128, 256, 64), 8, 3, TRANSPOSED=True, GROUPS=128),
        grouped("_weight_gradient", (128, 256, 64), 8, 3),
        moe("_place", 64, 4, EXPERTS=128, MULTIPLE=8),
    ]
    for each, machine in zip(compilations, report(compilations), strict=True):
        assert machine.spills == 0, each
        assert machine.wide_loads > 0 or each.kernel in NARROW, each
