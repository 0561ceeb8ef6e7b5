"""How adapters begin: drawn, read from a PEFT folder, or as the principal part of the weights (PiSSA, 2404.02948).

PiSSA: of W = U S V^T the r largest singular values are trained and the rest stays,

    s B_0 A_0 = U_r S_r V_r^T         A_0 = (S_r / s)^1/2 V_r^T        B_0 = U_r (S_r / s)^1/2
    W_res = W - s B_0 A_0             y = x W_res^T + s (x A^T) B^T

so a run begins as the model up to rounding of W_res. A_0 and B_0 are rounded to bf16 before W_res is made, which takes
up what that leaves; so they are the same in every dtype, and checkpoints, which hold them beside A and B, make the same
W_res in every layout. To other programs s (B A - B_0 A_0) is an adapter of twice the rank for W itself, and that is
what export writes (PEFT does so by path_initial_model_for_weight_conversion). With 4 bits W_res is what is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from models.adapter_config import AdapterConfig, adapted_layers
from models.config import ModelConfig
from models.lora import A, B, M
from models.peft import LowRank, load_peft, load_score
from models.registry import build_model
from parallel.problem import Problem, values
from parallel.regions import Located, local_region, local_tensor
from trainer.checkpoint import TensorReader

BEGUN = "0"
"""What is behind the name of a matrix in that of its beginning."""


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A_0 [.., r, in] and B_0 [.., out, r] of a weight [.., out, in], with values of bf16. Raises ValueError for a rank
    that the weight does not have."""
    if rank > min(weight.shape[-2:]):
        raise ValueError(f"adapter.rank={rank} is more than a weight of {list(weight.shape)} has; use a smaller one")
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    roots = (s[..., :rank] / scale).sqrt()
    a, b = roots[..., :, None] * v[..., :rank, :], u[..., :rank] * roots[..., None, :]
    return a.bfloat16().float(), b.bfloat16().float()


def principal_adapters(
    adapter: AdapterConfig,
    model: ModelConfig,
    read: Callable[[str, Sequence[int]], Tensor],
    device: torch.device,
) -> dict[str, LowRank]:
    """A_0 and B_0 of every adapted layer of a model, on the host. Collective: every rank computes some of them.

    read: a whole weight by its name and shape. Raises ValueError on all ranks alike.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_model(model).state_dict().items()}
    found = {}
    for number, layer in enumerate(adapted_layers(adapter, model)):
        *stack, out, columns = shape = shapes[f"{layer}.weight"]
        rank, owner = adapter.rank, number % dist.get_world_size()
        if rank > min(out, columns) or dist.get_rank() == owner:
            a, b = principal(read(f"{layer}.weight", shape).to(device), rank, adapter.scale)
        else:
            a = torch.empty(*stack, rank, columns, device=device)
            b = torch.empty(*stack, out, rank, device=device)
        for tensor in (a := a.contiguous(), b := b.contiguous()):
            dist.broadcast(tensor, src=owner)
        found[layer] = LowRank(a.cpu(), b.cpu(), adapter.scale)
    return found


def principal_adapters_of(
    checkpoint: Path, adapter: AdapterConfig, model: ModelConfig, *, prefix: str = ""
) -> dict[str, LowRank]:
    """The same from a checkpoint. Raises CheckpointError where it has none.

    prefix: of the model's names there, where it is one beside that of the run.
    """
    reader = TensorReader(checkpoint)

    def read(layer: str, kind: str) -> Tensor:
        return reader.read(f"{prefix}model/{layer}.{kind}{BEGUN}")

    layers = adapted_layers(adapter, model)
    return {layer: LowRank(read(layer, A), read(layer, B), adapter.scale) for layer in layers}


def residual(weight: Tensor, begun: LowRank, region: tuple[slice, ...] = ()) -> Tensor:
    """W - s B_0 A_0, in the dtype of W, rounded once. region: of the whole, that weight is."""
    return (weight.float() - begun.delta()[region].to(weight.device)).to(weight.dtype)


@torch.no_grad()
def fill(tensors: Mapping[str, Located], adapters: Mapping[str, LowRank], *, suffix: str = "") -> None:
    """Write whole adapters, by layer, into what this rank has of those with names LAYER.KIND and the suffix."""
    for name, tensor in tensors.items():
        layer, _, kind = name.removesuffix(suffix).rpartition(".")
        one = adapters[layer]
        whole = {A: one.a, B: one.b, M: one.lengths}[kind]
        assert whole is not None
        local_tensor(tensor).copy_(whole[local_region(tensor)])


def with_beginning(adapter: AdapterConfig) -> AdapterConfig:
    """The settings of s (B A - B_0 A_0) as an adapter of twice the rank beside whole weights."""
    factor = sqrt(2) if adapter.rank_stabilized else 2
    return replace(adapter, rank=2 * adapter.rank, alpha=factor * adapter.alpha, init="lora")


def read_with_beginning(read: Callable[[str], Tensor], name: str) -> Tensor:
    """The matrix of that adapter; name: of A or B. Of what is no adapter itself."""
    if not name.endswith((A, B)):
        return read(name)
    now, begun = read(name), read(f"{name}{BEGUN}")
    return torch.cat([now, begun], dim=-2) if name.endswith(A) else torch.cat([now, -begun], dim=-1)


def folder_problems(adapter: AdapterConfig, model: ModelConfig) -> list[str]:
    """Why a run cannot begin with the adapters in adapter.path, one line each. model: resolved."""
    if adapter.path is None:
        return []
    where, found = f"adapter.path={adapter.path}", list[str]()
    try:
        there = load_peft(Path(adapter.path).expanduser(), model)
        if model.score:
            load_score(Path(adapter.path).expanduser(), model)
    except ValueError as error:
        return [f"{where}: {error}"]
    ranks = sorted({one.a.shape[-2] for one in there.values()})
    if len(ranks) > 1:
        found.append(f"{where} has adapters of ranks {', '.join(map(str, ranks))}; a run trains adapters of one rank")
    elif ranks[0] != adapter.rank:
        why = f"adapter.rank={adapter.rank} is not that of {where}"
        found.append(Problem(why, values("adapter.rank", ranks)))
    scales = sorted({one.scale for one in there.values()})
    if any(abs(scale - adapter.scale) > 1e-6 * scale for scale in scales) and not found:
        root = sqrt(adapter.rank) if adapter.rank_stabilized else adapter.rank
        what = f"adapter.alpha={adapter.alpha} scales by {adapter.scale:g}, and {where} by"
        if len(scales) > 1:
            found.append(f"{what} {', '.join(f'{scale:g}' for scale in scales)} in different layers, which no run does")
        else:
            found.append(Problem(f"{what} {scales[0]:g}", values("adapter.alpha", [scales[0] * root])))
    wanted = set(adapted_layers(adapter, model))
    if different := sorted(wanted ^ set(there)):
        kinds = sorted({layer.partition(".")[2].partition(".")[2] for layer in there})
        where_not = "the folder" if different[0] in wanted else "adapter.targets"
        found.append(
            f"adapter.targets={','.join(adapter.targets)} is not what {where} is for: {different[0]} is not in "
            f"{where_not}; its layers are {', '.join(kinds)}"
        )
    if adapter.dora != any(one.lengths is not None for one in there.values()):
        found.append(
            Problem(f"adapter.dora={adapter.dora} is not so in {where}", values("adapter.dora", [not adapter.dora]))
        )
    return found
