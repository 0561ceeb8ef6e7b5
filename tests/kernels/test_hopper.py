"""The row-wise and element-wise kernels compiled for Hopper in bf16, on shapes of real models; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

ROWS = 64  # of 8192: what is compiled does not depend on it, but for its divisibility by 16


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What training calls, each with a name."""
    from kernels.geglu import geglu_fused
    from kernels.layer_norm.op import _layer_norm, _layer_norm_backward
    from kernels.rms_norm.kernel import BACKWARD
    from kernels.rms_norm.op import _rms_norm, _rms_norm_backward, rms_norm_fp8
    from kernels.rope import rope, rope_qkv
    from kernels.softmax.op import _softmax, _softmax_backward
    from kernels.swiglu import swiglu_fp8, swiglu_fused, swiglu_fused_backward

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    x, weight, rstd, scale = draw(ROWS, 4096), draw(4096), torch.empty(ROWS), torch.empty(())
    yield "rms_norm", lambda: _rms_norm(x, weight, x, 1e-5)
    for config in BACKWARD.configs[:2]:  # one that is chosen, and one of fewer programs
        with BACKWARD.forced(config):
            yield f"rms_norm backward {config}", lambda: _rms_norm_backward(x, x, weight, rstd, x, 1e-5)
    yield "rms_norm fp8", lambda: (rms_norm_fp8(x, weight, 1e-5), rms_norm_fp8(x, weight, 1e-5, scale=scale))
    yield "layer_norm", lambda: _layer_norm(x, weight, weight, None, 1e-5)
    yield "layer_norm backward", lambda: _layer_norm_backward(x, x, weight, weight, rstd, rstd, None, 1e-5)
    q, k, qkv, table = (
        draw(1, ROWS, 32, 128),
        draw(1, ROWS, 8, 128),
        draw(1, ROWS, 48, 128),
        torch.empty(1, ROWS, 1, 64),
    )
    yield "rope", lambda: rope(q, k, table, table)
    yield "rope of queries", lambda: rope(q, None, table, table)
    yield "rope_qkv", lambda: rope_qkv(qkv, table, table, num_heads=32, num_kv_heads=8)
    gate_up, d_y = draw(ROWS, 2 * 14336), draw(ROWS, 14336)
    yield "swiglu", lambda: swiglu_fused(gate_up)
    yield "swiglu backward", lambda: swiglu_fused_backward(d_y, gate_up)
    yield "swiglu fp8", lambda: (swiglu_fp8(gate_up), swiglu_fp8(gate_up, scale=scale))
    yield "geglu", lambda: (geglu_fused(gate_up), geglu_fused(gate_up, "none"))
    for width in (4096, 32768, 131072):
        scores = draw(ROWS, width)
        yield f"softmax {width}", lambda scores=scores: _softmax(scores)  # type: ignore[misc]
        yield f"softmax backward {width}", lambda scores=scores: _softmax_backward(scores, scores)  # type: ignore[misc]


def main() -> None:
    """Prints what was compiled as JSON: names with their kernels."""
    from tests.kernels.hopper import Compiled, compiled

    result: dict[str, list[dict[str, Any]]] = {}
    for name, launch in launches():
        found: list[Compiled] = []
        with compiled(found):
            launch()
        result[name] = [asdict(kernel) for kernel in found]
    print(json.dumps(result))


def test_kernels_compile_for_hopper_without_spills_and_with_wide_loads() -> None:
    """What the interpreter accepts and the compiler does not; registers spilled to memory; loads of single numbers,
    each a fraction of the bandwidth; more shared memory than there is."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "tests.kernels.test_hopper"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert len(result) > 15
    for name, kernels in result.items():
        assert kernels, name
        for kernel in kernels:
            assert kernel["stack_bytes"] == 0, (name, kernel["kernel"], kernel["stack_bytes"])
            assert kernel["shared_bytes"] <= 227 * 1024, name
            assert kernel["wide_loads"], (name, kernel["kernel"])


if __name__ == "__main__":
    main()
