"""What a plan leaves out, for whoever relies on it."""

from __future__ import annotations

from planner.hardware import Hardware
from planner.job import Job


def limits(job: Job, hardware: Hardware) -> list[str]:
    """What the model of memory and time does not know of this job, a line each."""
    found = ["waiting for data, validation, checkpoints, and GPUs that are slower than others"]
    found.append("masks between documents, which make attention cheaper: it is taken to be causal over whole sequences")
    if job.dims.world_size > hardware.gpus_per_node:
        found.append("the topology of the network: between nodes every collective has hardware.network_gbps")
    if job.dims.tp > 1:
        found.append("small products and collectives, which are slower than hardware's rates of large ones")
    if job.dims.ep > 1:
        found.append("experts that get more tokens than others")
    if job.dims.cp_ring > 1:
        found.append("communication of ring attention that is hidden behind its products")
    if job.optimizer == "muon":
        found.append("products of Muon's iterations")
    if job.parallel.cpu_offload:
        found.append("transfers to host memory, and the update there")
    if not job.compiled:
        found.append("what kernels that are not compiled reach one by one: all have hardware.eager_share")
    if job.model.activation_checkpoint == "budget":
        found.append("what a budget of activations picks: it is spread evenly over the layers")
    return found
