"""A model that computes what a trained one does, from the same weights, where its own blocks cannot be served.

An engine runs whole models over whole sequences. The trained one may have some layers alone (pp), or some experts (ep),
or split the tokens of a sequence (sequence parallelism). A twin is built for what is served: all layers with all
experts, cut over tp and nothing else. What of its weights this rank holds is the trained model's, in the same memory;
experts of other ranks of ep and layers of other stages come from there for as long as rollouts take.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inference.weights import receive_weights
from models.decoder import Decoder
from models.invariant import make_batch_invariant
from models.lora import apply_adapters
from models.registry import build_model
from parallel.data import is_spread_over_ep
from parallel.groups import ModelParallel
from parallel.regions import local_tensor
from trainer.config import TrainConfig


def empty_twin(source: Decoder, config: TrainConfig, groups: ModelParallel) -> Decoder:
    """All layers of a trained model, with its adapters, in evaluation; parameters and buffers are on meta."""
    with torch.device("meta"):
        twin = build_model(source.config, seed=config.train.seed, groups=groups)
        if source.adapted:
            apply_adapters(twin, config.adapter, config.precision.compute_dtype)
    if source.batch_invariant:
        make_batch_invariant(twin)
    twin.eval()
    return twin


def tensors_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, module, name in the module, and the tensor itself, of every parameter and buffer in all of its places."""
    for path, module in model.named_modules():
        own = chain(module.named_parameters(recurse=False, remove_duplicate=False), module.named_buffers(recurse=False))
        for kind, tensor in own:
            yield f"{path}.{kind}" if path else kind, module, kind, tensor


class _Place(NamedTuple):
    """Of a tensor of the twin."""

    name: str
    module: nn.Module
    kind: str  # its name in the module
    empty: Tensor  # on meta: what stands there between rollouts
    holder: int  # rank of the pipeline whose weight it is


class Twin:
    """A model for an engine, which `fill` gives the trained weights of now, and `drop` takes them from."""

    def __init__(
        self, source: Decoder, config: TrainConfig, *, stages: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        """source: the trained model, or its stages on this rank. stages: the ranks with its other layers; None: it has
        all. Collective."""
        self._source, self._stages, self._device = source, stages, device
        self.model = empty_twin(source, config, ModelParallel(tp=source.groups.tp))
        self._rank = 0 if stages is None else dist.get_rank(stages)
        of_ranks = self._of_stages([name for name, *_ in tensors_of(source)])
        self._dtypes: dict[str, torch.dtype] = {}  # of whole weights; found by the first `fill`
        self._places = []
        for name, module, kind, empty in list(tensors_of(self.model)):
            holder = next(rank for rank, held in enumerate(of_ranks) if name in held)
            self._places.append(_Place(name, module, kind, empty, holder))

    @torch.no_grad()
    def fill(self) -> None:
        """Give the twin the weights of now, while the source has those of its layers whole on this rank, or tp's part
        of them. Collective over the stages."""
        receive_weights(self._source)
        held = {name: tensor.detach() for name, _, _, tensor in tensors_of(self._source)}
        if not self._dtypes:  # fully_shard's shards have another one than what is gathered
            for theirs in self._of_stages({name: tensor.dtype for name, tensor in held.items()}):
                self._dtypes |= theirs
        given: dict[str, Tensor] = {}
        pending, sent = [], []
        for place in self._places:
            if place.holder == self._rank:
                local = _with_all_experts(held[place.name])
            else:
                shape = local_tensor(place.empty.detach()).shape
                local = torch.empty(shape, dtype=self._dtypes[place.name], device=self._device)
            if self._stages is not None:
                holder = dist.get_global_rank(self._stages, place.holder)
                sent.append(local.contiguous())
                pending.append(dist.broadcast(sent[-1], holder, group=self._stages, async_op=True))
            given[place.name] = local
        for work in pending:
            work.wait()
        for place in self._places:
            _put(place, given[place.name])

    def _of_stages(self, mine: Any) -> list[Any]:
        """One object of every stage's rank. Collective over them."""
        if self._stages is None:
            return [mine]
        of_ranks: list[Any] = [None] * dist.get_world_size(self._stages)
        dist.all_gather_object(of_ranks, mine, group=self._stages)
        return of_ranks

    def drop(self) -> None:
        """Let go of the weights, until the next `fill`."""
        for place in self._places:
            setattr(place.module, place.kind, place.empty)


def _with_all_experts(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, or of one that is spread over ep what all of its ranks have: [E, ...]. Collective
    over ep then."""
    local = local_tensor(tensor)
    if not is_spread_over_ep(tensor):
        return local
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh["ep"] if tensor.device_mesh.ndim > 1 else tensor.device_mesh
    whole = local.new_empty(mesh.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=mesh.get_group())
    return whole


def _put(place: _Place, local: Tensor) -> None:
    """A tensor of this memory in its place, as a layer of the twin has it."""
    if isinstance(place.empty, DTensor):
        local = DTensor.from_local(
            local,
            place.empty.device_mesh,
            place.empty.placements,
            run_check=False,
            shape=place.empty.shape,
            stride=place.empty.stride(),
        )
    if isinstance(place.empty, nn.Parameter):
        local = nn.Parameter(local, requires_grad=False)
    setattr(place.module, place.kind, local)
