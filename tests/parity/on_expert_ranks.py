"""What the tests of experts on several axes run on each rank: the trainer with one fault."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from models.layers import moe, router
from parallel.data import Holders
from parallel.expert import Buffers, Routes
from parallel.mesh import Meshes
from tests.parity.harness import Outcome, run_here
from trainer.config import TrainConfig
from trainer.pipelined import PipelinedPasses


def _over_all_tokens(original: Callable[..., Holders]) -> Callable[..., Holders]:
    def of(mesh: Meshes, *, sharded: bool, experts: bool) -> Holders:
        return replace(original(mesh, sharded=sharded, experts=experts), replicas=mesh.tokens)

    return of


def _as_arrived(original: Callable[..., Routes]) -> Callable[..., Routes]:
    def plan(*args: Any) -> Routes:
        routes = original(*args)
        same = torch.arange(routes.by_expert.shape[0])
        return replace(routes, by_expert=same, as_arrived=same)

    return plan


def _overwritten(original: Callable[..., Buffers]) -> Callable[..., Buffers]:
    """A row lies in the place of its neighbour as well, whose own row is lost."""

    def plan(*args: Any, **kwargs: Any) -> Buffers:
        buffers = original(*args, **kwargs)
        row_of_place = buffers.row_of_place.clone()
        row_of_place[1] = row_of_place[0]
        return replace(buffers, row_of_place=row_of_place)

    return plan


def _of_the_neighbour(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Rows that came from a rank are taken for those of the next one."""

    def exchange(self: Buffers, places: torch.Tensor) -> torch.Tensor:
        return original(self, places).roll(places.shape[0] // self.axis.size, 0)

    return exchange


def _replicated(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda parameter, *, grad: original(parameter, grad="replicated")


def _twice(original: Any) -> Any:
    return SimpleNamespace(apply=lambda y, loss, scale: original.apply(y, loss, 2 * scale))


def _without_aux(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda passes, state, microbatches, aux_scale=None: original(passes, state, microbatches)


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "experts_summed_over_ep": (Holders, "of", _over_all_tokens),
    "rows_as_they_arrived": (moe, "plan_routes", _as_arrived),
    "row_of_a_buffer_overwritten": (moe, "plan_buffers", _overwritten),
    "buffer_of_the_neighbour": (Buffers, "_exchange", _of_the_neighbour),
    "router_gradient_of_one_tp_rank": (router, "local_shard", _replicated),
    "auxiliary_loss_on_every_tp_rank": (moe, "_AddLoss", _twice),
    "load_of_one_cp_rank": (router, "all_reduce", lambda original: lambda x, axis: x),
    "queue_of_one_cp_rank": (router, "_position_across", lambda original: lambda e, E, *_: router.queue_position(e, E)),
    "no_auxiliary_loss_in_stages": (PipelinedPasses, "_loss_of_stage", _without_aux),
}


def run_broken(config: TrainConfig, fault: str) -> Outcome | None:
    """Train with a fault. Gradients are rank 0's view, without comparing copies between ranks."""
    where, name, breaking = FAULTS[fault]
    with ExitStack() as stack:
        stack.enter_context(patch.object(where, name, breaking(getattr(where, name))))
        stack.enter_context(patch("tests.parity.harness.torch.equal", lambda one, other: True))
        return run_here(config)
