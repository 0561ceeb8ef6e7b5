"""The search of layouts against trying all of them, its reasons, and what it refuses."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.compose import compose_for, compose_one
from launch.plan import PLAN, PlanConfig, load_hardware, plan, plan_of, search_of
from launch.plan_search import _Space, held_by
from models.mtp_config import MTPConfig
from models.registry import build_model, resolve_model
from parallel.dims import ParallelDims
from parallel.pipeline.stages import make_stages
from planner.plan import room
from planner.search import cost_of, differences, rank_layouts, split_of
from planner.search_report import as_page
from planner.shapes import Parameter, _parameters, parameters_of
from planner.state import rank_states
from planner.steptime import in_node, step_time
from tests.planner.test_state import GPT2, LATENT, MOE, ODD, TIED
from trainer.config import ConfigError
from trainer.validate import finalize

SMALL = ["model=llama3_8b", "model.num_layers=8", "precision=bf16", "train.compile=true", "train.seq_len=4096",
         "train.global_batch_size=8", "plan.gpus=4", "plan.search=true"]  # fmt: skip


def composed(*overrides: str) -> PlanConfig:
    return compose_for(PLAN, [*SMALL, *overrides])


def space(*overrides: str, **hardware: Any) -> _Space:
    from launch.plan import _train_config

    config = composed(*overrides)
    return _Space(_train_config(config), replace(load_hardware("h200"), **hardware), 4, held_by(overrides))


@pytest.mark.parametrize("gib", [40.0, 28.0])
def test_the_ranking_is_that_of_trying_every_layout(gib: float) -> None:
    """A bound that is none: the best layout is never looked at, and nothing shows it."""
    tried = space(memory_gib=gib)
    found = rank_layouts(tried.ladders(), tried.hardware, places=4)
    best: dict[object, float] = {}
    for ladder in tried.ladders():
        for rung in ladder:
            layout = cost_of(rung, tried.hardware)
            if layout.peak <= room(tried.hardware):
                split = split_of(layout.job)
                best[split] = min(best.get(split, layout.time.step), layout.time.step)
    assert [layout.time.step for layout in found.layouts] == sorted(best.values())[:4]
    assert found.num_costed < found.num_legal


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"])
def test_no_schedule_is_faster_than_the_bound(schedule: str) -> None:
    """The same, where it depends on the order of a pipeline."""
    tried = space()
    for micro_batch in (1, 2):
        rung = tried.legal(
            {"parallel.pp": 4, "parallel.pp_schedule": schedule, "parallel.zero_stage": 1,
             "train.micro_batch_size": micro_batch}
        )  # fmt: skip
        assert rung is not None, tried.problem
        bound = step_time(rung.job, tried.hardware, simulated=False).step
        time = step_time(rung.job, tried.hardware)
        assert bound <= time.step * (1 + 1e-9)
        assert sum(time.terms.values()) == pytest.approx(time.step)


def test_the_terms_of_a_difference_add_up() -> None:
    """Reasons that explain another number than the one that ranks."""
    tried = space()
    first, second = rank_layouts(tried.ladders(), tried.hardware, places=2).layouts
    assert sum(d.seconds for d in differences(first, second)) == pytest.approx(second.time.step - first.time.step)


def test_the_command_of_the_winner_has_the_cost_that_was_promised() -> None:
    """A command that leaves out a field of the layout, or that the trainer refuses."""
    arguments = [*SMALL, "parallel.tp=2"]
    found, hardware = search_of(compose_for(PLAN, arguments), arguments)
    winner = found.ranking.layouts[0]
    assert {layout.job.dims.tp for layout in found.ranking.layouts} == {2}
    words = shlex.split(found.command)
    overrides = words[words.index("launch/train.py") + 1 :]
    assert words[:3] == ["torchrun", "--nproc-per-node", "4"]
    finalize(compose_one(overrides), world_size=4)
    promised = plan_of(compose_for(PLAN, [*overrides, "plan.gpus=4"]))
    assert promised["step_seconds"] == winner.time.step
    assert max(rank["peak_bytes"] for rank in promised["ranks"]) == round(winner.peak)
    assert "parallel.tp" not in {other.field for other in found.others}
    page = as_page(found.ranking, found.others, found.command, hardware)
    for part in ("The best layout of each split", "Why: against the second", "with one thing changed", "Left out"):
        assert part in page


def test_the_largest_rank_of_a_stage_is_its_first() -> None:
    """Memory of the search, which looks at that one alone: shares that do not divide evenly."""
    for overrides in (["parallel.tp=2"], ["parallel.pp=2", "parallel.zero_stage=1"], ["parallel.zero_stage=2"]):
        rung = space("model.vocab_size=1001", *overrides).legal({})
        assert rung is not None
        every = {}
        for state in rank_states(rung.job):
            every[state.example.pp] = max(every.get(state.example.pp, 0), state.bytes.total)
        assert [state.bytes.total for state in rank_states(rung.job, largest=True)] == list(every.values())


def test_the_flag_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """--search that Hydra takes for a flag of its own."""
    plan([*SMALL[:-1], "--search", "format=json", "parallel.pp=1", "parallel.cp=1"])
    made = json.loads(capsys.readouterr().out)
    steps = [layout["step_seconds"] for layout in made["layouts"]]
    assert steps == sorted(steps)
    assert made["layouts"][0]["changes"]["parallel.pp"] == 1
    assert sum(made["why"].values()) == pytest.approx(steps[1] - steps[0])
    assert made["command"]
    assert made["not_modelled"]


def test_where_nothing_fits_the_nearest_is_named() -> None:
    """A ranking of what cannot run; a refusal that does not say by how much, or what would help."""
    arguments = ["model=llama3_70b", "precision=bf16", "train.compile=true", "plan.gpus=4", "plan.search=true"]
    with pytest.raises(ConfigError) as raised:
        search_of(compose_for(PLAN, arguments), arguments)
    (line,) = raised.value.problems
    assert "bytes too many" in line
    assert "parallel.zero_stage=3" in line
    assert "plan.gpus=16" in line or "plan.gpus=8" in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["plan.search=true"], "set plan.gpus"),
        (["plan.search=true", "plan.gpus=4", "parallel.tp=3"], "no layout of 4 GPUs is legal"),
        (["plan.search=true", "plan.gpus=4", "plan.picture=a.png"], "plan.picture draws one layout"),
    ],
)
def test_what_cannot_be_searched_is_refused(overrides: list[str], says: str) -> None:
    """An empty ranking without a word."""
    with pytest.raises(ConfigError, match=says):
        search_of(compose_for(PLAN, overrides), overrides)


def test_tp_that_is_searched_stays_in_a_node() -> None:
    """tp=3 or 6 of 24 GPUs, of which groups cross from one node of 8 to the next."""
    tried = space("model.num_heads=24", "model.num_kv_heads=24")
    tried.world_size = 24
    assert {split["parallel.tp"] for split in tried._splits()} == {1, 2, 4, 8}
    tried.world_size = 6
    assert {split["parallel.tp"] for split in tried._splits()} == {1, 2, 3, 6}


@pytest.mark.parametrize(
    ("world_size", "degrees", "inside"),
    [
        (24, {"tp": 3}, {"tp": False}),
        (24, {"tp": 6}, {"tp": False}),
        (24, {"tp": 4, "cp": 2}, {"tp": True, "cp": True}),
        (24, {"tp": 4, "cp": 3}, {"tp": True, "cp": False, "shard": False}),
        (6, {"tp": 3}, {"tp": True, "shard": True}),
        (16, {"tp": 2, "pp": 2}, {"tp": True, "shard": True, "pp": False}),
    ],
)
def test_a_group_is_in_a_node_if_none_of_its_axis_crosses(
    world_size: int, degrees: dict[str, int], inside: dict[str, bool]
) -> None:
    """Against the ranks of all groups: those that fit into a node by their number alone may lie across two."""
    rung = space().legal({})
    assert rung is not None
    rest = {"dp_shard": world_size // math.prod(degrees.values()), "dp_replicate": 1, "ep": 1}
    sizes = {"pp": 1, "cp": 1, "tp": 1} | degrees | rest
    job = replace(rung.job, dims=ParallelDims(**sizes, world_size=world_size))
    shape = (sizes["pp"], sizes["dp_shard"], sizes["cp"], sizes["tp"])
    ranks = torch.arange(world_size).view(shape)
    dims = {"pp": (0,), "shard": (1, 2), "cp": (2,), "tp": (3,)}
    for axis, expected in inside.items():
        others = [dim for dim in range(4) if dim not in dims[axis]]
        groups = ranks.permute(*others, *dims[axis]).reshape(-1, math.prod(shape[dim] for dim in dims[axis]))
        assert all(len({rank // 8 for rank in group}) == 1 for group in groups.tolist()) == expected
        assert in_node(job, load_hardware("h200"), axis) == expected


def test_parameters_of_stages_are_those_of_the_real_stages() -> None:
    """Stages are put together from one whole model: a table that the last one has too, blocks that come after it."""
    models = [ODD, TIED, GPT2, MOE, LATENT, replace(ODD, mtp=MTPConfig(depth=1))]
    for model in (resolve_model(model) for model in models):
        for sizes in ((2, 1, 1), (1, 3)):
            for stage in make_stages(sizes):
                with torch.device("meta"):
                    decoder = build_model(model, stages=[stage])
                real: Counter[Parameter] = Counter(
                    p for _, p in _parameters(decoder, torch.float32, shared=False, tp=1)
                )
                assert parameters_of(model, [stage], tp=1) == real


def test_a_picture_has_its_three_parts(tmp_path: Path) -> None:
    """A picture of a layout without a pipeline, or with one, that fails or is empty."""
    pytest.importorskip("matplotlib")
    common = ["model=llama3_8b", "model.num_layers=8", "precision=bf16", "train.compile=true", "plan.gpus=4"]
    for more, title in (["parallel.pp=4", "Pipeline"], ["parallel.pp=1", "Step"]):
        path = tmp_path / f"{title}.png"
        plan([*common, more, f"plan.picture={path}"])
        assert path.stat().st_size > 10_000
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        plan([*common, "plan.picture=a.txt"])
