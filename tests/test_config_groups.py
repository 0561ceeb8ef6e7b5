"""Every YAML of the small groups fits its dataclass, and says what the code does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from models.adapter_config import AdapterConfig
from parallel.dims import ParallelConfig, ParallelDims
from parallel.precision import DTYPES, PrecisionConfig
from trainer.config import CheckpointConfig, LoggingConfig, ResilienceConfig
from trainer.metrics import MetricLogger

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = {
    "precision": PrecisionConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "resilience": ResilienceConfig,
    "adapter": AdapterConfig,
}
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]


def load(group: str, name: str) -> object:
    merged = OmegaConf.merge(OmegaConf.structured(GROUPS[group]), OmegaConf.load(CONFIGS / group / f"{name}.yaml"))
    return OmegaConf.to_object(merged)


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_of_a_group_loads_into_its_dataclass(group: str, name: str) -> None:
    """Catches a field renamed in the dataclass but not in the YAML, and a value of the wrong type."""
    assert isinstance(load(group, name), GROUPS[group])


def test_a_field_the_dataclass_lacks_is_refused() -> None:
    """Negative control: the test above would pass on anything if merging accepted unknown keys."""
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(OmegaConf.structured(LoggingConfig), OmegaConf.create({"intervall": 1}))


@pytest.mark.parametrize("group", ["checkpoint", "logging", "resilience"])
def test_the_default_file_states_every_default_of_the_code(group: str) -> None:
    """Catches a default that is one thing in the YAML people read and another in the code."""
    written = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / "default.yaml"))
    assert written == asdict(GROUPS[group]())


def test_there_is_a_precision_file_for_every_compute_dtype_named_after_it() -> None:
    """Catches precision=bf16 that computes in something else."""
    found = {name: load("precision", name).compute for group, name in FILES if group == "precision"}  # type: ignore[attr-defined]
    assert found == {dtype: dtype for dtype in DTYPES}


@pytest.mark.parametrize(
    ("name", "stage", "replicate", "shard"),
    [("ddp", 0, 1, 8), ("zero1", 1, 1, 8), ("zero2", 2, 1, 8), ("zero3", 3, 1, 8), ("hsdp", 3, 2, 4)],
)
def test_a_parallel_file_gives_the_layout_of_its_name_on_eight_processes(
    name: str, stage: int, replicate: int, shard: int
) -> None:
    """Catches parallel=zero1 with another stage, and hsdp that is plain ZeRO-3."""
    config = load("parallel", name)
    assert isinstance(config, ParallelConfig)
    dims = ParallelDims.resolve(config, 8)
    assert (config.zero_stage, dims.dp_replicate, dims.dp_shard) == (stage, replicate, shard)


def test_the_logging_files_switch_on_what_they_are_named_after(tmp_path: Path) -> None:
    """Catches logging=wandb that logs to nowhere, or that MetricLogger refuses."""
    wandb, tensorboard = load("logging", "wandb"), load("logging", "tensorboard")
    assert (wandb.wandb, wandb.tensorboard) == (True, False)  # type: ignore[attr-defined]
    assert (tensorboard.wandb, tensorboard.tensorboard) == (False, True)  # type: ignore[attr-defined]
    for config in (wandb, tensorboard):
        MetricLogger(tmp_path, config, is_main=False, total_steps=1, run_name="x", config_dict={})  # type: ignore[arg-type]
