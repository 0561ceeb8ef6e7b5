"""AdamW over a list of tensors: what is checked, what is prepared once, what happens in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.adamw.placement import ElementIndex
from kernels.adamw.quantized import BLOCK, QuantizedMoment
from kernels.adamw.reference import Moment, Rounding, adamw_reference
from kernels.backend import refuse_dtensors, runs_triton
from kernels.multi_tensor import AddressTable, chunk_table, on_device

if TYPE_CHECKING:
    from kernels.adamw.kernel import Types

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Tensor:
    """A parameter and what belongs to it. Filled by AdamWUpdate."""

    parameter: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment
    decay: float
    copy: Tensor | None
    index: ElementIndex | None  # not None: rounded stochastically


class AdamWUpdate:
    """Adam with decoupled weight decay (1711.05101, algorithm 2) of many tensors; a launch per set of dtypes.

        g = grad_scale * gradient
        m += (1 - beta1) (g - m);    v += (1 - beta2) (g^2 - v)
        p = (1 - lr decay) p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    in fp32, whatever the tensors are stored in. With fp32 tensors 28 bytes per parameter move, 30 with a working copy
    in half precision, which is written in the same pass. Other forms of the state, tensor by tensor:

        8-bit moments: QuantizedMoment for both, blocks counted from the tensor's first element.
        bf16 parameters without a master: `rounding` names them, and updates are rounded up or down at random with
        expectation 0 (2010.06192), by numbers that depend on seed, step, name and the element's place in the whole
        parameter alone. Without it they are rounded to nearest, which loses updates below 1/256 of a weight.

    What it is built over keeps its place: the tensors are updated, and stay the state. Gradients are given each time.
    The same bits in every run; for 32- and 16-bit moments also however tensors are cut into shards.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        exp_avg: Sequence[Moment],
        exp_avg_sq: Sequence[Moment],
        *,
        decay: Sequence[float],
        copies: Sequence[Tensor | None] | None = None,
        rounding: Sequence[ElementIndex | None] | None = None,
        seed: int = 0,
    ) -> None:
        """Tensors are contiguous and on one device; shapes of a parameter, its moments and its copy agree.

        parameters, moments that are tensors: fp32, bf16 or fp16 (fp64 on the CPU). copies: rounded values of a
        parameter, None: none. Raises TypeError and ValueError, naming the tensor by its number.
        """
        empty = [None] * len(parameters)
        self._tensors = [
            _Tensor(*each)
            for each in zip(parameters, exp_avg, exp_avg_sq, decay, copies or empty, rounding or empty, strict=True)
        ]
        if not parameters:
            raise ValueError("an update of no parameters; pass at least one")
        self._device, self._seed = parameters[0].device, seed
        for number, tensor in enumerate(self._tensors):
            _check(number, tensor, self._device)
        self._launches: dict[tuple[torch.dtype, ...], list[_Launch]] = {}
        self._one = torch.ones((), device=self._device)
        self._zero = torch.zeros((), device=self._device)

    @torch.no_grad()
    def update(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        step: Tensor,
        grad_scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """One update in place; nothing waits for the device.

        gradients: of the parameters' shapes, contiguous, in fp32, bf16 or fp16. step: 0-d fp32, the number of this
        update, from 1. grad_scale: 0-d fp32, such as clipping coefficient / loss scale. skip: 0-d fp32; unless it is
        0, nothing is written, whatever the gradients hold. lr: a number, or 0-d fp32. All on the parameters' device.
        """
        if len(gradients) != len(self._tensors):
            raise ValueError(f"{len(gradients)} gradients for {len(self._tensors)} parameters")
        for number, (tensor, gradient) in enumerate(zip(self._tensors, gradients, strict=True)):
            refuse_dtensors(**{f"gradients[{number}]": gradient})
            _check_alike(f"gradients[{number}]", gradient, tensor.parameter, self._device)
        grad_scale, skip = self._one if grad_scale is None else grad_scale, self._zero if skip is None else skip
        for name, scalar in {"step": step, "grad_scale": grad_scale, "skip": skip, "lr": lr}.items():
            if isinstance(scalar, Tensor) and (scalar.dtype, scalar.device) != (torch.float32, self._device):
                raise TypeError(f"{name} is {scalar.dtype} on {scalar.device}; use torch.float32 on {self._device}")
        if not runs_triton(self._one):
            if skip == 0:
                for tensor, gradient in zip(self._tensors, gradients, strict=True):
                    rounding = None if tensor.index is None else Rounding(tensor.index, self._seed)
                    adamw_reference(
                        tensor.parameter,
                        gradient,
                        tensor.exp_avg,
                        tensor.exp_avg_sq,
                        lr=lr,
                        betas=betas,
                        eps=eps,
                        decay=tensor.decay,
                        step=step,
                        grad_scale=grad_scale,
                        rounding=rounding,
                    )
                    if tensor.copy is not None:
                        tensor.copy.copy_(tensor.parameter)
            return
        from kernels.adamw.kernel import launch

        for each in self._launches_for(gradients):
            tables = each.tables(gradients)
            launch(each.types, tables, lr=lr, betas=betas, eps=eps, step=step, grad_scale=grad_scale, skip=skip)

    def _launches_for(self, gradients: Sequence[Tensor]) -> list[_Launch]:
        """Launches that together update all tensors, prepared once for gradients of these dtypes."""
        dtypes = tuple(gradient.dtype for gradient in gradients)
        if dtypes not in self._launches:
            from kernels.adamw.kernel import Types

            groups: dict[Types, list[int]] = {}
            for number, (tensor, dtype) in enumerate(zip(self._tensors, dtypes, strict=True)):
                moment = tensor.exp_avg.codes if isinstance(tensor.exp_avg, QuantizedMoment) else tensor.exp_avg
                types = Types(
                    parameter=tensor.parameter.dtype,
                    gradient=dtype,
                    moment=moment.dtype,
                    copy=None if tensor.copy is None else tensor.copy.dtype,
                    stochastic=tensor.index is not None,
                    run=tensor.index is None or tensor.index.is_run,
                )
                groups.setdefault(types, []).append(number)
            self._launches[dtypes] = [
                _Launch(types, numbers, self._tensors, self._seed) for types, numbers in groups.items()
            ]
        return self._launches[dtypes]


class _Launch:
    """Tables of the tensors that one launch updates."""

    def __init__(self, types: Types, numbers: Sequence[int], tensors: Sequence[_Tensor], seed: int) -> None:
        self.types, self._numbers = types, numbers
        self._tensors = [tensors[number] for number in numbers]
        device = self._tensors[0].parameter.device
        sizes = [tensor.parameter.numel() for tensor in self._tensors]
        self._chunks = chunk_table(sizes, device)
        self._addresses = AddressTable(device)
        indices = [tensor.index or ElementIndex("") for tensor in self._tensors]
        constants = [
            (size, index.key(seed), index.first, *index.sizes, *index.strides)
            for size, index in zip(sizes, indices, strict=True)
        ]
        self._constants = on_device(constants, torch.int64, device)
        self._decays = on_device([tensor.decay for tensor in self._tensors], torch.float32, device)

    def tables(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """chunks, addresses, constants, decays: the kernel's first arguments."""
        addresses = self._addresses(
            [tensor.parameter for tensor in self._tensors],
            [gradients[number] for number in self._numbers],
            *zip(*(_parts(tensor.exp_avg, tensor.exp_avg_sq) for tensor in self._tensors), strict=True),
            [tensor.copy for tensor in self._tensors],
        )
        return self._chunks, addresses, self._constants, self._decays


def _parts(exp_avg: Moment, exp_avg_sq: Moment) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """First moment, second moment, the scales of both."""
    if isinstance(exp_avg, QuantizedMoment) and isinstance(exp_avg_sq, QuantizedMoment):
        return exp_avg.codes, exp_avg_sq.codes, exp_avg.scales, exp_avg_sq.scales
    assert isinstance(exp_avg, Tensor)
    assert isinstance(exp_avg_sq, Tensor)
    return exp_avg, exp_avg_sq, None, None


def _check(number: int, tensor: _Tensor, device: torch.device) -> None:
    parameter = tensor.parameter
    refuse_dtensors(**{f"parameters[{number}]": parameter})
    _check_alike(f"parameters[{number}]", parameter, parameter, device)
    for name, moment, dtype in (
        ("exp_avg", tensor.exp_avg, torch.int8),
        ("exp_avg_sq", tensor.exp_avg_sq, torch.uint8),
    ):
        name = f"{name}[{number}]"
        if not isinstance(moment, QuantizedMoment):
            refuse_dtensors(**{name: moment})
            _check_alike(name, moment, parameter, device)
            continue
        if moment.codes.dtype != dtype or moment.codes.numel() != parameter.numel():
            raise ValueError(f"{name} has {moment.codes.numel()} codes in {moment.codes.dtype}; use {dtype}, one each")
        if moment.scales.dtype != torch.float32 or moment.scales.numel() != -(-parameter.numel() // BLOCK):
            raise ValueError(
                f"{name} has {moment.scales.numel()} scales; use one per {BLOCK} elements, in torch.float32"
            )
        if {moment.codes.device, moment.scales.device} != {device}:
            raise ValueError(f"{name} is not on {device}")
    kinds = [moment.dtype if isinstance(moment, Tensor) else "8-bit" for moment in (tensor.exp_avg, tensor.exp_avg_sq)]
    if kinds[0] != kinds[1]:
        raise TypeError(f"exp_avg[{number}] is {kinds[0]} and exp_avg_sq[{number}] {kinds[1]}; use the same for both")
    if tensor.copy is not None:
        refuse_dtensors(**{f"copies[{number}]": tensor.copy})
        _check_alike(f"copies[{number}]", tensor.copy, parameter, device)
    if tensor.index is not None and parameter.dtype != torch.bfloat16:
        raise TypeError(f"rounding[{number}] is for bf16; parameters[{number}] is {parameter.dtype}; use None")


def _check_alike(name: str, tensor: Tensor, parameter: Tensor, device: torch.device) -> None:
    """Raise unless the tensor can be walked beside its parameter, element by element."""
    dtypes = (*DTYPES, torch.float64) if device.type == "cpu" and not runs_triton(tensor) else DTYPES
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; use one of {', '.join(map(str, dtypes))}")
    if tensor.shape != parameter.shape or tensor.device != device:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} on {tensor.device}, "
            f"its parameter {list(parameter.shape)} on {device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous in memory; make it so with .contiguous()")
