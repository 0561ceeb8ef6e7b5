"""PipelineLayout: the stages of a model, and what a configuration asks for that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.dims import ParallelConfig
from parallel.pipeline.schedules import SCHEDULES, Schedule, forward_only, make_schedule, placement, stages_per_rank
from parallel.pipeline.stages import Stage, balance, make_stages
from parallel.pipeline.timeline import problems as timeline_problems
from parallel.problem import Problem, values


@dataclass(frozen=True)
class PipelineLayout:
    """Which rank runs which layers under which schedule."""

    schedule: str
    num_ranks: int
    stages: tuple[Stage, ...]
    owner: tuple[int, ...]  # rank of each stage

    @property
    def summary(self) -> str:
        """Schedule and layers per stage, such as 1f1b(8+8+8+7)."""
        return f"{self.schedule}({'+'.join(str(stage.stop - stage.start) for stage in self.stages)})"

    def of_rank(self, rank: int) -> tuple[Stage, ...]:
        """The stages a rank holds, in model order."""
        return tuple(stage for stage in self.stages if self.owner[stage.index] == rank)

    def training(self, num_microbatches: int) -> Schedule:
        return make_schedule(
            self.schedule,
            num_ranks=self.num_ranks,
            num_microbatches=num_microbatches,
            chosen=len(self.stages) // self.num_ranks,
        )

    def evaluation(self, num_microbatches: int) -> Schedule:
        return forward_only(self.owner, num_microbatches)


def make_layout(config: ParallelConfig, layer_costs: Sequence[float], *, head_cost: float) -> PipelineLayout:
    """The layout asked for; costs in any unit, of which only the balance matters. `problems` has found none."""
    owner = placement(config.pp_schedule, config.pp, config.pp_stages_per_rank)
    sizes = config.pp_split or balance(layer_costs, len(owner), last=head_cost)
    return PipelineLayout(config.pp_schedule, config.pp, make_stages(sizes), owner)


def problems(config: ParallelConfig, num_layers: int) -> list[str]:
    """Every reason why these layers cannot be split as asked, one line each."""
    found = timeline_problems() if config.pp_trace else []
    if config.pp == 1:
        found += ["parallel.pp_trace=true and parallel.pp=1 has no pipeline to trace; use false"] * config.pp_trace
        return found + ["parallel.pp_split is set, and parallel.pp=1; leave it out"] * (config.pp_split is not None)
    return found + _stage_problems(config, num_layers)


def _stage_problems(config: ParallelConfig, num_layers: int) -> list[Problem]:
    """Of a real pipeline."""
    if config.pp_schedule not in SCHEDULES:
        why = f"parallel.pp_schedule={config.pp_schedule} is not a schedule"
        return [Problem(why, values("parallel.pp_schedule", SCHEDULES))]
    if config.pp_stages_per_rank < 1:
        why = f"parallel.pp_stages_per_rank={config.pp_stages_per_rank} must be at least 1; 2 is usual"
        return [Problem(why, values("parallel.pp_stages_per_rank", [2, 1]))]
    per_rank = stages_per_rank(config.pp_schedule, config.pp_stages_per_rank)
    num_stages = config.pp * per_rank
    if num_layers < num_stages:
        fewer = [s for s in SCHEDULES if config.pp * stages_per_rank(s, config.pp_stages_per_rank) <= num_layers]
        per_stage = [n for n in range(1, config.pp_stages_per_rank) if config.pp * n <= num_layers]
        return [
            Problem(
                f"parallel.pp={config.pp} with parallel.pp_schedule={config.pp_schedule} makes {num_stages} stages, "
                f"and model.num_layers={num_layers} does not fill them",
                values("parallel.pp", range(1, num_layers // per_rank + 1), near=config.pp),
                values("parallel.pp_schedule", fewer),
                values("parallel.pp_stages_per_rank", per_stage, near=config.pp_stages_per_rank),
            )
        ]
    split = config.pp_split
    if split is None:
        return []
    if len(split) != num_stages or sum(split) != num_layers or min(split) < 1:
        even = balance([1.0] * num_layers, num_stages)
        return [
            Problem(
                f"parallel.pp_split={list(split)} must have {num_stages} entries (stages), each at least 1, that add "
                f"up to model.num_layers={num_layers}",
                values("parallel.pp_split", [None, tuple(even)]),
            )
        ]
    return []
