"""The cache in memory: its pages on the device and on the host, how many there is room for, and copies of them.

L layers, P pages, G key/value heads, K features of a key, V of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from inference.blocks import Copy
from inference.config import CACHE_DTYPES, EngineConfig, longest
from inference.memory import STAGING_BYTES, WorkingMemory
from inference.ranks import smallest
from models.decoder import Decoder

CPU_CACHE_BYTES = 2**30


class Pages(NamedTuple):
    """The cache. Filled by `make_pages`."""

    keys: Tensor  # [L, P, page_size, G, K]
    values: Tensor | None  # [L, P, page_size, G, V]; None: made of the keys
    key_scales: Tensor | None  # [L, P, page_size, G] fp32, of codes in 8 bits
    value_scales: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self if x is not None)


def make_copies(copies: list[Copy], pages: list[tuple[Tensor, Tensor]]) -> None:
    """Copies in their order, of every pair of tensors [L, P, ...] on the device and on the host.

    Blocks are gathered on one side, sent, and put into their places on the other, some at a time: what is on its way
    is at most STAGING_BYTES, or one block.
    """
    for to_host, group in groupby(copies, key=lambda copy: copy.to_host):
        sources, targets = zip(*((copy.source, copy.target) for copy in group), strict=True)
        for here, there in pages:
            source, target = (here, there) if to_host else (there, here)
            _copy_blocks(source, target, torch.tensor(sources), torch.tensor(targets))


def _copy_blocks(source: Tensor, target: Tensor, sources: Tensor, targets: Tensor) -> None:
    """target[:, targets] = source[:, sources]."""
    block_bytes = source[:, :1].numel() * source.itemsize
    at_a_time = max(1, STAGING_BYTES // max(1, block_bytes))
    for some, places in zip(sources.split(at_a_time), targets.split(at_a_time), strict=True):
        # The device's own order keeps what follows behind this; copies to the host are waited for.
        moved = source[:, some.to(source.device)]
        target[:, places.to(target.device)] = moved.to(target.device)


def make_pages(
    model: Decoder,
    config: EngineConfig,
    blocks: int,
    given: torch.dtype,
    device: torch.device,
    *,
    pin: bool = False,
    num_layers: int | None = None,
) -> Pages:
    """Pages of the dtype that the settings ask for; given is that of the weights. num_layers: the model's, or so many.

    G are this rank's heads of tp, one where several ranks share it; a latent is whole on every rank.
    """
    sizes, ranks = model.config, 1 if model.groups.tp is None else model.groups.tp.size()
    codes = CACHE_DTYPES[config.cache_dtype]
    before = (num_layers or sizes.num_layers, blocks, config.block_size)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*before, *shape, dtype=dtype, device=device, pin_memory=pin)

    def pages(heads: int, features: int) -> tuple[Tensor, Tensor | None]:
        scales = None if codes is None else zeros(heads, dtype=torch.float32)
        return zeros(heads, features, dtype=codes or given), scales

    if sizes.mla.kv_rank:
        latents, scales = pages(1, sizes.mla.kv_rank + sizes.mla.rope_dim)
        return Pages(latents, None, scales, None)
    assert sizes.num_kv_heads is not None
    assert sizes.head_dim is not None  # resolved
    (keys, key_scales), (values, value_scales) = (
        pages(max(1, sizes.num_kv_heads // ranks), sizes.head_dim) for _ in range(2)
    )
    return Pages(keys, values, key_scales, value_scales)


@contextmanager
def no_room_named(what: str, name: str) -> Iterator[None]:
    """Inside, what torch raises where memory is refused becomes a ValueError of one line."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"there is no memory for {what}; use less engine.{name} ({str(error).splitlines()[0]})"
        ) from None


def fitting_blocks(
    model: Decoder, config: EngineConfig, like: Tensor, extra_block_bytes: int, working: WorkingMemory
) -> int:
    """Blocks for all that may run at a time, or as many as there is memory for on every rank of tp.

    like: a parameter. extra_block_bytes: that something else takes for each block. working: what is left to steps;
    off CUDA it is not the cache's concern.

    Raises ValueError where that is less than one sequence takes.
    """
    block_bytes = make_pages(model, config, 1, like.dtype, torch.device("meta")).nbytes + extra_block_bytes
    room = CPU_CACHE_BYTES
    if like.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(like.device)
        room = int(free - (1 - config.memory_fraction) * total) - working.total
    longest_here = longest(config, model.config)
    one = -(-longest_here // config.block_size)
    blocks = smallest(min(max(room, 0) // block_bytes, one * config.max_sequences), model.groups.tp)
    if blocks < one:
        fitting = (
            f"max_seq_len={blocks * config.block_size} or less" if blocks > 0 else "a device with more free memory"
        )
        larger = ""
        if like.device.type == "cuda":
            larger = (
                f", engine.memory_fraction above {config.memory_fraction}, or less engine.max_batch_tokens or "
                f"engine.max_sequences (steps take {working.describe()})"
            )
        raise ValueError(
            f"there is room for {blocks} blocks of {config.block_size} tokens ({block_bytes} bytes each), but one "
            f"sequence of engine.max_seq_len={longest_here} takes {one}; use {fitting}{larger}, or set "
            "engine.num_blocks"
        )
    return blocks
