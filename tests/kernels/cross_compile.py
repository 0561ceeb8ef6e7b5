"""Kernels compiled for an H200 on any machine, to see what the interpreter does not: types, layouts, registers.

Triton decides at import whether functions are interpreted, so this runs in a process of its own: `report` starts one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """One kernel for one set of types; whatever is not in the signature is a constant, a string `tl.NAME` a type."""

    kernel: str  # module:function
    signature: Mapping[str, str]  # "*bf16", "i32", "fp32"; with a suffix ":16" divisible by 16
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Machine:
    """What ptxas says about it, and how often the code has something. Filled by `report`."""

    registers: int
    spills: int  # bytes stored
    wide_loads: int  # of 16 bytes, or asynchronous copies
    wgmma: int


def report(compilations: Sequence[Compilation]) -> list[Machine]:
    """Compiles all of them. Raises with the compiler's message if one cannot be."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cross_compile"],
        input=json.dumps([asdict(each) for each in compilations]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    return [Machine(**each) for each in json.loads(done.stdout)]


def _compile(each: dict[str, Any]) -> dict[str, int]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    module, name = each["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    constants = {
        key: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for key, value in each["constants"].items()
    }
    signature, attributes = {}, {}
    for number, key in enumerate(kernel.arg_names):
        kind, _, divisor = each["signature"].get(key, "constexpr").partition(":")
        signature[key] = kind
        if divisor:
            attributes[(number,)] = [["tt.divisibility", int(divisor)]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": each["num_warps"], "num_stages": each["num_stages"]}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    ptxas = str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)|cp\.async\.cg|cp\.async\.bulk", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    print(json.dumps([_compile(each) for each in json.load(sys.stdin)]))
