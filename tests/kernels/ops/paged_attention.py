"""Cases of attention over pages."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.paged_attention import paged_attention, write_pages
from kernels.paged_attention.op import _paged_attention, _write_pages
from kernels.paged_attention.reference import paged_attention_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal

SHAPE = (6, 2, 20, 12, 3)  # H, G, K, V, page_size
COUNTS, LENGTHS = (1, 7, 0, 1, 2), (9, 7, 4, 1, 35)  # queries and tokens of each sequence
PADDING = 2


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """q, pages, tables; slopes and sinks at the end. Pages of a sequence lie anywhere, and some belong to nobody."""
    H, G, K, V, page_size = shape
    needed = [-(-length // page_size) for length in LENGTHS]
    order = torch.randperm(sum(needed) + 3, generator=generator).to(torch.int32)
    tables = torch.full((len(LENGTHS), max(needed) + 1), 0, dtype=torch.int32)
    for table, n, end in zip(tables, needed, torch.tensor(needed).cumsum(0).tolist(), strict=True):
        table[:n] = order[end - n : end]
    starts = torch.tensor((0, *COUNTS)).cumsum(0).to(torch.int32)
    return (
        normal((sum(COUNTS) + PADDING, H, K), dtype, generator),
        normal((len(order), page_size, G, K), dtype, generator),
        normal((len(order), page_size, G, V), dtype, generator),
        tables,
        starts,
        torch.tensor(LENGTHS, dtype=torch.int32),
        normal((H,), torch.float32, generator).abs() * 0.1,
        normal((H,), torch.float32, generator),
    )


def _call(function: Any, *inputs: Any, slopes: bool = False, sinks: bool = False, **settings: Any) -> Tensor:
    *tensors, its_slopes, its_sinks = inputs
    return function(*tensors, slopes=its_slopes if slopes else None, sinks=its_sinks if sinks else None, **settings)


def _latent(function: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> Tensor:
    """Values that are the beginning of the keys."""
    return _call(function, q, k_pages, k_pages[..., : v_pages.shape[3]], *rest, scale=0.3)


def _write(
    function: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Pages after writing tokens to the places with numbers 0, 7, 14, ... and one nowhere."""
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    k, v = (pages.flatten(0, 1)[:6] * 2 for pages in (k_pages, v_pages))
    slots = torch.arange(6, device=q.device) * 7
    slots[2] = -1
    function(k_pages, v_pages, k, v, slots)
    return k_pages, v_pages


def _plain_write(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    for pages, x in ((k_pages, k), (v_pages, v)):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                pages[slot // pages.shape[1], slot % pages.shape[1]] = x[token]


def _checks(inputs: Inputs) -> list[tuple[Any, Inputs]]:
    *tensors, slopes, sinks = inputs
    _, k_pages, v_pages = tensors[:3]
    tokens = [pages[0].clone() for pages in (k_pages, v_pages)]
    slots = torch.arange(k_pages.shape[1], device=slopes.device) + 5
    return [
        (_paged_attention, (*tensors, 0.2, 3, slopes, sinks)),
        (_write_pages, (k_pages.clone(), v_pages.clone(), *tokens, slots)),
    ]


def _case(name: str, call: Any, shapes: list[Shape], **changes: Any) -> Case:
    reference = _plain_write if call is _write else paged_attention_reference
    op = write_pages if call is _write else paged_attention
    return Case(
        name=name,
        op=partial(call, op),
        reference=partial(call, reference),
        inputs=_inputs,
        shapes=shapes,
        differentiable=(),
        batch_dim=None,
        **changes,
    )


TUNED = "kernels.paged_attention.kernel:ATTEND"
CASES = [
    _case("paged_attention", _call, [SHAPE, (5, 1, 7, 33, 16)], checks=_checks, tuned=TUNED),
    _case("paged_attention_masked", partial(_call, slopes=True, sinks=True, window=6), [SHAPE]),
    _case("paged_attention_latent", _latent, [(17, 1, 18, 15, 4)]),
    _case("write_pages", _write, [SHAPE]),
]
