"""Time of a step: a model that adds up what each operator takes at its measured rate. Not exact; held to measurements.

An operator takes max(FLOPs / rate, bytes / bandwidth): its roof is whichever binds. Of a token in a block (forward;
backward has twice the products, 2.5 times attention's, and the element-wise passes below):

    products          2 FLOPs for each weight that multiplies it, at hardware.matmul_tflops (experts: grouped_tflops)
    attention         4 H K for each pair that a causal mask (and window) leaves, at attention_tflops
    element-wise      bytes over elementwise_share of copy_tbps: norms with their residual sums 8 D each way, rope and
                      its copies 2 (H + 2 G) K each way, activation 3 F forward and 5 F backward
    loss              its products, 8 bytes a logit, and for 4096 tokens a pass over the fp32 gradient of the head

Blocks that are computed again add their forward (selective: its element-wise part). Eager blocks move three times the
element-wise bytes; in fp8, inputs, gradients and weights of products are read once more and written in one byte.
Communication inside of layers is waited for, at layer_gbps in a node. Data parallelism's travels
beside computation: what is longer than that is waited for, and overlap_cost of what is hidden; its copies (gradients
into buffers and to the dtype of the sum, gathered parameters into place) move memory in every micro-batch. The
optimizer moves its state, gradients and weights once at optimizer_tbps. A pipeline is simulated with the times of its
stages (parallel/pipeline/simulate.py), and computation waits for what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.schedules import SPLIT_BACKWARD
from parallel.pipeline.simulate import Costs, Timeline, simulate
from parallel.pipeline.stages import Stage
from planner.activations import layers_of, schedule_of
from planner.flops import operator_of, used_elements
from planner.hardware import Hardware
from planner.job import Job
from planner.shapes import parameters_of
from planner.state import rank_states
from planner.traffic import Transfer, bytes_less_in_fp8, local_elements, traffic


@dataclass(frozen=True)
class Operator:
    """One kind of work on all tokens of a micro-batch in a stage, on one rank."""

    name: str
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    forward_seconds: float
    backward_seconds: float
    binds: str  # compute or memory

    @property
    def intensity(self) -> float:
        """FLOPs per byte, forward and backward."""
        moved = self.forward_bytes + self.backward_bytes
        return (self.forward_flops + self.backward_flops) / moved if moved else 0.0


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


class _Sizes:
    """Numbers that every operator needs."""

    def __init__(self, job: Job) -> None:
        model = job.model
        assert model.head_dim is not None  # resolved
        assert model.value_dim is not None
        assert model.num_kv_heads is not None
        self.tp = job.dims.tp
        self.heads = model.num_heads / self.tp
        self.kv_heads = max(model.num_kv_heads / self.tp, 1)
        self.head_dim, self.value_dim = model.head_dim, model.value_dim
        self.itemsize = job.precision.compute_dtype.itemsize


def operators_of_stage(job: Job, hardware: Hardware, stage: Stage) -> list[Operator]:
    """All work of a stage on a whole micro-batch."""
    sizes, model, T = _Sizes(job), job.model, job.tokens
    layers = list(layers_of(job, stage))
    products: dict[str, list[float]] = {}  # operator to FLOPs forward and bytes
    for parameter, count in parameters_of(model, [stage], tp=sizes.tp).items():
        operator = operator_of(parameter, model)
        tied = operator is None and model.tie_embeddings and stage.is_last and parameter.name.startswith("embedding")
        operator = "head" if tied else operator
        if operator in (None, "norms and biases") or len(parameter.shape) < 2:
            continue
        assert operator is not None
        share = sizes.tp if parameter.tp_dim is not None else 1
        uses = 1 + model.mtp.depth if operator == "head" else 1
        *_, n, k = parameter.shape
        elements = count * used_elements(parameter, model) / share * uses
        weights = count * parameter.shape.numel() / share / (job.dims.ep if parameter.is_expert else 1)
        rows = T * (model.moe.top_k if parameter.is_expert else 1) * count * uses
        cut = parameter.tp_dim is not None
        outer = rows * ((n / sizes.tp if cut else n) + k)
        found = products.setdefault(operator, [0.0, 0.0])
        found[0] += 2 * T * elements
        found[1] += sizes.itemsize * (weights + outer)
    found_operators = [_product(job, hardware, name, *cost) for name, cost in products.items()]
    found_operators.append(_attention(job, hardware, layers, sizes))
    found_operators.append(_elementwise(job, hardware, layers, sizes))
    if stage.is_last:
        found_operators.append(_loss(job, hardware, sizes))
    return found_operators


def _product(job: Job, hardware: Hardware, name: str, flops: float, moved: float) -> Operator:
    fp8 = job.precision.fp8 and name in ("attention projections", "mlp")
    rate = hardware.matmul(job.precision.compute if fp8 or not job.precision.fp8 else "bf16")
    rate = hardware.grouped_tflops * 1e12 * min(1.0, rate / hardware.matmul("bf16")) if name == "experts" else rate
    return _operator(name, flops, 2 * flops, moved, 2 * moved, rate, rate, hardware)


def _attention(job: Job, hardware: Hardware, layers: list[int], sizes: _Sizes) -> Operator:
    model, S = job.model, job.seq_len
    windows = [min(S, model.window_of(layer) or S) for layer in layers]
    seen = sum(w - w * (w - 1) / (2 * S) for w in windows)  # keys that a token sees, over layers
    flops = 2 * job.tokens * seen * sizes.heads * (sizes.head_dim + sizes.value_dim)
    q_and_output = sizes.heads * (sizes.head_dim + sizes.value_dim)
    moved = job.tokens * len(layers) * sizes.itemsize * (q_and_output + 2 * sizes.kv_heads * sizes.head_dim)
    forward, backward = hardware.attention(sizes.head_dim)
    if job.precision.compute_dtype.itemsize == 4:
        forward = backward = hardware.matmul("fp32")
    return _operator("attention", flops, 2.5 * flops, moved, 2.5 * moved, forward, backward, hardware)


def _elementwise(job: Job, hardware: Hardware, layers: list[int], sizes: _Sizes) -> Operator:
    model = job.model
    stream = 8 * model.hidden_size * job.stream_tokens * len(layers)
    turned = (sizes.heads * sizes.head_dim + sizes.kv_heads * (sizes.head_dim + sizes.value_dim)) * 2
    features = sum(_mlp_rows(job, layer) for layer in layers) / sizes.tp
    routed = sum(model.moe.in_layer(layer) for layer in layers) * model.moe.top_k * model.hidden_size * 4
    forward = sizes.itemsize * (stream + job.tokens * (turned * len(layers) + 3 * features + routed))
    backward = sizes.itemsize * (stream + job.tokens * (turned * len(layers) + 5 * features + routed))
    times = 1 if job.compiled else 3
    if job.precision.fp8:  # what products read is read once more and written in one byte: inputs, gradients, weights
        of_heads = sizes.heads * (sizes.head_dim + sizes.value_dim) + 2 * sizes.kv_heads * sizes.head_dim
        forward += 3 * (job.tokens * ((2 * model.hidden_size + sizes.heads * sizes.value_dim) * len(layers) + features))
        backward += 3 * job.tokens * ((model.hidden_size * 2 + of_heads) * len(layers) + 2 * features)
        # Of a weight: read and written in forward, the other way round in backward; gathered in fp8, by each rank for
        # its shard, and what backward turns round are bytes.
        each = 2 + 5 / (job.dims.dp_shard * job.dims.cp) if job.precision.fp8_all_gather else 5
        forward += each * len(layers) * model.hidden_size * (of_heads + 3 * features / len(layers))
    return _operator("element-wise", 0, 0, times * forward, times * backward, 1, 1, hardware)


def _mlp_rows(job: Job, layer: int) -> float:
    """Features between the matrices of an MLP, or of all experts that a token is sent to."""
    moe = job.model.moe
    if not moe.in_layer(layer):
        return job.model.intermediate_size
    return (moe.top_k + moe.num_shared) * moe.intermediate_size


def _loss(job: Job, hardware: Hardware, sizes: _Sizes) -> Operator:
    words = job.model.vocab_size / sizes.tp
    per_logit = 8 if job.compiled else 24
    moved = job.tokens * words * per_logit + job.tokens / 4096 * words * job.model.hidden_size * 8
    return _operator("loss", 0, 0, moved * (1 + job.model.mtp.depth), 0, 1, 1, hardware)


def _operator(
    name: str, flops: float, backward_flops: float, moved: float, backward_moved: float,
    rate: float, backward_rate: float, hardware: Hardware,
) -> Operator:  # fmt: skip
    computing, moving = flops / rate, moved / hardware.elementwise
    forward = max(computing, moving)
    backward = max(backward_flops / backward_rate, backward_moved / hardware.elementwise)
    binds = "compute" if computing >= moving else "memory"
    return Operator(name, flops, backward_flops, moved, backward_moved, forward, backward, binds)


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
    again = {
        "none": 0.0,
        "full": sum(operator.forward_seconds for operator in of_blocks),
        "offload": sum(operator.forward_seconds for operator in of_blocks),
        "selective": sum(operator.forward_seconds for operator in of_blocks if operator.name == "element-wise"),
        "budget": 0.5 * sum(operator.forward_seconds for operator in of_blocks),
    }[job.model.activation_checkpoint]
    if not job.compiled:  # the host launches every operation: about 40 of a block and pass
        layers = len(layers_of(job, stage))
        forward = max(forward, 40 * layers * hardware.host_us * 1e-6)
        backward = max(backward, 80 * layers * hardware.host_us * 1e-6)
    return _StageTime(forward, backward + again, again)


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
        split = job.pipeline.schedule in SPLIT_BACKWARD
        through = sum(stage.forward + (0.0 if split else stage.backward) for stage in before)
        yield seconds + smallest * through


def _span(job: Job, axis: str) -> int:
    """Neighbouring GPUs from the first to the last rank of a group; tp is innermost, pp outermost."""
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
    link = hardware.link(_span(job, transfer.axis), in_layers=transfer.in_layers)
    return transfer.bytes / link + transfer.calls * hardware.latency_us * 1e-6


def step_time(job: Job, hardware: Hardware, *, simulated: bool = True) -> StepTime:
    """Predicted time of a step. Not simulated: no longer than that, and without what only the schedule can say."""
    stages = _stage_times(job, hardware)
    share = sum(job.sequences) / max(job.sequences)  # micro-batches, the last one by its part
    by_rank = []
    known: dict[object, tuple[float, float, float, float, float, dict[str, float]]] = {}
    for rank in range(job.dims.pp):
        alike = tuple(_kind_of(job, stage) for stage in job.stages_of(rank))
        if alike in known:
            by_rank.append(known[alike])
            continue
        mine = [stages[stage.index] for stage in job.stages_of(rank)]
        transfers = traffic(job, rank)
        axes: dict[str, float] = {}
        for t in transfers:
            if t.in_layers and t.axis != "pp":
                axes[t.axis] = axes.get(t.axis, 0.0) + seconds_of(job, hardware, t)
        beside = sum(seconds_of(job, hardware, t) for t in transfers if not t.in_layers)
        copies = _copies(job, hardware, rank)
        inside = sum(axes.values()) + copies
        compute = share * sum(stage.forward + stage.backward for stage in mine)
        known[alike] = (compute, inside, beside, share * sum(stage.again for stage in mine), copies, axes)
        by_rank.append(known[alike])
    compute, inside, beside, again, copies, axes = max(by_rank, key=lambda of_rank: of_rank[:4])
    timeline, passes, bubble = None, compute + inside, 0.0
    if job.pipeline is not None and simulated:
        timeline = _simulate(job, hardware, stages, [of_rank[1] / of_rank[0] for of_rank in by_rank])
        passes, bubble = timeline.makespan, timeline.bubble
    elif job.pipeline is not None:
        passes = max(passes, *_least_passes(job, stages, [of_rank[0] + of_rank[1] for of_rank in by_rank]))
    alone = max(0.0, beside - _cover(job, compute + inside))
    slowed = hardware.overlap_cost * (beside - alone)
    optimizer = _optimizer(job, hardware)
    waited = inside + alone + slowed
    return StepTime(
        step=passes + alone + slowed + optimizer,
        compute=compute,
        recompute=again,
        communication=waited,
        hidden_communication=beside - alone,
        optimizer=optimizer,
        bubble=bubble,
        terms={
            "compute": compute - again,
            "recompute": again,
            **{f"{axis} communication": seconds for axis, seconds in axes.items()},
            "copies of data parallelism": copies,
            "waiting in the pipeline": passes - compute - inside,
            "data-parallel communication not hidden": alone + slowed,
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
        owned: float = held.num_parameters
        if job.parallel.zero_stage:
            owned = owned / (job.dims.dp_shard * job.dims.cp)
        copied = compute if job.parallel.zero_stage < 3 and held.master else 0
        moved = 2 * held.optimizer + owned * (2 * master + 2 * job.precision.reduce_dtype.itemsize + copied)
        most = max(most, moved)
    return most / (hardware.optimizer_tbps * 1e12)


def _simulate(job: Job, hardware: Hardware, stages: list[_StageTime], slower: list[float]) -> Timeline:
    """Of one step's micro-batches; slower: by rank, what communication in layers adds to computation."""
    assert job.pipeline is not None
    owner, sizes = job.pipeline.owner, [n / max(job.sequences) for n in job.sequences]
    size = job.precision.compute_dtype.itemsize
    message = job.stream_tokens * job.model.hidden_size * size / hardware.link(job.dims.world_size)

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
