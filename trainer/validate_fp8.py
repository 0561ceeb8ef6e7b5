"""What linear layers in fp8 ask of a model and a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kernels.fp8.formats import PAD
from models.config import WITHOUT_BUDGET, ModelConfig
from models.fp8 import linears_in_fp8
from models.registry import build_model
from parallel.dims import ParallelDims
from parallel.pipeline.schedules import SCHEDULES, SPLIT_BACKWARD
from parallel.problem import Problem, values
from trainer.config import TrainConfig
from trainer.validate_tensor import CUT_BY_INPUT, WHOLE


def fp8_problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[str]:
    """Every reason why this run cannot multiply in fp8, one line each.

    None of sizes while parallel.tp is illegal. model: legal, resolved if that was possible. world_size: for which
    parallel is legal.
    """
    precision, parallel = config.precision, config.parallel
    if not precision.fp8 or model.num_kv_heads is None:
        return []
    found: list[str] = []
    if parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD:
        found.append(
            Problem(
                f"precision.compute=fp8 does not work with parallel.pp_schedule={parallel.pp_schedule}, which keeps "
                "inputs and gradients for later in bf16",
                values("parallel.pp_schedule", [name for name in SCHEDULES if name not in SPLIT_BACKWARD]),
                values("precision.compute", ["bf16"]),
            )
        )
    if model.activation_checkpoint == "budget":
        found.append(
            Problem(
                "precision.compute=fp8 does not work with model.activation_checkpoint=budget, which has no cost of "
                "products in fp8",
                WITHOUT_BUDGET,
                values("precision.compute", ["bf16"]),
            )
        )
    with torch.device("meta"):
        whole = build_model(model)
    every = linears_in_fp8(whole.blocks, skip=())
    for fragment in precision.fp8_skip:
        if not any(fragment in name for name in every):
            kinds = sorted({name.split(".", 2)[2] for name in every})
            found.append(
                f"precision.fp8_skip={fragment} is in the name of no linear layer; they are {', '.join(kinds)}"
            )
    names = linears_in_fp8(whole.blocks, skip=precision.fp8_skip)
    if not names and not found:
        found.append(
            f"precision.fp8_skip={precision.fp8_skip} leaves no layer in fp8; skip less, or use precision.compute=bf16"
        )
    dims = ParallelDims.resolve(parallel, world_size)
    rows = {whole.get_parameter(f"{name}.weight").shape[0] for name in names}
    found += _gather_problems(config, rows, dims.dp_shard * dims.cp)
    return [*found, *_size_problems(_shapes(whole, names), model, parallel.tp)]


def _gather_problems(config: TrainConfig, rows: Collection[int], num_shards: int) -> list[str]:
    """Of precision.fp8_all_gather: layouts that gather no weights, or others than this rank's rows. rows: of
    the layers' weights. num_shards: that each is cut into."""
    parallel = config.parallel
    if not config.precision.fp8_all_gather:
        return []
    found: list[str] = []
    for name, value, good, instead, why in (
        ("zero_stage", parallel.zero_stage, parallel.zero_stage == 3, 3, "ranks have whole weights"),
        ("tp", parallel.tp, parallel.tp == 1, 1, "shards of some of tp's shards are columns"),
        ("cpu_offload", parallel.cpu_offload, not parallel.cpu_offload, False, "shards come from the host as they are"),
    ):
        if not good:
            shown = str(value).lower()
            found.append(
                Problem(
                    f"precision.fp8_all_gather=true does not work with parallel.{name}={shown}: {why}",
                    values(f"parallel.{name}", [instead]),
                    values("precision.fp8_all_gather", [False]),
                )
            )
    if not found and rows and all(n % num_shards for n in rows):
        found.append(
            Problem(
                f"precision.fp8_all_gather=true has no weight to gather in fp8: none of {sorted(rows)} rows divides "
                f"into {num_shards} equal shards",
                values("precision.fp8_all_gather", [False]),
            )
        )
    return found


def _shapes(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, str, int, int]]:
    """Layers: name, its own or that of the fused one it is part of; name, features out and in. What is fused is taken
    part by part, as the layer behind it, and layouts that do not fuse it, see it."""
    for name in names:
        layer: Any = model.get_submodule(name)
        out, inside = layer.weight.shape
        above, _, own = name.rpartition(".")
        for part, rows in layer.parts.rows.items() if hasattr(layer, "parts") else [(own, out)]:
            yield name, f"{above}.{part}", rows, inside


def _size_problems(shapes: Iterator[tuple[str, str, int, int]], model: ModelConfig, tp: int) -> list[str]:
    """Of `_shapes`: one line for each kind that has sizes fp8 does not take."""
    found: dict[str, str] = {}
    for layer, name, out, inside in shapes:
        kind = layer.split(".", 2)[2]
        parts = _parts(name.split(".", 2)[2], model, tp)
        wrong = [(size, n) for size, n in zip((out, inside), parts, strict=True) if size % n == 0 and size // n % PAD]
        if not wrong or kind in found:
            continue
        instead = " and ".join(f"{_nearest(size, PAD * n)} for {size}" for size, n in wrong)
        share = f", {out // parts[0]} by {inside // parts[1]} on each of parallel.tp={tp} ranks" if tp > 1 else ""
        found[kind] = (
            f"precision.compute=fp8 multiplies matrices whose sizes are multiples of {PAD}, and {name} has {out} "
            f"features out by {inside} in{share}; use {instead}, or precision.fp8_skip=[{kind}]"
        )
    return list(found.values())


def _parts(kind: str, model: ModelConfig, tp: int) -> tuple[int, int]:
    """Into how many parts the features out and in of a layer are cut over tp."""
    layer = kind.rsplit(".", 1)[-1]
    if layer in WHOLE:
        return 1, 1
    if layer in CUT_BY_INPUT:
        return 1, tp
    assert model.num_kv_heads is not None
    return min(tp, model.num_kv_heads) if kind in ("attention.k", "attention.v") else tp, 1


def _nearest(size: int, step: int) -> str:
    below = size // step * step
    return f"{below} or {below + step}" if below else str(step)
