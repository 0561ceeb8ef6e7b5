"""Philox: published vectors, an implementation in Python integers, independence of the cut, and the distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.philox import four_uniforms, normal, philox4x32, stream_id, uniform

# kat_vectors of Random123 (philox 4x32 10): counter, key, output.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's definition in Python's unbounded integers: the independent reference."""
    (a, b, c, d), (k, j) = counter, key
    for i in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        round_key = ((k + i * 0x9E3779B9) % 2**32, (j + i * 0xBB67AE85) % 2**32)
        a, b, c, d = (q >> 32) ^ b ^ round_key[0], q % 2**32, (p >> 32) ^ d ^ round_key[1], p % 2**32
    return [a, b, c, d]


def philox_in_tensors(counter: list[int], key: list[int]) -> list[int]:
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), (key[0], key[1]))
    return [int(word) for word in words]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_published_known_answers_come_out(counter: list[int], key: list[int], expected: list[int]) -> None:
    """A wrong constant, word order or number of rounds: still random looking, and not Philox."""
    assert philox_in_tensors(counter, key) == expected


WORD = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(WORD, min_size=4, max_size=4), st.lists(WORD, min_size=2, max_size=2))
def test_any_counter_and_key_agree_with_python_integers(counter: list[int], key: list[int]) -> None:
    """A lost carry or a sign bit in the 64-bit product, which a few fixed vectors can miss."""
    assert philox_in_tensors(counter, key) == philox_in_integers(counter, key)


def test_four_numbers_of_an_index_are_its_four_words() -> None:
    """A word that comes twice: features with the same draw."""
    found = four_uniforms(5, 9, torch.tensor([[2**40 + 3, 1]]))
    words = torch.tensor([philox_in_integers([3, 2**8, 9, 0], [5, 0]), philox_in_integers([1, 0, 9, 0], [5, 0])])
    assert torch.equal(found, (words >> 8)[None] * 2.0**-24)
    assert torch.equal(found[..., 0], uniform(5, 9, torch.tensor([[2**40 + 3, 1]])))


def test_key_words_may_be_tensors() -> None:
    """A key tensor (one key per element) that is not broadcast or not masked."""
    counter, key, expected = KNOWN_ANSWERS[2]
    words = philox4x32(
        tuple(torch.tensor([word, word]) for word in counter), (torch.tensor([key[0], 5]), torch.tensor([key[1], 6]))
    )
    assert [int(word[0]) for word in words] == expected
    assert [int(word[1]) for word in words] == philox_in_integers(counter, [5, 6])


@pytest.mark.parametrize("index", [0, 1, 2**31, 2**32, 2**40 + 7, 2**63 - 1, -1, -(2**63)])
def test_all_64_bits_of_index_seed_and_stream_count(index: int) -> None:
    """A high word that is dropped, or sign-extended: weights beyond 2^32 elements would repeat."""
    seed, stream = 2**64 - 3, 2**63 + 11
    unsigned = index % 2**64
    counter = [unsigned % 2**32, unsigned >> 32, stream % 2**32, stream >> 32]
    word = philox_in_integers(counter, [seed % 2**32, seed >> 32])[0]
    value = uniform(seed, stream, torch.tensor([index]))
    assert value.item() == (word >> 8) / 2**24


def test_uniform_is_fp32_in_the_half_open_unit_interval_on_a_grid_of_24_bits() -> None:
    """Rounding of the top words up to 1.0: a dropout probability of 1 - 2^-25 would keep elements."""
    value = uniform(0, "grid", torch.arange(1 << 16).view(256, 256))
    assert value.dtype == torch.float32
    assert value.shape == (256, 256)
    assert value.min() >= 0
    assert value.max() < 1
    on_grid = value.double() * 2**24
    assert torch.equal(on_grid, on_grid.round())


def test_normal_is_box_muller_of_the_first_two_words() -> None:
    """A series cut too early, or an angle that covers part of the circle."""
    index = torch.arange(20_000)
    counter = (index, torch.zeros_like(index), torch.full_like(index, 9), torch.zeros_like(index))
    first, second, _, _ = philox4x32(counter, (4, 0))
    radius = (-2 * ((first + 1).double() / 2**32).log()).sqrt()
    expected = radius * torch.cos(2 * math.pi * (second.double() / 2**32 - 0.5))
    torch.testing.assert_close(normal(4, 9, index).double(), expected, rtol=1.2e-7, atol=1e-9)


def test_the_largest_and_smallest_words_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    """log 0 for the word 0, or the square root of a negative number for the word 2^32 - 1."""
    from kernels.philox import reference

    extremes = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    first, second = torch.meshgrid(extremes, extremes, indexing="ij")
    monkeypatch.setattr(reference, "philox4x32", lambda counter, key: (first, second, first, first))
    value = normal(0, 0, torch.zeros(5, 5, dtype=torch.int64))
    expected = (-2 * ((first + 1).double() / 2**32).log()).sqrt() * torch.cos(math.pi * (second.double() / 2**31 - 1))
    assert value.isfinite().all()
    assert value.abs().max() < 6.67
    torch.testing.assert_close(value.double(), expected, rtol=1.2e-7, atol=1e-9)


@pytest.mark.parametrize("function", [uniform, normal])
def test_any_cut_of_the_index_gives_the_same_bits(function: Callable[..., torch.Tensor]) -> None:
    """log and cos of a loop's vector body differing from those of its tail: shards would disagree in the last bit."""
    index = torch.arange(10_007) * 1_234_567_891
    whole = function(3, "cut", index)
    for size in (1, 3, 17, 1000):
        part = index[: 60 * size]
        pieces = torch.cat([function(3, "cut", piece) for piece in part.split(size)])
        assert torch.equal(pieces.view(torch.int32), whole[: part.numel()].view(torch.int32))
    strided = function(3, "cut", index[: 2 * 5000].view(5000, 2)[:, 1])
    assert torch.equal(strided, whole[1:10_000:2])


def test_compiled_and_eager_agree() -> None:
    """A construct torch.compile cannot trace (hashing), or overflow that compiled C++ treats as undefined."""

    def program(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return uniform(7, "compiled", index), normal(7, "compiled", index)

    index = torch.arange(-5000, 5003) * 987_654_321_123
    (compiled_uniform, compiled_normal), (eager_uniform, eager_normal) = (
        torch.compile(program, fullgraph=True)(index),
        program(index),
    )
    assert torch.equal(compiled_uniform, eager_uniform)
    # compiled fp64 may fuse products into sums: the same to one rounding of fp32
    torch.testing.assert_close(compiled_normal, eager_normal, rtol=1.2e-7, atol=0)


def test_uniform_fills_its_bins_evenly() -> None:
    """Bits that are not uniform: chi-square of 256 bins has mean 255 and standard deviation 22.6."""
    n, bins = 1 << 18, 256

    def chi_square(value: torch.Tensor) -> float:
        counts = torch.histc(value, bins, 0, 1)
        return float(((counts - n / bins) ** 2 / (n / bins)).sum())

    value = uniform(0, "bins", torch.arange(n))
    low_bits = (value.double() * 2**16).frac().float()
    assert 150 < chi_square(value) < 370
    assert 150 < chi_square(low_bits) < 370
    assert chi_square(value**1.05) > 370, "the test must see a distribution that is off by 5%"


def test_normal_has_the_normal_distribution() -> None:
    """A skewed tail. Kolmogorov-Smirnov: sqrt(n) times the largest gap to the distribution is below 1.95 (99.9%)."""
    n = 1 << 18

    def gap(value: torch.Tensor) -> float:
        cumulative = torch.special.ndtr(value.double().sort().values)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        return math.sqrt(n) * float(torch.maximum(steps[1:] - cumulative, cumulative - steps[:-1]).max())

    value = normal(0, "gap", torch.arange(n))
    assert gap(value) < 1.95
    assert abs(float((value**4).mean()) - 3) < 0.06
    assert gap(value * 1.02) > 1.95, "the test must see a standard deviation that is off by 2%"


def test_seeds_streams_and_neighbours_are_uncorrelated() -> None:
    """A seed or stream that only shifts the counter: the same numbers again, some places on."""
    n = 1 << 16
    index = torch.arange(n)
    base = normal(0, "a", index)
    others = {
        "seed": normal(1, "a", index),
        "high half of the seed": normal(1 << 32, "a", index),
        "stream": normal(0, "b", index),
        "next index": normal(0, "a", index + 1),
        "high half of the index": normal(0, "a", index + (1 << 32)),
    }
    for name, other in others.items():
        assert abs(float((base * other).mean())) < 5 / math.sqrt(n), name
    assert float((base * normal(0, "a", index)).mean()) > 0.9, "the test must see a stream that repeats"


def test_the_number_of_a_stream_is_the_same_in_every_process() -> None:
    """Python's hash(), which is salted: every process would draw other weights."""
    assert stream_id("layers.0.attention.wq.weight") == 0x09C2CEA9DD80BA4C
    assert stream_id(12) == 12


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_numbers_beyond_64_bits_are_refused(seed: int, stream: int) -> None:
    """Bits cut off in silence: two seeds would share their weights."""
    with pytest.raises(ValueError, match=r"is not an unsigned 64-bit number"):
        uniform(seed, stream, torch.arange(3))


def test_an_index_of_another_dtype_is_refused() -> None:
    """An int32 index wraps at 2^31 elements, a float one skips elements: both repeat numbers in silence."""
    with pytest.raises(TypeError, match=r"torch\.int64"):
        normal(0, 0, torch.arange(3, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("function", [uniform, normal])
def test_cuda_and_cpu_draw_the_same_bits(function: Callable[..., torch.Tensor]) -> None:
    """A library's log or cosine: a model initialized on GPUs could not be compared with one made on a CPU."""
    index = torch.arange(1 << 20) * 7_654_321_987
    assert torch.equal(function(3, "device", index.cuda()).cpu(), function(3, "device", index))
