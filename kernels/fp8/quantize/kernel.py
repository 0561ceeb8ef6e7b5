"""Quantization to fp8 in Triton. Largest magnitudes are found as integers: for |x| the order of fp32 numbers is that of
their bits, NaN above inf above all else, so NaN is not lost, and an atomic maximum has one result in any order.

x [R, C] contiguous; the transposed copy is [C, R padded to 16]. Scales are multiplied by as inverses, as in the
reference, so results are the reference's to the bit. EMULATE is for the interpreter, whose casts to fp8 do not round:
there a number is rounded in fp32 before.

A cast to fp8 must not be used twice. ptxas 12.8 and 12.9 (Triton 3.6 and 3.7 bring 12.8; 13.0 does not do it) merge the
casts of four numbers into the 32-bit word of a vectorised store and leave other uses of the first two undefined: on an
H200 two columns of four were garbage in transposed copies. So where both copies have the same numbers, the second is
multiplied by `one` as well, 1.0, which no compiler knows, and cast for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned, num_multiprocessors
from kernels.fp8.formats import BLOCK, LARGEST, block_outputs, blocks, padded


@dataclass(frozen=True)
class Flat:
    """Elements of one program, and its warps."""

    size: int
    num_warps: int


@dataclass(frozen=True)
class Tile:
    """Rows and columns of one program, and its warps."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Square:
    """How a program works on 128x128 elements."""

    num_warps: int
    runs: bool  # a thread holds rows that are neighbours, and writes pieces of the transposed copy
    registers: int | None = None  # of a thread at most
    again: bool = False  # x is read for each copy, from the L1 cache, and not kept in registers

    def step(self, rows: int, element_size: int, *, transpose: bool) -> int:
        """STEP of _fp8_blocks; 16 bytes are read at a time."""
        return min(rows, self.num_warps * 32 * 16 // (BLOCK * element_size)) if self.runs and transpose else rows


# With a scale that is given every program ends with an atomic maximum: the fewer the better.
FLAT = Tuned(
    (Flat(2048, 4), Flat(4096, 8), Flat(8192, 8), Flat(16384, 16), Flat(16384, 8)),
    lambda scaled: Flat(8192, 8) if scaled else Flat(4096, 8),
)
TILE = Tuned((Tile(64, 128, 4), Tile(128, 64, 4), Tile(128, 128, 8)), lambda rows, columns: Tile(128, 64, 4))
BYTES = Tuned((Tile(128, 128, 8), Tile(128, 128, 4), Tile(64, 128, 4)), lambda rows, columns: Tile(128, 128, 8))
ROWS_OF_BLOCKS = Tuned((16, 32, 64), lambda rows, columns: 32)  # of one program that writes no transposed copy
SQUARES = Tuned(
    (
        Square(4, False),
        Square(4, True),
        Square(4, True, again=True),
        Square(8, False, 128),
        Square(8, True, 128),
        Square(8, True, 128, again=True),
        Square(8, True, 80, again=True),
        Square(16, True, 64, again=True),
    ),
    lambda rows, columns, square: Square(8, True, 128) if square else Square(4, True),
)  # of 128x128
PROGRAMS_PER_MULTIPROCESSOR = 8  # that look for the largest magnitude of a tensor
LONGEST_ROW = 16384  # kept in registers; longer ones are read twice


@triton.jit
def _largest(bits, axis: tl.constexpr):
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr):
    """(scale, inverse): formats.scale_from_amax. The comparison leaves NaN where it is."""
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    if EMULATE:
        ratio = tl.div_rn(amax, largest)
    else:
        # A rounded quotient with its remainder, divided in the same way, added: the nearest (Markstein 1990). Divisions
        # by the compiler branch, and each thread makes those of all rows and columns that it holds.
        part = tl.full(amax.shape, 1.0 / LARGEST, tl.float32)
        ratio = amax * part
        ratio = tl.where(amax < float("inf"), tl.fma(tl.fma(-ratio, largest, amax), part, ratio), amax)
    scale = tl.where(amax == 0.0, 1.0, tl.where(ratio < 1.1754943508222875e-38, 1.1754943508222875e-38, ratio))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where((bits & 0x7FFFFFFF) >= 0x7F800000, scale, up)  # inf and NaN stay
    return scale, _inverse(scale, EMULATE)


@triton.jit
def _inverse(x, EMULATE: tl.constexpr):
    """1 / x rounded as IEEE says, for x > 0 with a normal inverse, inf and NaN."""
    one = tl.full(x.shape, 1.0, tl.float32)
    if EMULATE:
        return tl.div_rn(one, x)
    near = 1.0 / x  # off by 2 units in the last place at most
    y = tl.fma(tl.fma(-x, near, one), near, near)
    y = tl.fma(tl.fma(-x, y, one), y, y)
    # Right for all mantissas but that of ones alone, whose inverse is next to the middle of two numbers: below it.
    ones = (x.to(tl.int32, bitcast=True) & 0x7FFFFF) == 0x7FFFFF
    y = (y.to(tl.int32, bitcast=True) + ones.to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where(x < float("inf"), y, near)


@triton.jit
def to_fp8(x, dtype: tl.constexpr, LARGEST: tl.constexpr, EMULATE: tl.constexpr):
    if EMULATE:
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        MANTISSA: tl.constexpr = 3 if dtype == tl.float8e4nv else 2
        LOWEST: tl.constexpr = 127 - 6 if dtype == tl.float8e4nv else 127 - 14
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, LOWEST)
        # 1.5 * 2^23 units in the last place of the format: adding it leaves no bits below.
        magic = (((exponent - MANTISSA + 23) << 23) | 0x400000).to(tl.float32, bitcast=True)
        rounded = (x + magic) - magic
        bits = (rounded.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -0x80000000)
        cast = bits.to(tl.float32, bitcast=True).to(dtype).to(tl.uint8, bitcast=True)  # with the sign of minus zero
        return tl.where(x != x, 0x7F, cast).to(tl.uint8).to(dtype, bitcast=True)  # NaN, which the cast loses
    else:
        return x.to(dtype)  # one instruction that saturates and keeps NaN


@triton.jit
def _fp8_amax(x_ptr, partials_ptr, num_elements, num_blocks, SIZE: tl.constexpr):
    """Each program the largest magnitude of a run of blocks."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    largest = tl.zeros((SIZE,), dtype=tl.int32)
    offsets = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    for _ in range(program, num_blocks, programs):
        x = tl.load(x_ptr + offsets, mask=offsets < num_elements, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _magnitude_bits(x))
        offsets += programs * SIZE
    tl.store(partials_ptr + program, _largest(largest, 0))


@triton.jit
def _tensor_scale(
    scale_ptr, amax_ptr, source_ptr, num_partials, first,
    DYNAMIC: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, PARTIALS: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """The inverse scale of a tensor: of partial maxima at source_ptr, or of the scale that is there. The first program
    writes the scale, which so gets memory of its own, as a product by cuBLASLt wants it: aligned."""
    if DYNAMIC:
        n = tl.arange(0, PARTIALS)
        partials = tl.load(source_ptr + n, mask=n < num_partials, other=0.0)
        amax = _largest(_magnitude_bits(partials), 0)
        scale, inverse = _scale_of(amax, LARGEST, POWER_OF_TWO, EMULATE)
        if first:
            tl.store(amax_ptr, amax)
    else:
        scale = tl.load(source_ptr)
        inverse = _inverse(scale, EMULATE)
    if first:
        tl.store(scale_ptr, scale)
    return inverse


@triton.jit
def _fp8_cast(
    x_ptr, y_ptr, scale_ptr, amax_ptr, source_ptr, num_elements, num_partials,
    SIZE: tl.constexpr, DYNAMIC: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    PARTIALS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    # Last block first: what _fp8_amax read last may still lie in the L2 cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    inverse = _tensor_scale(
        scale_ptr, amax_ptr, source_ptr, num_partials, block == 0, DYNAMIC, LARGEST, POWER_OF_TWO, PARTIALS, EMULATE
    )
    offsets = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, to_fp8(x * inverse, y_ptr.dtype.element_ty, LARGEST, EMULATE), mask=inside)
    if not DYNAMIC:
        tl.atomic_max(amax_ptr, tl.max(_magnitude_bits(x), axis=0), sem="relaxed")


@triton.jit
def _fp8_cast_transpose(
    x_ptr, y_ptr, t_ptr, scale_ptr, amax_ptr, source_ptr, R, C, R_padded, num_partials, one,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DYNAMIC: tl.constexpr, LARGEST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, PARTIALS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile_of(C, COLUMNS)
    inverse = _tensor_scale(
        scale_ptr, amax_ptr, source_ptr, num_partials, (row_tile == 0) & (column_tile == 0),
        DYNAMIC, LARGEST, POWER_OF_TWO, PARTIALS, EMULATE,
    )  # fmt: skip
    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    x = _load_tile(x_ptr, r, c, R, C, "")
    _store_tile(y_ptr, to_fp8(x * inverse, y_ptr.dtype.element_ty, LARGEST, EMULATE), r, c, R, C)
    t = to_fp8(x * (inverse * one), y_ptr.dtype.element_ty, LARGEST, EMULATE)
    _store_transposed(t_ptr, t, r, c, R_padded, C)
    if not DYNAMIC:
        tl.atomic_max(amax_ptr, tl.max(tl.max(_magnitude_bits(x), axis=1), axis=0), sem="relaxed")


@triton.jit
def _tile_of(C, COLUMNS: tl.constexpr):
    """Neighbouring programs take neighbouring columns; last tile first, see _fp8_cast."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(C, COLUMNS)
    return program // across, program % across


@triton.jit
def _load_tile(x_ptr, r, c, R, C, POLICY: tl.constexpr):
    """POLICY differs between two reads of the same, which the compiler would make one."""
    inside = (r < R)[:, None] & (c < C)[None, :]
    pointers = x_ptr + r.to(tl.int64)[:, None] * C + c[None, :]
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _store_tile(y_ptr, y, r, c, R, C):
    tl.store(y_ptr + r.to(tl.int64)[:, None] * C + c[None, :], y, mask=(r < R)[:, None] & (c < C)[None, :])


@triton.jit
def _store_transposed(t_ptr, y, r, c, R_padded, C):
    """y [rows, columns] of the tile at (c, r). Rows from R to R_padded were loaded as zeros."""
    _store_rows(t_ptr, tl.trans(y), r, c, R_padded, C)


@triton.jit
def _store_rows(t_ptr, t, r, c, R_padded, C):
    inside = (c < C)[:, None] & (r < R_padded)[None, :]
    tl.store(t_ptr + c.to(tl.int64)[:, None] * R_padded + r[None, :], t, mask=inside)


@triton.jit
def _in_order(y, STEP: tl.constexpr):
    """y [rows, columns] as _fp8_blocks lays its rows, transposed and in their order: only names of registers change."""
    ROWS: tl.constexpr = y.shape[0]
    COLUMNS: tl.constexpr = y.shape[1]
    return tl.reshape(tl.permute(tl.reshape(y, (ROWS // STEP, STEP, COLUMNS)), (2, 1, 0)), (COLUMNS, ROWS))


@triton.jit
def _fp8_rowwise(
    x_ptr, y_ptr, scale_ptr, C,
    SIZE: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, EMULATE: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """A row per program; read once if it fits."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * C
    y_ptr += row * C
    c = tl.arange(0, SIZE)
    x = tl.load(x_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bits = _magnitude_bits(x)
    if not ONCE:
        for start in range(SIZE, C, SIZE):
            part = tl.load(x_ptr + start + c, mask=start + c < C, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, _magnitude_bits(part))
    scale, inverse = _scale_of(_largest(bits, 0), LARGEST, POWER_OF_TWO, EMULATE)
    tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + c, to_fp8(x * inverse, y_ptr.dtype.element_ty, LARGEST, EMULATE), mask=c < C)
    if not ONCE:
        for start in range(SIZE, C, SIZE):
            part = tl.load(x_ptr + start + c, mask=start + c < C, other=0.0).to(tl.float32)
            y = to_fp8(part * inverse, y_ptr.dtype.element_ty, LARGEST, EMULATE)
            tl.store(y_ptr + start + c, y, mask=start + c < C)


@triton.jit
def _fp8_row_and_column_amax(x_ptr, row_ptr, column_ptr, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0)
    across = tl.cdiv(C, COLUMNS)
    r = (program // across) * ROWS + tl.arange(0, ROWS)
    c = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    bits = _magnitude_bits(_load_tile(x_ptr, r, c, R, C, ""))
    tl.atomic_max(row_ptr + r, tl.max(bits, axis=1), mask=r < R, sem="relaxed")
    tl.atomic_max(column_ptr + c, tl.max(bits, axis=0), mask=c < C, sem="relaxed")


@triton.jit
def _fp8_cast_rows_and_columns(
    x_ptr, y_ptr, t_ptr, row_amax_ptr, column_amax_ptr, row_scale_ptr, column_scale_ptr, R, C, R_padded,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile_of(C, COLUMNS)
    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    x = _load_tile(x_ptr, r, c, R, C, "")
    amax = tl.load(row_amax_ptr + r, mask=r < R, other=0).to(tl.float32, bitcast=True)
    scale, inverse = _scale_of(amax, LARGEST, POWER_OF_TWO, EMULATE)
    tl.store(row_scale_ptr + r, scale, mask=(r < R) & (column_tile == 0))
    _store_tile(y_ptr, to_fp8(x * inverse[:, None], y_ptr.dtype.element_ty, LARGEST, EMULATE), r, c, R, C)
    amax = tl.load(column_amax_ptr + c, mask=c < C, other=0).to(tl.float32, bitcast=True)
    scale, inverse = _scale_of(amax, LARGEST, POWER_OF_TWO, EMULATE)
    tl.store(column_scale_ptr + c, scale, mask=(c < C) & (row_tile == 0))
    y = to_fp8(x * inverse[None, :], y_ptr.dtype.element_ty, LARGEST, EMULATE)
    _store_transposed(t_ptr, y, r, c, R_padded, C)


@triton.jit
def _fp8_blocks(
    x_ptr, y_ptr, scale_ptr, t_ptr, t_scale_ptr, R, C, R_padded, one,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    SQUARE: tl.constexpr, TRANSPOSE: tl.constexpr, EMULATE: tl.constexpr, STEP: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """A tile ROWS x 128, of 128 rows for square blocks and for the transposed copy. Scales of 1x128 lie column by
    column in memory, as a tile of a matrix product reads them; those of 128x128 row by row.

    The program's threads read STEP rows at once, and a thread every STEP-th row of the tile. Rows lie in the tile such
    that these are neighbours in x, so the transposed copy has pieces of its rows in one thread."""
    program = tl.program_id(0)
    across = tl.cdiv(C, COLUMNS)
    row_tile, column_tile = program // across, program % across
    n = tl.arange(0, ROWS)
    r = row_tile * ROWS + n % STEP * (ROWS // STEP) + n // STEP
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    x = _load_tile(x_ptr, r, c, R, C, "evict_last" if AGAIN else "")
    bits = _magnitude_bits(x)
    by_row = tl.max(bits, axis=1)
    if SQUARE:
        scale, inverse = _scale_of(_largest(by_row, 0), LARGEST, POWER_OF_TWO, EMULATE)
        tl.store(scale_ptr + row_tile * across + column_tile, scale)
    else:
        scale, inverse = _scale_of(by_row.to(tl.float32, bitcast=True), LARGEST, POWER_OF_TWO, EMULATE)
        inverse = inverse[:, None]
        tl.store(scale_ptr + column_tile.to(tl.int64) * R + r, scale, mask=r < R)
    if TRANSPOSE and SQUARE:
        tl.store(t_scale_ptr + column_tile * tl.cdiv(R, ROWS) + row_tile, scale)
        t_inverse = inverse * one
    elif TRANSPOSE:
        scale, t_inverse = _scale_of(_largest(bits, 0), LARGEST, POWER_OF_TWO, EMULATE)
        t_inverse = t_inverse[None, :]
        tl.store(t_scale_ptr + row_tile.to(tl.int64) * C + c, scale, mask=c < C)
    if AGAIN:
        x = _load_tile(x_ptr, r, c, R, C, "")
    _store_tile(y_ptr, to_fp8(x * inverse, y_ptr.dtype.element_ty, LARGEST, EMULATE), r, c, R, C)
    if TRANSPOSE:
        if AGAIN:
            x = _load_tile(x_ptr, r, c, R, C, "evict_first")
        t = to_fp8(_in_order(x * t_inverse, STEP), y_ptr.dtype.element_ty, LARGEST, EMULATE)
        _store_rows(t_ptr, t, row_tile * ROWS + n, c, R_padded, C)


@triton.jit
def _fp8_transpose(x_ptr, t_ptr, R, C, R_padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of bytes."""
    row_tile, column_tile = _tile_of(C, COLUMNS)
    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < R)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0)
    _store_transposed(t_ptr, x, r, c, R_padded, C)


def transpose(data: Tensor) -> Tensor:
    """[C, R padded to 16] of fp8 data [R, C], contiguous and not empty."""
    R, C = data.shape
    transposed = torch.empty(C, padded(R), dtype=data.dtype, device=data.device)
    tile = BYTES(R, C)
    _fp8_transpose[(triton.cdiv(padded(R), tile.rows) * triton.cdiv(C, tile.columns),)](
        data.view(torch.uint8), transposed.view(torch.uint8), R, C, padded(R),
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    return transposed


def amax_partials(x: Tensor) -> Tensor:
    """fp32 [P]: the largest magnitudes of parts of contiguous x, which is not empty."""
    n, flat = x.numel(), FLAT(False)
    num_blocks = triton.cdiv(n, flat.size)
    programs = min(num_blocks, PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(x.device))
    partials = torch.empty(programs, dtype=torch.float32, device=x.device)
    _fp8_amax[(programs,)](x, partials, n, num_blocks, SIZE=flat.size, num_warps=flat.num_warps)
    return partials


def quantize_tensorwise(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, power_of_two: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(data, transposed, scale used, amax) of x [R, C], contiguous and not empty; dynamic if no scale is given."""
    R, C = x.shape
    data = torch.empty(R, C, dtype=dtype, device=x.device)
    source = amax_partials(x) if scale is None else scale
    amax = torch.empty((), device=x.device) if scale is None else torch.zeros((), device=x.device)
    used = torch.empty((), device=x.device)
    num_partials = source.numel()
    shared = {
        "DYNAMIC": scale is None,
        "LARGEST": LARGEST[dtype],
        "POWER_OF_TWO": power_of_two,
        "PARTIALS": triton.next_power_of_2(num_partials),
        "EMULATE": not x.is_cuda,
    }
    maximum = amax if scale is None else amax.view(torch.int32)  # the atomic maximum is one of bits
    if transpose:
        tile = TILE(R, C)
        transposed = torch.empty(C, padded(R), dtype=dtype, device=x.device)
        grid = (triton.cdiv(padded(R), tile.rows) * triton.cdiv(C, tile.columns),)
        _fp8_cast_transpose[grid](
            x, data, transposed, used, maximum, source, R, C, padded(R), num_partials, 1.0,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps, **shared,
        )  # fmt: skip
        return data, transposed, used, amax
    flat = FLAT(scale is not None)
    grid = (triton.cdiv(x.numel(), flat.size),)
    _fp8_cast[grid](
        x, data, used, maximum, source, x.numel(), num_partials, SIZE=flat.size, num_warps=flat.num_warps, **shared
    )
    return data, data.new_empty(0), used, amax


def quantize_rowwise(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(data, scale, transposed, its scale) of x [R, C], contiguous and not empty."""
    R, C = x.shape
    data = torch.empty(R, C, dtype=dtype, device=x.device)
    scale = torch.empty(R, 1, device=x.device)
    shared = {"LARGEST": LARGEST[dtype], "POWER_OF_TWO": power_of_two, "EMULATE": not x.is_cuda}
    if not transpose:
        size = min(triton.next_power_of_2(C), LONGEST_ROW)
        warps = min(max(size // 1024, 1), 8 if size < LONGEST_ROW else 16)
        _fp8_rowwise[(R,)](x, data, scale, C, SIZE=size, ONCE=size >= C, num_warps=warps, **shared)
        return data, scale, data.new_empty(0), scale.new_empty(0)
    transposed = torch.empty(C, padded(R), dtype=dtype, device=x.device)
    transposed_scale = torch.empty(C, 1, device=x.device)
    amax = torch.zeros(R + C, dtype=torch.int32, device=x.device)
    tile = TILE(R, C)
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps}
    grid = (triton.cdiv(padded(R), tile.rows) * triton.cdiv(C, tile.columns),)
    _fp8_row_and_column_amax[grid](x, amax, amax[R:], R, C, **sizes)
    _fp8_cast_rows_and_columns[grid](
        x, data, transposed, amax, amax[R:], scale, transposed_scale, R, C, padded(R), **sizes, **shared
    )
    return data, scale, transposed, transposed_scale


def quantize_blocks(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, square: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(data, scale, transposed, its scale) of x [R, C], contiguous and not empty."""
    R, C = x.shape
    data = torch.empty(R, C, dtype=dtype, device=x.device)
    scale, transposed, transposed_scale = block_outputs(x, dtype, square, transpose)
    rows = BLOCK if square or transpose else ROWS_OF_BLOCKS(R, C)
    work = SQUARES(R, C, square) if rows == BLOCK else Square(4, False)
    _fp8_blocks[(triton.cdiv(R, rows) * blocks(C),)](
        x, data, scale, transposed, transposed_scale, R, C, padded(R), 1.0, ROWS=rows, COLUMNS=BLOCK,
        LARGEST=LARGEST[dtype], POWER_OF_TWO=power_of_two, SQUARE=square, TRANSPOSE=transpose, EMULATE=not x.is_cuda,
        STEP=work.step(rows, x.element_size(), transpose=transpose), AGAIN=work.again, num_warps=work.num_warps,
        maxnreg=work.registers,
    )  # fmt: skip
    return data, scale, transposed, transposed_scale
