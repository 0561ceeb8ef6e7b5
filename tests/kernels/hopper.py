"""Compiles kernels for Hopper where there is no GPU: what the interpreter cannot say.

`compiled()` in a process without TRITON_INTERPRET: every launch inside it compiles its kernel for sm_90, as for the
GPU with the types, alignment and constants of that very call, and runs nothing. Results are uninitialised memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.backend import interpreted


@dataclass(frozen=True)
class Compiled:
    """Of one launch."""

    kernel: str
    num_warps: int
    registers: int  # per thread
    stack_bytes: int  # per thread; anything but 0 is registers spilled to memory
    shared_bytes: int
    wide_loads: bool  # 16 bytes at once or more, into registers or shared memory
    wgmma: bool  # matrix products of a whole warp group


class _Driver:
    """All that compilation asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled(found: list[Compiled]) -> Iterator[None]:
    """Appends to `found` what the launches of ops on CPU tensors would run on the GPU."""

    def launch(function: Any, grid: Any) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            kernel = function.run(*args, grid=grid, warmup=True, **kwargs)
            found.append(_describe(kernel.result() if hasattr(kernel, "result") else kernel))

        return compile_only

    driver.set_active(_Driver())  # type: ignore[arg-type]
    with patch.object(JITFunction, "__getitem__", launch), interpreted():
        yield


def _describe(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    wide = re.search(r"ld\.global\S*\.v4|cp\.async\.(cg|bulk)", kernel.asm["ptx"]) is not None
    about = kernel.metadata
    return Compiled(
        about.name, about.num_warps, registers, stack, about.shared, wide, "wgmma.mma_async" in kernel.asm["ptx"]
    )
