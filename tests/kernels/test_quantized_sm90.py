"""The quantized kernels and the matrix product compiled for an H200, in bf16, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

N16 = "i32:16"
FP8 = {"LARGEST": 448.0, "POWER_OF_TWO": False, "EMULATE": False}


def specifications() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], Any]]:
    """Kernels, the types of their arguments, their constants, and the configuration whose warps and stages count."""
    import kernels.fp8.matmul.kernel as fp8_matmul
    import kernels.fp8.quantize.kernel as quantize
    import kernels.int4_linear.kernel as int4
    import kernels.int8_linear.kernel as int8
    import kernels.matmul.kernel as matmul
    import kernels.nf4.kernel as nf4

    copies = {"x_ptr": "*bf16", "y_ptr": "*fp8e4nv", "t_ptr": "*fp8e4nv", "R": N16, "C": N16, "R_padded": N16}
    tensor = {"scale_ptr": "*fp32", "amax_ptr": "*i32", "source_ptr": "*fp32", "num_partials": "i32"}
    flat, tile = quantize.FLAT(True), quantize.TILE(8192, 4096)
    whole = {"x_ptr": "*bf16", "y_ptr": "*fp8e5", "num_elements": "i64:16"}
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    given = {**FP8, "DYNAMIC": False, "PARTIALS": 1}
    yield quantize._cast, {**whole, **tensor}, {"SIZE": flat.size, **given}, flat
    dynamic = {**FP8, "DYNAMIC": True, "PARTIALS": 1024}
    for kind in ("*bf16", "*fp32"):
        found = {**copies, **tensor, "x_ptr": kind, "amax_ptr": "*fp32", "one": "fp32"}
        yield quantize._cast_transpose, found, {**sizes, **dynamic}, tile
    both = ("row_amax_ptr", "column_amax_ptr", "row_scale_ptr", "column_scale_ptr")
    amax = {name: "*i32" if "amax" in name else "*fp32" for name in both}
    yield quantize._cast_rows_and_columns, {**copies, **amax}, {**sizes, **FP8}, tile
    in_blocks = {**copies, "scale_ptr": "*fp32", "t_scale_ptr": "*fp32", "one": "fp32"}
    constants = {"ROWS": 128, "COLUMNS": 128, **FP8, "TRANSPOSE": True}
    for square in (False, True):
        work = quantize.SQUARES(8192, 4096, square)
        step = {"STEP": work.step(128, 2, transpose=True), "AGAIN": work.again}
        tile = quantize.Tile(128, 128, work.num_warps)
        yield quantize._blocks, in_blocks, {**constants, **step, "SQUARE": square}, tile

    block = fp8_matmul.TILES(8192, 8192, 8192, True)
    operands = {f"{name}_desc": f"tensordesc<fp8e4nv[{size},128]>" for name, size in
                (("a", block.rows), ("b", block.columns))}  # fmt: skip
    scales = {"y_ptr": "*bf16", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    constants = {"ROWS": block.rows, "COLUMNS": block.columns, "GROUP": 8, "BLOCK": 128, "SQUARE": True, "BIAS": True}
    yield fp8_matmul._matmul, {**operands, **scales, "M": N16, "N": N16, "K": N16}, constants, block

    out = {
        "x_ptr": "*bf16",
        "bias_ptr": "*bf16",
        "y_ptr": "*bf16",
        "parts_ptr": "*fp32",
        "M": "i32",
        "N": N16,
        "K": N16,
    }
    for rows in (16, 4096):
        t8, t4 = int8.TILES(rows, 8192, 8192, 2), int4.TILES(rows, 28672, 64, 2)
        constants = {"ROWS": t8.rows, "FEATURES": t8.features, "SPLITS": t8.splits, "GROUP": 8, "BIAS": True}
        words = {"data_ptr": "*i8", "scale_ptr": "*fp32", "steps": "i32"}
        yield int8._linear, {**out, **words}, {**constants, "STEP": t8.step}, t8
        constants = {"ROWS": t4.rows, "FEATURES": t4.features, "SPLITS": t4.splits, "GROUP": 8, "BIAS": True}
        words = {"words_ptr": "*i16", "pairs_ptr": "*i32", "groups": "i32", "groups_per_part": "i32"}
        bits = {"QUARTER": 32, "SCALE_SUMS": rows <= 64, "BITS": True}
        yield int4._linear, {**out, **words}, {**constants, **bits}, t4

    tables = ("scales_ptr", "offset_ptr", "levels_ptr", "magnitude_levels_ptr")
    packed = {"packed_ptr": "*u8", "magnitudes_ptr": "*u8", "y_ptr": "*bf16", "num_values": N16}
    t = nf4.TILES(1 << 30)
    constants = {"BLOCKS": t.blocks, "HALF": 32, "GROUP": 256}
    yield nf4._dequantize, {**packed, **dict.fromkeys(tables, "*fp32")}, constants, t

    m = matmul.TILES(8192, 8192, 8192, 2)
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "y_ptr", "bias_ptr", "residual_ptr", "h_ptr"), "*bf16")
    numbers = dict.fromkeys(("M", "N", "K", "a_row", "b_k"), N16)
    constants = {"ROWS": m.rows, "COLUMNS": m.columns, "STEP": m.step, "GROUP": m.group, "a_k": 1, "b_column": 1}
    nothing = dict.fromkeys(("BIAS", "GELU", "RESIDUAL", "SAVE"), False)
    yield matmul._matmul, {**pointers, **numbers}, {**constants, **nothing}, m


def main() -> None:
    """Prints what each needs, as JSON."""
    from tests.kernels.sm90 import resources

    for kernel, arguments, constants, config in specifications():
        stages = getattr(config, "num_stages", 3)
        used = resources(kernel, arguments, constants, num_warps=config.num_warps, num_stages=stages)
        print(json.dumps({"kernel": kernel.__module__ + kernel.__name__, "warps": config.num_warps, **used}))


def test_the_kernels_compile_for_an_h200_and_fit() -> None:
    """What the interpreter accepts and the compiler does not; accumulators that spill; more shared memory than 227
    KiB; casts to fp8 of which ptxas loses bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_quantized_sm90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 13
    for line in lines:
        assert line["spilled"] == 0, line
        assert line["casts"] == 0, line
        assert line["shared"] <= 227 * 1024, line
        assert line["registers"] * line["warps"] * 32 <= 65536, line


if __name__ == "__main__":
    main()
