"""BlockManager: which sequence has which blocks (pages) of the cache, and what is in them.

Only the host's view: numbers of blocks. What they hold is in inference/runner.py.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from inference.sequence import Sequence


def root(adapter: int) -> int:
    """Number of the content of nothing, which first blocks follow: another one for each adapter, by which keys and
    values differ. Contents of blocks are numbered from 1."""
    return -adapter


class Copy(NamedTuple):
    """A block on its way between device and host."""

    source: int
    target: int
    to_host: bool


class BlockManager:
    """Blocks with reference counts, found again by what is in them.

    A full block's content is (number of the content before it, its tokens); equal contents have one number, so the
    number stands for the whole beginning of a sequence. A dictionary from contents to blocks is the prefix cache: it
    hashes (number, tokens) and then compares them, so two beginnings with one hash are never taken for each other.
    Numbers are never used again. Only full blocks are shared, and nothing is written into a full block.

    A block that no sequence uses is free, and keeps its content until it is given away: those without content first,
    then the least recently used, ends of sequences before their beginnings.
    """

    def __init__(self, num_blocks: int, block_size: int, *, host_blocks: int = 0, prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self._uses = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._free_host = list(range(host_blocks))
        self._block_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._content_of: dict[int, tuple[tuple[int, tuple[int, ...]], int]] = {}  # by block: its key there, its number
        self._last_content = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def start(self, sequence: Sequence) -> bool:
        """Give a sequence without blocks those for all of its tokens, cached ones where there are; False: no room.

        Sets num_computed to the number of its tokens whose keys and values are there already; its last token is not
        one of them, because the next is sampled from what it computes.
        """
        assert not sequence.blocks
        cached = [] if sequence.wants_prompt_logprobs else self._cached(sequence.tokens[:-1], sequence.adapter)
        revived = sum(self._uses[block] == 0 for block, _ in cached)
        if self.blocks_for(len(sequence.tokens)) - len(cached) > self.num_free - revived:
            return False
        for block, _ in cached:
            self._use(block)
        sequence.blocks = [block for block, _ in cached]
        sequence.contents = [content for _, content in cached]
        sequence.num_computed = len(cached) * self.block_size
        return self.extend(sequence, len(sequence.tokens))

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make sure that a sequence has blocks for so many tokens; False, and nothing is given: no room."""
        missing = self.blocks_for(num_tokens) - len(sequence.blocks)
        if missing > self.num_free:
            return False
        sequence.blocks += [self._take() for _ in range(missing)]
        return True

    def keep(self, sequence: Sequence) -> None:
        """Remember what is in the blocks that the sequence's num_computed tokens fill."""
        if not self.prefix_cache:
            return
        for index in range(len(sequence.contents), sequence.num_computed // self.block_size):
            before = sequence.contents[-1] if index else root(sequence.adapter)
            key = (before, tuple(sequence.tokens[index * self.block_size : (index + 1) * self.block_size]))
            block = self._block_of.get(key)
            if block is None:  # else another sequence has computed the same in a block of its own
                block = self._block_of[key] = sequence.blocks[index]
                self._last_content += 1
                self._content_of[block] = (key, self._last_content)
            sequence.contents.append(self._content_of[block][1])

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away, those on the host too."""
        for block in reversed(sequence.blocks):
            self._uses[block] -= 1
            if self._uses[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._content_of)
        self._free_host += sequence.host_blocks
        sequence.blocks, sequence.host_blocks, sequence.contents = [], [], []

    def swap_out(self, sequence: Sequence) -> list[Copy] | None:
        """Move a sequence's computed tokens to the host; None, and nothing happens: no room there.

        The copies this returns must be made, in their order, before the device computes anything again.
        """
        used = self.blocks_for(sequence.num_computed)
        if used == 0 or used > len(self._free_host):
            return None
        host = [self._free_host.pop() for _ in range(used)]
        copies = [Copy(block, there, True) for block, there in zip(sequence.blocks, host, strict=False)]
        contents = sequence.contents
        self.release(sequence)
        sequence.host_blocks, sequence.contents = host, contents
        return copies

    def swap_in(self, sequence: Sequence) -> list[Copy] | None:
        """The reverse, with blocks for all of its tokens; None: no room."""
        host, sequence.host_blocks = sequence.host_blocks, []
        if not self.extend(sequence, len(sequence.tokens)):
            sequence.host_blocks = host
            return None
        self._free_host += host
        return [Copy(there, block, False) for there, block in zip(host, sequence.blocks, strict=False)]

    def forget(self) -> None:
        """Let no block be found again: the weights that made their keys and values are others now."""
        self._block_of.clear()
        self._content_of.clear()

    def _cached(self, tokens: list[int], adapter: int) -> list[tuple[int, int]]:
        """Blocks that hold the beginning of tokens as an adapter makes them, and the numbers of their contents."""
        found: list[tuple[int, int]] = []
        content = root(adapter)
        for first in range(0, len(tokens) - self.block_size + 1, self.block_size):
            block = self._block_of.get((content, tuple(tokens[first : first + self.block_size])))
            if block is None:
                break
            content = self._content_of[block][1]
            found.append((block, content))
        return found

    def _use(self, block: int) -> None:
        self._free.pop(block, None)
        self._uses[block] += 1

    def _take(self) -> int:
        """A free block, whatever was in it."""
        block, _ = self._free.popitem(last=False)
        if block in self._content_of:
            del self._block_of[self._content_of.pop(block)[0]]
        self._uses[block] = 1
        return block
