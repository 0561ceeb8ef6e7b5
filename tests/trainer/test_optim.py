"""AdamW over plain and sharded parameters, the global gradient norm, weight-decay groups, settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.pool import RankPool
from tests.trainer.optimized import (
    SHAPES,
    Case,
    NoHostSync,
    bits,
    largest_difference,
    outcome_of,
    take_steps,
)
from trainer.config import OptimConfig
from trainer.optim import build_optimizer, clip_coefficient, decay_of, global_grad_norm, problems

ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def reference_of(case: Case, *, adam: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict:
    """The case by torch.optim and torch's clipping, without the skipped steps; parameters and moments by name."""
    weights = {name: nn.Parameter(t) for name, t in case.weights().items()}
    groups = [{"params": [p], "weight_decay": decay_of(name, p, case.config)} for name, p in weights.items()]
    betas = (case.config.beta1, case.config.beta2)
    optimizer = adam(groups, lr=0.0, betas=betas, eps=case.config.eps)  # type: ignore[call-arg]
    for step in range(1, case.num_steps + 1):
        if step in case.skipped:
            continue
        for name, gradient in case.gradients(step).items():
            weights[name].grad = gradient.clone()
        if case.max_norm:
            nn.utils.clip_grad_norm_(weights.values(), case.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = case.lr(step)
        optimizer.step()
    moments = {
        f"{kind}/{name}": optimizer.state[p][kind] for kind in ("exp_avg", "exp_avg_sq") for name, p in weights.items()
    }
    return {name: p.detach() for name, p in weights.items()} | moments


def everything(case: Case) -> dict[str, Tensor]:
    """The case by our optimizer in this process; parameters and moments by name."""
    outcome = outcome_of(case)
    return outcome.parameters | {name: t for name, t in outcome.state.items() if name != "step"}


@pytest.mark.parametrize("skipped", [(), (1, 4, 5, 30)])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The coefficient is fp32 by design, so clipped fp64 gradients agree to 1e-7 only.
    [(torch.float32, 2e-6), (torch.float64, 1e-6)],
)
def test_adamw_equals_that_of_torch_over_many_steps(
    dtype: torch.dtype, tolerance: float, max_norm: float, skipped: tuple[int, ...]
) -> None:
    """A wrong bias correction, a step counted when skipped, a clipping coefficient divided instead of multiplied."""
    case = Case(OptimConfig(), num_steps=40, dtype=dtype, max_norm=max_norm, skipped=skipped)
    if dtype is torch.float64 and not max_norm:
        tolerance = 1e-13
    assert largest_difference(everything(case), reference_of(case)) < tolerance


def test_the_comparison_with_torch_sees_coupled_weight_decay() -> None:
    """Control: the tolerance of the comparison above must tell AdamW from Adam with L2 regularisation."""
    case = Case(OptimConfig(), num_steps=40)
    assert largest_difference(everything(case), reference_of(case, adam=torch.optim.Adam)) > 1e-3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_no_bit_even_with_gradients_that_are_not_numbers(name: str) -> None:
    """0 x NaN is NaN: an update multiplied by zero poisons weights and moments for ever."""
    case = Case(OptimConfig(name=name), skipped=(4,))
    optimizer = build_optimizer(case.weights(), case.config)
    take_steps(optimizer, case, [1, 2, 3], None)
    before = bits(optimizer.parameters | optimizer.state_tensors())
    take_steps(optimizer, case, [4], None)
    assert bits(optimizer.parameters | optimizer.state_tensors()) == before
    take_steps(optimizer, case, [5], None)
    assert all(
        bits(optimizer.parameters | optimizer.state_tensors())[name] != before[name] for name in [*SHAPES, "step"]
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_copied_into_a_fresh_optimizer_continues_bit_for_bit(name: str) -> None:
    """State outside state_tensors(), or tensors that a step replaces, would be lost by a checkpoint."""
    case = Case(OptimConfig(name=name), skipped=(2,))
    optimizer = build_optimizer(case.weights(), case.config)
    take_steps(optimizer, case, [1, 2, 3], None)
    fresh = build_optimizer({name: p.clone() for name, p in optimizer.parameters.items()}, case.config)
    kept = fresh.state_tensors()
    for key, t in optimizer.state_tensors().items():
        kept[key].copy_(t)
    for each in (optimizer, fresh):
        take_steps(each, case, [4, 5], None)
    assert bits(fresh.parameters) == bits(optimizer.parameters)
    assert bits(kept) == bits(optimizer.state_tensors())
    assert kept["step"].item() == 4


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (4,), (2, 2)])
def test_sharded_adamw_and_norm_equal_one_process(ranks: RankPool, mesh_shape: tuple[int, ...]) -> None:
    """Replicas counted twice in the norm, a shard left out, a rank with an empty shard that fails or hangs."""
    case = Case(OptimConfig(decay_embeddings=True), skipped=(3,))
    alone = outcome_of(case)
    outcomes = ranks.run(torch.Size(mesh_shape).numel(), outcome_of, case, mesh_shape)
    if mesh_shape[-1] == 4:
        assert outcomes[3].local_rows["blocks.1.tiny.weight"] == 0  # the case does hold empty shards
    for outcome in outcomes:
        assert outcome.norms[:2] == outcomes[0].norms[:2]  # the same bits on all ranks
        assert outcome.norms[2] != outcome.norms[2]  # NaN
        assert outcome.norms[3:] == pytest.approx(alone.norms[3:], rel=1e-6)
        assert largest_difference(outcome.parameters, alone.parameters) < 1e-6
        assert largest_difference(outcome.state, alone.state) < 1e-6
        assert bits(outcome.parameters) == bits(outcomes[0].parameters)


def _norms_of_mixed_parameters() -> tuple[float, float, int, float]:
    """Ours, torch's on whole tensors, number of collectives, and one that counts replicated elements once per rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    other = init_device_mesh("cpu", (4,), mesh_dim_names=("expert",))
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.randn(shape, generator=generator) * 3 for shape in [(5, 3), (7,), (4, 6), (3, 3), (2, 5), (8, 8)]
    ]
    placed = [
        distribute_tensor(gradients[0], mesh, [Replicate(), Shard(0)]),
        distribute_tensor(gradients[1], mesh, [Replicate(), Shard(0)]),
        distribute_tensor(gradients[2], mesh, [Shard(0), Shard(1)]),
        distribute_tensor(gradients[3], mesh, [Replicate(), Replicate()]),
        distribute_tensor(gradients[4], other, [Shard(0)]),
        gradients[5],
    ]
    parameters = [torch.zeros_like(g) for g in placed]
    for parameter, gradient in zip(parameters, placed, strict=True):
        parameter.grad = gradient
    with CommDebugMode() as comms:
        ours = global_grad_norm(parameters)
    whole = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(whole, gradients, strict=True):
        parameter.grad = gradient
    torchs = nn.utils.clip_grad_norm_(whole, 1.0)
    naive = torch.stack([(g.to_local() if isinstance(g, DTensor) else g).square().sum() for g in placed]).sum()
    dist.all_reduce(naive)
    return ours.item(), torchs.item(), comms.get_total_counts(), naive.sqrt().item()


def test_the_norm_counts_every_element_once_over_different_meshes_and_placements(ranks: RankPool) -> None:
    """Plain, replicated, HSDP and two-axis shards: summing over all ranks counts some elements twice or four times."""
    results = ranks.run(4, _norms_of_mixed_parameters)
    assert len({ours for ours, *_ in results}) == 1  # bitwise the same everywhere
    for ours, torchs, num_collectives, naive in results:
        assert ours == pytest.approx(torchs, rel=1e-6)
        assert num_collectives == 4  # one for each (mesh, axis): not one per parameter
        assert abs(naive / torchs - 1) > 0.1  # control: this case tells the mistake


def test_the_norm_of_many_elements_is_exact_to_rounding() -> None:
    """Adding millions of fp32 squares one after the other, as torch's CPU norm does, is 3e-4 off."""
    parameter = torch.zeros(5_000_000)
    parameter.grad = torch.rand(5_000_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = parameter.grad.double().norm().item()
    assert global_grad_norm([parameter]).item() == pytest.approx(exact, rel=2e-7)
    assert torch.linalg.vector_norm(parameter.grad).item() != pytest.approx(exact, rel=1e-5)  # control


def test_the_norm_of_bf16_gradients_is_taken_in_fp32() -> None:
    """A norm kept in bf16 has 3 digits."""
    parameters = [torch.zeros(1001, dtype=torch.bfloat16), torch.zeros(1000)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter.dtype)
    exact = torch.cat([p.grad.double() for p in parameters]).norm().item()  # type: ignore[union-attr]
    norm = global_grad_norm(parameters)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert norm.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_the_norm_shows_what_is_not_finite_and_survives_what_is_large(bad: float) -> None:
    """A square that overflows in fp32 makes a good step with a large loss scale look bad, or clips it to zero."""
    parameter = torch.zeros(3, 3)
    parameter.grad = torch.full((3, 3), bad)
    norm = global_grad_norm([parameter])
    if bad == 1e30:
        assert norm.item() == pytest.approx(3e30, rel=1e-6)
    else:
        assert not torch.isfinite(norm)


def test_the_clip_coefficient_is_that_of_torch_and_one_without_clipping() -> None:
    """A coefficient above 1 would enlarge small gradients; max_norm=0 must not zero them."""
    for norm in (0.0, 0.5, 1.0, 7.0):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([norm])
        nn.utils.clip_grad_norm_([parameter], 2.0)
        assert norm * clip_coefficient(torch.tensor(norm), 2.0).item() == pytest.approx(parameter.grad.item(), rel=1e-6)
        assert clip_coefficient(torch.tensor(norm), 0.0).item() == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_reads_no_value_back_to_the_host(name: str) -> None:
    """One .item() per step makes the host wait for the device and the device for the host."""
    case = Case(OptimConfig(name=name))
    optimizer = build_optimizer(case.weights(), case.config)
    for key, gradient in case.gradients(1).items():
        optimizer.parameters[key].grad = gradient
    with NoHostSync():
        norm = global_grad_norm(optimizer.parameters.values())
        optimizer.step(lr=0.1, grad_scale=clip_coefficient(norm, 1.0), skip=ZERO)
    with pytest.raises(AssertionError, match="read by the host"), NoHostSync():
        norm.item()  # control


def test_weight_decay_is_for_matrices_and_for_embeddings_on_request() -> None:
    """Decayed norms and biases, or a head taken for an embedding, change what is trained without any error."""
    for embeddings in (False, True):
        config = OptimConfig(weight_decay=0.3, decay_embeddings=embeddings)
        decayed = {name for name, shape in SHAPES.items() if decay_of(name, torch.empty(shape), config) == 0.3}
        matrices = {name for name, shape in SHAPES.items() if len(shape) == 2} - {"embedding.weight"}
        assert decayed == matrices | ({"embedding.weight"} if embeddings else set())
        assert "head.weight" in decayed
        assert decay_of("positions.weight", torch.empty(4, 4), config) == (0.3 if embeddings else 0.0)


class _Model(nn.Module):
    """Odd sizes; 3 rows are fewer than 4 ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def _train_model(name: str, offload: bool | None) -> dict[str, Tensor]:
    """Three steps under fully_shard (offload: with its CPU offload), or in one process (None); whole parameters."""
    model = _Model()
    if offload is not None:
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy())
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, OptimConfig(name=name))
    for step in range(3):
        model(torch.tensor([[1, 2, 3, 6], [0, 4, 5, step]])).square().mean().backward()
        norm = global_grad_norm(parameters.values())
        optimizer.step(lr=0.01, grad_scale=clip_coefficient(norm, 0.1), skip=ZERO)
        optimizer.zero_grad()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_of_fully_shard_train_as_in_one_process(ranks: RankPool, name: str, offload: bool) -> None:
    """FSDP2 hands out Parameters that are DTensors, with views as local tensors: a step must write through to them."""
    alone = _train_model(name, None)
    for trained in ranks.run(4, _train_model, name, offload):
        assert largest_difference(trained, alone) < 1e-5
    assert largest_difference(alone, {key: p.detach() for key, p in _Model().named_parameters()}) > 1e-3  # control


def _step_with_a_partial_gradient() -> str:
    mesh = init_device_mesh("cpu", (2,))
    parameter = distribute_tensor(torch.zeros(4, 2), mesh, [Replicate()])
    parameter.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    optimizer = build_optimizer({"w": parameter}, OptimConfig())
    with pytest.raises(RuntimeError, match="placements") as error:
        optimizer.step(lr=0.1, grad_scale=ONE, skip=ZERO)
    return str(error.value)


def test_a_gradient_that_was_not_reduced_is_refused(ranks: RankPool) -> None:
    """A local partial sum taken for the gradient trains each replica into another model."""
    assert "gradient of w" in ranks.run(2, _step_with_a_partial_gradient)[0]


@pytest.mark.parametrize(
    ("grad", "message"),
    [(None, "blocks.w has no gradient"), (torch.ones(3, 2, dtype=torch.bfloat16), "has dtype torch.bfloat16")],
)
def test_a_gradient_that_is_missing_or_of_another_type_is_refused_by_name(grad: Tensor | None, message: str) -> None:
    """A parameter left out in silence stays at its initial value for the whole run."""
    parameter = torch.zeros(3, 2)
    optimizer = build_optimizer({"blocks.w": parameter}, OptimConfig())
    if grad is None:
        parameter.grad = None
    else:
        parameter.grad_dtype = None  # torch >= 2.10 guards the dtype itself unless told not to
        parameter.grad = grad
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(lr=0.1, grad_scale=ONE, skip=ZERO)


def test_a_set_of_parameters_that_cannot_be_optimized_is_refused() -> None:
    """An optimizer of nothing (a wrong filter of names) trains nothing; a step count on one device cannot serve two."""
    with pytest.raises(ValueError, match="0 devices"):
        build_optimizer({}, OptimConfig())
    with pytest.raises(ValueError, match=r"2 devices.*cpu.*meta"):
        build_optimizer({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")}, OptimConfig())
    with pytest.raises(ValueError, match="at least one"):
        global_grad_norm([])
    with pytest.raises(ValueError, match="parameter a is not contiguous"):
        build_optimizer({"a": torch.zeros(3, 2).mT}, OptimConfig())


def test_a_gradient_of_another_memory_order_updates_the_same_elements() -> None:
    """The fused CPU kernel walks memory and would pair a transposed gradient with the wrong weights."""
    gradient = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for grad in (gradient, gradient.mT.contiguous().mT):
        parameter = torch.zeros(3, 2)
        parameter.grad = grad.clone(memory_format=torch.preserve_format)
        build_optimizer({"w": parameter}, OptimConfig()).step(lr=0.1, grad_scale=ONE, skip=ZERO)
        results.append(parameter)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sgd"}, "optim.name=sgd is not an optimizer; use optim.name=adamw or muon"),
        ({"lr": -1.0}, "optim.lr=-1.0 must be a number of at least 0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"beta1": 1.0}, "optim.beta1=1.0 must be at least 0 and below 1"),
        ({"beta2": -0.1}, "optim.beta2=-0.1"),
        ({"eps": 0.0}, "optim.eps=0.0 must be positive"),
        ({"weight_decay": float("inf")}, "optim.weight_decay=inf"),
        ({"momentum": 1.5}, "optim.momentum=1.5"),
        ({"newton_schulz_steps": 0}, "optim.newton_schulz_steps=0"),
    ],
)
def test_a_wrong_setting_is_one_line_with_field_and_value(settings: dict, message: str) -> None:
    """A setting out of range that trains all the same, to garbage."""
    config = OptimConfig(**settings)
    (found,) = problems(config)
    assert found.startswith(message)
    with pytest.raises(ValueError, match="optim"):
        build_optimizer({"w": torch.zeros(1)}, config)
    assert problems(OptimConfig()) == []


def test_all_wrong_settings_are_reported_at_once() -> None:
    """One error per start makes five starts of five mistakes."""
    assert len(problems(OptimConfig(name="?", lr=-1, beta1=2, beta2=2, eps=-1))) == 5


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_settings_files_are_valid_and_named_after_the_optimizer(name: str) -> None:
    """A typo in a YAML file that only the run that selects it would find."""
    path = Path(__file__).parents[2] / "configs" / "optim" / f"{name}.yaml"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OptimConfig), OmegaConf.load(path)))
    assert isinstance(config, OptimConfig)
    assert config.name == name
    assert problems(config) == []


@pytest.mark.gpu
@pytest.mark.parametrize("masters", ["cuda", "cpu"])
def test_on_a_gpu_adamw_equals_that_on_the_cpu(masters: str) -> None:
    """The CUDA kernel's conventions (division by its scale, skipping), and masters offloaded to host memory."""
    case = Case(OptimConfig(), skipped=(2,))
    expected = outcome_of(case)
    optimizer = build_optimizer({name: t.to(masters) for name, t in case.weights().items()}, case.config)
    for step in range(1, case.num_steps + 1):
        for name, gradient in case.gradients(step).items():
            optimizer.parameters[name].grad = gradient.to(masters)
        coefficient = clip_coefficient(global_grad_norm(optimizer.parameters.values()), case.max_norm).to("cuda")
        skip = torch.tensor(float(step in case.skipped), device="cuda")
        optimizer.step(lr=case.lr(step), grad_scale=coefficient, skip=skip)
    assert largest_difference({n: p.cpu() for n, p in optimizer.parameters.items()}, expected.parameters) < 1e-5
    assert largest_difference({n: t.cpu() for n, t in optimizer.state_tensors().items()}, expected.state) < 1e-5
