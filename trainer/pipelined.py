"""PipelinedPasses: forward and backward of a model whose stages lie on several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from models.config import ModelConfig
from models.decoder import Decoder, Head
from models.flops import multiplications_of_layers
from models.mtp_config import MTPConfig
from parallel.data import DataParallel
from parallel.dims import ParallelConfig
from parallel.mesh import CONTEXT_AXES, Meshes
from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.executor import PipelineExecutor
from parallel.pipeline.layout import PipelineLayout, make_layout
from parallel.pipeline.program import TRAVEL, Program, make_programs
from parallel.pipeline.schedules import Schedule
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.stages import Stage
from parallel.pipeline.timeline import draw
from parallel.pipeline.trace import chrome_trace
from parallel.pipeline.weight_gradients import WeightGradients
from trainer.gradients import local_shard_of
from trainer.heads import forward_head, in_evaluation, logits_head, logprobs_head
from trainer.passes import forward_loss_sum
from trainer.step import TrainState

TIED = "embedding.weight"
"""What first and last stage both hold when embeddings are tied, or multi-token prediction embeds later tokens."""


def pipeline_layout(config: ParallelConfig, model: ModelConfig, *, seq_len: int) -> PipelineLayout | None:
    """Stages balanced by multiplications per token; None without a pipeline."""
    if config.pp == 1:
        return None
    depth, model = model.mtp.depth, replace(model, mtp=MTPConfig())
    head = model.num_outputs * model.hidden_size
    costs = multiplications_of_layers(model, seq_len)
    ahead = depth * (costs[-1] + 2 * model.hidden_size**2 + head)
    return make_layout(config, costs, head_cost=head + ahead)


def plan_of_step(layout: PipelineLayout, sequences: Sequence[int]) -> Timeline:
    """The time line of a training step over micro-batches of so many sequences, in forwards of an average stage."""
    return simulate(layout.training(len(sequences)), layout.plan_costs(sequences))


@dataclass(frozen=True)
class PlanOfStep:
    """What a start says of a pipeline: the schedule, simulated with the costs of its stages."""

    layout: PipelineLayout
    sequences: tuple[int, ...]  # of each micro-batch
    timeline: Timeline

    @classmethod
    def of(cls, layout: PipelineLayout, *, num_sequences: int, micro_batch_size: int) -> PlanOfStep:
        """Of a step over so many sequences of a data rank."""
        starts = range(0, num_sequences, micro_batch_size)
        sequences = tuple(min(micro_batch_size, num_sequences - start) for start in starts)
        return cls(layout, sequences, plan_of_step(layout, sequences))

    @property
    def fields(self) -> dict[str, Any]:
        """For run.json and the start's event; defined in docs/METRICS.md."""
        return {
            "schedule": self.layout.schedule,
            "layers_per_stage": self.layout.sizes,
            "rank_of_stage": list(self.layout.owner),
            "forward_cost_of_stage": [round(cost, 4) for cost in self.layout.costs],
            "num_microbatches": len(self.sequences),
            "bubble": self.timeline.bubble,
            "peak_activations": self.timeline.peak_activations(),
        }

    def __str__(self) -> str:
        kept = max(self.timeline.peak_activations())
        per_stage = " x stages" if len(self.layout.stages) > self.layout.num_ranks else ""
        return f"{self.layout.summary}, {self.timeline.bubble:.0%} bubble, {kept} micro-batches{per_stage} kept"


class _ModelWork:
    """One pass as the executor wants it: the shapes of its micro-batches, and how a stage computes."""

    def __init__(
        self,
        num_stages: int,
        shapes: Sequence[Sequence[int]],
        forward: Callable[[int, int, Tensor | None], Tensor],
        unshard: Callable[[Action], None],
        reduce: Callable[[int], None] = lambda stage: None,
    ) -> None:
        self.num_stages = num_stages
        self.shapes = shapes
        self.forward = forward
        self.unshard = unshard
        self.reduce = reduce

    def hidden_shape(self, microbatch: int) -> Sequence[int]:
        return self.shapes[microbatch]


class PipelinedPasses:
    """`trainer.step.Passes` over the stages of a pipeline. All its ranks have the same micro-batches at hand."""

    def __init__(
        self,
        layout: PipelineLayout,
        *,
        mesh: Meshes,
        data_parallel: DataParallel,
        weight_gradients: WeightGradients | None,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        sequence_slices: int,
        trace: bool,
    ) -> None:
        """weight_gradients: for schedules with split backward. dtype: of hidden states. sequence_slices: into how many
        the tokens of the residual stream are cut by sequence parallelism. Collective over all ranks.
        """
        self.layout = layout
        self.sequence_slices = sequence_slices
        self.data_parallel = data_parallel
        self.model = model
        self.group = mesh.batch["pp"].get_group()
        self.rank = dist.get_rank(self.group)
        if weight_gradients is not None:
            weight_gradients.deliver = data_parallel.add_gradient
        self.executor = PipelineExecutor(
            self.group,
            device=device,
            dtype=dtype,
            weight_gradients=weight_gradients,
            trace=trace,
        )
        _join_groups_of_programs(mesh, device)
        self._plans: dict[tuple[int, bool], tuple[Schedule, Program]] = {}
        self._traced: tuple[Schedule, list[int]] | None = None  # and the sequences of each of its micro-batches
        self._users = _stages_of_parameters(
            list(data_parallel.masters), layout, self.rank, embeds_last=model.embeds_last
        )
        self._outside, self._of_layer = _parameters_of_layers(list(data_parallel.masters))
        ends = (layout.owner[0], layout.owner[-1])
        self.tied_group = _group_of_ends(mesh, ends) if model.embeds_last and ends[0] != ends[1] else None
        self.copies = frozenset({TIED}) if self.tied_group is not None and self.rank == ends[1] else frozenset()

    @property
    def first_stage(self) -> Stage:
        """Of those on this rank."""
        return self.layout.of_rank(self.rank)[0]

    def backward(self, state: TrainState, microbatches: list[Batch], scales: Tensor) -> Tensor:
        done: set[int] = set()

        def reduce(stage: int) -> None:
            done.add(stage)  # a table that two stages of this rank use is complete with the second
            names = [name for name, users in self._users.items() if stage in users and users <= done]
            self.data_parallel.gradients_complete(names)

        self.data_parallel.start_pipeline()
        schedule, program = self._plan(len(microbatches), training=True)
        aux_scale = None if state.routing is None else state.routing.aux_scale(state.loss_scale.scale)
        work = self._work(microbatches, self._loss_of_stage(state, microbatches, aux_scale), reduce)
        sums = self.executor.run(program, work, seed=scales)
        self._traced = schedule, [len(batch.tokens) for batch in microbatches]
        self.data_parallel.finish_backward()
        self._sum_tied()
        return self._total(sums, len(scales), state.device)

    def sums(self, state: TrainState, microbatches: list[Batch]) -> Tensor:
        _, program = self._plan(len(microbatches), training=False)
        work = self._work(microbatches, self._loss_of_stage(state, microbatches))
        sums = self.executor.run(program, work, seed=None)
        return self._total(sums, len(state.objective.counts(microbatches[0])), state.device)

    def logits(self, state: TrainState, tokens: Tensor, position: int) -> Tensor:
        def forward(stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
            return state.model(
                tokens,
                head=logits_head(state.model, position),
                stage=self.layout.stages[stage],
                hidden=hidden,
            )

        work = _ModelWork(len(self.layout.stages), [self._hidden_shape(tokens)], forward, self._gather)
        _, program = self._plan(1, training=False)
        results = self.executor.run(program, work, seed=None)
        holder = self.layout.owner[-1]
        shape = (tokens.shape[0], self.model.vocab_size)
        logits = results[0].float() if self.rank == holder else torch.empty(shape, device=state.device)
        dist.broadcast(logits, src=dist.get_global_rank(self.group, holder), group=self.group)
        return logits

    def per_token(
        self, model: Decoder, microbatches: list[Batch], head: Callable[[Batch], Head], *, everywhere: bool = True
    ) -> list[Tensor]:
        def forward(stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
            batch = microbatches[microbatch]
            return forward_head(model, batch, head(batch), stage=self.layout.stages[stage], hidden=hidden)

        _, program = self._plan(len(microbatches), training=False)
        with in_evaluation(model):
            results = self.executor.run(program, self._work(microbatches, forward), seed=None)
        holder = self.layout.owner[-1]
        if not everywhere:
            nothing = torch.empty(0, device=microbatches[0].labels.device)
            return [results.get(number, nothing) for number in range(len(microbatches))]
        found = []
        for number, batch in enumerate(microbatches):
            if self.rank == holder:
                values = results[number].contiguous()
            else:
                values = torch.empty(batch.labels.shape, dtype=torch.float32, device=batch.labels.device)
            dist.broadcast(values, src=dist.get_global_rank(self.group, holder), group=self.group)
            found.append(values)
        return found

    def token_logprobs(self, model: Decoder, microbatches: list[Batch], *, temperature: float = 1.0) -> list[Tensor]:
        return self.per_token(model, microbatches, logprobs_head(model, temperature))

    def write_trace(self, run_dir: Path) -> Path | None:
        """pipeline_trace.json and pipeline_timeline.png: planned and executed time line of the newest step.

        Collective; global rank 0 writes. Returns the picture's path; None if there was no step, as in a run that had
        ended before.
        """
        if self._traced is None:
            return None
        executed: list[list] = [[] for _ in range(self.layout.num_ranks)]
        dist.all_gather_object(executed, self.executor.executed, group=self.group)
        picture = run_dir / "pipeline_timeline.png"
        if dist.get_rank() == 0:  # of its own pipeline, where there are several beside each other
            schedule, sequences = self._traced
            plan = plan_of_step(self.layout, sequences)
            (run_dir / "pipeline_trace.json").write_text(json.dumps(chrome_trace(plan, executed)))
            draw(schedule, plan, executed).savefig(picture)
        return picture

    def _plan(self, num_microbatches: int, *, training: bool) -> tuple[Schedule, Program]:
        """The schedule of all ranks and the program of this one. Made once for each number of micro-batches: even to
        look a schedule up by itself takes longer than to launch a stage."""
        key = num_microbatches, training
        if key not in self._plans:
            schedule = (self.layout.training if training else self.layout.evaluation)(num_microbatches)
            costs = self.layout.plan_costs(message=TRAVEL)
            self._plans[key] = schedule, make_programs(schedule, costs)[self.rank]
        return self._plans[key]

    def _gather(self, use: Action) -> None:
        """Start to gather the layer that a computation begins with, and what lies outside all layers: fully_shard keeps
        that in one piece, which every pass through the model needs."""
        stage = self.layout.stages[use.stage]
        if use.kind is Kind.FORWARD:
            layer = stage.start
        else:  # blocks of multi-token prediction lie behind the last layer
            layer = max(self._of_layer) if stage.is_last else stage.stop - 1
        self.data_parallel.gather(self._outside + self._of_layer.get(layer, []))

    def _work(
        self,
        microbatches: list[Batch],
        forward: Callable[[int, int, Tensor | None], Tensor],
        reduce: Callable[[int], None] = lambda stage: None,
    ) -> _ModelWork:
        shapes = [self._hidden_shape(batch.tokens) for batch in microbatches]
        return _ModelWork(len(self.layout.stages), shapes, forward, self._gather, reduce)

    def _hidden_shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """Of what travels between stages: the residual stream of this rank's tokens [B, T]."""
        return tokens.shape[0], tokens.shape[1] // self.sequence_slices, self.model.hidden_size

    def _loss_of_stage(
        self, state: TrainState, microbatches: list[Batch], aux_scale: Tensor | None = None
    ) -> Callable[[int, int, Tensor | None], Tensor]:
        def forward(stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
            return forward_loss_sum(
                state,
                microbatches[microbatch],
                aux_scale=aux_scale,
                stage=self.layout.stages[stage],
                hidden=hidden,
            )

        return forward

    def _total(self, sums: dict[int, Tensor], size: int, device: torch.device) -> Tensor:
        """The sums [size] of all micro-batches added up in fp64, on every rank of the pipeline."""
        total = torch.zeros(size, dtype=torch.float64, device=device)
        for microbatch in sorted(sums):  # the order of a plain step
            total += sums[microbatch]
        dist.all_reduce(total, group=self.group)
        return total

    def _sum_tied(self) -> None:
        """The gradient of a table that two stages hold is the sum of what each of them contributes."""
        if self.tied_group is None or TIED not in self.data_parallel.masters:
            return
        grad = self.data_parallel.masters[TIED].grad
        assert grad is not None
        dist.all_reduce(local_shard_of(grad), group=self.tied_group)


def _join_groups_of_programs(mesh: Meshes, device: torch.device) -> None:
    """Make the communicators that layers and gradients use while a program runs. Collective over all ranks.

    NCCL makes one in the first collective of its group, and the host of each rank waits there for all others. Inside a
    program another rank may come there only after a message that this one has not started yet.
    """
    groups = [mesh.state[axis].get_group() for axis in ("dp_replicate", "shard", "tp")]
    if mesh.experts is not None and mesh.expert_tokens is not None:
        groups += [mesh.experts["expert_shard"].get_group(), mesh.expert_tokens.get_group()]
    if mesh.context is not None:
        groups += [mesh.context[axis].get_group() for axis in CONTEXT_AXES]
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def _stages_of_parameters(
    names: Sequence[str], layout: PipelineLayout, rank: int, *, embeds_last: bool
) -> dict[str, frozenset[int]]:
    """Which stages of a rank add to the gradient of each of its parameters.

    Blocks behind the last layer, of multi-token prediction, are the last stage's. embeds_last: see ModelConfig.
    """
    mine = layout.of_rank(rank)
    first = {stage.index for stage in mine if stage.is_first}
    last = {stage.index for stage in mine if stage.is_last}
    users: dict[str, frozenset[int]] = {}
    num_layers = layout.stages[-1].stop
    for name in names:
        prefix, *rest = name.split(".")
        if prefix == "blocks":
            layer = min(int(rest[0]), num_layers - 1)
            users[name] = frozenset(stage.index for stage in mine if stage.start <= layer < stage.stop)
        elif name == TIED:
            users[name] = frozenset(first | last if embeds_last else first)
        else:
            users[name] = frozenset(first if prefix == "positions" else last)
    return users


def _parameters_of_layers(names: Sequence[str]) -> tuple[list[str], dict[int, list[str]]]:
    """Names outside all layers, and those of each layer that a rank holds."""
    outside: list[str] = []
    layers: dict[int, list[str]] = {}
    for name in names:
        prefix, *rest = name.split(".")
        (layers.setdefault(int(rest[0]), []) if prefix == "blocks" else outside).append(name)
    return outside, layers


_ENDS: dict[tuple[dist.ProcessGroup | None, tuple[int, ...], tuple[int, int]], dist.ProcessGroup | None] = {}
"""Groups of first and last stage made so far on each default group; runs in one process share them, as meshes."""


def _group_of_ends(mesh: Meshes, ends: tuple[int, int]) -> dist.ProcessGroup | None:
    """This rank's group of the first and the last stage; None on ranks between. The first call is collective."""
    key = (dist.group.WORLD, tuple(mesh.batch.shape), ends)
    if key not in _ENDS:
        _ENDS[key] = _make_group_of_ends(mesh, ends)
    return _ENDS[key]


def _make_group_of_ends(mesh: Meshes, ends: tuple[int, int]) -> dist.ProcessGroup | None:
    columns = mesh.batch.mesh.flatten(1).T.tolist()  # the ranks of one pipeline each, in order
    mine = None
    for column in columns:
        members = [column[rank] for rank in sorted(ends)]
        group = dist.new_group(members)
        if dist.get_rank() in members:
            mine = group
    return mine
