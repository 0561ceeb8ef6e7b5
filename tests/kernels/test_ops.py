"""Every op of the kernel library against its reference: in Triton's interpreter, or on the GPU where there is one.

An op takes part by a file in tests/kernels/ops/ with a list CASES. The interpreter computes wrongly in bf16, so on the
CPU bf16 is not tried.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.kernels.ops
from kernels.backend import interpreted
from tests.kernels.ops.case import Case, Shape

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES: list[Case] = [
    case
    for module in sorted(m.name for m in pkgutil.iter_modules(tests.kernels.ops.__path__) if m.name != "case")
    for case in importlib.import_module(f"tests.kernels.ops.{module}").CASES
]
TRIED = [(case, dtype) for case in CASES for dtype in case.dtypes if CUDA or dtype != torch.bfloat16]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize(("case", "dtype"), TRIED, ids=lambda x: getattr(x, "name", str(x)))


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    """Not the references."""
    with nullcontext() if CUDA else interpreted():
        yield


def inputs_of(case: Case, shape: Shape, dtype: torch.dtype) -> list[Any]:
    made = case.inputs(shape, dtype, torch.Generator().manual_seed(0))
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in made]


def evaluate(function: Any, case: Case, inputs: list[Any], wide: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and gradients by the differentiable arguments, in direction of fixed random numbers."""

    def prepared(x: Any, number: int) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(wide) if wide is not None and x.is_floating_point() else x.detach()
        return x.requires_grad_(number in case.differentiable)

    arguments = [prepared(x, number) for number, x in enumerate(inputs)]
    outputs = function(*arguments)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    results = [y.detach() for y in outputs]
    smooth = [y for y in outputs if y.requires_grad]
    if case.differentiable:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in smooth]
        results += torch.autograd.grad(smooth, [arguments[number] for number in case.differentiable], grads)
    return results


def check(case: Case, inputs: list[Any], dtype: torch.dtype) -> None:
    """The op's error against fp64 is about that of its reference."""
    ours = evaluate(case.op, case, inputs)
    plain = evaluate(case.reference, case, inputs)
    exact = evaluate(case.reference, case, inputs, torch.float64)
    for number, (y, usual, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert y.shape == truth.shape
        assert y.dtype == usual.dtype
        if not y.numel():
            continue
        error, allowed = (y.double() - truth).abs().max(), (usual.double() - truth).abs().max()
        limit = max(case.error_factor * float(allowed), case.tolerance[dtype] * float(truth.abs().max()))
        assert float(error) <= limit, f"result {number}: error {float(error):.2e}, limit {limit:.2e}"


def test_the_kernels_are_what_runs() -> None:
    """A test of references against themselves, which cannot fail."""
    assert CUDA or importlib.import_module("triton.knobs").runtime.interpret


@each_dtype
def test_values_and_gradients_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    """A wrong formula, a missing mask at the edge of an odd shape, a sum in half precision."""
    for shape in case.shapes:
        check(case, inputs_of(case, shape, dtype), dtype)


@each_case
def test_a_wrong_result_would_be_seen(case: Case) -> None:
    """Negative control: one element in a hundred thousandths of the largest off."""

    def wrong(*arguments: Any) -> Any:
        outputs = case.op(*arguments)
        first, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        moved = first.clone()
        moved.view(-1)[-1] += 0.01 * float(first.detach().abs().max()) + 1e-6
        return (moved, *rest) if rest else moved

    shape = next(shape for shape in case.shapes if 0 not in shape)
    with pytest.raises(AssertionError):
        check(replace(case, op=wrong), inputs_of(case, shape, torch.float32), torch.float32)


@pytest.mark.some(9)
@each_case
def test_strided_inputs_give_the_same_bits(case: Case) -> None:
    """A kernel that reads the memory of a transposed or sliced tensor as if it were contiguous."""

    def strided(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        spread = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)
        spread[..., 0] = x
        return spread[..., 0]

    for shape in case.shapes:
        inputs = inputs_of(case, shape, torch.float32)
        expected = evaluate(case.op, case, inputs)
        for y, truth in zip(evaluate(case.op, case, [strided(x) for x in inputs]), expected, strict=True):
            assert torch.equal(y, truth)


@pytest.mark.some(9)
@each_case
def test_all_memory_of_the_results_is_written(case: Case) -> None:
    """Elements that keep what lay in memory: torch.empty gives NaN here."""

    def poison() -> AbstractContextManager[None]:
        return _Poisoned()

    shape = case.shapes[0]
    inputs = inputs_of(case, shape, torch.float32)
    expected = evaluate(case.op, case, inputs)
    with poison():
        for y, truth in zip(evaluate(case.op, case, inputs), expected, strict=True):
            assert torch.equal(y, truth)


class _Poisoned(AbstractContextManager[None]):
    """torch.empty and its kind are filled with NaN, or the largest integer."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


@pytest.mark.some(9)
@each_case
def test_extreme_values(case: Case) -> None:
    """An overflow in an intermediate result that the reference does not have; a division by zero."""
    for extreme in case.extremes:
        inputs = [
            torch.full_like(x, extreme) if number in case.differentiable else x
            for number, x in enumerate(inputs_of(case, case.shapes[0], torch.float32))
        ]
        for y, truth in zip(evaluate(case.op, case, inputs), evaluate(case.reference, case, inputs), strict=True):
            scale = float(truth.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
            atol = max(1e-5, case.tolerance[torch.float32]) * scale
            torch.testing.assert_close(y, truth, rtol=1e-4, atol=atol, equal_nan=True)


@pytest.mark.some(9)
@each_case
def test_every_configuration_is_right(case: Case) -> None:
    """A block size that only another GPU or another shape would pick."""
    table, dtype = case.table(), case.tuned_dtype if CUDA else torch.float32
    for config in () if table is None else table.configs:
        assert table is not None
        with table.forced(config):
            for shape in case.shapes:
                check(case, inputs_of(case, shape, dtype), dtype)


@pytest.mark.some(15)
@each_dtype
def test_two_runs_are_bitwise_equal(case: Case, dtype: torch.dtype) -> None:
    """Atomic additions."""
    inputs = inputs_of(case, case.shapes[0], dtype)
    for y, again in zip(evaluate(case.op, case, inputs), evaluate(case.op, case, inputs), strict=True):
        assert torch.equal(y, again)


@pytest.mark.some(15)
@each_dtype
def test_rows_do_not_depend_on_the_batch(case: Case, dtype: torch.dtype) -> None:
    """A split of work by the size of the batch, which makes a served token depend on its neighbours."""
    if case.batch_dim is None:
        pytest.skip("not promised")
    for shape in case.shapes:
        if shape[case.batch_dim] < 2:
            continue
        inputs = inputs_of(case, shape, dtype)
        part = [
            x.narrow(case.batch_dim, 0, shape[case.batch_dim] - 1) if number in case.batched else x
            for number, x in enumerate(inputs)
        ]
        with torch.no_grad():
            whole, fewer = case.op(*inputs), case.op(*part)
        for y, z in zip(*(out if isinstance(out, tuple) else (out,) for out in (whole, fewer)), strict=True):
            assert torch.equal(y.narrow(case.batch_dim, 0, z.shape[case.batch_dim]), z)


@pytest.mark.some(7)
@each_case
def test_its_custom_ops_are_proper(case: Case) -> None:
    """A schema that hides a mutation, a fake implementation that differs, a gradient that is not registered."""
    inputs = inputs_of(case, case.shapes[0], torch.float32)
    smooth = tuple(x.requires_grad_() if i in case.differentiable else x for i, x in enumerate(inputs))
    for op, arguments in [] if case.checks is None else case.checks(smooth):
        torch.library.opcheck(op, arguments)


@pytest.mark.some(7)
@each_case
def test_it_compiles_into_one_graph(case: Case) -> None:
    """A graph break, or a fake result of another shape, dtype or stride than the real one."""
    inputs = inputs_of(case, case.shapes[0], torch.float32)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True, dynamic=False)
    expected = evaluate(case.op, case, inputs)
    for y, truth in zip(evaluate(compiled, case, inputs), expected, strict=True):
        assert torch.equal(y, truth)
        assert y.stride() == truth.stride()
