"""How a model that is served lies over the ranks of torchrun: `parallel` of launch/lab.py.

All ranks have the same tokens: attention, MLPs, table and head are cut over tp by the very layers of training
(parallel/tensor.py), and so are experts by their inner features. With ep they are shared out over ep of tp's ranks
instead, and cut over the rest. In training ep takes ranks with other tokens, which then have to travel; here a rank
computes what its own experts make of the tokens that all have, and that is a summand of the sum over tp at the end of
the layer: nothing travels that would not without ep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from parallel.dims import divisors
from parallel.groups import ModelParallel
from parallel.problem import Problem, values


@dataclass
class ServingLayout:
    """`parallel`: as many processes as tp."""

    tp: int = 1  # ranks that every layer is cut over
    ep: int = 1  # of these, that experts are shared out over; a divisor of tp. 1: each expert is cut over all of them
    timeout_seconds: float = 600.0  # a step in which a rank waits longer for another ends all of them


def layout_problems(layout: ServingLayout, *, world_size: int) -> list[str]:
    """Every reason why no model can be served like this on so many processes; one line each."""
    found: list[str] = [
        Problem(f"parallel.{axis}={degree} must be at least 1", values(f"parallel.{axis}", [1]))
        for axis, degree in (("tp", layout.tp), ("ep", layout.ep))
        if degree < 1
    ]
    if not 0 < layout.timeout_seconds < math.inf:
        found.append(f"parallel.timeout_seconds={layout.timeout_seconds} must be positive and finite; 600 is usual")
    if found:
        return found
    if layout.tp != world_size:
        start = "start with python" if layout.tp == 1 else f"start torchrun --nproc-per-node {layout.tp}"
        why = f"parallel.tp={layout.tp} takes as many processes, and {world_size} were started"
        found.append(Problem(why, values("parallel.tp", [world_size]), words=start))
    if layout.tp % layout.ep:
        why = f"parallel.ep={layout.ep} does not divide parallel.tp={layout.tp}, whose ranks share out the experts"
        found.append(Problem(why, values("parallel.ep", divisors(layout.tp), near=layout.ep)))
    return found


_MADE: dict[tuple[dist.ProcessGroup | None, int, int, str], ModelParallel] = {}
"""Groups made so far on each default group, kept as parallel.mesh.build_mesh keeps its own."""


def serving_groups(layout: ServingLayout, device_type: str) -> ModelParallel:
    """The process groups of a model's layers, over all processes. Collective; on the first call they are made."""
    key = (dist.group.WORLD, layout.tp, layout.ep, device_type)
    if key not in _MADE:
        tp = init_device_mesh(device_type, (layout.tp,), mesh_dim_names=("tp",))
        experts = None
        if layout.ep > 1:
            shape = (layout.ep, layout.tp // layout.ep)
            experts = init_device_mesh(device_type, shape, mesh_dim_names=("ep", "tp"))
            experts = experts["ep"] if layout.ep == layout.tp else experts
        _MADE[key] = ModelParallel(tp=tp, experts=experts, tokens_alike=experts is not None)
    return _MADE[key]
