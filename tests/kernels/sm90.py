"""Compile Triton kernels for an H100 or H200 where there is none: ptxas comes with Triton. Not in the interpreter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def resources(
    kernel: Any, arguments: Mapping[str, str], constants: Mapping[str, Any], *, num_warps: int = 4, num_stages: int = 3
) -> dict[str, int]:
    """Registers per thread, bytes spilled and bytes of shared memory of a kernel, and how many casts it uses twice.

    arguments: Triton types by name, "*bf16" or "i32"; pointers and the integers written "i32:16" are multiples of 16.
    """
    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, type_ in arguments.items()
        if type_.startswith("*") or type_.endswith(":16")
    }
    signature = {name: arguments[name].removesuffix(":16") if name in arguments else "constexpr" for name in names}
    compiled = triton.compile(
        ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        command = [ptxas, "-v", "-arch=sm_90a", source, "-o", Path(folder) / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    casts = _casts_used_twice(compiled.asm["ptx"])
    return {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared, "casts": casts}


def _casts_used_twice(ptx: str) -> int:
    """Casts of two numbers to fp8 that are packed into a word with another such cast and used elsewhere as well, which
    ptxas 12.8 and 12.9 translate wrongly."""
    casts = set(re.findall(r"cvt\.rn\.satfinite\.e\dm\dx2\.f32\s+(%rs\d+)", ptx))
    pairs = [pair for pair in re.findall(r"mov\.b32\s+%r\d+, \{(%rs\d+), (%rs\d+)\}", ptx) if casts.issuperset(pair)]
    packed = Counter(register for pair in pairs for register in pair)
    mentioned = Counter(re.findall(r"%rs\d+", ptx))
    return sum(mentioned[register] > times + 1 for register, times in packed.items())
