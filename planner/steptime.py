"""Time of a step: a model that adds up what each operator takes at its measured rate. Not exact; held to measurements.

Operators take what planner/operators.py says. Blocks that are computed again add their forward: full, without a dense
MLP's last product, whose result no gradient needs, unless compiled graphs are made again as a whole (over tp and cp,
and with split backward: parallel/parallelize.py); selective, its element-wise part. Without compilation a block takes
at least what the host needs to launch it.

Communication inside of layers is waited for, at layer_gbps in a node, and so is that of the update (Muon's matrices, a
table that two stages have). Data parallelism's travels
beside computation: what is longer than that is waited for, and overlap_cost of what is hidden; its copies (gradients
into buffers and to the dtype of the sum, gathered parameters into place) move memory in every micro-batch. The
optimizer moves its state, gradients and weights once at optimizer_tbps. A pipeline is simulated with the times of its
stages (parallel/pipeline/simulate.py), and computation waits for what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.schedules import SPLIT_BACKWARD
from parallel.pipeline.simulate import Costs, Timeline, simulate
from parallel.pipeline.stages import Stage
from planner.activations import layers_of, schedule_of
from planner.eager import KERNELS, ROUTER_KERNELS
from planner.hardware import Hardware
from planner.job import Job
from planner.operators import Operator, operators_of_stage
from planner.shapes import parameters_of
from planner.state import rank_states
from planner.traffic import bytes_less_in_fp8, local_elements, traffic
from planner.traffic_in_layers import Transfer


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, and what they consist of."""

    step: float
    compute: float  # of the rank that computes longest
    recompute: float  # of that, again
    communication: float  # waited for, and its copies
    hidden_communication: float
    optimizer: float
    bubble: float  # of the passes through a pipeline, the part of all ranks' time in which they wait
    terms: Mapping[str, float]  # of the rank that computes longest; they add up to `step`
    timeline: Timeline | None


@dataclass(frozen=True)
class _StageTime:
    forward: float
    backward: float
    again: float  # of backward, forward once more


def _stage_time(job: Job, hardware: Hardware, stage: Stage) -> _StageTime:
    operators = operators_of_stage(job, hardware, stage)
    forward = sum(operator.forward_seconds for operator in operators)
    backward = sum(operator.backward_seconds for operator in operators)
    of_blocks = [operator for operator in operators if operator.name not in ("head", "loss")]
    full = sum(operator.forward_seconds for operator in of_blocks) - _not_again(job, of_blocks)
    again = {
        "none": 0.0,
        "full": full,
        "offload": full,
        "selective": sum(operator.forward_seconds for operator in of_blocks if operator.name == "element-wise"),
        "budget": 0.5 * full,
    }[job.model.activation_checkpoint]
    if not job.compiled:  # the host launches every operation
        layers = list(layers_of(job, stage))
        routers = sum(job.model.moe.in_layer(layer) for layer in layers)
        least = [
            (len(layers) * of_block + routers * of_router) * hardware.host_us * 1e-6
            for of_block, of_router in zip(KERNELS, ROUTER_KERNELS, strict=True)
        ]
        forward, backward = max(forward, least[0]), max(backward, least[1])
    return _StageTime(forward, backward + again, again)


def _not_again(job: Job, operators: Sequence[Operator]) -> float:
    """Seconds of products at the end of a block that are left out where it is computed again in backward.

    Their inputs are the last that backward needs (torch stops there, and compiled graphs have no dead code). A norm or
    dropout behind a product needs its result, and so do the weights of experts.
    """
    if any(job.model.moe.in_layer(layer) for layer in range(job.model.num_layers)):
        return 0.0  # few of its layers are dense
    whole_graphs = job.dims.tp > 1 or job.dims.cp > 1 or _splits_backward(job)
    if (job.compiled and whole_graphs) or not job.model.norm_first or job.model.dropout:
        return 0.0
    return sum(o.forward_seconds for o in operators if o.name == "mlp") / (3 if job.model.gated_mlp else 2)


def _splits_backward(job: Job) -> bool:
    return job.pipeline is not None and job.pipeline.schedule in SPLIT_BACKWARD


def _stage_times(job: Job, hardware: Hardware) -> list[_StageTime]:
    """Of every stage; those with layers of the same kinds take the same time."""
    known: dict[object, _StageTime] = {}
    found = []
    for stage in job.stages:
        if (key := _kind_of(job, stage)) not in known:
            known[key] = _stage_time(job, hardware, stage)
        found.append(known[key])
    return found


def _kind_of(job: Job, stage: Stage) -> object:
    """Equal for stages that take the same time."""
    layers = Counter((job.model.moe.in_layer(n), job.model.window_of(n)) for n in layers_of(job, stage))
    return frozenset(layers.items()), stage.is_first, stage.is_last


def _least_passes(job: Job, stages: list[_StageTime], busy: list[float]) -> Iterator[float]:
    """Of each rank, what no schedule undercuts: its work, after a micro-batch came through all stages before its first,
    and before one goes back through these (a split backward may leave work on weights for that time)."""
    assert job.pipeline is not None
    smallest = min(job.sequences) / max(job.sequences)
    for rank, seconds in enumerate(busy):
        before = stages[: job.stages_of(rank)[0].index]
        through = sum(stage.forward + (0.0 if _splits_backward(job) else stage.backward) for stage in before)
        yield seconds + smallest * through


def in_node(job: Job, hardware: Hardware, axis: str) -> bool:
    """Whether no group of an axis crosses from a node to the next."""
    node = hardware.gpus_per_node
    return job.dims.world_size <= node or node % _span(job, axis) == 0


def _span(job: Job, axis: str) -> int:
    """Neighbouring GPUs that one group of an axis, or several side by side, fill: the first begins at GPU 0, and each
    where another ends. tp is innermost, pp outermost."""
    dims = job.dims
    inner = dims.tp
    spans = {"tp": dims.tp, "cp": dims.tp * dims.cp, "ep": dims.tp * min(dims.dp_shard * dims.cp, dims.ep)}
    inner *= dims.cp * dims.dp_shard
    spans |= {"shard": inner, "shard of experts": inner}
    inner *= dims.dp_replicate
    spans |= {name: inner for name in ("replicas", "replicas of experts", "data", "data of experts")}
    return spans.get(axis, dims.world_size)


def seconds_of(job: Job, hardware: Hardware, transfer: Transfer) -> float:
    """Of a transfer that nothing hides."""
    link = hardware.link(in_node=in_node(job, hardware, transfer.axis), in_layers=transfer.in_layers)
    return transfer.bytes / link + transfer.calls * hardware.latency_us * 1e-6


class _RankTime(NamedTuple):
    """Seconds of a rank in a step, which `step_time` puts together."""

    compute: float
    inside: float  # communication of layers, and copies
    beside: float  # communication of data parallelism, were nothing to hide it
    again: float  # of compute
    at_end: float  # communication between backward and the end of the update
    copies: float
    axes: dict[str, float]  # communication of layers, by axis


def _rank_time(job: Job, hardware: Hardware, pp_rank: int, stages: Sequence[_StageTime]) -> _RankTime:
    share = sum(job.sequences) / max(job.sequences)  # micro-batches, the last one by its part
    axes: dict[str, float] = {}
    beside = at_end = 0.0
    for transfer in traffic(job, pp_rank):
        seconds = seconds_of(job, hardware, transfer)
        if transfer.at_end:
            at_end += seconds
        elif not transfer.in_layers:
            beside += seconds
        elif transfer.axis != "pp":
            axes[transfer.axis] = axes.get(transfer.axis, 0.0) + seconds
    copies = _copies(job, hardware, pp_rank)
    compute = share * sum(stage.forward + stage.backward for stage in stages)
    again = share * sum(stage.again for stage in stages)
    return _RankTime(compute, sum(axes.values()) + copies, beside, again, at_end, copies, axes)


def step_time(job: Job, hardware: Hardware, *, simulated: bool = True) -> StepTime:
    """Predicted time of a step. Not simulated: no longer than that, and without what only the schedule can say."""
    stages = _stage_times(job, hardware)
    by_rank: list[_RankTime] = []
    known: dict[object, _RankTime] = {}
    for rank in range(job.dims.pp):
        alike = tuple(_kind_of(job, stage) for stage in job.stages_of(rank))
        if alike in known:
            by_rank.append(known[alike])
            continue
        known[alike] = _rank_time(job, hardware, rank, [stages[stage.index] for stage in job.stages_of(rank)])
        by_rank.append(known[alike])
    slowest = max(by_rank, key=lambda of_rank: of_rank[:4])
    compute, inside, beside = slowest.compute, slowest.inside, slowest.beside
    timeline, passes, bubble = None, compute + inside, 0.0
    if job.pipeline is not None and simulated:
        timeline = _simulate(job, hardware, stages, [of_rank.inside / of_rank.compute for of_rank in by_rank])
        passes, bubble = timeline.makespan, timeline.bubble
    elif job.pipeline is not None:
        passes = max(passes, *_least_passes(job, stages, [of_rank.compute + of_rank.inside for of_rank in by_rank]))
    at_end = max(of_rank.at_end for of_rank in by_rank)
    alone = max(0.0, beside - _cover(job, compute + inside))
    slowed = hardware.overlap_cost * (beside - alone)
    optimizer = _optimizer(job, hardware)
    waited = inside + alone + slowed + at_end
    return StepTime(
        step=passes + alone + slowed + at_end + optimizer,
        compute=compute,
        recompute=slowest.again,
        communication=waited,
        hidden_communication=beside - alone,
        optimizer=optimizer,
        bubble=bubble,
        terms={
            "compute": compute - slowest.again,
            "recompute": slowest.again,
            **{f"{axis} communication": seconds for axis, seconds in slowest.axes.items()},
            "copies of data parallelism": slowest.copies,
            "waiting in the pipeline": passes - compute - inside,
            "data-parallel communication not hidden": alone + slowed,
            "communication of the update": at_end,
            "optimizer": optimizer,
        },
        timeline=timeline,
    )


def _cover(job: Job, passes: float) -> float:
    """Seconds of computation that data parallelism may hide behind: all but one micro-batch's forward below stage 3, of
    which stages 0 and 1 use the last micro-batch's backward and the next step's first forward alone."""
    if job.parallel.zero_stage == 3:
        return passes
    one = passes / len(job.sequences)
    return passes if job.parallel.zero_stage == 2 else one


def _copies(job: Job, hardware: Hardware, pp_rank: int) -> float:
    """Seconds of data parallelism's copies in a step.

    Of each parameter and micro-batch, bytes: stages 0 and 1, a gradient added to a buffer; 2, cast; 3, gathered twice
    and cast.
    """
    compute, reduce = job.precision.compute_dtype.itemsize, job.precision.reduce_dtype.itemsize
    cast = compute + reduce
    moved = {0: cast + reduce, 1: cast + reduce, 2: cast if compute != reduce else 0, 3: 4 * compute + cast}
    total = sum(local_elements(job, pp_rank)) * moved[job.parallel.zero_stage]
    # Each gather reads and writes.
    total -= 4 * bytes_less_in_fp8(job, parameters_of(job.model, job.stages_of(pp_rank), tp=job.dims.tp))
    return len(job.sequences) * total / hardware.elementwise


def _optimizer(job: Job, hardware: Hardware) -> float:
    """Gradients read twice (norm, update), weights and moments read and written."""
    compute = job.precision.compute_dtype.itemsize
    most = 0.0
    for state in rank_states(job, largest=True):
        held = state.bytes
        master = job.precision.master_dtype.itemsize
        copied = compute if job.parallel.zero_stage < 3 and held.master else 0
        moved = 2 * held.optimizer + held.num_owned * (2 * master + 2 * job.precision.reduce_dtype.itemsize + copied)
        most = max(most, moved)
    return most / (hardware.optimizer_tbps * 1e12)


def _simulate(job: Job, hardware: Hardware, stages: list[_StageTime], slower: list[float]) -> Timeline:
    """Of one step's micro-batches; slower: by rank, what communication in layers adds to computation."""
    assert job.pipeline is not None
    owner, sizes = job.pipeline.owner, [n / max(job.sequences) for n in job.sequences]
    size = job.precision.compute_dtype.itemsize
    message = job.stream_tokens * job.model.hidden_size * size / hardware.link(in_node=in_node(job, hardware, "pp"))

    def of(action: Action) -> float:
        stage = stages[action.stage]
        backward = stage.backward - stage.again
        seconds = {
            Kind.FORWARD: stage.forward,
            Kind.BACKWARD: stage.backward,
            Kind.INPUT: backward / 2 + stage.again,
            Kind.WEIGHT: backward / 2,
        }[action.kind]
        return seconds * sizes[action.microbatch] * (1 + slower[owner[action.stage]])

    return simulate(schedule_of(job.pipeline, len(job.sequences)), Costs(of, lambda _: message))
