"""What is exact of a job whose activations and time are not modelled: bytes of state on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.buffers import buffer_bytes
from planner.hardware import Hardware
from planner.job import Job
from planner.plan import layout_of, room
from planner.report import GIB, head, table
from planner.shapes import parameters_of
from planner.state import RankState, count_parameters, rank_states


def make_state_plan(job: Job, hardware: Hardware, *, because: Sequence[str]) -> dict[str, Any]:
    """`ranks` as in planner.plan.make_plan as far as state goes, with `beside_bytes` of a reference or teacher; `fits`
    is false where the state alone is too large, else null. because: what is not planned, a line each."""
    trained = sum(count * p.shape.numel() for p, count in job.parameters(None).items() if p.is_trained)
    model = count_parameters(parameters_of(job.model, None, tp=1))
    ranks = [_rank(job, state) for state in rank_states(job)]
    too_large = max(rank["state_bytes"] for rank in ranks) > room(hardware)
    return {
        "hardware": hardware.name,
        "world_size": job.dims.world_size,
        "layout": layout_of(job),
        "num_parameters": model,  # adapters not counted
        "num_trained": trained,
        "num_beside": 0 if job.beside is None else count_parameters(job.beside.parameters(None)),
        "beside_on_host": job.beside_on_host,
        "ranks": ranks,
        "fits": False if too_large else None,
        "memory_bytes": hardware.memory_gib * 2**30,
        "not_planned": list(because),
    }


def _rank(job: Job, state: RankState) -> dict[str, Any]:
    held, at = state.bytes, state.example
    buffers = buffer_bytes(job, at.pp)
    on_device = buffers + (0 if job.parallel.cpu_offload else held.total)
    return {
        "pp": at.pp,
        "tp": at.tp,
        "shard": at.shard,
        "count": state.count,
        "layers": [[stage.start, stage.stop] for stage in job.stages_of(at.pp)],
        "parameters_bytes": held.parameters,
        "gradients_bytes": held.gradients,
        "master_bytes": held.master,
        "optimizer_bytes": held.optimizer,
        "buffers_bytes": buffers,
        "beside_bytes": held.beside,
        "state_bytes": on_device + (0 if job.beside_on_host else held.beside),  # on the device
    }


def state_as_text(plan: dict[str, Any]) -> str:
    """The page of a `make_state_plan`."""
    columns = ("parameters", "gradients", "master", "optimizer", "buffers", "beside", "state")
    rows = [["stage", "ranks", *columns]]
    for rank in plan["ranks"]:
        rows.append([str(rank["pp"]), str(rank["count"]), *(f"{rank[f'{c}_bytes'] / GIB:.3f}" for c in columns)])
    most = max(rank["state_bytes"] for rank in plan["ranks"])
    verdict = "DOES NOT FIT" if plan["fits"] is False else "activations and workspaces come on top"
    lines = [
        head(plan),
        f"{plan['num_trained']:,} numbers are trained, in a model of {plan['num_parameters']:,}",
        "State of a rank, GiB (exact)",
        table(rows),
        f"at most {most / GIB:.2f} of {plan['memory_bytes'] / GIB:.1f} GiB on a device; {verdict}",
    ]
    if plan["num_beside"]:
        where = "in host memory" if plan["beside_on_host"] else "on the devices"
        lines.insert(
            2, f"Beside it, {where}: a model of {plan['num_beside'] / 1e9:.2f}B parameters that is not trained"
        )
    lines += ["Not planned:", *(f"  {line}" for line in plan["not_planned"])]
    return "\n".join(lines) + "\n"
