"""Keys and values of earlier tokens, in pages: what the attention layers of a model that is served read and write.

N tokens of a step, S sequences, L layers, P pages, G key/value heads, H query heads, K features of a key, V of a value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import fused, sdpa
from kernels.paged_attention import paged_attention, rotate_and_write, write_pages

LONG_PROMPT = 1024
"""Tokens from which on average prompts are attended to one by one, by cuDNN, rather than all in one launch of ours."""


class Fresh(NamedTuple):
    """Sequences that begin in this pass, the first of it: their keys are all here, and no page has to be read."""

    ends: tuple[int, ...]  # of their tokens, one behind the other
    documents: Tensor  # [1, ends[-1]] int32
    plain: bool  # attention without a window, ALiBi or sinks has a faster kernel where this is set


class PagedCache(NamedTuple):
    """The pages of all layers, and whose tokens a forward pass has; a pytree. Filled by inference/runner.py.

    The tokens [1, N] of such a pass are those of S sequences one behind the other, each with its position.
    """

    keys: Tensor  # [L, P, page_size, G, K]
    values: Tensor | None  # [L, P, page_size, G, V]; None: a value is the beginning of its key (latent attention)
    slots: Tensor  # [N] int64: page * page_size + place in it of each token's key; -1: it has none
    block_tables: Tensor  # [S, M] int32
    query_starts: Tensor  # [S + 1] int32
    lengths: Tensor  # [S] int32: tokens of each sequence, with those of this pass
    max_seq_len: int  # tokens of the longest sequence there can be
    frequencies: tuple[Tensor, float] | None = None  # rope.frequencies, on the device; None: to be computed
    slopes: Tensor | None = None  # of ALiBi, the same
    decodes: bool = False  # every sequence has one token here; one of length 0 pads
    splits: int | None = None  # of a sequence's keys (kernels/paged_attention)
    fresh: Fresh | None = None
    fused: bool = True  # blocks may be computed by models/layers/serving.py
    wanted: tuple[Tensor, Tensor] | None = None
    """int64 [R], [R]: tokens, each the last of its sequence, whose hidden states are wanted, and these sequences, by
    number. models/layers/serving.py computes the last block for them alone. None: all."""
    batch_invariant: bool = False  # models/invariant.py
    key_scales: Tensor | None = None  # [L, P, page_size, G] fp32, of codes in 8 bits; None: keys and values are none
    value_scales: Tensor | None = None  # the same; None also for latents, whose values are keys

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        *,
        value_dim: int,
        scale: float,
        window: int | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Keep k [1, N, G, K] and v [1, N, G, V], then attend from q [1, N, H, K] to all of the sequences' tokens.

        v None: the first value_dim features of k. Returns [1, N, H, V].
        """
        keys, values = self.keys[layer], None if self.values is None else self.values[layer]
        scales = self._scales(layer)
        write_pages(keys, values, k[0], None if v is None else v[0], self.slots, **scales)
        pages = keys, keys[..., :value_dim] if values is None else values
        if values is None:
            scales["v_scales"] = scales["k_scales"]
        return self._attend(q[0], *pages, scale=scale, window=window, slopes=slopes, sinks=sinks, **scales)[None]

    def rotate_and_keep(self, layer: int, qkv: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, H, K], k and v [N, G, K] of what the projection yields, [N, H + 2G, K], turned in place; k and v are
        kept. how: arguments of kernels.paged_attention.rotate_and_write."""
        assert self.values is not None
        scales = self._scales(layer)
        return rotate_and_write(qkv, self.keys[layer], self.values[layer], self.slots, **how, **scales)

    def attend_kept(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        """From q [N, H, K] to all of the sequences' tokens, [N, H, K], once k and v of this pass are kept."""
        assert self.values is not None
        keys, values, how_paged = self.keys[layer], self.values[layer], how | self._scales(layer)
        if self.fresh is None:
            return self._attend(q, keys, values, **how_paged)
        end, number = self.fresh.ends[-1], len(self.fresh.ends)
        output = _attend_fresh(self.fresh, q[:end], k[:end], v[:end], **how)
        if end == q.shape[0]:
            return output
        others = self._replace(
            block_tables=self.block_tables[number:],
            query_starts=self.query_starts[number:] - end,
            lengths=self.lengths[number:],
        )
        return torch.cat((output, others._attend(q[end:], keys, values, **how_paged)))

    def of_wanted(self) -> PagedCache:
        """As the wanted tokens see it, when all keys are kept: one query of each of their sequences."""
        assert self.wanted is not None
        _, sequences = self.wanted
        return self._replace(
            block_tables=self.block_tables[sequences],
            query_starts=self.query_starts[: len(sequences) + 1],  # not read
            lengths=self.lengths[sequences],
            decodes=True,
            fresh=None,
        )

    def _scales(self, layer: int) -> dict[str, Any]:
        """Of a layer's pages, as arguments of kernels/paged_attention."""
        both = {"k_scales": self.key_scales, "v_scales": self.value_scales}
        return {name: None if scales is None else scales[layer] for name, scales in both.items()}

    def _attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, **how: Any) -> Tensor:
        where = (self.block_tables, self.query_starts, self.lengths)
        return paged_attention(
            q,
            k_pages,
            v_pages,
            *where,
            decodes=self.decodes,
            splits=self.splits,
            batch_invariant=self.batch_invariant,
            **how,
        )


def _attend_fresh(
    fresh: Fresh,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Whole prompts, each attending to itself: q [N, H, K], k and v [N, G, K] to [N, H, K]."""
    if fresh.plain and window is None and slopes is None and sinks is None:
        outputs, first = [], 0
        for end in fresh.ends:
            outputs.append(sdpa.attention(q[None, first:end], k[None, first:end], v[None, first:end], None)[0])
            first = end
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    mask = fused.build_mask(q.shape[0], q.device, window=window, documents=fresh.documents)
    return fused.attention(q[None], k[None], v[None], mask, scale=scale, slopes=slopes, sinks=sinks)[0][0]
