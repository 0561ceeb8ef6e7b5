"""Operators of a step: what each computes and moves, and how long that takes at its measured rate.

An operator takes max(FLOPs / rate, bytes / bandwidth): its roof is whichever binds. Of a token in a block (forward;
backward has twice the products, 2.5 times attention's, and the element-wise passes below):

    products          2 FLOPs for each weight that multiplies it, at hardware.matmul_tflops (experts: grouped_tflops);
                      over tp some ranks compute the same (`_share_of_product`)
    attention         4 H K for each pair that a causal mask (and window) leaves, at attention_tflops for that length
    element-wise      bytes over elementwise_share of copy_tbps: norms with their residual sums 8 D each way, rope and
                      its copies 2 (H + 2 G) K each way, activation 3 F forward and 5 F backward; rows of k experts
                      sorted and added up 2 (k + 1) D forward, 3 k + 2 backward and 3 k for the gradients of both layers
    loss              its products, 8 bytes a logit, and for 4096 tokens a pass over the fp32 gradient of the head

Without compilation (planner/eager.py) every operation reads its inputs and writes its output, at eager_share. In fp8,
inputs, gradients and weights of products are read once more and written in one byte.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from parallel.pipeline.stages import Stage
from planner import eager
from planner.activations import layers_of
from planner.flops import operator_of, used_elements
from planner.hardware import Hardware
from planner.job import Job
from planner.shapes import Parameter, parameters_of


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
    binds: str  # compute, memory or latency

    @property
    def intensity(self) -> float:
        """FLOPs per byte, forward and backward."""
        moved = self.forward_bytes + self.backward_bytes
        return (self.forward_flops + self.backward_flops) / moved if moved else 0.0


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
    sizes, model = _Sizes(job), job.model
    layers = list(layers_of(job, stage))
    products: dict[str, list[float]] = {}  # operator to FLOPs forward and bytes
    for parameter, count in parameters_of(model, [stage], tp=sizes.tp).items():
        operator = operator_of(parameter, model)
        tied = operator is None and model.tie_embeddings and stage.is_last and parameter.name.startswith("embedding")
        operator = "head" if tied else operator
        if operator in (None, "norms and biases") or len(parameter.shape) < 2:
            continue
        assert operator is not None
        share, tokens = _share_of_product(job, parameter)
        uses = 1 + model.mtp.depth if operator == "head" else 1
        *_, n, k = parameter.shape
        elements = count * used_elements(parameter, model) / share * uses
        weights = count * parameter.shape.numel() / share / (job.dims.ep if parameter.is_expert else 1)
        rows = tokens * (model.moe.top_k if parameter.is_expert else 1) * count * uses
        outer = rows * (n / share + k)
        found = products.setdefault(operator, [0.0, 0.0])
        found[0] += 2 * tokens * elements
        found[1] += sizes.itemsize * (weights + outer)
    found_operators = [_product(job, hardware, name, *cost) for name, cost in products.items()]
    found_operators.append(_attention(job, hardware, layers, sizes))
    found_operators.append(_elementwise(job, hardware, layers, sizes))
    if not job.compiled and any(model.moe.in_layer(layer) for layer in layers):
        found_operators.append(_small_kernels(job, hardware, layers))
    if stage.is_last:
        found_operators.append(_loss(job, hardware, sizes))
    return found_operators


def _share_of_product(job: Job, parameter: Parameter) -> tuple[int, int]:
    """Over how many parts ranks of tp cut a product, of which each computes one, and the tokens that it is of.

    Ranks that share a head's key and value all compute these. Of layers that are whole on every rank (routers, the low
    ranks of latent attention, the projection of multi-token prediction) all compute the same, but for those that work
    on the residual stream, of which sequence parallelism leaves each rank its own tokens.
    """
    if parameter.tp_dim is not None:
        return job.dims.tp, job.tokens
    if parameter.is_shared_head:
        assert job.model.num_kv_heads is not None  # resolved
        return min(job.dims.tp, job.model.num_kv_heads), job.tokens
    return 1, job.tokens if ".router." in parameter.name else job.stream_tokens


def _product(job: Job, hardware: Hardware, name: str, flops: float, moved: float) -> Operator:
    fp8 = job.precision.fp8 and name in ("attention projections", "mlp")
    rate = hardware.matmul(job.precision.compute if fp8 or not job.precision.fp8 else "bf16")
    rate = hardware.grouped_tflops * 1e12 * min(1.0, rate / hardware.matmul("bf16")) if name == "experts" else rate
    return _operator(name, flops, 2 * flops, moved, 2 * moved, rate, rate, hardware.elementwise)


def _attention(job: Job, hardware: Hardware, layers: list[int], sizes: _Sizes) -> Operator:
    model, S = job.model, job.seq_len
    flops, seconds, backward_seconds = 0.0, 0.0, 0.0
    for window, count in Counter(min(S, model.window_of(layer) or S) for layer in layers).items():
        seen = window - window * (window - 1) / (2 * S)  # keys of a token
        of_kind = 2 * job.tokens * seen * count * sizes.heads * (sizes.head_dim + sizes.value_dim)
        # As fast as in a sequence without a window whose tokens see as many.
        forward, backward = hardware.attention(sizes.head_dim, 2 * seen - 1)
        if sizes.itemsize == 4:
            forward = backward = hardware.matmul("fp32")
        flops += of_kind
        seconds += of_kind / forward
        backward_seconds += 2.5 * of_kind / backward
    q_and_output = sizes.heads * (sizes.head_dim + sizes.value_dim)
    moved = job.tokens * len(layers) * sizes.itemsize * (q_and_output + 2 * sizes.kv_heads * sizes.head_dim)
    rates = (flops / seconds, 2.5 * flops / backward_seconds) if layers else (1.0, 1.0)
    return _operator("attention", flops, 2.5 * flops, moved, 2.5 * moved, *rates, hardware.elementwise)


def _elementwise(job: Job, hardware: Hardware, layers: list[int], sizes: _Sizes) -> Operator:
    """Of blocks: what lies between their products."""
    moved = [0.0, 0.0]
    for layer, count in _kinds(job, layers).items():
        for way, found in enumerate(_elementwise_bytes(job, layer, sizes)):
            moved[way] += count * found
    model = job.model
    if job.precision.fp8:  # what products read is read once more and written in one byte: inputs, gradients, weights
        features = sum(_mlp_rows(job, layer) for layer in layers) / sizes.tp
        of_heads = sizes.heads * (sizes.head_dim + sizes.value_dim) + 2 * sizes.kv_heads * sizes.head_dim
        moved[0] += 3 * (
            job.tokens * ((2 * model.hidden_size + sizes.heads * sizes.value_dim) * len(layers) + features)
        )
        moved[1] += 3 * job.tokens * ((model.hidden_size * 2 + of_heads) * len(layers) + 2 * features)
        # Of a weight: read and written in forward, the other way round in backward; gathered in fp8, by each rank for
        # its shard, and what backward turns round are bytes.
        each = 2 + 5 / (job.dims.dp_shard * job.dims.cp) if job.precision.fp8_all_gather else 5
        moved[0] += each * len(layers) * model.hidden_size * (of_heads + 3 * features / len(layers))
    bandwidth = hardware.elementwise if job.compiled else hardware.eager
    return _operator("element-wise", 0, 0, moved[0], moved[1], 1, 1, bandwidth)


def _kinds(job: Job, layers: list[int]) -> Counter[int]:
    """One layer with a dense MLP and one with experts, of those there are, with their numbers."""
    sparse = [layer for layer in layers if job.model.moe.in_layer(layer)]
    dense = [layer for layer in layers if not job.model.moe.in_layer(layer)]
    return Counter({kind[0]: len(kind) for kind in (sparse, dense) if kind})


def _elementwise_bytes(job: Job, layer: int, sizes: _Sizes) -> tuple[float, float]:
    """Of a micro-batch in a layer, forward and backward."""
    model, T = job.model, job.tokens
    D, experts = model.hidden_size, model.moe.in_layer(layer)
    features = _mlp_rows(job, layer) / sizes.tp
    of_rows = (2 * (model.moe.top_k + 1), 3 * model.moe.top_k + 2 + 3 * model.moe.top_k) if experts else (0, 0)
    if job.compiled:
        turned = (sizes.heads * sizes.head_dim + sizes.kv_heads * (sizes.head_dim + sizes.value_dim)) * 2
        forward, backward = (
            sizes.itemsize * (8 * D * job.stream_tokens + T * (turned + each * features + rows * D))
            for each, rows in zip((3, 5), of_rows, strict=True)
        )
        return forward, backward
    split = 2 * (sizes.heads * sizes.head_dim + sizes.kv_heads * (sizes.head_dim + sizes.value_dim))
    beside = (0, split if model.fused_projections and not model.mla.kv_rank else 0)
    stream, each = eager.stream_elements(model), eager.activation_elements(model, experts=experts)
    rope = eager.rope_bytes(model, heads=sizes.heads, kv_heads=sizes.kv_heads)
    router = eager.ROUTER_BYTES if experts else (0, 0)
    forward, backward = (
        sizes.itemsize * (stream[way] * job.stream_tokens + T * (beside[way] + each[way] * features + of_rows[way] * D))
        + T * (rope[way] + router[way] * D)
        for way in (0, 1)
    )
    return forward, backward


def _small_kernels(job: Job, hardware: Hardware, layers: list[int]) -> Operator:
    """Of routers that are not compiled: their scores and counts are small, their kernels are many."""
    routers = sum(job.model.moe.in_layer(layer) for layer in layers)
    forward, backward = (routers * number * hardware.kernel_us * 1e-6 for number in eager.ROUTER_KERNELS)
    return Operator("small kernels of routers", 0, 0, 0, 0, forward, backward, "latency")


def _mlp_rows(job: Job, layer: int) -> float:
    """Features between the matrices of an MLP, or of all experts that a token is sent to."""
    moe = job.model.moe
    if not moe.in_layer(layer):
        return job.model.intermediate_size
    return (moe.top_k + moe.num_shared) * moe.intermediate_size


def _loss(job: Job, hardware: Hardware, sizes: _Sizes) -> Operator:
    words, one_kernel = job.model.vocab_size / sizes.tp, job.loss_kernel != "torch"
    bandwidth, per_logit = (hardware.elementwise, 8) if one_kernel else (hardware.eager, eager.LOSS_BYTES)
    sums = job.tokens / 4096 * words * job.model.hidden_size * 8 * bandwidth / hardware.elementwise  # by products
    moved = job.tokens * words * per_logit + sums
    return _operator("loss", 0, 0, moved * (1 + job.model.mtp.depth), 0, 1, 1, bandwidth)


def _operator(
    name: str, flops: float, backward_flops: float, moved: float, backward_moved: float,
    rate: float, backward_rate: float, bandwidth: float,
) -> Operator:  # fmt: skip
    computing, moving = flops / rate, moved / bandwidth
    forward = max(computing, moving)
    backward = max(backward_flops / backward_rate, backward_moved / bandwidth)
    binds = "compute" if computing >= moving else "memory"
    return Operator(name, flops, backward_flops, moved, backward_moved, forward, backward, binds)
