"""FLOPs, predictions beside measurements, worked examples, and the command itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from launch.compose import CONFIG_DIR, compose_for
from launch.plan import PLAN, load_hardware, plan, plan_of
from models.config import ModelConfig
from models.flops import flops_per_token, num_parameters
from models.registry import resolve_model
from planner.cache import cache_bytes
from planner.failure import RESTART_SECONDS, failure_cost
from planner.flops import flops_by_operator
from planner.report import as_text
from tests.parity.adapting import adapter_config
from tests.planner.measured import held, predictions, table
from trainer.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted(path.stem for path in (Path(CONFIG_DIR) / "model").glob("*.yaml") if path.stem != "hf")
PEAK_WITHIN, SECONDS_WITHIN = 0.03, 0.10
EXPECTED_SLOWER = {"llama3_1b tp4+sp": 0.25}
"""Small products and collectives, which the rates of large ones flatter."""


def planned(*overrides: str) -> dict[str, Any]:
    return plan_of(compose_for(PLAN, list(overrides)))


def most(plan: dict[str, Any], kind: str) -> float:
    return max(rank[f"{kind}_bytes"] for rank in plan["ranks"])


@pytest.mark.some(9)
@pytest.mark.parametrize("name", MODELS)
def test_flops_of_operators_add_up_to_what_the_trainer_logs(name: str) -> None:
    """An operator forgotten or counted twice: tied heads, experts that a token is not sent to, learned positions."""
    model = resolve_model(compose_for(PLAN, [f"model={name}"]).model)
    assert sum(flops_by_operator(model, 512).values()) == flops_per_token(model, 512)


def test_flops_of_multi_token_prediction_add_up_too() -> None:
    """Its blocks use the head once more each."""
    overrides = ["model=deepseek_v3", "model.num_layers=4", "model.mtp.depth=2"]
    model = resolve_model(compose_for(PLAN, overrides).model)
    assert sum(flops_by_operator(model, 512).values()) == flops_per_token(model, 512)


def test_predictions_are_near_what_was_measured() -> None:
    """A formula that drifts from the code, or a rate from the machine; and the table of the docs with them."""
    rows = held()
    assert len(rows) >= 18
    for row in rows:
        if row.run.peak_gib is not None:
            assert row.peak_gib == pytest.approx(row.run.peak_gib, rel=PEAK_WITHIN), row
        assert row.seconds == pytest.approx(row.run.seconds, rel=EXPECTED_SLOWER.get(row.run.name, SECONDS_WITHIN)), row
    docs = (ROOT / "docs" / "PLANNER.md").read_text()
    assert table(rows) in docs
    assert table(predictions()) in docs


def test_13b_with_zero3_on_8() -> None:
    """16 bytes a parameter, shared by 8: nothing else is state."""
    plan = planned("+exp=zero3_13b", "plan.gpus=8")
    (rank,) = plan["ranks"]
    state = sum(rank[f"{kind}_bytes"] for kind in ("parameters", "gradients", "master", "optimizer"))
    assert plan["num_parameters"] == 13_015_864_320
    assert state == 13_015_864_320 * 16 // 8 + 4
    assert rank["count"] == 8
    assert plan["fits"]
    # Twice gathered in bf16, once scattered in fp32: 8 bytes a parameter and micro-batch, of which there are two; of
    # both tables [32000, 5120] and the last norm 6, because they stay gathered from forward to backward.
    outside = 2 * 32000 * 5120 + 5120
    moved = 8 * 13_015_864_320 - 2 * outside
    assert sum(plan["traffic_bytes_per_step"]["shard"].values()) == pytest.approx(2 * moved * 7 / 8)


def test_70b_on_64() -> None:
    """tp=8 inside nodes and ZeRO-2 between them fits; ZeRO-2 alone does not."""
    common = ["model=llama3_70b", "precision=bf16", "train.compile=true", "train.seq_len=8192", "plan.gpus=64",
              "parallel.zero_stage=2", "train.global_batch_size=128"]  # fmt: skip
    split = planned(*common, "parallel.tp=8", "parallel.sequence_parallel=true")
    assert split["num_parameters"] == 70_553_706_496
    assert split["fits"]
    assert 0.3 < split["mfu"] < 0.65
    assert not planned(*common)["fits"]


def test_405b_on_1024() -> None:
    """Three axes at once, each with its traffic, and a bubble that more micro-batches make smaller."""
    common = [
        "model=llama3_405b",
        "precision=bf16",
        "train.compile=true",
        "train.seq_len=8192",
        "plan.gpus=1024",
        "parallel.tp=8",
        "parallel.sequence_parallel=true",
        "parallel.pp=16",
        "parallel.zero_stage=1",
    ]
    few = planned(*common, "train.global_batch_size=128")
    many = planned(*common, "train.global_batch_size=512")
    assert few["num_parameters"] == 405_853_388_800
    assert few["fits"]
    assert sum(rank["count"] for rank in few["ranks"]) == 1024
    assert set(few["traffic_bytes_per_step"]) == {"shard", "tp", "pp"}
    assert few["bubble"] > 1.5 * many["bubble"] > 0
    assert few["mfu"] < many["mfu"]


def test_8_experts_of_7b_against_13b_dense() -> None:
    """Two experts of eight: the arithmetic of a 13B model, the memory of a 47B one, and rows that travel."""
    common = ["precision=bf16", "train.compile=true", "train.seq_len=4096", "plan.gpus=8", "train.global_batch_size=16"]
    sparse = planned(*common, "model=mixtral_8x7b", "parallel.ep=8", "parallel.ep_buffer=1.5")
    dense = planned(*common, "model=llama2_13b")
    assert sparse["num_parameters"] == pytest.approx(46.7e9, rel=0.01)
    assert sparse["flops_per_token"] == pytest.approx(dense["flops_per_token"], rel=0.05)
    assert most(sparse, "optimizer") == pytest.approx(46.7 / 13.0 * most(dense, "optimizer"), rel=0.02)
    # Of an element that a rank owns, 8 bytes of moments and 4 of its weight read and written, a gradient read twice.
    owned = most(sparse, "optimizer") / 8
    assert sparse["step_parts"]["optimizer"] == pytest.approx(owned * (2 * 8 + 2 * 4 + 2 * 4) / 3.9e12)
    assert sparse["traffic_bytes_per_step"]["ep"]["all_to_all"] > 0
    assert "ep" not in dense["traffic_bytes_per_step"]


def test_keys_and_values_of_70b_at_32k() -> None:
    """10 GiB: 2 x 80 layers x 8 heads x 128 x 2 bytes x 32768 tokens."""
    model = resolve_model(compose_for(PLAN, ["model=llama3_70b"]).model)
    assert cache_bytes(model, tokens=32768) == 10 * 2**30


def test_checkpointing_trades_memory_for_time() -> None:
    """Modes that are read but change nothing."""
    common = ["+exp=llama3_8b", "plan.gpus=4"]
    plans = [planned(*common, f"model.activation_checkpoint={mode}") for mode in ("none", "selective", "full")]
    kept = [most(plan, "activations") for plan in plans]
    seconds = [plan["step_seconds"] for plan in plans]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
    assert seconds == sorted(seconds)


def test_the_command_prints_json_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that JSON cannot hold; a page that lacks one of its parts."""
    plan(["train.steps=2", "parallel.dp_shard=2", "format=json"])
    made = json.loads(capsys.readouterr().out)
    assert made["world_size"] == 2
    for key in (
        "ranks",
        "traffic_bytes_per_step",
        "flops_per_token",
        "step_seconds",
        "tokens_per_second_per_gpu",
        "mfu",
    ):
        assert made[key]
    assert made["bubble"] == 0
    assert made["flops_per_token"] == flops_per_token(resolve_model(compose_for(PLAN, []).model), 1024)
    assert made["num_parameters"] == num_parameters(resolve_model(compose_for(PLAN, []).model))
    text = as_text(made)
    for word in ("Memory of a rank", "Sent by a rank", "Work of a rank", "Step", "A failure every"):
        assert word in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("format=xml", "format=xml is unknown; use text or json"),
        ("plan.gpus=0", "plan.gpus=0 must be at least 1"),
        ("plan.gpus=12", "12 GPUs are no whole number of nodes, which have hardware.gpus_per_node=8; use 8 or 16"),
        ("plan.mtbf_hours=0", "plan.mtbf_hours=0.0 must be positive"),
        ("plan.tokens=-1", "plan.tokens=-1.0 must be positive"),
        ("plan.hardware=abacus", "plan.hardware=abacus is not there; use one of h200"),
        ("parallel.tp=3", "parallel.tp=3"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(override: str, says: str) -> None:
    """A traceback, or a plan of a run that the trainer refuses."""
    with pytest.raises(ConfigError) as raised:
        planned("plan.gpus=4", override) if not override.startswith("plan.gpus") else planned(override)
    assert any(says in line for line in raised.value.problems)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("seconds", [0.5, 40.0])
def test_lost_time_is_that_of_failures_at_all_moments(asynchronous: bool, seconds: float) -> None:
    """A write beside training that counts as lost; the newest checkpoint taken to be there before it is written.
    seconds: of the copy; of the write four times as many."""
    hardware = replace(load_hardware("h200"), host_gbps=1.0, checkpoint_gbps=1.0, mtbf_gpu_hours=30.0)
    sizes = {"checkpoint_bytes": 2 * 4e9 * seconds, "rank_bytes": 1e9 * seconds}
    found = failure_cost(hardware, num_gpus=16, asynchronous=asynchronous, **sizes)
    write, held_up = 4 * seconds, seconds if asynchronous else 5 * seconds
    assert (found.checkpoint_seconds, found.held_up_seconds) == (write, held_up)

    def lost(interval: float) -> float:
        """Of a failure in each of a thousand moments of an interval: what came after the newest whole checkpoint."""
        moments = [(n + 0.5) / 1000 * interval for n in range(1000)]
        ages = [m + interval if asynchronous and m < write else m for m in moments]
        return held_up / interval + (sum(ages) / 1000 + RESTART_SECONDS) / found.mtbf_seconds

    assert found.lost_fraction == pytest.approx(lost(found.interval_seconds), rel=0.01)
    least = write if asynchronous else 0.0
    for other in (0.8, 1.25):
        if found.interval_seconds * other > least:
            assert lost(found.interval_seconds * other) > lost(found.interval_seconds)
    assert found.interval_seconds >= least


def test_failures_are_as_frequent_as_the_command_line_says() -> None:
    """plan.mtbf_hours that is read and changes nothing, or a checkpoint's way of being written."""
    common = ["+exp=llama3_8b", "plan.gpus=16", "train.global_batch_size=16"]
    changes = ([], ["plan.mtbf_hours=8"], ["checkpoint.asynchronous=false"])
    costs = [planned(*common, *more)["failure"] for more in changes]
    assert [cost["mtbf_seconds"] for cost in costs] == [50000 * 3600 / 16, 8 * 3600 / 16, 50000 * 3600 / 16]
    assert costs[0]["lost_fraction"] < min(costs[1]["lost_fraction"], costs[2]["lost_fraction"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders llama and llama_of_blocks, as of Hugging Face; what is in their tokenizers is not asked."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama_of_blocks"):
        adapter_config(folder, DataConfig(source="stdlib"), name)
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


def test_of_adapters_and_recipes_with_other_passes_state_is_planned_and_no_time(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that look exact and are not; a reference that is forgotten, or counted where it is not."""
    common = ["model=hf", f"model.path={models}/llama_of_blocks", "precision=bf16", "plan.gpus=2", "train.seq_len=64"]
    adapters = [*common, "adapter.name=lora", "adapter.quantize=nf4", "parallel.zero_stage=1"]
    made = planned(*adapters)
    (rank,) = made["ranks"]
    assert made["num_parameters"] == num_parameters(resolve_model(compose_for(PLAN, common).model))
    # 2 layers of q, k, v, o, gate, up, down of 256 to 256, 128, 128, 256, 256, 256, 256 features, rank 16.
    assert made["num_trained"] == 2 * 16 * (7 * 256 + 5 * 256 + 2 * 128)
    assert (made["fits"], made["num_beside"], rank["beside_bytes"]) == (None, 0, 0)
    assert not {"step_seconds", "mfu", "traffic_bytes_per_step"} & made.keys()
    assert any("adapter.name=lora" in line for line in made["not_planned"])

    beside = planned(*adapters, "recipe.name=dpo", f"recipe.reference_path={models}/llama")
    assert beside["num_beside"] == num_parameters(resolve_model(ModelConfig(family="hf", path=f"{models}/llama")))
    assert beside["ranks"][0]["beside_bytes"] == beside["num_beside"] * 2 / 2  # bf16, over 2 ranks
    assert beside["ranks"][0]["state_bytes"] == rank["state_bytes"] + beside["ranks"][0]["beside_bytes"]
    on_host = planned(*adapters, "recipe.name=kto", "recipe.reference_offload=true")
    assert on_host["ranks"][0]["beside_bytes"] > 0
    assert on_host["ranks"][0]["state_bytes"] == rank["state_bytes"]
    assert planned(*adapters, "recipe.name=dpo", "recipe.loss=simpo")["num_beside"] == 0
    reward = planned(*common, "recipe.name=reward", "model.score=true")
    assert reward["num_parameters"] == made["num_parameters"] - (300 - 1) * 256

    plan([*adapters, "recipe.name=distill", f"recipe.teacher_path={models}/llama"])
    text = capsys.readouterr().out
    for word in ("State of a rank, GiB (exact)", "Beside it, on the devices", "Not planned:", "recipe.name=distill"):
        assert word in text
    small = planned(*common, "adapter.name=lora", "model.activation_checkpoint=full", f"plan.hardware={_tiny(models)}")
    assert small["fits"] is False


def _tiny(folder: Path) -> Path:
    """Hardware without memory to speak of."""
    h200 = (Path(CONFIG_DIR) / "hardware" / "h200.yaml").read_text()
    path = folder / "tiny.yaml"
    path.write_text(re.sub(r"(?m)^memory_gib:.*$", "memory_gib: 2.0", h200))
    return path


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["recipe.name=grpo"], "recipe.name=grpo is not planned for"),
        (["recipe.name=distill"], "recipe.teacher_path is missing"),
        (["recipe.name=distill", "recipe.on_policy=0.5"], "recipe.on_policy=0.5 is not planned for"),
        (["adapter.name=lora", "adapter.init=pissa"], "adapter.init=pissa is not planned for"),
        (["recipe.name=dpo", "recipe.reference_path=/nowhere"], "recipe.reference_path=/nowhere"),
        (["recipe.name=reward"], "model.score=false with recipe.name=reward"),
        (["model.score=true"], "model.score=true with recipe.name=pretrain"),
        (["recipe.name=kto", "plan.search=true", "plan.gpus=2"], "plan.search=true needs more than bytes of state"),
        (["recipe.name=kto", "plan.picture=/tmp/x.png"], "plan.picture=/tmp/x.png needs more than bytes of state"),
        (["adapter.name=lora"], "set model.path=DIR"),
        (["recipe.name=dpo", "recipe.reference=adapter"], "recipe.reference=adapter is the policy with its adapters"),
        (["recipe.name=kto", "recipe.reference=nobody"], "recipe.reference=nobody is unknown"),
        (["recipe.name=reward", "model.score=true", "adapter.name=lora"], "adapter.name=lora with model.score=true"),
    ],
)
def test_what_has_no_plan_is_refused_with_its_reason(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        planned(*overrides)
    assert any(says in line for line in raised.value.problems)


def test_hardware_that_lacks_a_rate_is_refused(tmp_path: Path) -> None:
    """A rate of 0 becomes an infinite time, far from its cause."""
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmemory_gib: 80.0\n")
    with pytest.raises(ConfigError, match=r"hardware\.peak_tflops=0\.0 must be positive"):
        load_hardware(str(path))
