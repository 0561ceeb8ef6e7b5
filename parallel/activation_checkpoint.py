"""Activation checkpointing (Chen et al., 1604.06174): trade recomputation in backward for activation memory.

Applied to a block's `forward`, not as a wrapper module, so parameter names and FSDP's hooks stay where they are.
Nothing here needs the random state: dropout is a function of position (models/layers/dropout.py).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from parallel.problem import Problem, values

MODES = ("none", "full", "selective", "offload", "budget")


@dataclass(frozen=True)
class ActivationCheckpoint:
    """What is kept between forward and backward of a block.

    none: everything. full: the block's input. selective: outputs of the ops in `save`. offload: the input, in (pinned)
    host memory. budget: one of the first three for each block (parallel/activation_budget.py chooses).
    """

    mode: str = "none"
    save: list[str] = field(default_factory=list)  # selective: "aten.mm", or "aten.mm#2" for its third call alone


def resolve_op(name: str) -> torch._ops.OpOverload | None:
    """`aten.mm` or `aten.mm#2` -> torch.ops.aten.mm.default; None when torch has no such op, or the number is none."""
    op: Any = torch.ops
    name, hash_sign, number = name.partition("#")
    if hash_sign and not number.isdecimal():
        return None
    for part in name.split("."):
        op = getattr(op, part, None)
        if op is None:
            return None
    if isinstance(op, torch._ops.OpOverloadPacket):
        return getattr(op, "default", None)
    return op if isinstance(op, torch._ops.OpOverload) else None


def op_name(op: torch._ops.OpOverload) -> str:
    """The name that `resolve_op` knows this op by."""
    overload = "" if op._overloadname == "default" else f".{op._overloadname}"
    return f"{op.namespace}.{op._opname}{overload}"


def problems(config: ActivationCheckpoint) -> list[str]:
    """Every reason why this cannot be applied, one line each."""
    found: list[str] = []
    if config.mode not in MODES:
        known = values("model.activation_checkpoint", MODES)
        found.append(Problem(f"model.activation_checkpoint={config.mode} is unknown", known))
    if config.mode == "selective":
        unknown = [name for name in config.save if resolve_op(name) is None]
        if unknown:
            found.append(f"model.activation_checkpoint_save={unknown} are not torch ops; write them as aten.mm")
        if not config.save:
            found.append("model.activation_checkpoint_save=[] keeps nothing; use activation_checkpoint=full for that")
    return found


def _selective_contexts(saved: Mapping[torch._ops.OpOverload, frozenset[int] | None]) -> Any:
    """Contexts of one forward and its recomputation. saved: numbers of the calls of an op that are kept; None: all."""
    counts: dict[bool, Counter[torch._ops.OpOverload]] = {False: Counter(), True: Counter()}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op not in saved:
            return CheckpointPolicy.PREFER_RECOMPUTE
        number = counts[ctx.is_recompute][op]
        counts[ctx.is_recompute][op] += 1
        numbers = saved[op]
        keep = numbers is None or number in numbers
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _saved_calls(names: Sequence[str]) -> dict[torch._ops.OpOverload, frozenset[int] | None]:
    """`ActivationCheckpoint.save` by op: the numbers of its calls, or None for all of them."""
    saved: dict[torch._ops.OpOverload, frozenset[int] | None] = {}
    for name in names:
        op, (_, _, number) = resolve_op(name), name.partition("#")
        if op is None:
            continue
        before = saved.get(op, frozenset())
        saved[op] = None if not number or before is None else before | {int(number)}
    return saved


def apply_activation_checkpoint(block: nn.Module, config: ActivationCheckpoint) -> None:
    """Make block.forward recompute in backward what `config` does not keep. For `offload` see `apply_offload`."""
    if config.mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.mode == "selective":
        options["context_fn"] = functools.partial(_selective_contexts, _saved_calls(config.save))
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, **options, **kwargs)

    block.forward = forward


def apply_offload(block: nn.Module, *, pin_memory: bool) -> None:
    """Keep what autograd saves of this block in host memory between forward and backward.

    On top of full checkpointing that is the block's input. Comes after compilation: a compiled graph does not run
    Python hooks on the tensors it saves.
    """
    inner: Callable[..., Any] = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=pin_memory):
            return inner(*args, **kwargs)

    block.forward = forward
