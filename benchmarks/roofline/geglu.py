"""GeGLU on the shapes of Gemma's MLPs: of two tensors, and of one projection's output, as a fused layer has it.

The second was not part of the committed results: which kernels a model takes (models/layers/mlp.py) follows the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.roofline.peers import liger
from benchmarks.roofline.problem import Problem, both_directions
from kernels.geglu import geglu, geglu_fused
from kernels.geglu.reference import geglu_fused_reference, geglu_reference

TABLE = ("kernels.swiglu.kernel:BLOCKS", "kernels.swiglu.kernel:BLOCKS")


def problems(device: torch.device) -> Iterator[Problem]:
    """Made one after the other, so that the memory of one is free before the next."""
    for rows, width, approximate in ((8192, 14336, "tanh"), (8192, 14336, "none"), (8192, 24576, "tanh")):
        gate, up = (torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        reference = partial(geglu_reference, approximate=approximate)
        functions = {
            "lattice": partial(geglu, approximate=approximate),
            "eager": reference,
            "compile": torch.compile(reference, dynamic=False),
            **(liger("geglu:LigerGELUMulFunction") if approximate == "tanh" else {}),
        }
        size, shape = gate.numel() * gate.element_size(), f"{approximate} {rows}x{width}"
        yield from both_directions("geglu", shape, functions, (gate, up), bytes=(3 * size, 5 * size), tuned=TABLE)
        gate_up = torch.cat((gate, up), dim=-1).detach().requires_grad_()
        reference = partial(geglu_fused_reference, approximate=approximate)
        functions = {
            "lattice": partial(geglu_fused, approximate=approximate),
            "eager": reference,
            "compile": torch.compile(reference, dynamic=False),
        }
        moved = (3 * size, 5 * size)
        yield from both_directions("geglu", f"fused {shape}", functions, (gate_up,), bytes=moved, tuned=TABLE)
