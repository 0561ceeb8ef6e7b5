"""Muon: the iteration against singular values, the update against torch's, ranks against one process."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from parallel.regions import local_region
from tests.parity.harness import largest
from tests.pool import RankPool
from tests.trainer.optimized import SHAPES, Case, bits, largest_difference, outcome_of, place, take_steps, whole
from trainer.config import OptimConfig
from trainer.gradients import local_shard_of
from trainer.muon import COEFFICIENTS, Muon, orthogonalize, share_of
from trainer.optim import build_optimizer, decay_of, is_hidden_matrix

HIDDEN = {name: shape for name, shape in SHAPES.items() if is_hidden_matrix(name, torch.empty(shape))}


def matrix_with(singular_values: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U diag(singular_values) V^T, U, V) in fp64 with random orthonormal columns of U [rows, k] and V [cols, k]."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    k = len(singular_values)
    u, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, k, generator=generator, dtype=torch.float64))
    return u * singular_values @ v.mT, u, v


@pytest.mark.parametrize(("rows", "cols"), [(5, 123), (123, 5), (17, 17), (1, 9), (9, 1), (64, 48)])
def test_orthogonalize_keeps_singular_vectors_and_brings_singular_values_near_one(rows: int, cols: int) -> None:
    """A transposed or unnormalised iteration converges to something else, or not at all."""
    matrix, u, v = matrix_with(torch.logspace(0, -1, min(rows, cols), dtype=torch.float64) * 30, rows, cols)
    result = orthogonalize(matrix.float(), num_steps=5)
    assert result.shape == (rows, cols)
    values = torch.linalg.svdvals(result)
    assert values.min() >= 0.68
    assert values.max() <= 1.14
    in_basis = u.mT @ result.double() @ v  # diagonal if the singular vectors are those of the matrix
    assert (in_basis - in_basis.diagonal().diag()).abs().max() < 1e-4
    assert in_basis.diagonal().min() > 0.68


@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_orthogonalize_applies_the_quintic_to_the_singular_values(num_steps: int) -> None:
    """A wrong coefficient or number of steps still gives a roughly orthogonal matrix."""
    matrix, _, _ = matrix_with(torch.logspace(0, -3, 11, dtype=torch.float64), 11, 14)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    assert (a, b, c) == (3.4445, -4.7750, 2.0315)
    values = values / matrix.norm()
    for _ in range(num_steps):
        values = a * values + b * values**3 + c * values**5
    result = orthogonalize(matrix.float(), num_steps=num_steps)
    assert (result.double() - u * values @ vt).abs().max() < 1e-4


def test_orthogonalize_gives_zeros_for_zeros_and_does_not_depend_on_scale() -> None:
    """0/0 in the first step of a matrix that has no gradient yet; a loss scale that changes the direction."""
    assert torch.equal(orthogonalize(torch.zeros(3, 5), num_steps=5), torch.zeros(3, 5))
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(matrix, num_steps=5)
    for scale in (1e-13, 1e12):
        assert (orthogonalize(matrix * scale, num_steps=5) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_that_of_torch_over_many_steps(
    monkeypatch: pytest.MonkeyPatch, nesterov: bool, max_norm: float
) -> None:
    """A wrong momentum, scale of the update, or coupling of weight decay to it; gradients that are not clipped."""
    config = OptimConfig(name="muon", nesterov=nesterov, weight_decay=0.3)
    case = Case(config, num_steps=20, max_norm=max_norm, shapes=HIDDEN)
    # torch iterates in bf16 everywhere; in fp32 the comparison is sharp.
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.float().clone())
    weights = {name: nn.Parameter(t) for name, t in case.weights().items()}
    theirs = torch.optim.Muon(
        weights.values(), lr=0.0, weight_decay=0.3, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(1, case.num_steps + 1):
        for name, gradient in case.gradients(step).items():
            weights[name].grad = gradient
        if max_norm:
            nn.utils.clip_grad_norm_(weights.values(), max_norm)
        theirs.param_groups[0]["lr"] = case.lr(step)
        theirs.step()
    ours = outcome_of(case)
    expected = {name: p.detach() for name, p in weights.items()}
    assert largest_difference(ours.parameters, expected) < 2e-5
    momenta = {f"momentum/{name}": theirs.state[p]["momentum_buffer"] for name, p in weights.items()}
    assert largest_difference({name: t for name, t in ours.state.items() if name != "step"}, momenta) < 1e-6
    # Control: another weight decay.
    config.weight_decay = 0.1
    other = outcome_of(case)
    assert largest_difference(other.parameters, expected) > 1e-3


def test_the_update_of_a_matrix_has_the_size_of_an_adamw_update() -> None:
    """Without the factor 0.2 sqrt(max(rows, cols)) the learning rate of AdamW does not carry over (2502.16982, 2.2)."""
    for rows, cols in [(64, 64), (96, 32), (32, 96)]:
        parameter = torch.zeros(rows, cols)
        parameter.grad = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        optimizer = build_optimizer({"blocks.0.w": parameter}, OptimConfig(name="muon"))
        optimizer.step(lr=1.0, grad_scale=torch.tensor(1.0), skip=torch.tensor(0.0))
        assert 0.15 < parameter.square().mean().sqrt().item() < 0.25


def test_only_hidden_matrices_are_orthogonalised_and_the_rest_is_adamw() -> None:
    """Orthogonalised embeddings or heads train badly; vectors have no singular values."""
    case = Case(OptimConfig(name="muon"))
    muon, adamw = outcome_of(case), outcome_of(Case(OptimConfig(name="adamw")))
    assert set(HIDDEN) == {name for name in SHAPES if name.startswith("blocks.") and len(SHAPES[name]) == 2}
    assert {name.removeprefix("momentum/") for name in muon.state if name.startswith("momentum/")} == set(HIDDEN)
    assert muon.state.keys() == {"step"} | {
        f"{kind}/{name}" for name in SHAPES for kind in (["momentum"] if name in HIDDEN else ["exp_avg", "exp_avg_sq"])
    }
    rest = [name for name in SHAPES if name not in HIDDEN]
    assert bits({name: muon.parameters[name] for name in rest}) == bits({name: adamw.parameters[name] for name in rest})
    assert not is_hidden_matrix("positions.weight", torch.empty(4, 4))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (4,), (2, 2)])
def test_on_ranks_muon_equals_one_process_bit_for_bit(
    ranks: RankPool, mesh_shape: tuple[int, ...], nesterov: bool
) -> None:
    """Rows sent back to the wrong matrix or rank, padding that enters the iteration, empty shards, skipped steps."""
    config = OptimConfig(name="muon", nesterov=nesterov)
    case = Case(config, skipped=(3,), max_norm=0.0)  # clipping brings in the norm, which rounds by layout
    alone = outcome_of(case)
    expected = {name: alone.parameters[name] for name in HIDDEN}
    momenta = {name: t for name, t in alone.state.items() if name.startswith("momentum/")}
    for outcome in ranks.run(torch.Size(mesh_shape).numel(), outcome_of, case, mesh_shape):
        assert bits({name: outcome.parameters[name] for name in HIDDEN}) == bits(expected)
        assert bits({name: outcome.state[name] for name in momenta}) == bits(momenta)
        assert largest_difference(outcome.parameters, alone.parameters) < 1e-6
        assert largest_difference(outcome.state, alone.state) < 1e-6


def _state_moves_to_another_layout(case: Case) -> dict[str, Tensor]:
    """Steps 1 to 3 on (4,), then 4 to 6 on (2, 2) from the whole tensors; whole parameters."""
    first = init_device_mesh("cpu", (4,))
    second = init_device_mesh("cpu", (2, 2))
    before = build_optimizer({name: place(t, first) for name, t in case.weights().items()}, case.config)
    take_steps(before, case, [1, 2, 3], first)
    after = build_optimizer({name: place(whole(p), second) for name, p in before.parameters.items()}, case.config)
    kept = after.state_tensors()
    for key, t in before.state_tensors().items():
        kept[key].copy_(t if key == "step" else place(whole(t), second))
    take_steps(after, case, [4, 5, 6], second)
    return {name: whole(p) for name, p in after.parameters.items()}


def test_state_moves_between_layouts_and_training_goes_on_the_same(ranks: RankPool) -> None:
    """State that depends on how it was sharded cannot be resumed on another number of ranks."""
    case = Case(OptimConfig(name="muon"), skipped=(2,))
    expected = outcome_of(case).parameters
    for parameters in ranks.run(4, _state_moves_to_another_layout, case):
        assert largest_difference(parameters, expected) < 1e-5


def _collectives_of_a_step(num_matrices: int, mesh_shape: tuple[int, ...]) -> int:
    mesh = init_device_mesh("cpu", mesh_shape)
    placements: list[Placement] = [Shard(0), Shard(1)][: len(mesh_shape)]
    parameters = {f"blocks.{i}.w": cut(torch.ones(5 + i % 2, 4), mesh, placements) for i in range(num_matrices)}
    optimizer = build_optimizer(parameters, OptimConfig(name="muon"))
    for parameter in parameters.values():
        parameter.grad = cut(torch.randn(parameter.shape), mesh, placements)
    with CommDebugMode() as comms:
        optimizer.step(lr=0.1, grad_scale=torch.tensor(1.0), skip=torch.tensor(0.0))
    return comms.get_total_counts()


def test_a_round_of_as_many_matrices_as_ranks_costs_two_all_to_alls_per_axis(ranks: RankPool) -> None:
    """An exchange per matrix leaves all ranks but one idle; two shapes share a round that neither fills."""
    assert ranks.run(4, _collectives_of_a_step, 4, (4,)) == [2] * 4
    assert ranks.run(4, _collectives_of_a_step, 9, (4,)) == [6] * 4
    assert ranks.run(4, _collectives_of_a_step, 4, (2, 2)) == [4] * 4


CUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Shard(0), Shard(1)]),  # rows by ZeRO, columns by tp
    ((2, 2), [Shard(1), Shard(0)]),  # the other way round
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),  # rows by tp, and what that leaves by ZeRO
    ((2, 2), [Shard(0), Shard(0)]),
    ((1, 2, 2), [Replicate(), _StridedShard(1, split_factor=2), Shard(1)]),
    ((2, 2), [Replicate(), Replicate()]),
]
MATRICES = [(8, 2), (3, 3), (4, 1), (13, 5), (1, 4), (7, 7), (2, 9), (5, 12), (5, 12)]


def _pieces_on_ranks(mesh_shape: tuple[int, ...], placements: list[Placement]) -> tuple[float, float]:
    """Largest difference to whole matrices of the exchange, and of orthogonalising each piece by itself (control)."""
    mesh = init_device_mesh("cpu", mesh_shape)
    generator = torch.Generator().manual_seed(0)
    parameters, expected, alone = {}, {}, []
    for number, shape in enumerate(MATRICES):
        matrix = torch.randn(shape, generator=generator)
        parameters[f"blocks.{number}.w"] = cut(matrix, mesh, placements)
        region = local_region(parameters[f"blocks.{number}.w"])
        expected[f"blocks.{number}.w"] = orthogonalize(matrix, num_steps=5)[region]
        alone.append(largest_of(orthogonalize(matrix[region], num_steps=5) - expected[f"blocks.{number}.w"]))
    muon = Muon(parameters, dict.fromkeys(parameters, 0.0), OptimConfig(name="muon"))
    difference = 0.0
    for axes, names in muon._rounds:
        directions = [local_shard_of(parameters[name]) for name in names]
        for name, found in zip(names, muon._orthogonalize(names, directions, axes), strict=True):
            assert found.shape == expected[name].shape
            difference = largest([difference, largest_of(found - expected[name])])
    return difference, largest(alone)


def cut(matrix: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """A DTensor of the matrix, by where a rank's part lies: torch's own way to cut does not know all of CUTS."""
    stride = (matrix.size(1), 1)
    whole = DTensor.from_local(matrix, mesh, placements, run_check=False, shape=matrix.shape, stride=stride)
    mine = matrix[local_region(whole)].contiguous()
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=matrix.shape, stride=stride)


def largest_of(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


@pytest.mark.parametrize(("mesh_shape", "placements"), CUTS, ids=[f"{shape}{cuts}" for shape, cuts in CUTS])
def test_pieces_are_orthogonalised_as_parts_of_their_whole_matrix(
    ranks: RankPool, mesh_shape: tuple[int, ...], placements: list[Placement]
) -> None:
    """Each rank orthogonalising its own piece runs without error and is another optimizer; so is a matrix whose pieces
    were put together in another order. Every matrix is orthogonalised to the bits of one process."""
    outcomes = ranks.run(math.prod(mesh_shape), _pieces_on_ranks, mesh_shape, placements)
    assert {exchanged for exchanged, _ in outcomes} == {0.0}
    is_cut = any(not placement.is_replicate() for placement in placements)
    assert all((alone > 0.05) == is_cut for _, alone in outcomes)  # control


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 200), num_ranks=st.integers(1, 40))
def test_a_dim_is_cut_as_by_chunk(length: int, num_ranks: int) -> None:
    """DTensor splits like torch.chunk; another split would exchange rows of the wrong matrix."""
    chunks = [c.numel() for c in torch.arange(length).chunk(num_ranks)]
    expected = chunks + [0] * (num_ranks - len(chunks))
    assert [share_of(length, num_ranks, rank) for rank in range(num_ranks)] == expected


def test_hidden_matrices_are_decayed_as_by_adamw() -> None:
    """Weight decay that Muon forgets, or scales with its update."""
    case = Case(OptimConfig(name="muon", weight_decay=0.5), shapes=HIDDEN, num_steps=1)
    parameters = case.weights()
    optimizer = build_optimizer(parameters, case.config)
    expected = {name: t * (1 - 0.1 * decay_of(name, t, case.config)) for name, t in case.weights().items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lr=0.1, grad_scale=torch.tensor(1.0), skip=torch.tensor(0.0))
    assert largest_difference(parameters, expected) < 1e-6


@pytest.mark.gpu
def test_on_a_gpu_muon_is_that_of_the_cpu_within_bf16() -> None:
    """bf16 iterations and a CPU reference in fp32: the direction agrees, entries to a few percent of the largest."""
    case = Case(OptimConfig(name="muon"), skipped=(2,), max_norm=0.0)
    expected = outcome_of(case)
    optimizer = build_optimizer({name: t.cuda() for name, t in case.weights().items()}, case.config)
    for step in range(1, case.num_steps + 1):
        for name, gradient in case.gradients(step).items():
            optimizer.parameters[name].grad = gradient.cuda()
        skip = torch.tensor(float(step in case.skipped), device="cuda")
        optimizer.step(lr=case.lr(step), grad_scale=torch.ones((), device="cuda"), skip=skip)
    start = case.weights()
    for name in HIDDEN:
        ours, theirs = optimizer.parameters[name].cpu() - start[name], expected.parameters[name] - start[name]
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
