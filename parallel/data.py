"""Data parallelism: the ZeRO stages (Rajbhandari et al., 1910.02054) behind one interface.

A training step sees master parameters: what the optimizer updates and a checkpoint stores, by name, whole tensors at
stage 0 and DTensors sharded on one dim above it, with their summed gradient in `.grad`. How gradients get there and how
updated values get back into the model is the stage's business (with tensor parallelism, "whole" is a rank's tp shard):

    stage  model computes with    gradients are summed by              masters, moments
    0      whole parameters       bucketed all-reduce                  whole
    1      whole parameters       bucketed reduce-scatter              sharded over the shard axis
    2      whole parameters       reduce-scatter of each micro-batch   sharded over the shard axis
    3      one gathered block     reduce-scatter of each micro-batch   sharded over the shard axis

Stages 0 to 2 are in parallel/zero.py, stage 3 (fully_shard, FSDP2) in parallel/fully_sharded.py.

Gradients are summed over ranks, never averaged: the loss is already divided by the number of valid tokens of the
global batch (trainer/loss.py).

With expert parallelism the experts of a rank have seen the tokens of all ranks of ep: their gradients are summed, and
their state is sharded, over the ranks that hold the same experts (parallel/mesh.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.mesh import Meshes
from parallel.regions import local_tensor


def is_spread_over_ep(parameter: torch.Tensor) -> bool:
    """Whether the ranks of ep hold different parts of a parameter, which then is one of experts."""
    return isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())


class DataParallel(ABC):
    """What a ZeRO stage promises to the training step."""

    masters: dict[str, torch.Tensor]
    """Parameters the optimizer updates, by name; DTensors where sharded. `.grad` is set after `finish_backward`."""

    copies: Mapping[str, torch.Tensor] = {}
    """Of masters by name: memory of this rank's part that the model computes with, of the same shape in the compute
    dtype, where that is not the master itself. An optimizer that writes it spares `publish` a pass."""

    needed_first: frozenset[str] = frozenset()
    """Names of masters whose new values the next forward waits for before others: best updated and published first."""

    @abstractmethod
    def start_microbatch(self, *, last: bool) -> None:
        """Call before the forward of each micro-batch; `last`: gradients are complete after its backward."""

    @abstractmethod
    def start_pipeline(self) -> None:
        """Instead of `start_microbatch`, once before micro-batches whose backwards come in any order."""

    @abstractmethod
    def gradients_complete(self, names: Iterable[str]) -> None:
        """After `start_pipeline`: these parameters have had their last contribution, and may be reduced."""

    def gather(self, names: Iterable[str]) -> None:  # noqa: B027  (whole parameters leave nothing to do)
        """The model is about to compute with these parameters: start to make them whole, if they are not."""

    @abstractmethod
    def add_gradient(self, name: str, grad: torch.Tensor) -> None:
        """Take this rank's gradient of what it computes with of a parameter, where autograd does not deliver it.

        Every rank that shares the parameter's state adds the same ones in the same order. It may be kept, and is not
        to be changed, until `finish_backward`.
        """

    @abstractmethod
    def finish_backward(self) -> None:
        """After the last backward: wait until every master's `.grad` holds the sum over ranks and micro-batches."""

    @abstractmethod
    def publish(self, names: Collection[str] | None = None, *, written: Collection[str] = ()) -> None:
        """After masters changed (update, load): make the model compute with the new values. Collective.

        names: the masters that changed, of which each has to be named before the next forward; None: all. written:
        names of masters whose `copies` already have the new values.
        """

    @abstractmethod
    def storage(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tensors that hold what the model computes with, and the gradients between backward and update."""


@dataclass(frozen=True)
class Holders:
    """The ranks that hold the same parameters, and how their state is divided among them."""

    view: DeviceMesh  # of all ranks, with the axes below
    shard: DeviceMesh  # state is sharded over these ranks, if at all
    num_shards: int  # 1: it is not
    replicas: DeviceMesh  # ranks with the same state: what is reduced is summed over them too
    axes: tuple[str, ...]  # of `view` that the state's DTensors lie on, before those inside layers

    @classmethod
    def of(cls, mesh: Meshes, *, sharded: bool, experts: bool) -> Holders:
        """The holders of experts, where those are spread over ep, or of all else."""
        view = mesh.experts if experts else mesh.state
        everyone = mesh.expert_tokens if experts else mesh.tokens
        assert view is not None
        assert everyone is not None
        axis = "expert_shard" if experts else "shard"
        num_shards = view[axis].size() if sharded else 1
        replicas = view["dp_replicate"] if sharded else everyone
        # DTensor state lives on the shard axis alone unless there are replicas, as fully_shard's does.
        axes = ("dp_replicate", axis) if replicas.size() > 1 else (axis,)
        return cls(view, view[axis], num_shards, replicas, axes if num_shards > 1 else ())

    @property
    def shard_rank(self) -> int:
        return self.shard.get_local_rank() if self.num_shards > 1 else 0

    @property
    def num_replicas(self) -> int:
        return self.replicas.size()


def state_bytes(data_parallel: DataParallel, optimizer_state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of training state this rank holds now, by kind. Shared storage counts once.

    parameters: what the model computes with; gradients: what holds them between backward and update, without those of
    the micro-batch at hand that are on their way; master: fp32 copies of parameters, 0 where a master is the parameter
    itself; optimizer: moments.
    """
    seen: set[int] = set()

    def size(tensors: Iterable[torch.Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = local_tensor(tensor).untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    parameters, gradients = data_parallel.storage()
    return {
        "parameters": size(parameters),
        "gradients": size(gradients),
        "master": size(data_parallel.masters.values()),
        "optimizer": size(optimizer_state.values()),
    }
