"""AdamW over many tensors: the update against torch's own, scalars on the device, the smaller forms of the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adamw import AdamWUpdate, ElementIndex, QuantizedMoment
from kernels.adamw.quantized import dequantize, levels, quantize
from kernels.backend import interpreted
from kernels.multi_tensor import CHUNK

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter rounds bf16 wrongly
SHAPES = [(5, 123), (1,), (0, 4), (CHUNK + 300,), (33, 64)]
DECAY = [0.1, 0.0, 0.1, 0.0, 0.3]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def _both(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything holds for the kernel and for what runs without one."""
    if request.param == "reference" and CUDA:
        pytest.skip("the kernel is what runs on CUDA")
    with interpreted() if request.param == "kernel" and not CUDA else nullcontext():
        yield


def tensors(seed: int, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes over several decades, as gradients have.
    made = [torch.randn(s, generator=generator) * 10 ** (2 * torch.rand(s, generator=generator)) for s in shapes]
    return [x.to(DEVICE, dtype) for x in made]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def zeros_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) for p in parameters]


def by_torch(parameters: Sequence[Tensor], gradients: Callable[[int], list[Tensor]], steps: int) -> list[Tensor]:
    """torch.optim.AdamW in fp64 from the same numbers."""
    leaves = [p.detach().double().requires_grad_() for p in parameters]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(leaves, DECAY, strict=False)]
    optimizer = torch.optim.AdamW(groups, **SETTINGS, foreach=False)
    for step in range(1, steps + 1):
        for p, g in zip(leaves, gradients(step), strict=True):
            p.grad = g.double()
        optimizer.step()
    return [p.detach() for p in leaves]


def test_twenty_steps_are_those_of_torch_in_fp64() -> None:
    """A wrong bias correction, decay after the update, epsilon inside the root, a tensor's neighbour's decay."""
    shapes, steps = [*SHAPES[:3], (700,), SHAPES[4]], 20
    parameters = tensors(0, shapes=shapes)
    expected = by_torch(parameters, lambda step: [0.5 * g for g in tensors(step, shapes=shapes)], steps)
    copies = [p.to(HALF) if p.ndim > 1 else None for p in parameters]
    update = AdamWUpdate(parameters, zeros_of(parameters), zeros_of(parameters), decay=DECAY, copies=copies)
    for step in range(1, steps + 1):
        gradients = tensors(step, shapes=shapes)
        update.update(gradients, **SETTINGS, step=number(step), grad_scale=number(0.5))
    for p, copy, truth in zip(parameters, copies, expected, strict=True):
        torch.testing.assert_close(p.double(), truth, rtol=2e-5, atol=2e-6)
        if copy is not None:
            assert torch.equal(copy, p.to(HALF))


def test_bias_correction_keeps_its_digits() -> None:
    """1 - 0.9999 computed in fp32, which has an error of 6e-4."""
    parameters = [torch.zeros(300, device=DEVICE)]
    update = AdamWUpdate(parameters, zeros_of(parameters), zeros_of(parameters), decay=[0.0])
    gradients = [torch.full((300,), 2.0, device=DEVICE)]
    update.update(gradients, lr=1.0, betas=(0.9, 0.9999), eps=1e-8, step=number(1))
    torch.testing.assert_close(parameters[0], torch.full_like(parameters[0], -1.0), rtol=1e-6, atol=0)


def test_half_precision_gradients_and_states() -> None:
    """A gradient read with the width of its parameter."""
    parameters = tensors(0)
    states = [[x.to(HALF) for x in zeros_of(parameters)] for _ in range(2)]
    gradients = [g.to(HALF) for g in tensors(1)]
    expected = by_torch(parameters, lambda _: gradients, 1)
    AdamWUpdate(parameters, *states, decay=DECAY).update(gradients, **SETTINGS, step=number(1))
    for p, m, g, truth in zip(parameters, states[0], gradients, expected, strict=True):
        torch.testing.assert_close(p.double(), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(m.float(), 0.1 * g.float(), rtol=1e-2, atol=1e-3)


def test_a_learning_rate_on_the_device() -> None:
    """A captured graph that goes on with the learning rate of its capture."""
    results = []
    for lr in (1e-2, number(1e-2)):
        parameters = tensors(0)
        update = AdamWUpdate(parameters, zeros_of(parameters), zeros_of(parameters), decay=DECAY)
        update.update(tensors(1), lr=lr, betas=(0.0, 0.95), eps=1e-8, step=number(1))
        results.append(parameters)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("skip", [1.0, float("nan")])
def test_a_skipped_step_writes_nothing(skip: float) -> None:
    """A non-finite gradient that reaches weights or moments."""
    parameters = tensors(0)
    states = [zeros_of(parameters), zeros_of(parameters)]
    copies: list[Tensor | None] = [torch.full_like(p, 7.0) for p in parameters]
    update = AdamWUpdate(parameters, *states, decay=DECAY, copies=copies)
    bad = [torch.full_like(p, float("inf")) for p in parameters]
    update.update(bad, **SETTINGS, step=number(1), grad_scale=number(float("nan")), skip=number(skip))
    for p, before, m, v, copy in zip(parameters, tensors(0), *states, copies, strict=True):
        assert torch.equal(p, before)
        assert copy is not None
        assert not m.any()
        assert not v.any()
        assert (copy == 7.0).all()


def test_tensors_anywhere_in_memory_give_the_same_bits() -> None:
    """Wide accesses of memory that is not aligned; a chunk of one tensor that writes into the next."""
    flat = torch.cat([p.flatten() for p in tensors(0)])

    def views(buffer: Tensor) -> list[Tensor]:
        parts = buffer.split([torch.Size(s).numel() for s in SHAPES])
        return [part.view(s) for part, s in zip(parts, SHAPES, strict=True)]

    parameters, states = tensors(0), [zeros_of(tensors(0)) for _ in range(2)]
    AdamWUpdate(parameters, *states, decay=DECAY).update(tensors(1), **SETTINGS, step=number(1))
    moments = [views(torch.zeros_like(flat)) for _ in range(2)]
    AdamWUpdate(views(flat), *moments, decay=DECAY).update(tensors(1), **SETTINGS, step=number(1))
    for p, q in zip(parameters, views(flat), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_every_configuration_gives_the_same_bits(eight_bit: bool) -> None:
    """A configuration that only another GPU would pick; blocks of 256 that are not a warp's."""
    from kernels.adamw.kernel import BLOCKS, BLOCKS_8_BIT

    results: list[list[Tensor]] = []
    table = BLOCKS_8_BIT if eight_bit else BLOCKS
    for block in table.configs:
        parameters = tensors(0)
        states: list[list[Any]] = [
            [
                QuantizedMoment.zeros(p.numel(), signed=signed, device=DEVICE) if eight_bit else torch.zeros_like(p)
                for p in parameters
            ]
            for signed in (True, False)
        ]
        with table.forced(block):
            update = AdamWUpdate(parameters, *states, decay=DECAY)
            for step in (1, 2):
                update.update(tensors(step), **SETTINGS, step=number(step))
        moments = [x for kind in states for x in kind]
        codes = [x for m in moments for x in ((m.codes, m.scales) if eight_bit else (m,))]
        results.append([*parameters, *codes])
    for block, found in zip(table.configs[1:], results[1:], strict=True):
        for index, (p, q) in enumerate(zip(found, results[0], strict=True)):
            assert torch.equal(p, q), f"{block}: {int((p != q).sum())} of {p.numel()} in tensor {index}"


def test_looked_up_codes_have_the_values_of_the_map() -> None:
    """A table in another order than the bits of signed codes."""
    from kernels.adamw.kernel import code_values

    table = code_values(torch.device(DEVICE))
    codes = torch.arange(256, device=DEVICE).to(torch.uint8)
    ones = torch.ones(1, device=DEVICE)
    signed = codes[codes != 128]  # -128 is no code
    assert torch.equal(table[signed.long()], dequantize(signed.view(torch.int8), ones))
    assert torch.equal(table[256:], dequantize(codes, ones))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed: bool) -> None:
    """A formula for codes that is not the map's; a second moment that becomes zero."""
    generator = torch.Generator().manual_seed(0)
    values = 10 ** (-9 * torch.rand(20 * 256 + 5, generator=generator))
    values[:256] = 0.0
    if signed:
        values *= torch.randn(values.shape, generator=generator).sign()
    codes, scales = quantize(values, signed=signed)
    table = levels(signed=signed).float()
    assert torch.equal(table, table.sort().values)
    assert len(table.unique()) == len(table)
    assert table[-1] == 1.0
    relative = values.abs() / scales.repeat_interleave(256)[: len(values)].clamp(min=1e-30)
    nearest = (relative[:, None] - table).abs().argmin(1)
    if not signed:
        nearest = torch.where(relative > 0, nearest.clamp(min=1), nearest)
    assert torch.equal(codes.to(torch.int64).abs(), nearest)
    back = dequantize(codes, scales)
    assert torch.equal(back.sign(), values.sign() * (nearest > 0))
    assert back.abs().max() == values.abs().max()


def test_eight_bit_moments_are_those_of_the_map() -> None:
    """A scale of the wrong block; codes that differ from the written map by more than a tie."""
    parameters = tensors(0)
    states = [
        [QuantizedMoment.zeros(p.numel(), signed=signed, device=DEVICE) for p in parameters] for signed in (True, False)
    ]
    update = AdamWUpdate(parameters, *states, decay=DECAY)
    plain, moments = tensors(0), [zeros_of(parameters) for _ in range(2)]
    for step in (1, 2):
        update.update(tensors(step), **SETTINGS, step=number(step))
        for tensor, p in enumerate(plain):
            g = tensors(step)[tensor]
            m = torch.lerp(moments[0][tensor], g, 0.1)
            v = torch.lerp(moments[1][tensor], g * g, 0.05)
            denominator = v.sqrt() / (1 - 0.95**step) ** 0.5 + 1e-8
            p.mul_(1 - 1e-2 * DECAY[tensor]).sub_(1e-2 / (1 - 0.9**step) * m / denominator)
            torch.testing.assert_close(parameters[tensor], p, rtol=1e-5, atol=1e-5)
            for kind, (state, truth) in enumerate(zip(states, (m, v), strict=True)):
                codes, scales = quantize(truth.flatten(), signed=kind == 0)
                torch.testing.assert_close(state[tensor].scales, scales, rtol=1e-5, atol=0)
                off = (state[tensor].codes.int() - codes.int()).abs()
                assert off.sum() <= 2 + off.numel() // 500
                moments[kind][tensor] = state[tensor].values().view_as(p)


def test_eight_bit_moments_train_like_wide_ones() -> None:
    """A map so coarse, or a second moment so often zero, that a small problem is not solved."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 30, generator=generator).to(DEVICE) * torch.logspace(-2, 0, 30, device=DEVICE)
    truth = torch.randn(30, generator=generator).to(DEVICE)
    losses = []
    for quantized in (False, True):
        x = torch.zeros(30, device=DEVICE)
        states: list[Any] = [
            [QuantizedMoment.zeros(30, signed=signed, device=DEVICE) if quantized else torch.zeros_like(x)]
            for signed in (True, False)
        ]
        update = AdamWUpdate([x], *states, decay=[0.0])
        for step in range(1, 31):
            update.update([a.T @ (a @ (x - truth))], lr=0.2, betas=(0.9, 0.95), eps=1e-8, step=number(step))
        losses.append(float((a @ (x - truth)).square().sum()))
    assert losses[1] < 1.5 * losses[0] + 1e-3
    assert losses[0] < 0.05 * float((a @ truth).square().sum())


SHARDS = [  # offsets and local shapes of [6, 4, 40]
    ((0, 0, 0), (6, 4, 40)),
    ((2, 0, 0), (3, 4, 40)),
    ((0, 1, 0), (6, 2, 40)),
    ((0, 0, 13), (6, 4, 21)),
    ((1, 2, 8), (2, 2, 16)),
]


def bf16_step(values: Tensor, index: ElementIndex, *, step: int = 3, seed: int = 5, lr: float = 1e-2) -> Tensor:
    p = values.bfloat16()
    states = [[torch.zeros(p.shape, device=DEVICE)] for _ in range(2)]
    update = AdamWUpdate([p], *states, decay=[0.1], rounding=[index], seed=seed)
    gradient = values * 3 + 0.7
    update.update([gradient], lr=lr, betas=(0.9, 0.95), eps=1e-8, step=number(step))
    return p


@pytest.mark.parametrize(("offsets", "local"), SHARDS)
def test_stochastic_rounding_does_not_know_the_layout(offsets: tuple[int, ...], local: tuple[int, ...]) -> None:
    """Random numbers by the place in a shard, or by its start alone."""
    shape = (6, 4, 40)
    (whole,) = tensors(0, shapes=[shape])
    whole = whole.bfloat16().float()
    part = whole[tuple(slice(o, o + n) for o, n in zip(offsets, local, strict=True))].contiguous()
    expected = bf16_step(whole, ElementIndex.of_shard("w", shape, shape, (0, 0, 0)))
    index = ElementIndex.of_shard("w", shape, local, offsets)
    expected = expected[tuple(slice(o, o + n) for o, n in zip(offsets, local, strict=True))]
    assert torch.equal(bf16_step(part, index), expected)
    assert not torch.equal(bf16_step(part, index, step=4), expected)
    assert not torch.equal(bf16_step(part, index, seed=6), expected)
    assert not torch.equal(bf16_step(part, ElementIndex.of_shard("u", shape, local, offsets)), expected)


def test_stochastic_rounding_is_unbiased() -> None:
    """Updates below half a unit in the last place, which rounding to nearest loses; a biased draw."""
    values = torch.ones(1 << 14, device=DEVICE)
    p = bf16_step(values, ElementIndex("w"), lr=1e-3)
    m, v = 0.1 * 3.7, 0.05 * 3.7**2
    expected = 1 - 1e-4 - 1e-3 / (1 - 0.9**3) * m / (v / (1 - 0.95**3)) ** 0.5
    below = 1 - 2.0**-8  # the neighbour of 1
    assert set(p.float().unique().tolist()) == {1.0, below}
    deviation = 2.0**-8 * 0.5 / len(p) ** 0.5
    assert abs(float(p.double().mean()) - expected) < 4 * deviation


def test_what_cannot_work_is_refused() -> None:
    """A message that does not say which tensor; a silent walk over memory of another order."""
    p = torch.zeros(4, 6, device=DEVICE)

    def build(**changes: Any) -> AdamWUpdate:
        arguments: dict[str, Any] = {"parameters": [p], "exp_avg": [p], "exp_avg_sq": [p], "decay": [0.0]} | changes
        return AdamWUpdate(**arguments)

    for changes, error, words in (
        ({"parameters": [p.T]}, ValueError, r"parameters\[0\] is not contiguous"),
        ({"exp_avg": [p[:3]]}, ValueError, r"exp_avg\[0\] has shape \[3, 6\]"),
        ({"exp_avg": [p.to(torch.int32)]}, TypeError, r"exp_avg\[0\] has dtype torch.int32"),
        ({"exp_avg_sq": [p.half()]}, TypeError, r"use the same for both"),
        ({"rounding": [ElementIndex("w")]}, TypeError, r"rounding\[0\] is for bf16"),
        ({"exp_avg": [QuantizedMoment.zeros(23, signed=True, device=DEVICE)]}, ValueError, "23 codes"),
    ):
        with pytest.raises(error, match=words):
            build(**changes)
    with pytest.raises(ValueError, match="0 gradients for 1"):
        build().update([], **SETTINGS, step=number(1))
    with pytest.raises(TypeError, match=r"step is torch\.int64"):
        build().update([p], **SETTINGS, step=number(1).long())
