"""AdamW by kernels/adamw in the trainer: moments in 32, 16 and 8 bits, bf16 weights, on every layout alike."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import trainer.adamw_kernel as adamw_kernel
from data.config import DataConfig
from kernels.adamw.quantized import dequantize
from kernels.backend import interpreted
from parallel.regions import local_region
from tests.parity.harness import Outcome, changed, run_on, text_corpus, tiny_config, whole
from tests.parity.interrupted import run_part_on
from tests.pool import RankPool
from tests.trainer.optimized import bits, largest_difference
from trainer.config import ConfigError, OptimConfig, TrainConfig
from trainer.gradients import local_shard_of
from trainer.identity import check_same_moments
from trainer.optim import (
    Optimizer,
    build_optimizer,
    choose_kernel,
    choose_norm_kernel,
    decay_of,
    global_grad_norm,
)
from trainer.trainer import Trainer
from trainer.validate import finalize

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (11, 256),
    "blocks.0.up.weight": (14, 512),
    "blocks.0.down.weight": (6, 1024),
    "blocks.0.experts.weight": (4, 6, 256),
    "blocks.0.norm.weight": (256,),
    "blocks.0.odd.weight": (9, 7),
    "blocks.0.scarce.weight": (1, 256),  # fewer rows than ranks: empty shards
}
"""Rows of whole blocks and others."""

BY_KERNEL = [
    (torch.float32, OptimConfig(kernel="triton")),
    (torch.float32, OptimConfig(state_dtype="bf16")),
    (torch.float32, OptimConfig(state_dtype="int8")),
    (torch.bfloat16, OptimConfig()),
    (torch.bfloat16, OptimConfig(state_dtype="int8")),
]
"""Dtype of the weights, and settings that torch's fused kernel does not do, or not here."""


@dataclass
class Case:
    """Steps with random gradients, NaN where a step is skipped."""

    config: OptimConfig
    dtype: torch.dtype = torch.float32
    num_steps: int = 5
    skipped: Sequence[int] = ()
    lr: float = 0.01
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))
    seed: int = 3

    def tensors(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        # Gradients of one tensor differ by orders of magnitude.
        made = {n: torch.randn(s, generator=generator) for n, s in self.shapes.items()}
        return {
            n: (t * 10 ** (2 * torch.rand(t.shape, generator=generator) - 2)).to(self.dtype) for n, t in made.items()
        }

    def gradients(self, step: int) -> dict[str, Tensor]:
        made = self.tensors(100 + step)
        return {n: torch.full_like(t, torch.nan) for n, t in made.items()} if step in self.skipped else made


Layout = tuple[tuple[int, ...], dict[int, list[Placement]]]
"""Shape of the mesh, placements of parameters by their number of dims."""


def place(t: Tensor, layout: Layout | None) -> Tensor:
    """t in a layout: its own part on every rank."""
    if layout is None:
        return t.clone()
    mesh, placements = mesh_of(layout[0]), layout[1][t.ndim]
    empty = DTensor.from_local(
        torch.empty(0), mesh, placements, run_check=False, shape=t.shape, stride=t.stride()
    )  # knows its region
    local = t[local_region(empty)].clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=t.shape, stride=t.stride())


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """One of each shape in a process: its groups have threads."""
    return init_device_mesh("cpu", shape)


def stepped(case: Case, layout: Layout | None = None, steps: Sequence[int] | None = None) -> Optimizer:
    """The optimizer after the case's steps."""
    parameters = {name: place(t, layout) for name, t in case.tensors(1).items()}
    optimizer = build_optimizer(parameters, case.config, seed=case.seed)
    take(optimizer, case, range(1, case.num_steps + 1) if steps is None else steps, layout)
    return optimizer


def take(optimizer: Optimizer, case: Case, steps: Sequence[int], layout: Layout | None = None) -> None:
    for step in steps:
        for name, gradient in case.gradients(step).items():
            optimizer.parameters[name].grad = place(gradient, layout)
        skip = torch.tensor(float(step in case.skipped))
        optimizer.step(lr=case.lr, grad_scale=torch.tensor(0.5), skip=skip)


def everything(optimizer: Optimizer) -> dict[str, Tensor]:
    """Whole parameters and state. Collective."""
    return {name: whole(t) for name, t in (optimizer.parameters | optimizer.state_tensors()).items()}


def by_torch(case: Case) -> dict[str, Tensor]:
    """Parameters and moments of torch.optim.AdamW in fp64 from the same numbers."""
    weights = {name: t.double().requires_grad_() for name, t in case.tensors(1).items()}
    groups = [{"params": [p], "weight_decay": decay_of(name, p, case.config)} for name, p in weights.items()]
    betas = (case.config.beta1, case.config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=case.lr, betas=betas, eps=case.config.eps)
    for step in range(1, case.num_steps + 1):
        if step not in case.skipped:
            for name, gradient in case.gradients(step).items():
                weights[name].grad = gradient.double() * 0.5
            optimizer.step()
    moments = {f"{k}/{n}": optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq") for n, p in weights.items()}
    return {name: p.detach() for name, p in weights.items()} | moments


def step_error(case: Case) -> float:
    """Largest error of a tensor's whole change, relative to that change (norms), against torch."""
    ours, truth, before = everything(stepped(case)), by_torch(case), case.tensors(1)
    return max(((ours[n].double() - truth[n]).norm() / (truth[n] - before[n].double()).norm()).item() for n in before)


@pytest.mark.parametrize("skipped", [(), (1, 4)])
@pytest.mark.parametrize("path", ["reference", pytest.param("interpreter", marks=pytest.mark.interpreter)])
def test_in_fp32_it_is_adamw_of_torch(path: str, skipped: tuple[int, ...]) -> None:
    """The wrong weight decay for a name, a skipped step that counts, clipping that divides."""
    case = Case(OptimConfig(kernel="triton"), skipped=skipped)
    with interpreted() if path == "interpreter" else nullcontext():
        result = everything(stepped(case))
    truth = by_torch(case)
    assert largest_difference({name: result[name] for name in truth}, truth) < 3e-6
    assert result["step"] == case.num_steps - len(skipped)
    other = by_torch(Case(OptimConfig(beta2=0.951), skipped=skipped))  # control
    assert largest_difference({name: result[name] for name in truth}, other) > 1e-3


@pytest.mark.parametrize(("settings", "tolerance"), [({"state_dtype": "bf16"}, 0.01), ({"state_dtype": "int8"}, 0.05)])
def test_narrow_moments_move_weights_as_wide_ones_do(settings: dict[str, str], tolerance: float) -> None:
    """A scale of another block, a second moment that becomes zero: steps of the wrong size."""
    assert step_error(Case(OptimConfig(**settings), num_steps=10)) < tolerance  # type: ignore[arg-type]
    with mock.patch.object(adamw_kernel.KernelAdamW, "_prepared", _forgetful):  # control: moments lost in every step
        assert step_error(Case(OptimConfig(**settings), num_steps=10)) > 4 * tolerance  # type: ignore[arg-type]


_prepared = adamw_kernel.KernelAdamW._prepared


def _forgetful(rule: adamw_kernel.KernelAdamW) -> Any:
    for state in rule.state().values():
        state.zero_()
    return _prepared(rule)


@pytest.mark.interpreter
def test_the_kernel_in_the_interpreter_and_its_reference_keep_the_same_8_bit_state() -> None:
    """CI would test the reference alone, and the GPU would run something else."""
    case = Case(OptimConfig(state_dtype="int8"), num_steps=3)
    with interpreted():
        kernel = everything(stepped(case))
    reference = everything(stepped(case))
    for name, expected in reference.items():
        if expected.dtype in (torch.int8, torch.uint8):
            assert (kernel[name].int() != expected.int()).float().mean() < 0.01, name  # ties, and what they lead to
        else:
            torch.testing.assert_close(kernel[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_updates_of_bf16_weights_are_not_lost() -> None:
    """A step of 1/1000 of a weight, which rounding to nearest undoes every time."""
    shapes = {"w.weight": (64, 256)}
    case = Case(OptimConfig(weight_decay=0.0), torch.bfloat16, num_steps=8, lr=5e-4, shapes=shapes)
    weight = torch.ones(shapes["w.weight"], dtype=torch.bfloat16)
    gradient = torch.ones_like(weight)
    optimizer = build_optimizer({"w.weight": weight}, case.config, seed=1)
    for _ in range(case.num_steps):
        weight.grad = gradient
        optimizer.step(lr=case.lr, grad_scale=torch.tensor(1.0), skip=torch.tensor(0.0))
    moved = 1 - weight.double().mean().item()
    assert moved == pytest.approx(case.num_steps * case.lr, rel=0.05)  # 2^-8 sqrt(p (1 - p) / 16384) = 3e-5 is 0.7 %
    nearest = torch.nn.Parameter(torch.ones_like(weight))  # control
    by_nearest = torch.optim.AdamW([nearest], lr=case.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(case.num_steps):
        nearest.grad = gradient
        by_nearest.step()
    assert torch.equal(nearest.detach(), torch.ones_like(nearest))


@pytest.mark.parametrize(("dtype", "config"), BY_KERNEL)
def test_a_skipped_step_changes_no_bit_and_no_random_number(dtype: torch.dtype, config: OptimConfig) -> None:
    """fp16: the loss scale finds its size by steps that must not have been."""
    case = Case(config, dtype, skipped=(4,))
    optimizer = stepped(case, steps=[1, 2, 3])
    before = bits(optimizer.parameters | optimizer.state_tensors())
    take(optimizer, case, [4])
    assert bits(optimizer.parameters | optimizer.state_tensors()) == before
    take(optimizer, case, [5])
    assert bits(everything(optimizer)) == bits(everything(stepped(case, steps=[1, 2, 3, 5])))
    assert bits(everything(optimizer)) != before


@pytest.mark.parametrize(("dtype", "config"), BY_KERNEL)
def test_state_copied_into_a_fresh_optimizer_continues_bit_for_bit(dtype: torch.dtype, config: OptimConfig) -> None:
    """State outside state_tensors(), or that a step replaces, would be lost by a checkpoint."""
    case = Case(config, dtype)
    optimizer = stepped(case, steps=[1, 2, 3])
    fresh = build_optimizer({n: p.clone() for n, p in optimizer.parameters.items()}, config, seed=case.seed)
    kept = fresh.state_tensors()
    for name, t in optimizer.state_tensors().items():
        kept[name].copy_(t)
    for each in (optimizer, fresh):
        take(each, case, [4, 5])
    assert bits(everything(fresh)) == bits(everything(optimizer))
    assert bits(kept) == bits(optimizer.state_tensors())


def test_parameters_that_move_in_memory_are_still_updated() -> None:
    """fully_shard gives padded shards other memory when a model first runs."""
    case = Case(OptimConfig(kernel="triton"))
    optimizer = stepped(case, steps=[1, 2])
    for parameter in optimizer.parameters.values():
        parameter.data = parameter.data.clone()
    take(optimizer, case, [3, 4, 5])
    assert bits(everything(optimizer)) == bits(everything(stepped(case)))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "config"), BY_KERNEL)
def test_on_a_gpu_the_kernel_keeps_the_state_of_its_reference(dtype: torch.dtype, config: OptimConfig) -> None:
    """Scalars on the wrong device, shards that the kernel walks otherwise than the state is laid out."""
    case = Case(config, dtype, num_steps=3, skipped=(2,))
    optimizer = build_optimizer({n: t.cuda() for n, t in case.tensors(1).items()}, config, seed=case.seed)
    for step in range(1, case.num_steps + 1):
        for name, gradient in case.gradients(step).items():
            optimizer.parameters[name].grad = gradient.cuda()
        skip = torch.tensor(float(step in case.skipped), device="cuda")
        optimizer.step(lr=case.lr, grad_scale=torch.tensor(0.5, device="cuda"), skip=skip)
    result = everything(optimizer)
    for name, expected in everything(stepped(case)).items():
        if expected.dtype == torch.float32:
            torch.testing.assert_close(result[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        else:  # codes and bf16: neighbours where fp32 arithmetic rounds otherwise
            assert (result[name] != expected).float().mean() < 0.01, name


# ---- layouts

LAYOUTS: list[Layout] = [
    ((2,), {n: [Shard(0)] for n in (1, 2, 3)}),
    ((4,), {n: [Shard(0)] for n in (1, 2, 3)}),
    ((2, 2), {n: [Replicate(), Shard(0)] for n in (1, 2, 3)}),  # HSDP
    # Data parallelism inside tensor parallelism: rows of rows; with experts: some of them, and rows of each matrix.
    ((2, 2), {1: [_StridedShard(0, split_factor=2), Shard(0)], 2: [_StridedShard(0, split_factor=2), Shard(0)],
              3: [Shard(1), Shard(0)]}),
    ((2, 2), {1: [Shard(0), Replicate()], 2: [Shard(0), Replicate()], 3: [_StridedShard(1, split_factor=2), Shard(1)]}),
]  # fmt: skip
BY_COLUMNS: Layout = ((2, 2), {1: [Shard(0), Replicate()], 2: [Shard(0), Shard(1)], 3: [Shard(0), Shard(1)]})
WIDE = {name: shape for name, shape in SHAPES.items() if len(shape) != 2 or shape[1] in (512, 1024, 7)}


def outcomes(cases: list[Case], layout: Layout) -> list[dict[str, bytes]]:
    """Bits of everything after each case, in a layout."""
    return [bits(everything(stepped(case, layout))) for case in cases]


@pytest.mark.some(3)
@pytest.mark.parametrize("layout", [*LAYOUTS, BY_COLUMNS], ids=range(len(LAYOUTS) + 1))
def test_no_bit_depends_on_how_parameters_are_cut(ranks: RankPool, layout: Layout) -> None:
    """Random bits by the place in a shard; blocks counted from a shard's first element; an empty shard that fails."""
    shapes = WIDE if layout is BY_COLUMNS else SHAPES
    cases = [Case(config, dtype, num_steps=3, skipped=(2,), shapes=shapes) for dtype, config in BY_KERNEL]
    alone = [bits(everything(stepped(case))) for case in cases]
    for results in ranks.run(torch.Size(layout[0]).numel(), outcomes, cases, layout):
        for case, result, expected in zip(cases, results, alone, strict=True):
            assert [n for n in expected if result[n] != expected[n]] == [], case.config


def _misplaced(cases: list[Case], layout: Layout) -> list[dict[str, bytes]]:
    """Every shard rounds as if it were the first."""
    with mock.patch.object(adamw_kernel, "local_region", lambda t: tuple(slice(0, n) for n in t.to_local().shape)):
        return outcomes(cases, layout)


def test_the_comparison_notices_shards_that_round_alike(ranks: RankPool) -> None:
    """Control: random bits by the place in a shard."""
    cases = [Case(OptimConfig(), torch.bfloat16)]
    alone = bits(everything(stepped(cases[0])))
    (result,) = ranks.run(2, _misplaced, cases, LAYOUTS[0])[0]
    assert result["embedding.weight"] != alone["embedding.weight"]
    assert (
        bits(everything(stepped(Case(OptimConfig(), torch.bfloat16, seed=4))))["embedding.weight"]
        != (alone["embedding.weight"])
    )


def _cut_blocks() -> str:
    with pytest.raises(ConfigError) as error:
        stepped(Case(OptimConfig(state_dtype="int8")), BY_COLUMNS)
    return str(error.value)


def test_a_layout_that_cuts_blocks_is_refused_by_all_ranks(ranks: RankPool) -> None:
    """Scales of half blocks: another quantization on every layout."""
    (message,) = set(ranks.run(4, _cut_blocks))
    assert "cuts the 256 columns of embedding.weight into pieces of 128" in message


def test_codes_and_scales_are_those_of_rows() -> None:
    """A scale that belongs to another block than its place in the state says."""
    optimizer = stepped(Case(OptimConfig(state_dtype="int8"), num_steps=1))
    state = optimizer.state_tensors()
    gradient = Case(OptimConfig()).gradients(1)["blocks.0.up.weight"] * 0.5
    codes, scales = (state[f"exp_avg{kind}/blocks.0.up.weight"] for kind in ("", "_scales"))
    assert scales.shape == (14, 2)
    torch.testing.assert_close(scales, 0.1 * gradient.abs().unflatten(1, (2, 256)).amax(2))
    values = dequantize(codes.flatten(), scales.flatten()).view_as(gradient)
    # A decade has at least 1 / 64 of it between codes, seven of them below the largest of a block.
    assert ((values - 0.1 * gradient).abs() <= 0.1 * gradient.abs().amax() / 64).all()
    assert state["exp_avg/blocks.0.norm.weight"].dtype == state["exp_avg/blocks.0.odd.weight"].dtype == torch.float32


def test_the_gradient_norm_by_the_kernel_is_that_of_torch() -> None:
    """kernels/global_norm over gradients of several dtypes."""
    parameters = {n: t.requires_grad_() for n, t in Case(OptimConfig()).tensors(1).items()}
    for parameter in parameters.values():
        parameter.grad = parameter.detach() * 2
    norms = [global_grad_norm(parameters.values(), kernel=kernel) for kernel in ("torch", "triton")]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


# ---- the whole trainer

BLOCKS: dict[str, Any] = {
    "train__steps": 4,
    "train__seq_len": 8,
    "train__global_batch_size": 4,
    "train__grad_clip": 0.0,  # a coefficient would carry the rounding of a sum over ranks
    "model__hidden_size": 256,
    "model__intermediate_size": 512,
    "model__num_layers": 2,
    "model__num_heads": 4,
    "model__num_kv_heads": 2,
    "model__head_dim": 128,
    "parallel__bucket_mb": 1.0,
}
PURE_BF16: dict[str, Any] = {
    "precision__compute": "bf16",
    "precision__master": "bf16",
    "precision__reduce": "bf16",
    "optim__state_dtype": "int8",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("adamw"))


@pytest.fixture(scope="module")
def stage_0(
    ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Outcome]:
    config = tiny_config(tmp_path_factory.mktemp("zero0") / "run", corpus, **BLOCKS, **PURE_BF16)
    config.train.micro_batch_size = 2
    return config, run_on(ranks, 2, config)


@pytest.mark.some(1)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_train_pure_bf16_with_8_bit_moments_to_the_same_bits(
    ranks: RankPool, stage_0: tuple[TrainConfig, Outcome], tmp_path: Path, stage: int
) -> None:
    """Sums of two are the same in any order, so nothing may differ: names, places and steps of the random bits."""
    config, expected = stage_0
    outcome = run_on(ranks, 2, changed(config, tmp_path / "run", parallel__zero_stage=stage))
    assert outcome.losses == expected.losses
    assert [n for n, w in expected.weights.items() if not torch.equal(outcome.weights[n], w)] == []
    assert expected.losses[-1] < expected.losses[0] - 0.3
    kernels = json.loads((tmp_path / "run" / "run.json").read_text())["kernels"]
    assert kernels["optimizer"] == (
        "adamw (reference of the triton kernel, auto: not in torch, int8 moments of 99.9% of the weights, fp32 of the "
        "others, stochastic rounding)"
    )
    assert kernels["gradient_norm"] == "torch, auto: on cpu"


def _written(config: TrainConfig) -> tuple[int, int, list[str]]:
    """Of a step: copies that the update wrote, all masters, and what was not its master rounded before anything else
    could have copied it, or is not once it is published."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    parallel, wrong = trainer.state.data_parallel, []
    publish = parallel.publish

    def watched(names: Collection[str], *, written: Collection[str]) -> None:
        for name in set(names) & set(written):
            copy = parallel.copies[name]
            if not torch.equal(copy, local_shard_of(parallel.masters[name]).to(copy.dtype)):
                wrong.append(name)
        num_written.append(len(set(names) & set(written)))
        publish(names, written=written)

    num_written: list[int] = []
    try:
        parallel.publish = watched  # type: ignore[method-assign, assignment]
        trainer._launch_step()
        values = dict(trainer.state.model.named_parameters())
        for name, master in parallel.masters.items():
            if not torch.equal(values[name], whole(master).to(values[name].dtype)):
                wrong.append(name)
        assert len(num_written) == (1 if config.parallel.zero_stage == 0 else 2)  # what is needed first, and the rest
        return sum(num_written), len(values), wrong
    finally:
        trainer.close()


@pytest.mark.parametrize(("stage", "size"), [(0, 255), (1, 256), (1, 255), (2, 255)])
def test_the_update_writes_what_the_model_computes_with(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, stage: int, size: int
) -> None:
    """Copies that are written a second time, or not at all, or into a neighbour's rows; rows that do not divide."""
    changes = BLOCKS | {"precision__compute": "bf16", "optim__kernel": "triton", "model__hidden_size": size}
    changes |= {"train__micro_batch_size": 1, "parallel__zero_stage": stage}
    for written, masters, wrong in ranks.run(2, _written, tiny_config(tmp_path, corpus, **changes)):
        assert wrong == []
        # What has hidden_size rows: two projections and two norms of two layers, and the last norm.
        uneven = 0 if stage == 0 or size % 2 == 0 else 2 * 4 + 1
        assert written == masters - uneven


def test_auto_is_the_kernel_where_it_was_measured_to_be_faster() -> None:
    """A GPU that trains by torch's update, or a CPU that trains by the kernels' slow reference."""
    auto, cpu, cuda = OptimConfig(), torch.device("cpu"), torch.device("cuda")
    for device, expected in ((cpu, "torch"), (cuda, "triton")):
        assert choose_kernel(auto, stochastic=False, device=device) == expected
        assert choose_norm_kernel(auto, device) == expected
        assert choose_kernel(auto, stochastic=True, device=device) == "triton"
        assert choose_kernel(OptimConfig(state_dtype="int8"), stochastic=False, device=device) == "triton"
        asked = OptimConfig(kernel="torch")
        assert choose_kernel(asked, stochastic=False, device=device) == choose_norm_kernel(asked, device) == "torch"


def test_the_trainer_by_the_kernels_is_the_trainer_by_torch(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """A clipping coefficient, a shard or a norm that only one of the two gets right."""
    config = tiny_config(tmp_path / "torch", corpus, train__steps=5, parallel__zero_stage=3)
    expected = run_on(ranks, 2, config)
    outcome = run_on(ranks, 2, changed(config, tmp_path / "triton", optim__kernel="triton"))
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-6)
    assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    kernels = json.loads((tmp_path / "triton" / "run.json").read_text())["kernels"]
    assert kernels["optimizer"] == "adamw (reference of the triton kernel)"
    assert kernels["gradient_norm"] == "reference of the triton kernel"
    other = run_on(ranks, 2, changed(config, tmp_path / "other", optim__kernel="triton", optim__beta2=0.951))
    assert other.losses != pytest.approx(expected.losses, rel=1e-6)  # control


FP16_WITH_OVERFLOW: dict[str, Any] = {
    "precision__compute": "fp16",
    "precision__loss_scale": 2.0**24,
    "precision__loss_scale_growth_interval": 3,
    "optim__state_dtype": "int8",
    "train__steps": 10,
    "checkpoint__interval": 6,
}


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("stage", "changes"),
    [(3, PURE_BF16 | {"train__steps": 4, "checkpoint__interval": 2}), (1, FP16_WITH_OVERFLOW)],
    ids=["bf16", "fp16"],
)
def test_a_run_that_crashed_continues_bitwise(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, stage: int, changes: dict[str, Any]
) -> None:
    """Codes that are quantized anew, random bits of another step, a skipped step that counted."""
    config = tiny_config(tmp_path / "whole", corpus, **BLOCKS | changes | {"parallel__zero_stage": stage})
    reference = run_part_on(ranks, 2, config)
    stopped = changed(config, tmp_path / "stopped")
    run_part_on(ranks, 2, stopped, crash_before=config.checkpoint.interval + 2)
    continued = run_part_on(ranks, 2, stopped)
    assert continued.resumed_from == f"step_{config.checkpoint.interval}"
    assert continued.of("loss") == reference.of("loss")
    different = [n for n, t in reference.state_at_end.items() if not torch.equal(continued.state_at_end[n], t)]
    assert different == []
    if changes is FP16_WITH_OVERFLOW:
        assert 0 < reference.lines[-1]["skipped_steps"] < 8
        assert reference.state_at_end["optim/step"] == 10 - reference.lines[-1]["skipped_steps"]


@pytest.mark.thorough
def test_8_bit_moments_move_to_other_layouts_exactly(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """tp, pp and HSDP: scales of another rank's blocks; a loss that is not that of one process."""
    settings: dict[str, Any] = {"optim__state_dtype": "int8", "checkpoint__interval": 2, "train__grad_clip": 1.0}
    config = tiny_config(tmp_path / "one", corpus, **BLOCKS | settings)
    alone = run_part_on(ranks, 1, config)
    layout = {"parallel__tp": 2, "parallel__pp": 2, "parallel__zero_stage": 1}
    stopped = changed(config, tmp_path / "moved", **layout)
    crashed = run_part_on(ranks, 8, stopped, crash_before=3)
    assert crashed.of("loss") == pytest.approx(alone.of("loss")[:2], rel=1e-5)
    hsdp = {"parallel__tp": 1, "parallel__pp": 1, "parallel__dp_replicate": 2, "parallel__zero_stage": 3}
    continued = run_part_on(ranks, 4, changed(stopped, tmp_path / "moved", **hsdp))
    assert continued.resumed_from == "step_2"
    assert sum(t.dtype == torch.int8 for t in continued.state_at_start.values()) > 10
    for name, tensor in crashed.state_at_end.items():
        assert torch.equal(continued.state_at_start[name], tensor), name
    assert continued.of("loss") == pytest.approx(alone.of("loss"), rel=1e-4)


# ---- what is refused


def wide_config(**changes: Any) -> TrainConfig:
    return tiny_config(Path("runs/never"), DataConfig(source="stdlib", num_workers=0), **BLOCKS | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"parallel__tp": 4, "model__intermediate_size": 1024},
            "the 512 columns of blocks.0.attention.o.weight and 1 more into pieces of 128; use parallel.tp=1 or 2",
        ),
        (
            {"parallel__tp": 2, "model__intermediate_size": 768},
            "768 columns of blocks.0.mlp.down.weight and 1 more into",
        ),
        (
            {"parallel__tp": 2, "parallel__zero_stage": 3},
            "more into pieces of 128; use parallel.tp=1, or parallel.zero_stage=0, 1 or 2, or",
        ),
        (
            {"model__hidden_size": 640},
            "the length of most, is no multiple; use model.hidden_size=256, 512",
        ),
    ],
)
def test_layouts_that_cut_blocks_are_refused_before_anything_starts(changes: dict[str, Any], says: str) -> None:
    """Found by a rank after the model was built."""
    changes = {"model__num_kv_heads": 4, "optim__state_dtype": "int8"} | changes
    with pytest.raises(ConfigError) as error:
        finalize(wide_config(**changes), world_size=4)
    (line,) = error.value.problems
    assert says in line
    finalize(wide_config(**changes | {"optim__state_dtype": "bf16"}), world_size=4)  # control


def test_a_checkpoint_with_other_moments_is_refused_by_name(tmp_path: Path) -> None:
    """A list of fifty tensors of another dtype."""
    saved = TrainConfig(optim=OptimConfig(state_dtype="int8"))
    (tmp_path / "extra.json").write_text(json.dumps({"config": asdict(saved)}))
    check_same_moments(tmp_path, saved)
    with pytest.raises(ConfigError, match=r"optim\.state_dtype=fp32, and the moments in .* are int8; use"):
        check_same_moments(tmp_path, TrainConfig())
    old = asdict(TrainConfig())
    del old["optim"]["state_dtype"]
    (tmp_path / "extra.json").write_text(json.dumps({"config": old}))
    check_same_moments(tmp_path, TrainConfig())


def test_settings_that_do_not_go_together_are_refused_where_parameters_are_known() -> None:
    """bf16 weights that torch's kernel rounds to nearest, in silence."""
    weights = {"w.weight": torch.zeros(4, 256, dtype=torch.bfloat16)}
    for config, says in (
        (OptimConfig(kernel="torch"), "rounds to nearest"),
        (OptimConfig(name="muon"), "is for optim"),
    ):
        with pytest.raises(ValueError, match=says):
            build_optimizer(weights, config)
