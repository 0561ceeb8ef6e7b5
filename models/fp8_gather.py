"""Weights of fp8 layers that fully_shard (ZeRO-3) gathers in fp8: half the bytes on the wire and in gathered blocks.

Each rank quantizes its shard, by the scale that reaches over the whole weight, and backward transposes the bytes that
came. The numbers are those of a weight that is gathered first and quantized then, to the bit: it is rounded to the
dtype of compute before, and its largest magnitude is found over all ranks, once a step, before anything is gathered.

fully_shard asks the local tensor of a parameter what to gather (`fsdp_pre_all_gather`) and what the parameter is then
(`fsdp_post_all_gather`). Autograd would cast the gradient of a parameter in fp8 to fp8: so it is a stand-in of the
dtype of compute, without memory and not to be read, that brings the gradient; products take the bytes of `Fp8Weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import ExtensionsData
from torch.distributed.tensor import DTensor

from kernels.fp8 import E4M3, Quantized, quantize_tensorwise, scale_from_amax


class Fp8Weight:
    """The weight [N, K] of one layer, of which this rank has a shard of rows."""

    def __init__(self, shard: Tensor, number: int, dtype: torch.dtype) -> None:
        """number: of the layer, in Fp8Linears.names. dtype: of compute."""
        self.shard, self.number, self.dtype = shard, number, dtype
        self.scale = torch.ones((), device=shard.device)  # in memory of its own, aligned as cuBLASLt wants it
        self.data: Tensor | None = None  # [N, K] in fp8 while it is gathered, the same tensor each time
        self.is_scaled = False  # `scale` is for the weight as it is now; set by GatheredWeights
        shard.fsdp_pre_all_gather = self._pre_all_gather  # type: ignore[attr-defined]
        shard.fsdp_post_all_gather = self._post_all_gather  # type: ignore[attr-defined]

    @property
    def quantized(self) -> Quantized:
        """What products multiply with."""
        assert self.data is not None
        return Quantized(self.data, self.scale)

    def _pre_all_gather(
        self, mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: MixedPrecisionPolicy
    ) -> tuple[tuple[Tensor, ...], None]:
        if not self.is_scaled:
            raise RuntimeError(
                "fp8 weights are gathered before they have scales: call Fp8Linears.begin before this forward"
            )
        made, _ = quantize_tensorwise(self.shard.to(self.dtype), self.scale)
        return (made.data,), None

    def _post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        (data,) = outputs
        if out is not None:
            return None  # `data` lies where it lay the first time
        self.data = data
        return data.new_empty((), dtype=self.dtype).as_subclass(_StandIn), ()


class _StandIn(torch.Tensor):
    """Becomes, in the view that fully_shard takes of what is gathered, a plain tensor of that size without memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.as_strided:
            element, size = args[:2]
            return element.as_subclass(torch.Tensor).expand(size)
        return super().__torch_function__(func, types, args, kwargs or {})


class GatheredWeights:
    """Those of a model's fp8 layers that ranks gather in fp8, and the largest magnitudes of all of them."""

    def __init__(
        self, weights: Sequence[Fp8Weight], *, num_layers: int, of: int, power_of_two: bool, device: torch.device
    ) -> None:
        """num_layers: in Fp8Linears.names. of: how many layers there are here."""
        self.weights, self.of, self.power_of_two = list(weights), of, power_of_two
        self.numbers = torch.tensor([weight.number for weight in weights], device=device, dtype=torch.int64)
        self.amax = torch.zeros(num_layers, device=device)  # of each layer's weight, over all ranks
        self.known = False  # amax is that of the weights as they are

    @torch.no_grad()
    def set_scales(self, scales: Tensor | None = None) -> None:
        """Before something is gathered: scales [num_layers] that are known, or those of the weights themselves.
        Collective over all ranks if weights have changed."""
        self.find_amax()
        if scales is None:
            scales = scale_from_amax(self.amax, E4M3, power_of_two=self.power_of_two)
        if self.weights:
            torch._foreach_copy_([weight.scale for weight in self.weights], list(scales[self.numbers].unbind()))
        self._mark(scaled=True)

    def changed(self) -> None:
        """The weights are others: nothing is to be gathered before `set_scales`."""
        self.known = False
        self._mark(scaled=False)

    def _mark(self, *, scaled: bool) -> None:
        for weight in self.weights:
            weight.is_scaled = scaled

    @torch.no_grad()
    def find_amax(self) -> None:
        """Collective over all ranks if weights have changed."""
        if self.known:
            return
        self.amax.zero_()
        if self.weights:
            largest = torch.stack(torch._foreach_norm([weight.shard for weight in self.weights], torch.inf))
            # As of the weights in the dtype of compute: rounding keeps the order.
            self.amax[self.numbers] = largest.to(self.weights[0].dtype).float()
        dist.all_reduce(self.amax, op=dist.ReduceOp.MAX)
        self.known = True


def gather_in_fp8(
    blocks: nn.Module, *, num_layers: int, dtype: torch.dtype, power_of_two: bool, device: torch.device
) -> GatheredWeights:
    """Let fully_shard gather the weights of fp8 layers (models/fp8.py) in fp8 from now on, where shards are even. Once
    the model's memory is there, before its first forward. dtype: of compute."""
    shards = {id(p): (group, p) for group, p in _sharded_parameters(blocks)}
    layers: list[Any] = [layer for layer in blocks.modules() if hasattr(layer, "fp8_number")]
    found: list[Fp8Weight] = []
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, DTensor)
        fsdp_param, _ = shards[id(weight)]
        shard = weight._local_tensor  # itself, which fully_shard asks, and no view of it
        if shard.numel() * fsdp_param.mesh_info.shard_mesh_size != weight.numel():
            continue  # padded: ranks would have to send bytes that are no weights
        layer.fp8_gathered = Fp8Weight(shard, layer.fp8_number, dtype)
        fsdp_param._extensions_data = (
            ExtensionsData()
        )  # what fully_shard does for tensors that bring this from the start
        found.append(layer.fp8_gathered)
    return GatheredWeights(found, num_layers=num_layers, of=len(layers), power_of_two=power_of_two, device=device)


def _sharded_parameters(blocks: nn.Module) -> list[tuple[Any, nn.Parameter]]:
    """fully_shard's own records of parameters."""
    units = [module for module in blocks.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group) is not None]
    return [(record, record.sharded_param) for group in groups for record in group.fsdp_params]
