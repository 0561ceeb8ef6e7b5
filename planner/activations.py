"""What a rank keeps for backward, and needs beside it, in bytes: a model of shapes, not exact; held to measurements.

A block of width D, with T tokens of a micro-batch on a rank, t of them in the residual stream (t = T, or T / tp with
sequence parallelism), H query and G key/value heads of width K over tp = R ranks, and F features of its MLP. Kept, in
elements of the compute dtype:

    residual stream: input and what follows attention          2 t D
    normalised inputs of the projections, gathered             2 T D                   (latent: T D + t D)
    q, k, v as attention reads them, and its output            T (2 H + 2 G) K / R     (latent: see `_attention`)
    gate, up and their product                                 3 T F / R               (2 without a gate)
    log-sum-exp of attention, in fp32                          2 T H / R

Experts keep k rows for each token in the place of one: input, gate, up, product and output. Eager blocks also keep
what the compiler would compute again: act(gate), and the normalised inputs before they are gathered. In fp8 the inputs
of products are kept in one byte; attention's output in both.

By model.activation_checkpoint, a block keeps: none, all of this; full, its input; offload, nothing on the device;
selective, input, outputs of products and of attention; budget, what model.activation_memory_gib says.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from models.config import ModelConfig
from parallel.pipeline.actions import Action, Kind
from parallel.pipeline.layout import PipelineLayout
from parallel.pipeline.schedules import Schedule
from parallel.pipeline.stages import Stage
from planner.job import Job

CHUNK_TOKENS = 4096
"""Of the loss at a time (kernels/linear_cross_entropy)."""


@dataclass(frozen=True)
class BlockBytes:
    """Of one layer and a whole micro-batch."""

    kept: float  # between forward and backward
    all: float  # that a block which is computed again has in its own backward
    gradients: float  # beside `all` in the backward of its MLP, where most is held


def block_bytes(job: Job, layer: int) -> BlockBytes:
    """Of a layer under the activation checkpointing of the run."""
    size = job.precision.compute_dtype.itemsize
    mode = job.model.activation_checkpoint
    stream = job.stream_tokens * job.model.hidden_size * size
    every = _everything(job, layer)
    kept = {
        "none": every,
        "full": float(stream),
        "offload": 0.0,
        "selective": float(stream) + _selected(job, layer),
        "budget": (job.model.activation_memory_gib or 0.0) * 2**30 / max(1, _largest_number_of_layers(job)),
    }[mode]
    # Of what lies before the product, and behind the block. The product's own takes the place of the product, which is
    # gone by then.
    before_product = (2 if job.model.gated_mlp else 1) * _mlp_width(job, layer)
    gradients = size * (before_product * job.tokens + job.stream_tokens * job.model.hidden_size)
    return BlockBytes(min(kept, every), 0.0 if mode == "none" else every, gradients)


def _largest_number_of_layers(job: Job) -> int:
    return max(sum(s.stop - s.start for s in job.stages_of(rank)) for rank in range(job.dims.pp))


def _everything(job: Job, layer: int) -> float:
    model, size = job.model, job.precision.compute_dtype.itemsize
    fp8 = job.precision.fp8
    of_input = 1 if fp8 else size
    T, D = job.tokens, model.hidden_size
    total = 2.0 * job.stream_tokens * D * size  # residual stream
    gathered = T if gathers_input(model) else 0
    own = job.stream_tokens if model.mla.kv_rank and (job.parallel.sequence_parallel or not gathered) else 0
    total += (T + gathered + own) * D * of_input  # normalised
    attention, output = _attention(job)
    total += T * (attention * size + output * (size + (1 if fp8 else 0)))
    total += 4.0 * T * model.num_heads / job.dims.tp
    total += T * _mlp(job, layer, size, of_input)
    if not job.compiled:
        before = (2 if gathers_input(model) else 1) * job.stream_tokens * D * size if job.dims.tp > 1 else 0
        total += T * size * _mlp_width(job, layer) + before
    return total


def gathers_input(model: ModelConfig) -> bool:
    """Whether sequence parallelism gathers what attention reads; else it is latents that it gathers."""
    return not model.mla.kv_rank or model.mla.q_rank is None


def _attention(job: Job) -> tuple[float, float]:
    """Elements of a token on a rank: what attention reads and is made of, and its output."""
    model, tp = job.model, job.dims.tp
    assert model.head_dim is not None  # resolved
    assert model.value_dim is not None
    assert model.num_kv_heads is not None
    if model.mla.kv_rank:
        mla = model.mla
        # Before their norms of the residual stream's tokens, behind them of all.
        latents = (1 + job.stream_tokens / job.tokens) * (mla.kv_rank + (mla.q_rank or 0)) + mla.rope_dim
        heads = model.num_heads * (2 * model.head_dim + model.value_dim) / tp
        return latents + heads, model.num_heads * model.value_dim / tp
    kv_heads = max(model.num_kv_heads / tp, 1)
    extra = 2.0 if model.qk_norm else 1.0  # before the norms, too
    reads = (model.num_heads / tp + kv_heads) * model.head_dim * extra + kv_heads * model.value_dim
    return reads, model.num_heads * model.value_dim / tp


def _mlp(job: Job, layer: int, size: int, of_input: int) -> float:
    """Bytes of a token."""
    model, tp = job.model, job.dims.tp
    if not model.moe.in_layer(layer):
        branches = 2 if model.gated_mlp else 1
        return model.intermediate_size / tp * (branches * size + of_input)
    moe = model.moe
    room = job.parallel.ep_buffer or 1.0  # rows that buffers have room for, full or not
    rows = moe.top_k * room
    routed = rows * size * (2 * model.hidden_size + 3 * moe.intermediate_size / tp)
    shared = moe.num_shared * moe.intermediate_size / tp * (2 * size + of_input)
    return routed + shared + 4.0 * moe.num_experts  # the router's scores, in fp32


def _mlp_width(job: Job, layer: int) -> float:
    """Features between the matrices of a token's MLP, or of its experts."""
    model, tp = job.model, job.dims.tp
    if not model.moe.in_layer(layer):
        return model.intermediate_size / tp
    return (model.moe.top_k * (job.parallel.ep_buffer or 1.0) + model.moe.num_shared) * model.moe.intermediate_size / tp


def _selected(job: Job, layer: int) -> float:
    """What model.activation_checkpoint_save keeps: outputs of products (where it has aten.mm) and of attention."""
    save = {name.partition("#")[0] for name in job.model.activation_checkpoint_save}
    size, T = job.precision.compute_dtype.itemsize, job.tokens
    attention, output = _attention(job)
    total = 0.0
    if any("attention" in name for name in save):
        total += T * (output * size + 4.0 * job.model.num_heads / job.dims.tp)
    if save & {"aten.mm", "aten.addmm"}:
        branches = 2 if job.model.gated_mlp else 1
        total += T * size * attention + job.stream_tokens * job.model.hidden_size * size  # projections, and behind o
        if not job.model.moe.in_layer(layer):
            total += T * size * branches * _mlp_width(job, layer)
    return total


def stage_bytes(job: Job, stage: Stage) -> float:
    """Kept of one whole micro-batch by a stage."""
    alike: Counter[bool] = Counter()
    example = {}
    for layer in layers_of(job, stage):
        kind = job.model.moe.in_layer(layer)
        alike[kind] += 1
        example[kind] = layer
    return sum(count * block_bytes(job, example[kind]).kept for kind, count in alike.items())


def layers_of(job: Job, stage: Stage) -> range:
    """Its layers; the last stage has the blocks of multi-token prediction too."""
    return range(stage.start, job.model.num_blocks if stage.is_last else stage.stop)


def most_kept(job: Job) -> list[float]:
    """The most that each pipeline rank keeps at one time, over the micro-batches that its schedule has under way."""
    if job.pipeline is None:
        return [stage_bytes(job, job.stages[0])]
    of_stage = [stage_bytes(job, stage) for stage in job.stages]
    found = []
    for actions in schedule_of(job.pipeline, len(job.sequences)).ranks:
        held = most = 0.0
        for action in actions:
            if not isinstance(action, Action):
                continue
            if action.kind is Kind.FORWARD:
                held += of_stage[action.stage]
                most = max(most, held)
            elif action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                held -= of_stage[action.stage]
        found.append(most)
    return found


@lru_cache(maxsize=8)  # memory and time are worked out one after the other, and in a search for many jobs
def schedule_of(pipeline: PipelineLayout, num_microbatches: int) -> Schedule:
    """Of a training step."""
    return pipeline.training(num_microbatches)


def loss_bytes(job: Job) -> float:
    """Workspace of the loss, on ranks of the last stage: the gradient of the head's rows in fp32, logits of a chunk of
    tokens (compiled 4 bytes each, by triton 2, else 9), and of all tokens the last hidden state and its gradient in
    fp32 and in the compute dtype."""
    words = -(-job.model.vocab_size // job.dims.tp)
    size = job.precision.compute_dtype.itemsize
    per_logit = {"compiled": 4, "triton": size}.get(job.loss_kernel, 9 if size == 2 else 12)
    chunk = min(job.tokens, CHUNK_TOKENS)
    hidden = job.tokens * job.model.hidden_size
    return words * job.model.hidden_size * 4 + chunk * words * per_logit + hidden * (2 * size + 4)
