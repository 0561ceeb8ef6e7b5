"""What the tests of models run on each rank of a group of two."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Shard, distribute_tensor

import models.hf_files
from models.config import ModelConfig
from models.hf import export_hf_weights, load_hf_weights
from models.registry import build_model, resolve_model
from tests.models.small import random_decoder, tiny


def sharded_logits_and_grads(config: ModelConfig, tokens: Tensor, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """On each rank: fully_shard per block and at the root, one forward and backward over the same tokens."""
    model = random_decoder(config).train()
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    logits = model(tokens, samples=samples)
    logits.square().sum().backward()
    grads = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        grads[name] = parameter.grad.full_tensor()
    dist.barrier()
    return logits.detach(), grads


def shards_equal_the_whole(folder: str, placements: list[Placement]) -> list[str]:
    """On each rank: load into DTensors and compare the local shard with that of the whole model; names that differ."""
    config = resolve_model(ModelConfig(family="hf", path=folder))
    whole = build_model(config)
    weights = whole.state_dict()
    load_hf_weights(folder, weights, config)
    mesh = init_device_mesh("cpu", (2,))
    sharded = {
        name: distribute_tensor(
            torch.full_like(parameter, torch.nan).detach(), mesh, [p for p in placements if fits(p, parameter)][:1]
        )
        for name, parameter in weights.items()
    }
    load_hf_weights(folder, sharded, config)
    differing = []
    for name, parameter in weights.items():
        expected = distribute_tensor(parameter.detach(), mesh, sharded[name].placements)
        if not torch.equal(sharded[name].to_local(), expected.to_local()):
            differing.append(name)
    return differing


def fits(placement: Placement, parameter: Tensor) -> bool:
    return not isinstance(placement, Shard) or placement.dim < parameter.ndim


class CountingFile:
    """A safetensors handle that notes how many elements each read returns."""

    reads: list[int] = []  # noqa: RUF012 (shared on purpose)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = safe_open(*args, **kwargs)

    def keys(self) -> Any:
        return self.file.keys()

    def get_slice(self, name: str) -> Any:
        inner = self.file.get_slice(name)

        class Slice:
            get_shape, get_dtype = inner.get_shape, inner.get_dtype

            def __getitem__(self, region: Any) -> Tensor:
                part = inner[region]
                CountingFile.reads.append(part.numel())
                return part

        return Slice()


def elements_read(folder: str) -> tuple[int, int]:
    """On each rank: (elements read, elements held) for parameters sharded over two ranks."""
    config = resolve_model(ModelConfig(family="hf", path=folder))
    mesh = init_device_mesh("cpu", (2,))
    weights = build_model(config).state_dict()
    parameters = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in weights.items()}
    CountingFile.reads = []
    models.hf_files.safe_open = CountingFile
    try:
        load_hf_weights(folder, parameters, config)
    finally:
        models.hf_files.safe_open = safe_open
    held = sum(p.to_local().numel() for p in parameters.values())
    return sum(CountingFile.reads), held


def export_on_ranks(out: str, *, fails_on: int | None = None) -> list[str]:
    """On each rank: export one model together; returns the parameters this rank was asked for, or the error."""
    rank = dist.get_rank()
    model = random_decoder(tiny())
    parameters = model.state_dict()
    asked = []

    def read(name: str) -> Tensor:
        asked.append(name)
        if rank == fails_on:
            raise ValueError("the disk is gone")
        return parameters[name]

    try:
        export_hf_weights(read, model.config, out, dtype=torch.float32, max_shard_bytes=9000, rank=rank, world_size=2)
    except ValueError as error:
        return [str(error)]
    return asked


def partial_is_refused(folder: str) -> str:
    config = resolve_model(ModelConfig(family="hf", path=folder))
    mesh = init_device_mesh("cpu", (2,))
    parameters: dict[str, Tensor] = build_model(config).state_dict()
    parameters["final_norm.weight"] = DTensor.from_local(torch.zeros(24), mesh, [Partial()])
    try:
        load_hf_weights(folder, parameters, config)
    except ValueError as error:
        return str(error)
    return ""
