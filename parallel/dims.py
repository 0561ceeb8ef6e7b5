"""ParallelConfig and ParallelDims: the degrees of a layout. Pure arithmetic, no process group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ParallelConfig:
    """The layout asked for. -1 for dp_shard means: all processes the other axes leave."""

    dp_replicate: int = 1  # replicas of the (sharded) model: HSDP when dp_shard > 1
    dp_shard: int = -1  # processes one copy of the training state is sharded over
    zero_stage: int = 3  # 0 plain data parallel, 1 optimizer state, 2 and gradients, 3 and parameters (1910.02054)
    cpu_offload: bool = False  # keep sharded parameters, gradients and optimizer state in host memory (stages 2, 3)
    bucket_mb: float = 64.0  # stages 0 and 1: gradients are reduced in buckets of this many MiB
    tp: int = 1
    sequence_parallel: bool = False
    pp: int = 1
    pp_schedule: str = "1f1b"
    cp: int = 1
    cp_method: str = "ring"
    ep: int = 1


def divisors(n: int) -> list[int]:
    """All positive divisors of n, ascending: the legal values an error message offers."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class ParallelDims:
    """A layout with every degree resolved; their product is world_size."""

    dp_replicate: int
    dp_shard: int
    world_size: int

    @property
    def dp(self) -> int:
        """Ranks the global batch is split over."""
        return self.dp_replicate * self.dp_shard

    @classmethod
    def resolve(cls, config: ParallelConfig, world_size: int) -> ParallelDims:
        """Fill in dp_shard=-1. Raises ValueError naming field, value and fix; `problems` lists the same ones."""
        found = problems(config, world_size)
        if found:
            raise ValueError("; ".join(found))
        dp_shard = config.dp_shard if config.dp_shard != -1 else world_size // config.dp_replicate
        return cls(dp_replicate=config.dp_replicate, dp_shard=dp_shard, world_size=world_size)


def problems(config: ParallelConfig, world_size: int) -> list[str]:
    """Every reason why this layout cannot run on world_size processes, one line each."""
    found = []
    for name in ("tp", "pp", "cp", "ep"):
        degree = getattr(config, name)
        if degree != 1:
            found.append(
                f"parallel.{name}={degree} is not available: this version composes the data-parallel axes; use 1"
            )
    if config.sequence_parallel:
        found.append("parallel.sequence_parallel=true needs parallel.tp > 1, which is not available; use false")
    if config.zero_stage not in (0, 1, 2, 3):
        found.append(f"parallel.zero_stage={config.zero_stage} is not a ZeRO stage; use 0, 1, 2 or 3")
    if config.cpu_offload and config.zero_stage in (0, 1):
        found.append(
            f"parallel.cpu_offload=true does not work with parallel.zero_stage={config.zero_stage}, which keeps whole "
            "parameters on the device; use zero_stage 2 or 3, or cpu_offload=false"
        )
    if config.bucket_mb <= 0:
        found.append(f"parallel.bucket_mb={config.bucket_mb} must be positive; 64 suits most models")
    if config.dp_replicate < 1:
        found.append(f"parallel.dp_replicate={config.dp_replicate} must be at least 1")
    elif world_size % config.dp_replicate:
        found.append(
            f"parallel.dp_replicate={config.dp_replicate} does not divide the {world_size} processes; "
            f"use one of {', '.join(map(str, divisors(world_size)))}"
        )
    elif config.dp_shard != -1:
        if config.dp_shard < 1:
            found.append(f"parallel.dp_shard={config.dp_shard} must be at least 1, or -1 for what is left")
        elif config.dp_replicate * config.dp_shard != world_size:
            found.append(
                f"parallel.dp_replicate={config.dp_replicate} x parallel.dp_shard={config.dp_shard} = "
                f"{config.dp_replicate * config.dp_shard} is not the number of processes, {world_size}; "
                f"use parallel.dp_shard={world_size // config.dp_replicate} (or -1), or start "
                f"{config.dp_replicate * config.dp_shard} processes"
            )
    return found
