"""What is wrong with a configuration is said at once, before there is a process group, a device or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data.config import DataConfig
from tests.parity.harness import tiny_config
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize

CORPUS = DataConfig(source="stdlib", num_workers=0)


def found(world_size: int = 4, **changes: Any) -> list[str]:
    """The problems of a good configuration with these changes."""
    config = tiny_config(Path("runs/never"), CORPUS, **changes)
    try:
        finalize(config, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return []


def test_a_good_configuration_has_no_problem_and_gets_its_sizes() -> None:
    """Negative control for all that follows."""
    config = finalize(tiny_config(Path("runs/never"), CORPUS), world_size=4)
    assert config.model.head_dim == 6
    assert isinstance(config, TrainConfig)


PURE_BF16: dict[str, Any] = {"precision__compute": "bf16", "precision__reduce": "bf16", "precision__master": "bf16"}

# Changes, and what the line must say.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"train__steps": 0, "schedule__warmup_steps": 0}, "train.steps=0 must be at least 1"),
    ({"train__seed": -1}, "train.seed=-1 must be at least 0"),
    ({"train__grad_clip": float("nan")}, "train.grad_clip=nan must be at least 0"),
    ({"train__grad_clip": float("inf")}, "train.grad_clip=inf must be at least 0"),
    ({"train__timeout_seconds": float("nan")}, "train.timeout_seconds=nan must be positive"),
    ({"train__device": "gpu"}, "train.device=gpu is unknown; use train.device=auto, cpu or"),
    ({"train__nonfinite": "ignore"}, "train.nonfinite=ignore is unknown; use train.nonfinite=skip or"),
    ({"train__compile": True, "train__compile_backend": "fast"}, "train.compile_backend=fast is not a torch.compile"),
    ({"train__global_batch_size": 10}, "data-parallel ranks; use train.global_batch_size=4, 8, 12 or 16"),
    ({"train__global_batch_size": 3}, "data-parallel ranks; use train.global_batch_size=4, 8, 12 or 16"),
    ({"train__seq_len": 100, "model__dropout": 0.1}, "train.seq_len=100 is above model.max_seq_len=64"),
    ({"train__eval_interval": 5, "data__validation_fraction": 0.0}, "data.validation_fraction=0 has nothing to"),
    (
        {"parallel__dp_replicate": 3},
        "does not divide the 4 processes; use parallel.dp_replicate=1, 2 or 4",
    ),
    ({"parallel__zero_stage": 4}, "parallel.zero_stage=4 is not a ZeRO stage; use parallel.zero_stage=0, 1, 2 or 3"),
    (
        {"parallel__cpu_offload": True, "parallel__zero_stage": 2},
        "parallel.cpu_offload=true does not work with parallel.zero_stage=2, which keeps whole parameters on the "
        "device; use parallel.zero_stage=3, or parallel.cpu_offload=false",
    ),
    ({"model__num_heads": 5}, "model.num_heads=5 does not divide model.hidden_size=36"),
    ({"model__activation_checkpoint": "some"}, "model.activation_checkpoint=some is unknown"),
    ({"model__family": "hf", "model__path": "/nowhere"}, "model.path=/nowhere does not exist"),
    ({"precision__compute": "fp4"}, "precision.compute=fp4 is not a precision; use fp32, bf16, fp16, fp8"),
    ({"precision__fp8_recipe": "block"}, "precision.fp8_recipe=block is unknown; use tensorwise_dynamic, tensorwise"),
    ({"precision__fp8_gradient": "e3m4"}, "precision.fp8_gradient=e3m4 is unknown; use e5m2 or e4m3"),
    ({"precision__fp8_amax_history": 0}, "precision.fp8_amax_history=0 must be 1 to 4096; use 1"),
    ({"precision__master": "bf16"}, "precision.master=bf16 must be fp32 or that of precision.compute"),
    (
        {"precision__compute": "bf16", "precision__master": "bf16", "parallel__zero_stage": 3},
        "precision.reduce=fp32 with precision.master=bf16 and parallel.zero_stage=3: fully_shard adds the gradients",
    ),
    (PURE_BF16 | {"optim__name": "muon"}, "precision.master=bf16 is for optim.name=adamw: muon rounds to nearest"),
    (PURE_BF16 | {"optim__kernel": "torch"}, "precision.master=bf16 is rounded stochastically, and optim.kernel=torch"),
    (
        PURE_BF16 | {"parallel__zero_stage": 3, "parallel__cpu_offload": True},
        "updates weights in host memory, where the kernel that precision.master=bf16 needs does not run",
    ),
    (
        {"optim__kernel": "triton", "parallel__zero_stage": 3, "parallel__cpu_offload": True},
        "updates weights in host memory, where the kernel that optim.kernel=triton needs does not run",
    ),
    ({"train__loss_kernel": "cuda"}, "train.loss_kernel=cuda is unknown; use train.loss_kernel=auto, torch or triton"),
    (
        {"train__loss_kernel": "triton", "train__batch_invariant": True},
        "train.loss_kernel=triton does not work with train.batch_invariant=true: losses that do not depend on the",
    ),
    ({"optim__kernel": "cuda"}, "optim.kernel=cuda is unknown; use optim.kernel=auto, torch or triton"),
    ({"optim__state_dtype": "fp8"}, "optim.state_dtype=fp8 is unknown; use optim.state_dtype=fp32 or"),
    ({"optim__state_dtype": "bf16", "optim__name": "muon"}, "optim.state_dtype=bf16 is for optim.name=adamw"),
    ({"optim__state_dtype": "bf16", "optim__kernel": "torch"}, "optim.state_dtype=bf16 is not in optim.kernel=torch"),
    ({"optim__state_dtype": "bf16", "optim__beta2": 0.999}, "optim.state_dtype=bf16 with optim.beta2=0.999: a moment"),
    (
        {"optim__state_dtype": "int8"},
        "model.hidden_size=36, the length of most, is no multiple; use model.hidden_size=768",
    ),
    ({"optim__lr": float("nan")}, "optim.lr=nan must be a number of at least 0"),
    ({"optim__name": "sgd"}, "optim.name=sgd is not an optimizer; use optim.name=adamw or muon"),
    ({"schedule__name": "step"}, "schedule.name=step"),
    ({"schedule__warmup_steps": -1}, "schedule.warmup_steps=-1"),
    ({"parallel__cp_method": "ulysses"}, "parallel.cp_method=ulysses has no effect with parallel.cp=1; use"),
    ({"optim__momentum": 0.9}, "optim.momentum=0.9 has no effect with optim.name=adamw; use optim.momentum=0.95"),
    ({"precision__fp8_skip": ["head"]}, "precision.fp8_skip=[head] has no effect with precision.compute=fp32; use"),
    ({"model__activation_checkpoint_save": ["aten.mm"]}, "has no effect with model.activation_checkpoint=none; use"),
    (
        {"model__attention": "flex", "model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
        "model.activation_checkpoint=budget cannot measure model.attention=flex, which is no single operation; use",
    ),
    (
        {"model__activation_checkpoint": "budget", "model__activation_memory_gib": 1e-6},
        "model.activation_memory_gib=1e-06 is less than the inputs of the blocks of a rank",
    ),
    ({"checkpoint__interval": -1}, "checkpoint.interval=-1 must be at least 0"),
    ({"checkpoint__resume": "/nowhere/step_5"}, "checkpoint.resume=/nowhere/step_5 does not exist; use auto, never"),
    ({"resilience__check_interval": -1}, "resilience.check_interval=-1 must be at least 0"),
    ({"resilience__straggler_share": 0.0}, "resilience.straggler_share=0.0 must be positive and finite; 0.1 is usual"),
    (
        {"resilience__peer_interval": 1, "resilience__peer_dir": "/nowhere"},
        "resilience.peer_dir=/nowhere is no folder of this host; use /dev/shm",
    ),
    ({"logging__interval": 0}, "logging.interval=0 must be at least 1"),
    ({"logging__wandb_mode": "on"}, "logging.wandb_mode=on is unknown; use logging.wandb_mode=offline or online"),
    ({"logging__peak_tflops": 0.0}, "logging.peak_tflops=0.0 must be positive"),
    ({"data__source": "parquet"}, "data.source=parquet is unknown"),
    ({"data__num_workers": -1}, "data.num_workers=-1 must be at least 0"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_a_wrong_value_is_one_line_with_field_value_and_fix(changes: dict[str, Any], says: str) -> None:
    """A value that is found out after minutes, by a traceback, or never (a NaN passes every "less than")."""
    (line,) = found(**changes)
    assert says in line
    assert "\n" not in line


def test_every_problem_is_named_at_once_whatever_part_it_is_in() -> None:
    """Fixing a configuration one launch at a time; a problem that hides another one."""
    changes: dict[str, Any] = {}
    for change, _ in WRONG:
        # hf and an unknown source keep the rest of their group from being looked at.
        if not {"model__family", "data__source", "train__compile"} & change.keys():
            changes |= {k: v for k, v in change.items() if k not in changes}
    lines = found(**changes)
    groups = {line.partition(".")[0] for line in lines}
    assert groups >= {"train", "parallel", "model", "precision", "optim", "schedule", "checkpoint", "logging", "data"}
    assert len(lines) == len(set(lines)) >= 20


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__pp": 8},
        {"parallel__pp": 2, "parallel__pp_split": [3, 5]},
        {"parallel__ep": 2},
        {"optim__state_dtype": "int8"},
        {"adapter__name": "lora", "adapter__quantize": "nf4"},
    ],
)
def test_nothing_is_said_about_a_shape_that_nobody_has_read(changes: dict[str, Any]) -> None:
    """A mistyped model.path that is followed by refusals, with values to use, about the default shape; a traceback."""
    (line,) = found(8, model__path="/nowhere", **changes)
    assert line.startswith("model.path=/nowhere does not exist")
    (line,) = found(8, model__path="/nowhere", model__dropout=2.0, **changes)
    assert line.startswith("model.dropout=2.0")


def test_text_cannot_be_sampled_from_a_token_array_without_its_tokenizer(tmp_path: Path) -> None:
    """A sample that is asked for and silently left out."""
    (tmp_path / "tokens.npy").write_bytes(b"")
    tokens: dict[str, Any] = {"data__source": "tokens", "data__path": str(tmp_path / "tokens.npy")}
    (line,) = found(train__sample_tokens=5, **tokens)
    assert line.startswith("train.sample_tokens=5 needs data.tokenizer.path")
    assert found(**tokens) == []


def test_checking_starts_no_process_group_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that only works on the cluster, or leaves a run directory behind."""
    monkeypatch.chdir(tmp_path)
    assert found() == []
    assert found(train__steps=0)
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []
