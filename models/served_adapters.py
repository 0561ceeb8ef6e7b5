"""Several low-rank adapters beside one model in serving: each token has its own, or none.

Applied from outside, when the model is whole: layers keep their weights and get, beside their product, that of the
adapter of each token. Tokens are put in the order of their adapters once a pass, and in every layer two grouped
products (kernels/grouped_linear) make s B A x of all of them; tokens of the model alone lie behind the last group,
where a grouped product is 0. Ranks that differ are filled up with zeros, and so are layers that an adapter leaves out.
Over tp A and B are cut as in training (models/lora.py): what a row-parallel layer adds is a summand of its sum.

N tokens of a pass, P adapters, r the largest rank (of a fused layer: of all its parts), I features in, O out, of this
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from kernels.grouped_linear import grouped_linear
from kernels.nf4.pieces import Rows
from models.adapted_linear import function_of, is_linear, together
from models.decoder import Decoder
from models.lora import ABSORBED
from models.merge import check_fits
from models.peft import LowRank
from models.quantized import part_here, separate_names
from parallel.regions import local_tensor
from parallel.tensor import ColumnParallelLinear

MULTIPLE = 8
"""Ranks are filled up to these: kernels want rows of 16 bytes."""


@dataclass(frozen=True)
class Stack:
    """What all adapters are for one layer."""

    a: Tensor  # [P, r, I]
    b: Tensor  # [P, O, r]
    scales: Tensor  # [P + 1] fp32 at least; the last, of nobody, is 0


class ServedAdapters:
    """Adapters of a model, numbered from 1; a token with number 0 is the model's alone."""

    def __init__(self, model: Decoder, adapters: Mapping[str, Mapping[str, LowRank]]) -> None:
        """adapters: by name, those of layers by the layer's name (models.peft.load_peft). In place, and for good.

        Raises ValueError, before anything is changed, for adapters that do not fit the model or are not served.
        """
        self.names = list(adapters)
        self._order: Tensor | None = None  # [N] int64: tokens in the order of their adapters, as the rest by `tell`
        if problems := _problems(model, adapters):
            raise ValueError("; ".join(problems))
        self._implementation = "invariant" if model.batch_invariant else None
        for name, module in model.blocks.named_modules(prefix="blocks"):
            layer: Any = module
            if isinstance(module, ColumnParallelLinear):
                layer.together = MethodType(together, layer)
            if is_linear(module):
                stack = self._stack(layer, separate_names(layer, name), list(adapters.values()))
                if stack is not None:
                    self._add_to(layer, stack)
        model.adapted, model.served = True, self

    def tell(self, numbers: Tensor) -> None:
        """Of the tokens of the next pass: the number of each one's adapter, integers [N]. Nothing waits for it."""
        count = len(self.names)
        self._keys, self._order = torch.where(numbers == 0, count, numbers - 1).sort(stable=True)
        groups = torch.arange(count, device=numbers.device, dtype=self._keys.dtype)
        self._ends = torch.searchsorted(self._keys, groups, right=True).to(torch.int32)

    def _add_to(self, layer: Any, stack: Stack) -> None:
        replaced = function_of(layer)
        alone: Callable[[Tensor], Tensor] = getattr(layer, replaced)
        setattr(layer, replaced, lambda x: self._added(alone(x), x, stack))

    def _added(self, y: Tensor, x: Tensor, stack: Stack) -> Tensor:
        """y [.., O] of x [.., I], of N tokens, with what each one's adapter adds; in place."""
        assert self._order is not None
        rows = x.flatten(0, -2)[self._order]
        u = grouped_linear(rows, stack.a, self._ends, implementation=self._implementation)
        added = grouped_linear(u, stack.b, self._ends, implementation=self._implementation)
        added = (added * stack.scales[self._keys][:, None]).to(y.dtype)
        y.flatten(0, -2).index_add_(0, self._order, added)
        return y

    def _stack(self, layer: Any, names: list[str], adapters: list[Mapping[str, LowRank]]) -> Stack | None:
        """The adapters of a layer, or of the parts that it is fused of, by their names; None: nobody has any."""
        if not any(name in of_model for name in names for of_model in adapters):
            return None
        weight, (parts, column, columns, _) = local_tensor(layer.weight), part_here(layer)
        ranks = [len(of_model[name].a) for of_model in adapters for name in names if name in of_model]
        rank = -(-max(ranks) // MULTIPLE) * MULTIPLE
        out = sum(rows.num for rows in parts)
        wide = torch.promote_types(weight.dtype, torch.float32)
        stack = Stack(
            weight.new_zeros(len(adapters), len(names) * rank, columns),
            weight.new_zeros(len(adapters), out, len(names) * rank),
            torch.zeros(len(adapters) + 1, device=weight.device, dtype=wide),
        )
        for number, of_model in enumerate(adapters):
            scales = {of_model[name].scale for name in names if name in of_model}
            common = max(scales, default=0.0)
            stack.scales[number] = common
            begin = 0
            for part, (name, rows) in enumerate(zip(names, parts, strict=True)):
                if name in of_model:
                    one = of_model[name]
                    to_rank = slice(part * rank, part * rank + len(one.a))
                    stack.a[number, to_rank] = one.a[:, column : column + columns].to(stack.a)
                    b = one.b if one.scale == common else one.b * (one.scale / common)  # parts of one layer share it
                    stack.b[number, begin : begin + rows.num, to_rank] = _rows_of(b, rows).to(stack.b)
                begin += rows.num
        return stack


def _rows_of(b: Tensor, rows: Rows) -> Tensor:
    return b[rows.first : rows.first + rows.num]


def _problems(model: Decoder, adapters: Mapping[str, Mapping[str, LowRank]]) -> list[str]:
    """Why adapters cannot be served beside this model, one line each."""
    if model.adapted:
        return ["the model has adapters already; serve it without, or merged with them (models/merge.py)"]
    found: list[str] = []
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, layers in adapters.items():
        advice = "; merge it into a model of its own (launch/convert.py export --merged, or PEFT's merge_and_unload)"
        try:
            check_fits(shapes, layers)
        except ValueError as error:
            found.append(f"adapter {name}: {error}")
            continue
        if stacked := [layer for layer, one in layers.items() if one.a.ndim == 3]:
            found.append(f"adapter {name} is of experts ({stacked[0]}), whose tokens are in another order{advice}")
        if lengths := [layer for layer, one in layers.items() if one.lengths is not None]:
            found.append(f"adapter {name} has lengths of rows (DoRA, {lengths[0]}), not a low-rank product{advice}")
        if read := [layer for layer in layers if layer.endswith(ABSORBED)]:
            found.append(f"adapter {name} is of {read[0]}, of which attention over a cache reads the weight{advice}")
    return found
