"""What a block keeps and computes, measured by running it once on fake tensors: no memory, no kernel, no communication.

The operations are those that the dispatcher sees below autograd, which is where selective checkpointing decides, and
the tensors those that autograd saves. Seconds follow from the sizes (roofline: arithmetic or bytes, whichever takes
longer), not from a clock, so all ranks agree on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from parallel.activation_budget import BlockCost, Operation
from parallel.activation_checkpoint import op_name


@dataclass(frozen=True)
class Rates:
    """Of one device."""

    flops: float = 600e12  # FLOP/s of matrix products; a Hopper GPU in bf16, as reached
    memory: float = 3e12  # bytes/s read and written
    network: float = 250e9  # bytes/s of a collective's result


@dataclass(frozen=True)
class _Call:
    name: str  # with the number of the call
    output_storages: Mapping[int, int]  # bytes by identity, those of views of inputs left out
    flops: int
    moved_bytes: int
    communicates: bool

    def seconds(self, rates: Rates) -> float:
        if self.communicates:
            return sum(self.output_storages.values()) / rates.network
        return max(self.flops / rates.flops, self.moved_bytes / rates.memory if self.output_storages else 0.0)


class _Recorder(TorchDispatchMode):
    """Every call on plain tensors, in order. Holds all tensors, so that no identity is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.held: list[Any] = []
        self._numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(output)
        if any(isinstance(tensor, DTensor) for tensor in (*inputs, *outputs)):
            return output  # its local operation is seen as well
        self.held += outputs
        name = op_name(func)
        known = storages(inputs)
        self.calls.append(
            _Call(
                name=f"{name}#{self._numbers[name]}",
                output_storages={key: size for key, size in storages(outputs).items() if key not in known},
                flops=_flops(func, name, args, kwargs or {}, output),
                moved_bytes=sum(tensor.nbytes for tensor in (*inputs, *outputs)),
                communicates=func.namespace in ("_c10d_functional", "c10d"),
            )
        )
        self._numbers[name] += 1
        return output


def _flops(func: Any, name: str, args: Any, kwargs: Any, output: Any) -> int:
    """Of one call; 0 for what only moves memory."""
    if name.startswith("aten._scaled_dot_product_"):
        # torch's formula knows no grouped heads, and none of the CPU's kernel. q [B, H, T, K], v [B, G, S, V].
        (B, H, T, K), (_, _, S, V) = args[0].shape, args[2].shape
        return B * H * T * S * (K + V)  # of 2 per pair of tokens, causal kernels skip half
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=output)) if formula else 0
    return flops // 2 if name == "lattice.attention" else flops


def measure_block(
    block: nn.Module,
    inputs: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    mode: FakeTensorMode,
    dtype: torch.dtype,
    fused: bool,
    rates: Rates,
) -> BlockCost:
    """The cost of block.forward(*inputs, **options).

    block: before anything was applied to it; its parameters may be on meta, and DTensors. inputs, options: fake tensors
    of `mode` on the device that will compute; inputs belong to the block, tensors in options to all blocks alike.
    dtype: of parameters in forward. fused: the block will be compiled. Then what only moves memory costs nothing again,
    being fused into what reads it, and keeping everything is no choice, because what a compiled block keeps is decided
    by its compiler; keeping all that costs arithmetic comes to the same.
    """
    device = inputs[0].device
    saved: list[Tensor] = []
    num_calls = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls = len(recorder.calls)
        saved.append(tensor)
        return tensor

    with mode, torch.enable_grad():
        parameters: dict[str, Tensor] = {name: _fake(p, device, dtype) for name, p in block.named_parameters()}
        recorder = _Recorder()
        with (
            _reparametrize_module(block, parameters),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            recorder,
        ):
            output = block.forward(*inputs, **options)
    # Recomputation stops where the last tensor that backward needs is there.
    again = recorder.calls[:num_calls]
    kept = [call for call in again if call.flops and call.output_storages]
    others = [call for call in again if call not in kept and (call.communicates or not fused)]
    elsewhere = storages([*tensors_of(parameters), *tensors_of(options), *tensors_of(output)])
    all_storages = storages([*inputs, *saved])
    all_bytes = sum(size for key, size in all_storages.items() if key not in elsewhere)
    return BlockCost(
        input_bytes=sum(storages(inputs).values()),
        operations=tuple(
            Operation((call.name,), sum(call.output_storages.values()), call.seconds(rates)) for call in kept
        ),
        other_seconds=sum(call.seconds(rates) for call in others),
        all_bytes=None if fused else all_bytes,
    )


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors, by its identity; a DTensor's is its local tensor's."""
    local = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in local}


def _fake(parameter: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """The same parameter without memory, on the device that will compute."""
    local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    fake = torch.empty(local.shape, device=device, dtype=dtype)
    if not isinstance(parameter, DTensor):
        return nn.Parameter(fake)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return nn.Parameter(DTensor.from_local(fake, mesh, placements, run_check=False, shape=shape, stride=stride))
