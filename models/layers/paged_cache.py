"""Keys and values of earlier tokens, in pages: what the attention layers of a model that is served read and write.

N tokens of a step, S sequences, L layers, P pages, G key/value heads, K features of a key, V of a value.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.paged_attention import paged_attention, write_pages


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
        write_pages(keys, values, k[0], None if v is None else v[0], self.slots)
        return paged_attention(
            q[0],
            keys,
            keys[..., :value_dim] if values is None else values,
            self.block_tables,
            self.query_starts,
            self.lengths,
            scale=scale,
            window=window,
            slopes=slopes,
            sinks=sinks,
        )[None]
