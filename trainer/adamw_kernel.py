"""AdamW by this project's own kernel: moments in 32, 16 or 8 bits, and bf16 weights that have no wider copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kernels.adamw import AdamWUpdate, ElementIndex, QuantizedMoment
from kernels.adamw.quantized import BLOCK
from parallel.fused import NOTHING_FUSED, Parts
from parallel.regions import largest_piece, local_region
from trainer.config import ConfigError, OptimConfig
from trainer.gradients import local_gradient, local_shard_of

NO_COPIES: Mapping[str, Tensor] = MappingProxyType({})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of moments that are not quantized, by optim.state_dtype."""


def is_quantized(parameter: Tensor) -> bool:
    """Whether optim.state_dtype=int8 keeps this parameter's moments in 8 bits.

    By its shape alone, so that every layout decides alike: matrices and stacks of them whose rows are whole blocks.
    Vectors (norms, biases), which are few and which any number of ranks cuts anywhere, stay fp32.
    """
    return parameter.ndim >= 2 and parameter.shape[-1] % BLOCK == 0


@dataclass(frozen=True)
class Moment:
    """A moment as state, laid out as its parameter is: values, or codes with the scales of their blocks."""

    values: Tensor  # of the parameter's shape: fp32, bf16; codes: int8 (first moment), uint8 (second)
    scales: Tensor | None = None  # of codes: fp32 [..., columns / BLOCK]

    @classmethod
    def zeros(cls, name: str, parameter: Tensor, state_dtype: str, *, signed: bool) -> Moment:
        """A moment of 0, as it is before the first step. Raises ConfigError for a layout that cuts blocks."""
        if state_dtype == "int8" and is_quantized(parameter):
            _check_blocks(name, parameter)
            codes = torch.zeros_like(parameter, dtype=torch.int8 if signed else torch.uint8, requires_grad=False)
            return cls(codes, _scales_of(parameter))
        dtype = DTYPES.get(state_dtype, torch.float32)
        if parameter.dtype == torch.float64:
            dtype = torch.float64
        return cls(torch.zeros_like(parameter, dtype=dtype, requires_grad=False))

    def local(self, rows: slice = slice(None)) -> Tensor | QuantizedMoment:
        """What this rank holds, or some of its rows, in the same memory."""
        values = local_shard_of(self.values)[rows]
        if self.scales is None:
            return values
        return QuantizedMoment(values.view(-1), local_shard_of(self.scales)[rows].view(-1))


class _Run(NamedTuple):
    """What one update is told of as a tensor: a parameter, or a part of a fused one."""

    parameter: str  # name
    rows: slice  # of this rank's
    rounding: ElementIndex | None


class KernelAdamW:
    """The rule of trainer/adamw.py by `kernels.adamw.AdamWUpdate`: Triton on CUDA, its reference in torch elsewhere.

    Each rank updates its local shards, without communication. Everything is computed in fp32, whatever it is stored in,
    and what is stored does not depend on how parameters are cut:

        Moments in bf16 are rounded to nearest. Moments in 8 bits (2110.02861) have a scale per 256 neighbours of a row:
        a layout that cuts rows cuts them between blocks, or is refused. So a checkpoint holds codes and scales as they
        are, and they move between layouts exactly.

        bf16 parameters are rounded stochastically (2010.06192), by random bits that are a function of seed, parameter
        name, number of the update and the element's place in the whole parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: Mapping[str, float],
        config: OptimConfig,
        *,
        seed: int,
        copies: Mapping[str, Tensor] = NO_COPIES,
        fused: Mapping[str, Parts] = NOTHING_FUSED,
    ) -> None:
        """decay: weight decay coefficient of each parameter, by name. seed: of stochastic rounding. copies: where new
        values of what this rank holds of a parameter are written to as well, in another dtype. fused: what fused
        parameters are made of, by name; bits are those of their parts.

        Raises ConfigError where optim.state_dtype=int8 and the layout cuts a block of 256 elements in two.
        """
        self.config, self.seed = config, seed
        self.parameters = dict(parameters)
        self.decay = dict(decay)
        self.copies = {name: copy for name, copy in copies.items() if name in parameters}
        make = Moment.zeros
        self.exp_avg = {n: make(n, p, config.state_dtype, signed=True) for n, p in parameters.items()}
        self.exp_avg_sq = {n: make(n, p, config.state_dtype, signed=False) for n, p in parameters.items()}
        # A rank may hold no row of a small parameter.
        held = [name for name, p in parameters.items() if local_shard_of(p).numel()]
        self._runs = [run for name in held for run in _runs_of(name, parameters[name], fused.get(name))]
        self._update: AdamWUpdate | None = None
        self._addresses: list[int] = []

    def state(self) -> dict[str, Tensor]:
        """exp_avg/NAME and exp_avg_sq/NAME of every parameter; of those in 8 bits also KIND_scales/NAME."""
        state: dict[str, Tensor] = {}
        for kind, moments in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            state |= {f"{kind}/{name}": moment.values for name, moment in moments.items()}
            state |= {f"{kind}_scales/{name}": m.scales for name, m in moments.items() if m.scales is not None}
        return state

    def update(self, *, lr: float, grad_scale: Tensor, skip: Tensor, num_steps: Tensor) -> None:
        """One update in place. num_steps counts this one; see Optimizer.step."""
        gradients = [local_gradient(run.parameter, self.parameters[run.parameter])[run.rows] for run in self._runs]
        if not gradients:
            return
        self._prepared().update(
            gradients,
            lr=lr,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            step=num_steps,
            grad_scale=grad_scale,
            skip=skip,
        )

    def _copy(self, run: _Run) -> Tensor | None:
        copy = self.copies.get(run.parameter)
        return None if copy is None else copy[run.rows]

    def _prepared(self) -> AdamWUpdate:
        """The update of all local shards; made anew if they moved, as fully_shard moves padded ones at first use."""
        shards = [local_shard_of(self.parameters[run.parameter])[run.rows] for run in self._runs]
        addresses = [shard.data_ptr() for shard in shards]
        if self._update is None or addresses != self._addresses:
            self._addresses = addresses
            self._update = AdamWUpdate(
                shards,
                [self.exp_avg[run.parameter].local(run.rows) for run in self._runs],
                [self.exp_avg_sq[run.parameter].local(run.rows) for run in self._runs],
                decay=[self.decay[run.parameter] for run in self._runs],
                copies=[self._copy(run) for run in self._runs],
                rounding=[run.rounding for run in self._runs],
                seed=self.seed,
            )
        return self._update


def _runs_of(name: str, parameter: Tensor, parts: Parts | None) -> list[_Run]:
    """What stochastic rounding of a bf16 parameter is numbered by is that of separate layers; fp32 holds an update."""
    if parameter.dtype != torch.bfloat16:
        return [_Run(name, slice(None), None)]
    local, region = local_shard_of(parameter), local_region(parameter)
    first = [part.start for part in region]
    if parts is None:
        return [_Run(name, slice(None), ElementIndex.of_shard(name, parameter.shape, local.shape, first))]
    found = []
    for part, its_name in parts.names(name).items():
        begin, count, first[0] = parts.rows_among(part, region[0].start, region[0].stop)
        if count:
            shape, here = (parts.rows[part], *parameter.shape[1:]), (count, *local.shape[1:])
            index = ElementIndex.of_shard(its_name, shape, here, first)
            found.append(_Run(name, slice(begin, begin + count), index))
    return found


def _scales_of(parameter: Tensor) -> Tensor:
    """fp32 0 [..., columns / BLOCK], placed as the parameter: a rank has the scales of the blocks it has."""
    local = local_shard_of(parameter)
    scales = torch.zeros((*local.shape[:-1], local.shape[-1] // BLOCK), dtype=torch.float32, device=local.device)
    if not isinstance(parameter, DTensor):
        return scales
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // BLOCK))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        scales, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _check_blocks(name: str, parameter: Tensor) -> None:
    """Raise ConfigError, the same on all ranks of its mesh, if a rank has a part of a block."""
    columns, piece = parameter.shape[-1], largest_piece(parameter, parameter.ndim - 1)
    if piece != columns and piece % BLOCK:
        raise ConfigError(
            [
                f"optim.state_dtype=int8 quantizes blocks of {BLOCK} elements of a row, and this layout cuts the "
                f"{columns} columns of {name} into pieces of {piece}; cut them into fewer ranks (parallel.tp, "
                "parallel.dp_shard, parallel.zero_stage=2), or use optim.state_dtype=bf16 or fp32"
            ]
        )
