"""RoPE on the heads of Llama-3-8B and of a model with many heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.roofline.peers import LIGER, liger
from benchmarks.roofline.problem import Problem, both_directions
from kernels.rope import rope, rope_qkv
from kernels.rope.reference import rope_qkv_reference, rope_reference

TABLE = ("kernels.rope.kernel:BLOCKS", "kernels.rope.kernel:BLOCKS")


def _liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's heads come before positions and its tables hold every angle twice."""
    cos, sin = (torch.cat((table, table), dim=-1)[:, :, 0] for table in (cos, sin))
    q, k = liger("rope:LigerRopeFunction")["liger"](q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for B, T, H, H_kv, K in ((2, 8192, 32, 8, 128), (4, 8192, 32, 8, 64), (1, 8192, 64, 8, 128)):
        make = partial(torch.randn, device=device, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.rand(1, T, 1, K // 2, device=device) * 6.28
        tables = (angles.cos(), angles.sin())
        inputs = (make(B, T, H, K), make(B, T, H_kv, K), *tables)
        moved = 2 * B * T * (H + H_kv) * K * 2 + T * K * 4
        functions = {
            "lattice": rope,
            "eager": rope_reference,
            "compile": torch.compile(rope_reference, dynamic=False),
            **({"liger": _liger} if LIGER else {}),
        }
        shape = f"{B}x{T}x{H}/{H_kv}x{K}"
        yield from both_directions("rope", shape, functions, inputs, bytes=(moved, moved), tuned=TABLE)
        heads = {"num_heads": H, "num_kv_heads": H_kv}
        functions = {
            "lattice": partial(rope_qkv, **heads),
            "eager": partial(rope_qkv_reference, **heads),
            "compile": torch.compile(partial(rope_qkv_reference, **heads), dynamic=False),
        }
        moved = 2 * B * T * (H + 2 * H_kv) * K * 2 + T * K * 4
        fused = (make(B, T, H + 2 * H_kv, K), *tables)
        yield from both_directions("rope", f"qkv {shape}", functions, fused, bytes=(moved, moved), tuned=TABLE)
