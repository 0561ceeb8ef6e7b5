"""Bytes on the wire against those that the real trainer sends in a step, on gloo ranks, by axis and collective."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainer.step
from data.config import DataConfig
from models.config import ModelConfig
from parallel.dims import ParallelConfig
from planner.job import Job
from planner.traffic import traffic
from tests.parity.harness import tiny_config
from tests.planner.test_state import BF16, LATENT, MOE, ODD, TIED
from tests.pool import RankPool
from trainer.config import OptimConfig, TrainConfig
from trainer.predicted import job_of
from trainer.trainer import Trainer
from trainer.validate import finalize

Sent = dict[tuple[str, str], float]
"""Bytes by axis and collective."""
SMALL = 500
"""Bytes of a step that are not planned: its loss, the norm of gradients, counts of routers and of rows for experts."""
PADDING = 0.006
"""Of parameters that ranks do not divide, by which buckets are longer; of these sizes, some hundred bytes."""
COLLECTIVES = {
    "allreduce_": "all_reduce", "all_reduce": "all_reduce", "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter", "alltoall_base_": "all_to_all", "all_to_all_single": "all_to_all",
    "send": "send_receive",
}  # fmt: skip
"""By name of the operator; others of a step move next to nothing."""


class _Sending(TorchDispatchMode):
    """What this rank sends, by group and collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in COLLECTIVES:
            named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
            group = _group_of(named)
            if group.size() > 1:
                name = COLLECTIVES[func._opname]
                self.bytes[group.group_name, name] += _sent(name, func.namespace, named, group)
        return func(*args, **(kwargs or {}))


def _group_of(named: dict[str, Any]) -> dist.ProcessGroup:
    if "group_name" in named:
        return torch._C._distributed_c10d._resolve_process_group(named["group_name"])
    return dist.ProcessGroup.unbox(named["process_group"])


def _sent(name: str, namespace: str, named: dict[str, Any], group: dist.ProcessGroup) -> float:
    """Of one collective, as planner/traffic.py counts them."""
    given = named["tensors" if "tensors" in named else "input_tensor" if "input_tensor" in named else "input"]
    size = sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
    n = group.size()
    if name == "all_to_all":
        sizes = named["input_split_sizes"] or [1] * n
        return size * (1 - sizes[group.rank()] / max(sum(sizes), 1))
    return size * {"all_reduce": 2 * (n - 1) / n, "all_gather": n - 1, "reduce_scatter": (n - 1) / n}.get(name, 1)


def _measure(config: TrainConfig) -> tuple[int, dict[str, list[str]], dict[tuple[str, str], float]]:
    """Stage of this rank, groups by axis as the planner names it, and what it sends in a step."""
    run = Trainer(finalize(config, world_size=dist.get_world_size()))
    sending = _Sending()

    def train_step(*args: Any, **kwargs: Any) -> Any:
        with sending:
            return original(*args, **kwargs)

    original = trainer.step.train_step
    try:
        with mock.patch("trainer.trainer.train_step", train_step):
            run.run()
        mesh, tied = run.mesh, getattr(run.state.passes, "tied_group", None)
        groups = {
            "shard": [mesh.state["shard"]], "tp": [mesh.state["tp"]], "replicas": [mesh.state["dp_replicate"]],
            "cp": [] if mesh.context is None else [mesh.context["cp_ring"], mesh.context["cp_ulysses"]],
            "ep": [] if mesh.experts is None else [mesh.experts["ep"]],
            "shard of experts": [] if mesh.experts is None else [mesh.experts["expert_shard"]],
            "pp": [mesh.state["pp"]],
        }  # fmt: skip
        names = {
            axis: [view.get_group().group_name for view in views if view.size() > 1] for axis, views in groups.items()
        }
        names["pp"] += [] if tied is None else [tied.group_name]
        return mesh.state["pp"].get_local_rank(), names, dict(sending.bytes)
    finally:
        run.close()


def _by_axis(groups: dict[str, list[str]], sent: Counter[tuple[str, str]]) -> Sent:
    """Groups of one rank's axes that are the same ranks are one group, named after the first of these axes."""
    of_group: dict[str, str] = {}
    for axis, names in groups.items():
        for name in names:
            of_group.setdefault(name, axis)
    found: Sent = {}
    for (group, collective), count in sent.items():
        if group in of_group:
            key = of_group[group], collective
            found[key] = found.get(key, 0.0) + count
    return found


def _planned(job: Job, pp_rank: int, groups: dict[str, list[str]]) -> Sent:
    """With the axes of `_by_axis`. Messages of a ring are made as all-to-alls."""
    of_group: dict[str, str] = {}
    alias = {}
    for axis, names in groups.items():
        for name in names:
            alias.setdefault(axis, of_group.setdefault(name, axis))
    found: Sent = {}
    for transfer in traffic(job, pp_rank):
        ring = transfer.axis == "cp" and transfer.collective == "send_receive"
        key = alias[transfer.axis], "all_to_all" if ring else transfer.collective
        found[key] = found.get(key, 0.0) + transfer.bytes
    return found


ALONE = replace(ODD, num_layers=2)
KEYS_OF_ONE = replace(ALONE, num_kv_heads=1)
SP = {"zero_stage": 1, "tp": 2, "sequence_parallel": True}
FULL, SELECTIVE = "full", "selective"

CASES: dict[str, tuple[int, ModelConfig, dict[str, Any], dict[str, Any]]] = {
    "zero3 and replicas": (4, ALONE, {"zero_stage": 3, "dp_replicate": 2}, {}),
    "tp": (2, replace(ALONE, qk_norm=True), {"zero_stage": 1, "tp": 2}, {}),
    "sp": (2, ALONE, SP, {}),
    "sp, computed again": (2, replace(ALONE, activation_checkpoint=FULL), SP, {}),
    "tp, computed again": (2, replace(ALONE, activation_checkpoint=SELECTIVE), {"zero_stage": 1, "tp": 2}, {}),
    "tp, shared key heads": (2, KEYS_OF_ONE, {"zero_stage": 1, "tp": 2}, {}),
    "tp, latent": (2, LATENT, {"zero_stage": 1, "tp": 2}, {}),
    "sp, latent": (2, LATENT, SP, {}),
    "sp, latent keys alone": (2, replace(LATENT, mla=replace(LATENT.mla, q_rank=None)), SP, {}),
    "sp, experts": (2, MOE, SP, {}),
    "ring": (4, ALONE, {"zero_stage": 1, "cp": 4}, {}),
    "ring, computed again": (2, replace(ALONE, activation_checkpoint=FULL), {"zero_stage": 1, "cp": 2}, {}),
    "allgather": (2, ALONE, {"zero_stage": 1, "cp": 2, "cp_method": "allgather"}, {}),
    "ulysses, repeated key heads": (4, KEYS_OF_ONE, {"zero_stage": 1, "cp": 4, "cp_method": "ulysses"}, {}),
    "ring between ulysses": (4, KEYS_OF_ONE, {"zero_stage": 1, "cp": 4, "cp_ulysses": 2}, {}),
    "pp, tied": (2, TIED, {"zero_stage": 1, "pp": 2}, {}),
    "ep": (2, MOE, {"zero_stage": 1, "ep": 2, "ep_buffer": 2.0}, {}),
    "muon": (2, ALONE, {"zero_stage": 1}, {"name": "muon"}),
    "muon, tp x zero3": (4, ALONE, {"zero_stage": 3, "tp": 2}, {"name": "muon"}),
}
ALWAYS = ("sp", "tp, shared key heads", "sp, latent", "ring", "ulysses, repeated key heads", "pp, tied",
          "muon, tp x zero3")  # fmt: skip
"""Run in every suite, the others with --thorough."""
PARAMETERS = [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.thorough]) for n in CASES]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sent") / "tokens.npy"
    np.save(path, np.arange(2000, dtype=np.int32) % 300)
    return path


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_step_sends_the_bytes_that_are_planned(ranks: RankPool, tokens: Path, name: str) -> None:
    """A collective that is forgotten, or counted in another dtype; half of what a ring sends, nothing of Muon."""
    world_size, model, parallel, optim = CASES[name]
    data = DataConfig(source="tokens", path=str(tokens), shuffle=False, num_workers=0)
    run_dir = tokens.parent / name.replace(" ", "_")
    config = tiny_config(run_dir, data, train__steps=1, train__seq_len=32, schedule__warmup_steps=0)
    config.train.global_batch_size = 2 * world_size
    config.model, config.precision = replace(model), BF16
    config.parallel, config.optim = ParallelConfig(bucket_mb=0.02, **parallel), OptimConfig(**optim)
    job = job_of(finalize(config, world_size=world_size), world_size=world_size)
    results = ranks.run(world_size, _measure, config)
    with mock.patch("planner.traffic.MUON_BYTES", 4):  # what a CPU iterates on
        for pp in range(job.dims.pp):
            here = [(groups, sent) for at, groups, sent in results if at == pp]
            total: Counter[tuple[str, str]] = Counter()
            for groups, sent in here:
                total.update(_by_axis(groups, Counter(sent)))
            mean = {key: count / len(here) for key, count in total.items()}
            planned = _planned(job, pp, here[0][0])
            for key in mean.keys() | planned.keys():
                assert planned.get(key, 0.0) == pytest.approx(mean.get(key, 0.0), rel=PADDING, abs=SMALL), key
