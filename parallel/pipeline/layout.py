"""PipelineLayout: the stages of a model, and what a configuration asks for that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.dims import ParallelConfig
from parallel.pipeline.schedules import SCHEDULES, Schedule, forward_only, make_schedule, placement, stages_per_rank
from parallel.pipeline.simulate import Costs, stage_costs
from parallel.pipeline.stages import Stage, balance, make_stages
from parallel.pipeline.timeline import problems as timeline_problems
from parallel.problem import Problem, shown, values


@dataclass(frozen=True)
class PipelineLayout:
    """Which rank runs which layers under which schedule."""

    schedule: str
    num_ranks: int
    stages: tuple[Stage, ...]
    owner: tuple[int, ...]  # rank of each stage
    costs: tuple[float, ...]  # of a stage's forward, in those of an average stage
    unshards: bool  # parameters lie in shards, and what computes with them gathers them

    @property
    def sizes(self) -> list[int]:
        """Layers of each stage."""
        return [stage.stop - stage.start for stage in self.stages]

    @property
    def summary(self) -> str:
        """Schedule and layers per stage, such as 1f1b(8+8+8+7)."""
        return f"{self.schedule}({'+'.join(map(str, self.sizes))})"

    def of_rank(self, rank: int) -> tuple[Stage, ...]:
        """The stages a rank holds, in model order."""
        return tuple(stage for stage in self.stages if self.owner[stage.index] == rank)

    def training(self, num_microbatches: int) -> Schedule:
        return make_schedule(
            self.schedule,
            num_ranks=self.num_ranks,
            num_microbatches=num_microbatches,
            chosen=len(self.stages) // self.num_ranks,
            unshards=self.unshards,
        )

    def evaluation(self, num_microbatches: int) -> Schedule:
        return forward_only(self.owner, num_microbatches, unshards=self.unshards)

    def plan_costs(self, sequences: Sequence[int] | None = None, *, message: float = 0.0) -> Costs:
        """Of computations by stage, F = I = W, and by micro-batch of so many sequences, against the first one's."""
        sizes = None if sequences is None else [n / sequences[0] for n in sequences]
        return stage_costs(self.costs, sizes=sizes, message=message)


def make_layout(config: ParallelConfig, layer_costs: Sequence[float], *, head_cost: float) -> PipelineLayout:
    """The layout asked for; costs in any unit, of which only the balance matters. `problems` has found none."""
    owner = placement(config.pp_schedule, config.pp, config.pp_stages_per_rank)
    stages = make_stages(config.pp_split or balance(layer_costs, len(owner), last=head_cost))
    costs = [sum(layer_costs[stage.start : stage.stop]) + head_cost * stage.is_last for stage in stages]
    average = sum(costs) / len(costs)
    return PipelineLayout(
        config.pp_schedule,
        config.pp,
        stages,
        owner,
        costs=tuple(cost / average for cost in costs),
        # Below stage 3 they stay whole from one use to the next, so that there is nothing to start.
        unshards=config.zero_stage == 3,
    )


def problems(config: ParallelConfig, num_layers: int | None) -> list[str]:
    """Every reason why these layers cannot be split as asked, one line each. num_layers: None if nobody knows."""
    found = timeline_problems() if config.pp_trace else []
    if config.pp == 1:
        return found + _without_pipeline(config)
    return found + _stage_problems(config, num_layers)


def _without_pipeline(config: ParallelConfig) -> list[Problem]:
    """What is set and would have no effect."""
    default = ParallelConfig()
    found = []
    for name in ("pp_trace", "pp_split", "pp_schedule", "pp_stages_per_rank"):
        value, unset = getattr(config, name), getattr(default, name)
        if value != unset:
            why = f"parallel.{name}={shown(value)} has no effect with parallel.pp=1, which has no pipeline"
            found.append(Problem(why, values(f"parallel.{name}", [unset])))
    return found


def _stage_problems(config: ParallelConfig, num_layers: int | None) -> list[Problem]:
    """Of a real pipeline."""
    if config.pp_schedule not in SCHEDULES:
        why = f"parallel.pp_schedule={config.pp_schedule} is not a schedule"
        return [Problem(why, values("parallel.pp_schedule", SCHEDULES))]
    if config.pp_stages_per_rank < 1:
        why = f"parallel.pp_stages_per_rank={config.pp_stages_per_rank} must be at least 1; 2 is usual"
        return [Problem(why, values("parallel.pp_stages_per_rank", [2, 1]))]
    default = ParallelConfig.pp_stages_per_rank
    if config.pp_schedule != "interleaved_1f1b" and config.pp_stages_per_rank != default:
        number = stages_per_rank(config.pp_schedule, config.pp_stages_per_rank)
        return [
            Problem(
                f"parallel.pp_stages_per_rank={config.pp_stages_per_rank} has no effect on parallel.pp_schedule="
                f"{config.pp_schedule}, which has {number} on each rank",
                values("parallel.pp_stages_per_rank", [default]),
                values("parallel.pp_schedule", ["interleaved_1f1b"]),
            )
        ]
    return [] if num_layers is None else _split_problems(config, num_layers)


def _split_problems(config: ParallelConfig, num_layers: int) -> list[Problem]:
    """Of so many layers over the stages of a schedule."""
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
