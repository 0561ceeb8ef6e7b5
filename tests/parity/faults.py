"""Faults that a comparison must notice: what the tests of negative controls break on every rank."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as of_fsdp
from torch.fx import GraphModule

from data.batch import Batch
from models.layers.dropout import Dropout
from parallel import activation_checkpoint, collectives, parallelize
from parallel.data import DataParallel
from tests.parity.harness import Outcome, run_here
from trainer.config import TrainConfig
from trainer.passes import PlainPasses, forward_loss_sum
from trainer.pipelined import PipelinedPasses

Fault = list[tuple[Any, str, Callable[[Any], Any]]]
"""Where, the name of what is replaced, and what makes the replacement from it."""

_DONE = SimpleNamespace(wait=lambda: None)  # of a collective

# ---- data parallelism: by this project's buckets and by fully_shard


def _not_of_data_parallelism(true: Callable[..., Any]) -> Callable[..., Any]:
    """Only those of the step and of the comparison, which count tokens and put tensors together."""

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        ours = caller.startswith(("parallel.", "torch.distributed.fsdp."))
        return _DONE if ours else true(tensor, *args, **kwargs)

    return all_reduce


def _own_part(true: Callable[..., Any]) -> Callable[..., Any]:
    def scatter(out: Tensor, whole: Tensor, *, group: Any, **kwargs: Any) -> Any:
        out.copy_(whole.chunk(group.size())[group.rank()])
        return _DONE

    return scatter


def _own_slice(true: Callable[..., Any]) -> Callable[..., Any]:
    def scatter(self: Any, output_tensor: Tensor, input_tensor: Tensor, group: Any, *args: Any, **kwargs: Any) -> None:
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])

    return scatter


def _parts_of_the_rank_before(true: Callable[..., Any]) -> Callable[..., Any]:
    def gather(out: Tensor, part: Tensor, *, group: Any, **kwargs: Any) -> Any:
        true(out, part, group=group)
        out.copy_(out.roll(part.numel()))
        return _DONE

    return gather


def _slices_of_the_rank_before(true: Callable[..., Any]) -> Callable[..., Any]:
    def gather(self: Any, output_tensor: Tensor, input_tensor: Tensor, group: Any, *args: Any, **kwargs: Any) -> None:
        true(self, output_tensor, input_tensor, group)
        output_tensor.copy_(output_tensor.roll(input_tensor.numel()))

    return gather


def _only_first_values(true: Callable[..., None]) -> Callable[..., None]:
    published = []

    def publish(self: DataParallel, *args: Any, **kwargs: Any) -> None:
        if not published:
            true(self, *args, **kwargs)
        published.append(self)

    return publish


# ---- accumulation over micro-batches


def _gradients_times(factor: Callable[[Batch, Sequence[Batch]], float]) -> Callable[[Any], Any]:
    """Of each micro-batch, in a plain step or in a pipeline's last stage; losses are as they were."""

    def fault(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def backward(self: Any, state: Any, microbatches: list[Batch], per_token: Tensor) -> Tensor:
            def forward(state: Any, batch: Batch, **kwargs: Any) -> Tensor:
                result = forward_loss_sum(state, batch, **kwargs)
                if kwargs.get("stage") is None or kwargs["stage"].is_last:
                    result.register_hook(lambda grad: grad * factor(batch, microbatches))
                return result

            modules = ("trainer.passes", "trainer.pipelined")
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(patch(f"{module}.forward_loss_sum", forward))
                return true(self, state, microbatches, per_token)

        return backward

    return fault


def _alike(batch: Batch, microbatches: Sequence[Batch]) -> float:
    """Each has the same weight, whatever its size: the mean over micro-batches of their means."""
    return sum(len(b.tokens) for b in microbatches) / len(microbatches) / len(batch.tokens)


def _without_the_last(batch: Batch, microbatches: Sequence[Batch]) -> float:
    return 0.0 if batch is microbatches[-1] else 1.0


def _twice_the_first(batch: Batch, microbatches: Sequence[Batch]) -> float:
    return 2.0 if batch is microbatches[0] else 1.0


# ---- activation checkpointing


def _recomputing() -> bool:
    return torch._C._current_graph_task_id() != -1  # inside a backward


def _another_mask(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drop(self: Dropout, x: Tensor, index: Tensor) -> Tensor:
        with patch.object(self, "seed", self.seed + _recomputing()):
            return true(self, x, index)

    return drop


def _another_input(true: Callable[..., Any]) -> Callable[..., Any]:
    def checkpoint(inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        def moved(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return inner(x.roll(int(_recomputing()), dims=1), *args, **kwargs)

        return true(moved, x, *args, **kwargs)

    return checkpoint


def _returned_elsewhere(true: Any) -> Any:
    def moved(x: Tensor) -> Tensor:
        return x.flatten().roll(1).view_as(x) if x.is_floating_point() else x

    return lambda pin_memory: torch.autograd.graph.saved_tensors_hooks(lambda x: x, moved)


# ---- compiled blocks


def _without_last_sum(graph: GraphModule, *_: Any) -> Any:
    """The graph without the first term of its last sum: the residual stream, or of its gradient what passes by."""
    sums = {operator.add, operator.iadd, torch.ops.aten.add.Tensor}
    nodes = [node for node in graph.graph.nodes if node.target in sums]
    whole = [n for n in nodes if all(isinstance(a, torch.fx.Node) for a in n.args)]
    whole[-1].replace_all_uses_with(whole[-1].args[1])
    graph.recompile()
    return graph


def _lost_forward(graph: GraphModule, inputs: Any) -> Any:
    return lookup_backend("aot_eager")(_without_last_sum(graph), inputs)


_lost_backward = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=_without_last_sum)


def _compiled_by(backend: Any) -> Callable[[Any], Any]:
    return lambda true: lambda block, **options: true(block, **options | {"backend": backend})


def _of_each_pass(fault: Callable[[Any], Any]) -> Fault:
    return [(passes, "backward", fault) for passes in (PlainPasses, PipelinedPasses)]


FAULTS: dict[str, Fault] = {
    "nothing": [],
    "replicas not summed": [(dist, "all_reduce", _not_of_data_parallelism)],
    "shards not summed": [
        (collectives, "_reduce_scatter", _own_part),
        (of_fsdp.DefaultReduceScatter, "__call__", _own_slice),
    ],
    "shards permuted": [
        (collectives, "_all_gather", _parts_of_the_rank_before),
        (of_fsdp.DefaultAllGather, "__call__", _slices_of_the_rank_before),
    ],
    "nothing published": [(stage, "publish", _only_first_values) for stage in DataParallel.__subclasses__()],
    "micro-batches weighted alike": _of_each_pass(_gradients_times(_alike)),
    "a micro-batch dropped": _of_each_pass(_gradients_times(_without_the_last)),
    "a micro-batch counted twice": _of_each_pass(_gradients_times(_twice_the_first)),
    "another mask recomputed": [(Dropout, "_drop", _another_mask)],
    "another input recomputed": [(activation_checkpoint, "checkpoint", _another_input)],
    "returned elsewhere": [("torch.autograd.graph", "save_on_cpu", _returned_elsewhere)],
    "a term lost in forward": [(parallelize, "compile_block", _compiled_by(_lost_forward))],
    "a term lost in backward": [(parallelize, "compile_block", _compiled_by(_lost_backward))],
}


def run_broken(config: TrainConfig, fault: str) -> Outcome | None:
    """Train with a fault. Gradients and weights are rank 0's view, without comparing copies between ranks."""
    with ExitStack() as stack:
        for where, name, breaking in FAULTS[fault]:
            place = import_module(where) if isinstance(where, str) else where
            stack.enter_context(patch.object(place, name, breaking(getattr(place, name))))
        stack.enter_context(patch("tests.parity.harness.torch.equal", lambda one, other: True))
        return run_here(config)
