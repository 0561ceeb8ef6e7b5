"""NEFTune's noise: its range by the length of each document, its draws, and where the decoder adds it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from kernels.philox import stream_id
from models.layers.embedding_noise import EmbeddingNoise, lengths_of
from tests.kernels.test_philox import philox_in_integers
from tests.models.small import random_decoder, tiny

ALPHA, D = 5.0, 90
LENGTHS = [[7, 60, 1, 32], [100]]  # of the documents of each row


def documents_of(lengths: list[list[int]]) -> Tensor:
    return torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in lengths]).int()


def noise_of(lengths: list[list[int]], samples: list[int], alpha: float = ALPHA, seed: int = 3) -> Tensor:
    documents = documents_of(lengths)
    zeros = torch.zeros(*documents.shape, D)
    return EmbeddingNoise(alpha, seed=seed)(zeros, samples=torch.tensor(samples), documents=documents)


def test_each_document_has_the_noise_of_its_own_length() -> None:
    """The length of the row, or of the row without padding: noise that depends on packing."""
    noise = noise_of(LENGTHS, [0, 1])
    for row, lengths in zip(noise, LENGTHS, strict=True):
        for part, length in zip(row.split(lengths), lengths, strict=True):
            bound = ALPHA / math.sqrt(length * D)
            assert 0.9 * bound < part.abs().max() <= bound
            count = part.numel()
            assert abs(part.mean()) < 5 * bound / math.sqrt(3 * count)  # five standard deviations of a mean
            assert part.square().mean() == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(0.8 / count))


def test_of_a_row_without_padding_it_is_as_large_as_in_transformers() -> None:
    """A factor of two, or a mean over features instead of the root."""
    module = torch.nn.Embedding(4, D)
    module.neftune_noise_alpha = ALPHA  # type: ignore[assignment]
    theirs = neftune_post_forward_hook(module, (), torch.zeros(1, 100, D))
    ours = noise_of([[100]], [0])
    assert ours.std() == pytest.approx(theirs.std().item(), rel=0.03)
    assert ours.abs().max() == pytest.approx(theirs.abs().max().item(), rel=0.01)


def test_draws_are_philox_of_seed_sample_token_and_feature() -> None:
    """Two places of the run that share a draw; features of one counter that are the same word."""
    noise = noise_of([[40, 60]], [2**33 + 5], seed=11)
    site = stream_id("neftune")
    for token, feature in ((0, 0), (39, 2), (99, D - 1)):
        index = ((2**33 + 5) * 100 + token) * math.ceil(D / 4) + feature // 4
        words = philox_in_integers([index % 2**32, index >> 32, site % 2**32, site >> 32], [11, 0])
        drawn = (words[feature % 4] >> 8) * 2.0**-24
        expected = (2 * drawn - 1) * ALPHA / math.sqrt((40 if token < 40 else 60) * D)
        assert noise[0, token, feature].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_rows_and_tokens_alone_have_the_noise_they_have_together() -> None:
    """Draws by the place in a micro-batch, or in a rank's part of a sequence."""
    together = noise_of(LENGTHS, [4, 9])
    assert torch.equal(noise_of(LENGTHS[1:], [9]), together[1:])
    tokens = torch.tensor([99, 8, 3])
    documents, layer = documents_of(LENGTHS), EmbeddingNoise(ALPHA, seed=3)
    some = layer(torch.zeros(2, 3, D), samples=torch.tensor([4, 9]), documents=documents, tokens=tokens)
    assert torch.equal(some, together[:, tokens])
    assert not torch.equal(noise_of(LENGTHS, [4, 10])[1], together[1])


def test_alpha_of_zero_changes_no_bit_and_evaluation_has_none() -> None:
    x, documents = torch.randn(2, 100, D), documents_of(LENGTHS)
    assert torch.equal(EmbeddingNoise(0.0, seed=0)(x, samples=torch.tensor([0, 1]), documents=documents), x)
    assert EmbeddingNoise(ALPHA, seed=0).eval()(x, samples=None, documents=None) is x


def test_in_bf16_the_sum_is_rounded_and_not_the_noise() -> None:
    x, documents, samples = torch.randn(2, 100, D).bfloat16(), documents_of(LENGTHS), torch.tensor([0, 1])
    layer = EmbeddingNoise(ALPHA, seed=0)
    wide = layer(x.float(), samples=samples, documents=documents)
    assert torch.equal(layer(x, samples=samples, documents=documents), wide.bfloat16())


def test_lengths_are_those_of_counting() -> None:
    documents = torch.tensor([[0, 0, 3, 3, 3, 7], [1, 2, 2, 2, 2, 2]], dtype=torch.int32)
    assert lengths_of(documents).tolist() == [[2, 2, 3, 3, 3, 1], [1, 5, 5, 5, 5, 5]]


def test_the_decoder_adds_it_once_to_what_the_first_block_gets() -> None:
    """Noise on positions, behind each block, or in evaluation; a gradient that it changes."""
    model = random_decoder(tiny(positions="learned"))
    model.embedding_noise = EmbeddingNoise(ALPHA, seed=3)
    seen: list[Tensor] = []
    model.blocks.get_submodule("0").register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    documents, samples = torch.tensor([[0] * 5 + [1] * 4] * 2, dtype=torch.int32), torch.tensor([6, 7])
    tokens = torch.randint(model.config.vocab_size, documents.shape)
    for training in (True, False):
        model.train(training)(tokens, documents=documents, samples=samples)
    added = seen[0] - seen[1]
    expected = EmbeddingNoise(ALPHA, seed=3)(torch.zeros_like(added), samples=samples, documents=documents)
    assert added.abs().max() > 0.1
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="needs the sample number of each row and the documents"):
        model.train()(tokens, samples=samples)
