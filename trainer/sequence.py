"""What context parallelism asks of a batch and of a configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from models.config import ATTENTION_IMPLEMENTATIONS, WITHOUT_BUDGET, ModelConfig
from models.layers.context_attention import runs_on_context
from parallel.cut import balanced, zigzag_indices
from parallel.dims import CP_METHODS, ParallelConfig, ParallelDims, divisors
from parallel.mesh import Meshes
from parallel.problem import Problem, multiples, values
from trainer.config import TrainConfig


def split_batch(
    batch: Batch, *, cp_rank: int, cp_size: int, cp_ulysses: int = 1, windows: Mapping[int | None, int] | None = None
) -> Batch:
    """The tokens of each sequence that belong to one rank of the cp axis, [B, S] to [B, S / cp_size]. On the CPU.

    Every rank of the axis loads the same whole sequences. In zigzag order; where documents are masked, cut so that
    ranks of the ring see about the same number of keys. windows: number of layers by window; None: one without. cp_size
    1: the batch as it is.
    """
    if cp_size == 1:
        return batch
    seq_len, ring = batch.tokens.shape[1], cp_size // cp_ulysses
    if batch.documents is None or ring == 1:
        return batch.take(zigzag_indices(seq_len, rank=cp_rank, size=cp_size))
    cut = balanced(batch.documents, ring, windows or {None: 1})
    indices = cut.indices(cp_rank // cp_ulysses)
    if cp_ulysses > 1:
        indices = indices[zigzag_indices(len(indices), rank=cp_rank % cp_ulysses, size=cp_ulysses)]
    return batch.take(indices, cut)


class SequenceParts:
    """Which tokens of each sequence are this rank's, and what is found for them put together again."""

    def __init__(self, config: TrainConfig, mesh: Meshes, model: ModelConfig | None = None) -> None:
        """config: resolved. model: whose attention the tokens are shared out for; None: the trained one."""
        model = config.model if model is None else model
        self._dims = ParallelDims.resolve(config.parallel, mesh.batch.size())
        self._axis = mesh.batch["cp"]
        self._windows = Counter(model.window_of(layer) for layer in range(model.num_blocks))

    def of(self, batch: Batch) -> Batch:
        """`split_batch` for this rank. Sequences of a multiple of `row_step` tokens."""
        return split_batch(
            batch,
            cp_rank=self._axis.get_local_rank(),
            cp_size=self._dims.cp,
            cp_ulysses=self._dims.cp_ulysses,
            windows=self._windows,
        )

    def whole(self, found: Tensor, part: Batch) -> Tensor:
        """[B, T] of the tokens of a batch that `of` gave, to [B, S] of whole sequences. Collective over cp."""
        if part.indices is None:
            return found
        group = self._axis.get_group()
        of_ranks, places = ([torch.empty_like(one) for _ in range(self._dims.cp)] for one in (found, part.indices))
        dist.all_gather(of_ranks, found.contiguous(), group=group)
        dist.all_gather(places, part.indices, group=group)
        result = torch.empty(len(found), self._dims.cp * found.shape[1], dtype=found.dtype, device=found.device)
        result[:, torch.cat(places)] = torch.cat(of_ranks, dim=1)
        return result


def row_step(parallel: ParallelConfig) -> int:
    """What the length of a row is a multiple of, for context and sequence parallelism to cut it evenly. Axes whose
    degree is left open count as 1."""
    cp = max(1, parallel.cp)
    of_tensor = max(1, parallel.tp) * parallel.sp_chunks * cp if parallel.sequence_parallel else 1
    return math.lcm(2 * cp if cp > 1 else 1, of_tensor)


def context_parallelism(parallel: ParallelConfig, dims: ParallelDims, *, documents: bool) -> str:
    """What runs over the cp axis, with or without document masks, for run.json."""
    if dims.cp == 1:
        return "none"
    inner = f" over ulysses({dims.cp_ulysses})" if 1 < dims.cp_ulysses < dims.cp else ""
    cut = ", cut by documents" if documents and dims.cp_ring > 1 else ""
    return f"{parallel.cp_method}({dims.cp if not inner else dims.cp_ring}){inner}{cut}"


def problems(config: TrainConfig, model: ModelConfig) -> list[Problem]:
    """Every reason why the sequences of `config` cannot be split over parallel.cp, whose degrees are legal.

    model: resolved; of one that is not (its own problems have been named), heads are not looked at.
    """
    cp, method, seq_len = config.parallel.cp, config.parallel.cp_method, config.train.seq_len
    found = []
    if seq_len % (2 * cp):
        step = row_step(config.parallel)  # where parallel.tp cuts the sequence too, of what both ask for
        found.append(
            Problem(
                f"train.seq_len={seq_len} does not divide into 2 x parallel.cp={cp} chunks",
                values("train.seq_len", multiples(step, seq_len), near=seq_len),
                values("parallel.cp", [d for d in divisors(cp)[:-1] if seq_len % (2 * d) == 0 or d == 1], near=cp),
            )
        )
    try:
        runs_on_context(model.attention, method, sinks=model.attention_sinks)
    except ValueError as error:
        what = str(error).partition("; use ")[0]
        others = [name for name in ("auto", *ATTENTION_IMPLEMENTATIONS) if name != model.attention]
        methods = values("parallel.cp_method", [name for name in CP_METHODS if name != method])
        found.append(Problem(what, values("model.attention", others), methods))
    if model.activation_checkpoint == "budget":
        found.append(
            Problem(
                f"model.activation_checkpoint=budget does not work with parallel.cp={cp}, whose attention exchanges "
                "keys that no single process can measure",
                WITHOUT_BUDGET,
            )
        )
    if config.train.compile and model.activation_checkpoint == "selective":
        found.append(
            Problem(
                "model.activation_checkpoint=selective with train.compile=true picks operations of one graph, which "
                f"attention over parallel.cp={cp} parts in two",
                values("model.activation_checkpoint", ["none", "full", "offload"]),
                values("train.compile", [False]),
            )
        )
    return found if model.num_kv_heads is None else found + _head_problems(config.parallel, model)


def _head_problems(parallel: ParallelConfig, model: ModelConfig) -> list[Problem]:
    whole = parallel.cp_method == "ulysses"
    field, degree = ("cp", parallel.cp) if whole else ("cp_ulysses", parallel.cp_ulysses)
    heads = model.num_heads // parallel.tp
    if heads % degree == 0:
        return []
    inner = [d for d in divisors(math.gcd(heads, parallel.cp)) if d < parallel.cp]
    methods = values("parallel.cp_method", ["ring", "allgather"]) if whole else None
    degrees = values(f"parallel.{field}", inner, near=degree)
    shown = f"model.num_heads={model.num_heads}"
    shown += f" / parallel.tp={parallel.tp} = {heads}" if parallel.tp > 1 else ""
    what = f"parallel.{field}={degree} does not divide {shown}, which Ulysses shares out"
    return [Problem(what, methods, degrees)]
