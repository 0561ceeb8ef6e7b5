"""Other projects' functions for the same problems, where they are installed. Written for Liger 0.8.5."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

LIGER = find_spec("liger_kernel") is not None


def liger(function: str, *constants: Any) -> dict[str, Callable[..., Any]]:
    """{"liger": the autograd function "module:Class" of liger_kernel.ops, called with the inputs and then the
    constants}, or nothing where Liger is not installed. What fails to import fails in the call."""

    def call(*inputs: Any) -> Any:
        module, name = function.split(":")
        return getattr(import_module(f"liger_kernel.ops.{module}"), name).apply(*inputs, *constants)

    return {"liger": call} if LIGER else {}
