"""Compiles kernels for Hopper where there is no GPU: what the interpreter cannot say.

A test lists calls of ops on CPU tensors, and `compile_launches` makes them in a process without TRITON_INTERPRET: each
launch compiles its kernel for sm_90, as for the GPU with the types, alignment and constants of that very call, and runs
nothing. Results are uninitialised memory, so large tensors cost nothing while no op of torch reads or writes them.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.backend import interpreted

ON_A_GPU = {"EMULATE": False, "BITS": True}
"""Constants that a launch on CPU tensors sets for the interpreter, as they are on a GPU."""


@dataclass(frozen=True)
class Compiled:
    """Of one launch."""

    kernel: str
    num_warps: int
    registers: int  # per thread
    stack_bytes: int  # per thread; anything but 0 is registers spilled to memory
    shared_bytes: int
    wide_loads: bool  # 16 bytes at once or more, into registers or shared memory
    copy_engine: bool  # fetches tiles by descriptors (TMA)
    wgmma: bool  # matrix products of a whole warp group
    casts_used_twice: int  # to fp8


def compile_launches(module: str) -> dict[str, list[Compiled]]:
    """What the calls of `launches()` of a module, pairs of a name and a function, compile, by their names."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: [Compiled(**kernel) for kernel in kernels] for name, kernels in json.loads(done.stdout).items()}


def main() -> None:
    """The process of `compile_launches`: prints its result as JSON."""
    result: dict[str, list[dict[str, Any]]] = {}
    for name, launch in importlib.import_module(sys.argv[1]).launches():
        found: list[Compiled] = []
        with compiled(found):
            launch()
        assert name not in result, name
        result[name] = [asdict(kernel) for kernel in found]
    print(json.dumps(result))


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
        constants = {name: value for name, value in ON_A_GPU.items() if name in function.arg_names}

        def compile_only(*args: Any, **kwargs: Any) -> None:
            kernel = function.run(*args, grid=grid, warmup=True, **(kwargs | constants))
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
    ptx, about = kernel.asm["ptx"], kernel.metadata
    return Compiled(
        kernel=about.name,
        num_warps=about.num_warps,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=about.shared,
        wide_loads=re.search(r"ld\.global\S*\.v4|cp\.async\.(cg|bulk)", ptx) is not None,
        copy_engine="cp.async.bulk.tensor" in ptx,
        wgmma="wgmma.mma_async" in ptx,
        casts_used_twice=_casts_used_twice(ptx),
    )


def _casts_used_twice(ptx: str) -> int:
    """Casts of two numbers to fp8 that are packed into a word with another such cast and used elsewhere as well, which
    ptxas 12.8 and 12.9 translate wrongly."""
    casts = set(re.findall(r"cvt\.rn\.satfinite\.e\dm\dx2\.f32\s+(%rs\d+)", ptx))
    pairs = [pair for pair in re.findall(r"mov\.b32\s+%r\d+, \{(%rs\d+), (%rs\d+)\}", ptx) if casts.issuperset(pair)]
    packed = Counter(register for pair in pairs for register in pair)
    mentioned = Counter(re.findall(r"%rs\d+", ptx))
    return sum(mentioned[register] > times + 1 for register, times in packed.items())


if __name__ == "__main__":
    main()
