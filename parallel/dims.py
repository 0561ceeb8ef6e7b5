"""ParallelConfig and ParallelDims: the degrees of a layout. Pure arithmetic, no process group."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from parallel.problem import Advice, Problem, change, values

CP_METHODS = ("ring", "ulysses", "allgather")


@dataclass
class ParallelConfig:
    """The layout asked for. -1 for dp_shard means: all processes the other axes leave."""

    dp_replicate: int = 1  # replicas of the (sharded) model: HSDP when dp_shard > 1
    dp_shard: int = -1  # processes one copy of the training state is sharded over
    zero_stage: int = 3  # 0 plain data parallel, 1 optimizer state, 2 and gradients, 3 and parameters (1910.02054)
    cpu_offload: bool = False  # keep sharded parameters, gradients and optimizer state in host memory (stage 3)
    bucket_mb: float = 64.0  # stages 0 and 1: gradients are reduced in buckets of this many MiB (stage 2: blocks)
    tp: int = 1
    sequence_parallel: bool = False
    sp_chunks: int = 1  # with sequence_parallel: cut gathers and scatters, to travel while products are computed
    pp: int = 1
    pp_schedule: str = "1f1b"  # gpipe, 1f1b, interleaved_1f1b, zero_bubble, zbv, dualpipev
    pp_stages_per_rank: int = 2  # interleaved_1f1b: pieces of the model each pipeline rank holds
    pp_split: list[int] | None = None  # layers of each stage, first to last; None: balanced by cost
    pp_trace: bool = (
        False  # time every action (slows steps); of the last step pipeline_trace.json, pipeline_timeline.png
    )
    cp: int = 1  # processes the tokens of a sequence are split over
    cp_method: str = "ring"  # one of CP_METHODS
    cp_ulysses: int = 1  # ring or allgather between groups of this many of cp's processes, Ulysses inside them
    ep: int = 1  # processes of dp_shard x cp that the experts of a layer are shared out over
    # Room for the rows from a rank to another, in equal shares of its rows; neither host nor compiler then waits for
    # sizes. ep is always enough; a step that needs more than there is makes no update, and the run stops. 0: as many as
    # there are, which the host reads in each layer. None: 0, or with train.compile ep.
    ep_buffer: float | None = None


def divisors(n: int) -> list[int]:
    """All positive divisors of n, ascending: the legal values an error message offers."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class ParallelDims:
    """A layout with every degree resolved. The product of all but ep, which re-uses data ranks, is world_size."""

    dp_replicate: int
    dp_shard: int
    world_size: int
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    cp_ulysses: int = 1  # the inner part of cp, over which heads are shared out; cp when that is all there is

    @property
    def cp_ring(self) -> int:
        """The outer part of cp, over which keys and values travel."""
        return self.cp // self.cp_ulysses

    @property
    def expert_shard(self) -> int:
        """Ranks that the state of one rank's experts is sharded over: what ep leaves of dp_shard x cp."""
        return self.dp_shard * self.cp // self.ep

    @property
    def dp(self) -> int:
        """Ranks the sequences of a global batch are split over."""
        return self.dp_replicate * self.dp_shard

    @classmethod
    def resolve(cls, config: ParallelConfig, world_size: int) -> ParallelDims:
        """Fill in dp_shard=-1. Raises ValueError naming field, value and fix; `problems` lists the same ones."""
        found = problems(config, world_size)
        if found:
            raise ValueError("; ".join(found))
        others = config.dp_replicate * config.pp * config.cp * config.tp
        return cls(
            dp_replicate=config.dp_replicate,
            dp_shard=config.dp_shard if config.dp_shard != -1 else world_size // others,
            world_size=world_size,
            pp=config.pp,
            cp=config.cp,
            tp=config.tp,
            ep=config.ep,
            cp_ulysses=config.cp if config.cp_method == "ulysses" else config.cp_ulysses,
        )


def problems(config: ParallelConfig, world_size: int) -> list[Problem]:
    """Every reason why this layout cannot run on world_size processes, one line each."""
    found = []
    if config.sequence_parallel and config.tp == 1:
        found.append(
            Problem(
                "parallel.sequence_parallel=true splits norms over the tp axis, and parallel.tp=1",
                values("parallel.sequence_parallel", [False]),
                values("parallel.tp", divisors(world_size)[1:], near=1),
            )
        )
    if config.cp_method not in CP_METHODS:
        found.append(
            Problem(f"parallel.cp_method={config.cp_method} is unknown", values("parallel.cp_method", CP_METHODS))
        )
    if config.cp_ulysses != 1 and config.cp_method == "ulysses":
        found.append(
            Problem(
                f"parallel.cp_ulysses={config.cp_ulysses} is the inner part of ring or allgather, and "
                "parallel.cp_method=ulysses uses all of cp",
                values("parallel.cp_ulysses", [1]),
                values("parallel.cp_method", ["ring", "allgather"]),
            )
        )
    elif config.cp_ulysses != 1 and (config.cp_ulysses < 1 or config.cp % config.cp_ulysses):
        found.append(
            Problem(
                f"parallel.cp_ulysses={config.cp_ulysses} does not divide parallel.cp={config.cp}",
                values("parallel.cp_ulysses", divisors(config.cp)[:-1] or [1], near=config.cp_ulysses),
            )
        )
    elif config.cp_ulysses == config.cp > 1:
        found.append(
            Problem(
                f"parallel.cp_ulysses={config.cp_ulysses} leaves nothing of parallel.cp={config.cp} to "
                f"parallel.cp_method={config.cp_method}",
                change(parallel__cp_method="ulysses", parallel__cp_ulysses=1),
                values("parallel.cp_ulysses", divisors(config.cp)[:-1], near=config.cp),
            )
        )
    if config.zero_stage not in (0, 1, 2, 3):
        found.append(
            Problem(
                f"parallel.zero_stage={config.zero_stage} is not a ZeRO stage",
                values("parallel.zero_stage", [0, 1, 2, 3]),
            )
        )
    if config.cpu_offload and config.zero_stage in (0, 1, 2):
        found.append(
            Problem(
                f"parallel.cpu_offload=true does not work with parallel.zero_stage={config.zero_stage}, which keeps "
                "whole parameters on the device",
                values("parallel.zero_stage", [3]),
                values("parallel.cpu_offload", [False]),
            )
        )
    if not 0 < config.bucket_mb < math.inf:
        found.append(
            Problem(
                f"parallel.bucket_mb={config.bucket_mb} must be positive and finite; 64 suits most models",
                values("parallel.bucket_mb", [64.0]),
            )
        )
    found += _ep_buffer_problems(config)
    return found + _degree_problems(config, world_size)


def _ep_buffer_problems(config: ParallelConfig) -> list[Problem]:
    buffer, ep = config.ep_buffer, config.ep
    if not buffer or ep < 1:
        return []
    if ep == 1:
        why = f"parallel.ep_buffer={buffer} is room for rows between ranks of parallel.ep, which is 1"
        return [Problem(why, values("parallel.ep_buffer", [None]))]
    if not 1 <= buffer <= ep:
        why = (
            f"parallel.ep_buffer={buffer} is neither 0 (exact sizes) nor from 1 (what equal shares need) to "
            f"parallel.ep={ep} (what is always enough)"
        )
        return [Problem(why, values("parallel.ep_buffer", [1.0, float(ep), None]))]
    return []


def _degree_problems(config: ParallelConfig, world_size: int) -> list[Problem]:
    """Degrees that are not positive, or whose product is not the number of processes."""
    given = {axis: getattr(config, axis) for axis in ("dp_replicate", "pp", "cp", "tp", "ep")}
    found = [
        Problem(f"parallel.{axis}={degree} must be at least 1", values(f"parallel.{axis}", divisors(world_size)))
        for axis, degree in given.items()
        if degree < 1
    ]
    if config.dp_shard < 1 and config.dp_shard != -1:
        found.append(
            Problem(
                f"parallel.dp_shard={config.dp_shard} must be at least 1, or -1 for what is left",
                values("parallel.dp_shard", [-1]),
            )
        )
    if found:
        return found
    large = {axis: degree for axis, degree in given.items() if degree > 1 and axis != "ep"}
    product = math.prod(large.values())
    shown = " x ".join(f"parallel.{axis}={degree}" for axis, degree in large.items())
    if world_size % product:
        what = f"{shown} does not divide" if len(large) == 1 else f"{shown} = {product} does not divide"
        return [
            Problem(
                f"{what} the {world_size} processes",
                *_fitting(large, world_size),
                words=f"start a multiple of {product} processes",
            )
        ]
    if config.dp_shard not in (-1, world_size // product):
        total = product * config.dp_shard
        shown = " x ".join(filter(None, (shown, f"parallel.dp_shard={config.dp_shard}")))
        return [
            Problem(
                f"{shown} = {total} is not the number of processes, {world_size}",
                values("parallel.dp_shard", [world_size // product, -1]),
                words=f"start {total} processes",
            )
        ]
    shard = world_size // product * config.cp  # dp_shard x cp
    if shard % config.ep:
        return [
            Problem(
                f"parallel.ep={config.ep} does not divide parallel.dp_shard x parallel.cp = {shard}, whose ranks share "
                "out the experts",
                values("parallel.ep", divisors(shard), near=config.ep),
            )
        ]
    return []


def _fitting(degrees: dict[str, int], world_size: int) -> list[Advice | None]:
    """For each axis the degrees that fit beside the others; where none does for any, nearby degrees of all of them."""
    product = math.prod(degrees.values())
    one = [
        values(
            f"parallel.{axis}",
            [d for d in divisors(world_size) if world_size % (product // degree * d) == 0],
            near=degree,
        )
        for axis, degree in degrees.items()
    ]
    if any(one):
        return one

    def distance(other: tuple[int, ...]) -> float:
        return sum(abs(math.log(new / old)) for new, old in zip(other, degrees.values(), strict=True))

    every = itertools.product(*(divisors(world_size) for _ in degrees))
    legal = sorted((other for other in every if world_size % math.prod(other) == 0), key=distance)
    together = ({f"parallel.{axis}": d for axis, d in zip(degrees, other, strict=True)} for other in legal)
    return [Advice(tuple(itertools.islice(together, 24)))]
