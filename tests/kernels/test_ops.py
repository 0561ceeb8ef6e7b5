"""Every op of the kernel library against its reference: in Triton's interpreter, or on the GPU where there is one.

An op takes part by a file in tests/kernels/ops/ with a list CASES. The interpreter computes wrongly in bf16, so on the
CPU bf16 is not tried.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
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
FILES = sorted(m.name for m in pkgutil.iter_modules(tests.kernels.ops.__path__) if m.name != "case")
FILE_OF = {case.name: file for file in FILES for case in importlib.import_module(f"tests.kernels.ops.{file}").CASES}
CASES: list[Case] = [case for file in FILES for case in importlib.import_module(f"tests.kernels.ops.{file}").CASES]
TRIED = [(case, dtype) for case in CASES for dtype in case.dtypes if CUDA or dtype != torch.bfloat16]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def some(num: int) -> pytest.MarkDecorator:
    """`pytest.mark.some`, and with --thorough one case of every file of ops/, and of every layout, as well."""
    return pytest.mark.some(num, thorough_each=lambda params: (FILE_OF[params["case"].name], params.get("layout")))


each_case = each(CASES)
each_dtype = pytest.mark.parametrize(("case", "dtype"), TRIED, ids=lambda x: getattr(x, "name", str(x)))
BY_ROW = [(case, dtype) for case, dtype in TRIED if case.batch_dim is not None]


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    """Not the references."""
    with nullcontext() if CUDA else interpreted():
        yield


def inputs_of(case: Case, shape: Shape, dtype: torch.dtype) -> list[Any]:
    made = case.inputs(shape, dtype, torch.Generator().manual_seed(0))
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in made]


def evaluate(
    function: Any,
    case: Case,
    inputs: list[Any],
    wide: torch.dtype | None = None,
    laid: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> list[Tensor]:
    """Outputs and gradients by the differentiable arguments, in direction of fixed random numbers, which `laid` lays in
    memory."""

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
        grads = [laid(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)) for y in smooth]
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


def _spread(x: Tensor) -> Tensor:
    """Elements of a row do not lie side by side, so that most ops copy it."""
    memory = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)
    memory[..., 0] = x
    return memory[..., 0]


def _sliced(x: Tensor) -> Tensor:
    """Columns out of wider rows: elements lie side by side, rows further apart than they are wide."""
    memory = torch.empty(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype, device=x.device)
    columns = memory[..., 3:-5]
    columns.copy_(x)
    return columns


def _expanded(x: Tensor) -> Tensor:
    """All rows are the first one in memory."""
    return x[:1].expand(x.shape) if x.ndim > 1 and x.is_floating_point() else x


LAYOUTS = {"spread": _spread, "sliced": _sliced, "expanded": _expanded}


@some(9)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_case
def test_strided_inputs_and_gradients_give_the_same_results(case: Case, layout: str) -> None:
    """A kernel that reads the memory of a transposed, sliced or expanded tensor as if it were contiguous; one that
    takes the distance between rows for their width; one that does so with the gradient it is given."""

    def laid(x: Any) -> Any:
        return LAYOUTS[layout](x) if isinstance(x, Tensor) and x.ndim else x

    def contiguous(x: Any) -> Any:
        return laid(x).contiguous() if isinstance(x, Tensor) else x

    for shape in case.shapes:
        inputs = inputs_of(case, shape, torch.float32)
        expected = evaluate(case.op, case, [contiguous(x) for x in inputs], laid=contiguous)
        # On a GPU rows that lie at one place are another program, whose products are fused with other sums.
        allowed = 0.0 if case.stride_bits and not CUDA else 1e-5
        for y, truth in zip(evaluate(case.op, case, [laid(x) for x in inputs], laid=laid), expected, strict=True):
            scale = float(truth.abs().max()) if truth.numel() else 0.0
            torch.testing.assert_close(y, truth, rtol=0.0, atol=allowed * scale)


@some(9)
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


def test_every_case_has_extreme_values() -> None:
    """Ordinary inputs compared a second time, because an op without a gradient says of no argument that it may be
    extreme."""
    for case in CASES:
        assert case.extremes, case.name
        case.extreme(0.0, inputs_of(case, case.shapes[0], torch.float32))


@some(9)
@each_case
def test_extreme_values(case: Case) -> None:
    """An overflow in an intermediate result that the reference does not have; a division by zero."""
    for extreme in case.extremes:
        inputs = case.extreme(extreme, inputs_of(case, case.shapes[0], torch.float32))
        for y, truth in zip(evaluate(case.op, case, inputs), evaluate(case.reference, case, inputs), strict=True):
            scale = float(truth.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
            atol = max(1e-5, case.tolerance[torch.float32]) * scale
            torch.testing.assert_close(y, truth, rtol=1e-4, atol=atol, equal_nan=True)


@some(5)
@each([case for case in CASES if case.tuned is not None])
def test_every_configuration_is_right(case: Case) -> None:
    """A block size that only another GPU or another shape would pick."""
    table, dtype = case.table(), case.tuned_dtype if CUDA else torch.float32
    assert table is not None
    for config in table.configs:
        with table.forced(config):
            for shape in case.shapes:
                check(case, inputs_of(case, shape, dtype), dtype)


@some(15)
@each_dtype
def test_two_runs_are_bitwise_equal(case: Case, dtype: torch.dtype) -> None:
    """Atomic additions."""
    inputs = inputs_of(case, case.shapes[0], dtype)
    for y, again in zip(evaluate(case.op, case, inputs), evaluate(case.op, case, inputs), strict=True):
        assert torch.equal(y, again)


@some(15)
@pytest.mark.parametrize(("case", "dtype"), BY_ROW, ids=lambda x: getattr(x, "name", str(x)))
def test_rows_do_not_depend_on_the_batch(case: Case, dtype: torch.dtype) -> None:
    """A split of work by the size of the batch, which makes a served token depend on its neighbours."""
    assert case.batch_dim is not None
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


@some(4)
@each([case for case in CASES if case.checks is not None])
def test_its_custom_ops_are_proper(case: Case) -> None:
    """A schema that hides a mutation, a fake implementation that differs, a gradient that is not registered."""
    inputs = inputs_of(case, case.shapes[0], torch.float32)
    smooth = tuple(x.requires_grad_() if i in case.differentiable else x for i, x in enumerate(inputs))
    assert case.checks is not None
    for op, arguments in case.checks(smooth):
        torch.library.opcheck(op, arguments)


@some(7)
@each_case
def test_it_compiles_into_one_graph(case: Case) -> None:
    """A graph break, or a fake result of another shape, dtype or stride than the real one."""
    inputs = inputs_of(case, case.shapes[0], torch.float32)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True, dynamic=False)
    expected = evaluate(case.op, case, inputs)
    for y, truth in zip(evaluate(compiled, case, inputs), expected, strict=True):
        assert torch.equal(y, truth)
        assert y.stride() == truth.stride()
