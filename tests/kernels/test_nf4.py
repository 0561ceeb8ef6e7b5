"""NF4 against bitsandbytes 0.50.2: what it once gave (nf4_bitsandbytes.json), and itself where it is installed."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.backend import interpreted
from kernels.nf4 import NF4, dequantize_nf4, quantize_nf4
from kernels.nf4.reference import GROUP, LEVELS, magnitude_levels

FIXTURE = Path(__file__).with_name("nf4_bitsandbytes.json")
CPU = torch.device("cpu")


def example(num_values: int = 64 * 260) -> Tensor:
    """Numbers that every machine makes alike: a generator on integers, cubed, blocks of sizes 1 to 2^-6; block 1 is
    all zeros."""
    state, numbers = 1, []
    for _ in range(num_values):
        state = (1103515245 * state + 12345) % 2**31
        numbers.append(state / 2**30 - 1.0)
    x = torch.tensor(numbers, dtype=torch.float32)
    x = x * x * x * 2.0 ** -(torch.arange(num_values) // 64 % 7)
    x[64:128] = 0.0
    return x


def decoded(name: str, dtype: Any) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(json.loads(FIXTURE.read_text())[name]), dtype=dtype).copy())


def known() -> NF4:
    offset = decoded("offset", np.float32).reshape(())
    return NF4(decoded("packed", np.uint8), decoded("magnitudes", np.uint8), decoded("scales", np.float32), offset)


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def same_magnitudes(ours: NF4, theirs: NF4, largest: Tensor) -> None:
    """Equal, but next to the midpoint of two levels, where bitsandbytes' search on the CPU is only near."""
    share = (largest - ours.offset) / ours.scales.repeat_interleave(GROUP)[: len(largest)]
    other = (ours.magnitudes != theirs.magnitudes).nonzero().flatten()
    levels = magnitude_levels(CPU)
    between = (levels[ours.magnitudes[other].long()] + levels[theirs.magnitudes[other].long()]) / 2
    assert len(other) <= 0.02 * len(largest) + 1
    assert ((ours.magnitudes[other].int() - theirs.magnitudes[other].int()).abs() == 1).all()
    assert ((share[other] - between).abs() < 3e-5).all()


@pytest.mark.parametrize("runs", ["reference", "kernel"])
def test_it_is_byte_for_byte_bitsandbytes(runs: str) -> None:
    """Halves of bytes swapped, another code book, a mean left out: a checkpoint that reads as noise."""
    x, theirs = example(), known()
    on_gpu = runs == "kernel" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    with interpreted() if runs == "kernel" and not on_gpu else nullcontext():
        ours = NF4(*(part.cpu() for part in quantize_nf4(x.to(device))))
        values = dequantize_nf4(NF4(*(part.to(device) for part in theirs)), x.shape, torch.float32).cpu()
    assert torch.equal(ours.packed, theirs.packed)
    exact = 1e-6 if on_gpu else 0.0  # the offset is a mean, which CUDA adds in another order
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=exact, atol=0.0)
    torch.testing.assert_close(ours.offset, theirs.offset, rtol=exact, atol=0.0)
    same_magnitudes(ours, theirs, x.view(-1, 64).abs().amax(dim=1))
    assert digest(values) == json.loads(FIXTURE.read_text())["float32"]


def test_half_precision_is_that_of_bitsandbytes() -> None:
    """Values rounded twice."""
    for dtype in (torch.bfloat16, torch.float16):
        values = dequantize_nf4(known(), (64 * 260,), dtype)
        assert digest(values) == json.loads(FIXTURE.read_text())[str(dtype).removeprefix("torch.")]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bitsandbytes_itself_agrees(dtype: torch.dtype) -> None:
    """A change of its format."""
    import bitsandbytes.functional as bnb

    for num_values in (64 * 300, 64 * 7 + 2):
        x = (torch.randn(num_values, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
        theirs = NF4(packed.flatten(), state.absmax, state.state2.absmax, state.offset)
        ours = quantize_nf4(x)
        assert torch.equal(ours.packed, theirs.packed)
        blocks = torch.nn.functional.pad(x.float(), (0, -num_values % 64)).view(-1, 64)
        same_magnitudes(ours, theirs, blocks.abs().amax(dim=1))
        assert torch.equal(dequantize_nf4(theirs, x.shape, dtype), bnb.dequantize_4bit(packed, state).flatten())


def test_the_levels_divide_a_normal_distribution() -> None:
    """A mistyped number: the paper's appendix E makes the levels from quantiles of the normal distribution, eight
    evenly spaced from 0.5 to its end on the positive side with 0, seven on the negative side."""
    end = 0.9677083
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    positive = quantile(torch.linspace(0.5, end, 9, dtype=torch.float64))[1:]
    negative = -quantile(torch.linspace(0.5, end, 8, dtype=torch.float64))[1:].flip(0)
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]) / quantile(torch.tensor(end).double())
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), levels, rtol=0, atol=1e-6)


def test_errors_are_those_of_the_levels() -> None:
    """A block's magnitude applied to its neighbour; normal numbers lose about 9% (root mean square)."""
    x = torch.randn(64 * 512, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-1, 1, 512).repeat_interleave(64)
    error = dequantize_nf4(quantize_nf4(x), x.shape, torch.float32) - x
    largest = x.view(-1, 64).abs().amax(dim=1)
    gap = max(b - a for a, b in itertools.pairwise(LEVELS))
    # Half the widest gap, and what the 8 bits of a magnitude lose, at most 1/128 of their largest.
    limit = largest * gap / 2 + largest.max() / 128
    assert (error.view(-1, 64).abs().amax(dim=1) <= limit * 1.001).all()
    assert 0.05 < float(error.norm() / x.norm()) < 0.12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_nf4(torch.ones(64, dtype=torch.int32)), "floating"),
        (lambda: dequantize_nf4(quantize_nf4(torch.ones(128)), (64,)), r"of \[64\] they are"),
        (lambda: dequantize_nf4(quantize_nf4(torch.ones(64)), (64,), torch.float64), "torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    """Memory of another tensor read by a kernel."""
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_the_mean_is_what_a_constant_tensor_keeps() -> None:
    """Equal magnitudes: all of them in the offset, none in the 8 bits."""
    q = quantize_nf4(torch.full((640,), 3.0))
    assert float(q.offset) == 3.0
    assert not q.scales.any()
    assert (dequantize_nf4(q, (640,), torch.float32) == 3.0).all()
    assert math.isclose(q.packed.numel() * 8 / 640, 4.0)
