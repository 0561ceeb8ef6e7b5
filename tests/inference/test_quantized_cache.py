"""Keys and values in 8 bits: half the memory, an error that is bounded, and the same tokens under every feature."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import inference.pages
from inference.config import CACHE_DTYPES, EngineConfig, SamplingConfig
from inference.engine import Engine
from kernels.paged_attention import reference
from models.config import ModelConfig
from models.decoder import Decoder
from models.mla_config import MLAConfig
from tests.inference.greedy import GREEDY, prompts_of, run_preempting
from tests.models.small import random_decoder, tiny

PROMPTS = prompts_of([1, 8, 12, 17, 23], shared=7)
SCORED = SamplingConfig(temperature=0, max_tokens=1, prompt_logprobs=True)
MODELS: dict[str, ModelConfig] = {
    "llama": tiny(),
    "masked": tiny(attention_sinks=True, sliding_window=5, sliding_window_layers=[1]),
    "mla": tiny(num_kv_heads=None, head_dim=None, mla=MLAConfig(kv_rank=10, nope_dim=4, rope_dim=6, value_dim=7)),
}
LIMITS = {"int8": 0.05, "fp8": 0.4}
"""Of the difference of a log-probability; those of these models are about 4."""
quantized = pytest.mark.parametrize("dtype", LIMITS)


@cache
def served(name: str) -> Decoder:
    return random_decoder(MODELS[name]).double()


def error_of(name: str, dtype: str) -> float:
    """The largest difference that a quantised cache makes in the log-probability of a prompt's token."""

    def logprobs(cache_dtype: str) -> Tensor:
        engine = Engine(served(name), EngineConfig(block_size=4, cache_dtype=cache_dtype))
        found = (completion.prompt_logprobs or [] for completion in engine.generate(PROMPTS, SCORED))
        return torch.tensor([x for prompt in found for x in prompt[1:]])

    return float((logprobs(dtype) - logprobs("auto")).abs().max())


@quantized
@pytest.mark.parametrize("name", MODELS)
def test_what_a_quantised_cache_changes_is_bounded(name: str, dtype: str) -> None:
    """Scales of other tokens or heads; codes that wrap around."""
    assert 1e-6 < error_of(name, dtype) < LIMITS[dtype]


@quantized
def test_a_wrong_scale_breaks_that_bound(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    right = reference.quantize_rows

    def wrong(x: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
        values, scales = right(x, codes)
        return values, scales.roll(1, dims=-1) * 1.5

    monkeypatch.setattr(reference, "quantize_rows", wrong)
    assert error_of("llama", dtype) > LIMITS[dtype]


@quantized
@pytest.mark.parametrize("name", MODELS)
def test_no_feature_changes_the_tokens(name: str, dtype: str) -> None:
    """Codes that are swapped or shared without their scales; a chunk that attends to what was not rounded."""
    plain = EngineConfig(block_size=4, cache_dtype=dtype, prefix_cache=False)
    expected = [completion.token_ids for completion in Engine(served(name), plain).generate(PROMPTS, GREEDY)]
    swapping = EngineConfig(
        block_size=4,
        num_blocks=8,
        host_blocks=8,
        max_sequences=4,
        max_batch_tokens=7,
        preemption="swap",
        cache_dtype=dtype,
    )
    engine = Engine(served(name), swapping)
    found = run_preempting(engine, PROMPTS, GREEDY)
    assert [completion.token_ids for completion in found] == expected
    assert engine.counts.swapped > 0
    assert engine.counts.cached_tokens > 0


@quantized
def test_the_cache_takes_half_the_memory_and_so_holds_twice_as_much(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes in the dtype of the weights; scales as large as what they scale; memory that nobody fills."""
    monkeypatch.setattr(inference.pages, "CPU_CACHE_BYTES", 2**20)
    model = random_decoder(tiny(head_dim=128)).bfloat16()
    wide, narrow = (Engine(model, EngineConfig(cache_dtype=name)).runner for name in ("auto", dtype))
    bytes_per_block = [runner._pages.nbytes / runner.num_blocks for runner in (wide, narrow)]
    assert bytes_per_block[1] == (128 + 4) / 256 * bytes_per_block[0]
    assert narrow.num_blocks >= 1.93 * wide.num_blocks
    assert narrow._keys.dtype == CACHE_DTYPES[dtype]


@quantized
def test_codes_are_the_nearest_there_are(dtype: str) -> None:
    """A rounding down, or a scale by which the largest element overflows."""
    codes = CACHE_DTYPES[dtype]
    assert codes is not None
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    found, scales = reference.quantize_rows(x, codes)
    if codes == torch.int8:
        every = torch.arange(-127, 128).double()
    else:
        every = torch.arange(256, dtype=torch.uint8).view(codes).double()
        every = every[every.isfinite()]
    error = (found.double() * scales[:, None] - x).abs()
    least = (every * scales[:, None, None] - x[:, :, None]).abs().amin(-1)
    torch.testing.assert_close(error, least, rtol=1e-5, atol=0)
    assert (scales * reference.LARGEST[codes]).allclose(x.abs().amax(-1))


def test_an_unknown_dtype_of_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.cache_dtype=fp4 is unknown; use auto, fp8, int8"):
        Engine(served("llama"), EngineConfig(cache_dtype="fp4"))
