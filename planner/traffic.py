"""Bytes that a rank sends in a step, by axis and collective.

Of a buffer of n bytes over N ranks an all-gather, reduce-scatter or all-to-all sends n (N - 1) / N, an all-reduce twice
that (ring algorithms; NCCL's "bus bandwidth" is these bytes over time). With M micro-batches:

    shard       stage 1: gradients reduce-scattered and parameters gathered once; 2: gradients in every micro-batch;
                3: parameters of blocks gathered in forward and backward of every micro-batch, others once; gradients
                in each
    replicas    what is left of gradients all-reduced once; stage 0: whole gradients
    tp          a sum of the residual stream behind the embedding, each branch and, in backward, before each branch and
                the head: all-reduces, or with sequence parallelism gathers and scatters, of which backward gathers what
                forward scattered. Latent attention gathers latents. Gradients of what is whole on every rank and sees
                other tokens or heads on each; and 16 bytes a token of the loss
    cp          ring: keys and values to n - 1 others, in backward once more with n of their gradients in fp32;
                allgather: forward, and their gradients in fp32 back; ulysses: q, k, v and output, both ways
    ep          rows to their experts and back, both ways
    pp          hidden states, and their gradients, between stages; the gradient of a table that two of them have
    Muon        matrices to the rank that works on them and back, in bf16, over each axis that cuts them

Blocks that are computed again send what they sent in forward once more. A few numbers of a step are left out (its loss,
the norm of gradients, counts of a router).
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.job import Job
from planner.shapes import Parameter, parameters_of
from planner.state import Coordinates, state_of_rank
from planner.traffic_in_layers import Transfer, in_layers, sent

MUON_BYTES = 2
"""Of an element that Muon iterates on: bf16, on a GPU."""


def traffic(job: Job, pp_rank: int = 0) -> list[Transfer]:
    """Of a rank with these stages."""
    found = [*_data_parallel(job, pp_rank), *in_layers(job, pp_rank), *_pipeline(job, pp_rank), *_muon(job, pp_rank)]
    return [transfer for transfer in found if transfer.bytes]


def plain_ddp_bytes(job: Job) -> float:
    """What one all-reduce of all gradients over all ranks would send, with the whole model on each."""
    elements = sum(count * parameter.shape.numel() for parameter, count in parameters_of(job.model, None, tp=1).items())
    return 2 * sent(elements * job.precision.reduce_dtype.itemsize, job.dims.world_size)


def local_elements(job: Job, pp_rank: int) -> tuple[int, int]:
    """That a rank computes with: all but experts that are spread over ep, and those."""
    tp, ep = (job.dims.tp, 0), (job.dims.ep, 0)
    plain = spread = 0
    for parameter, count in parameters_of(job.model, job.stages_of(pp_rank), tp=job.dims.tp).items():
        elements = count * parameter.local(tp=tp, ep=ep).numel()
        if parameter.is_expert and job.dims.ep > 1:
            spread += elements
        else:
            plain += elements
    return plain, spread


def bytes_less_in_fp8(job: Job, parameters: Mapping[Parameter, int]) -> int:
    """What one gather of these parameters does not move, because they travel in fp8."""
    num_shards, compute = job.dims.dp_shard * job.dims.cp, job.precision.compute_dtype.itemsize
    return sum(
        count * parameter.shape.numel() * (compute - 1)
        for parameter, count in parameters.items()
        if parameter.travels_in_fp8(job.precision, num_shards)
    )


def _data_parallel(job: Job, pp_rank: int) -> list[Transfer]:
    dims, stage = job.dims, job.parallel.zero_stage
    compute, reduce = job.precision.compute_dtype.itemsize, job.precision.reduce_dtype.itemsize
    found = []
    plain, spread = local_elements(job, pp_rank)
    shard = dims.dp_shard * dims.cp
    for elements, num_shards, suffix in ((plain, shard, ""), (spread, dims.expert_shard, " of experts")):
        if stage == 0:
            num = num_shards * dims.dp_replicate
            found.append(Transfer(f"data{suffix}", "all_reduce", 2 * sent(elements * reduce, num), 1))
            continue
        scatters = len(job.sequences) if stage >= 2 else 1
        gathers = 2 * len(job.sequences) if stage == 3 else 1
        gathered = gathers * elements * compute
        if stage == 3 and not suffix:
            parameters = parameters_of(job.model, job.stages_of(pp_rank), tp=dims.tp)
            outside = sum(
                count * parameter.local(tp=(dims.tp, 0), ep=(dims.ep, 0)).numel()
                for parameter, count in parameters.items()
                if not parameter.name.startswith("blocks.")
            )
            # What is outside of blocks stays from forward to backward.
            gathered -= len(job.sequences) * outside * compute + gathers * bytes_less_in_fp8(job, parameters)
        axis = f"shard{suffix}"
        found.append(Transfer(axis, "reduce_scatter", scatters * sent(elements * reduce, num_shards), scatters))
        found.append(Transfer(axis, "all_gather", sent(gathered, num_shards), gathers))
        replicas = 2 * sent(elements / num_shards * reduce, dims.dp_replicate)
        found.append(Transfer(f"replicas{suffix}", "all_reduce", replicas, 1))
    return found


def _pipeline(job: Job, pp_rank: int) -> list[Transfer]:
    if job.pipeline is None:
        return []
    owner, size = job.pipeline.owner, job.precision.compute_dtype.itemsize
    tokens = sum(job.sequences) * job.seq_len // job.dims.cp
    if job.parallel.sequence_parallel:
        tokens //= job.dims.tp
    neighbours = [other for stage in job.stages_of(pp_rank) for other in (stage.index - 1, stage.index + 1)]
    messages = sum(0 <= other < len(owner) and owner[other] != pp_rank for other in neighbours)
    calls = messages * len(job.sequences)
    moved = messages * tokens * job.model.hidden_size * size
    return [Transfer("pp", "send_receive", moved, calls, True), *_tied(job, pp_rank)]


def _tied(job: Job, pp_rank: int) -> list[Transfer]:
    """The first stage's table, which the last one has as well: one sum of what each owns of its gradient."""
    assert job.pipeline is not None
    ends = (job.pipeline.owner[0], job.pipeline.owner[-1])
    if not job.model.embeds_last or ends[0] == ends[1] or pp_rank not in ends:
        return []
    table = {p: n for p, n in job.parameters(pp_rank).items() if p.name.startswith("embedding.")}
    owned = state_of_rank(job, table, Coordinates(pp_rank, 0, 0)).num_owned
    return [Transfer("pp", "all_reduce", 2 * sent(owned * job.precision.master_dtype.itemsize, 2), 1, at_end=True)]


def _muon(job: Job, pp_rank: int) -> list[Transfer]:
    """Of each axis that cuts hidden matrices, all of what a rank has of them, there and back. On average: where a round
    has fewer matrices than ranks, some send more and others less."""
    if job.optimizer != "muon":
        return []
    dims, found = job.dims, []
    num_shards = dims.dp_shard * dims.cp if job.parallel.zero_stage else 1
    hidden = {p: n for p, n in job.parameters(pp_rank).items() if p.is_hidden_matrix and p.is_trained}
    for is_cut in (True, False):
        matrices = {p: n for p, n in hidden.items() if (p.tp_dim is not None) == is_cut}
        axes = {"shard": num_shards, "tp": dims.tp if is_cut else 1}
        held = state_of_rank(job, matrices, Coordinates(pp_rank, 0, 0)).num_owned * MUON_BYTES
        rounds = -(-sum(matrices.values()) // (axes["shard"] * axes["tp"]))
        found += [Transfer(a, "all_to_all", 2 * sent(held, n), 2 * rounds, at_end=True) for a, n in axes.items()]
    return found
