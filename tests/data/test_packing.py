"""Packing: which tokens a sample holds, against slow and obvious code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import IGNORE_INDEX
from data.config import DataError
from data.corpus import Corpus
from data.order import permutation
from data.packing import Blend, FlatTokens, PackedDocuments, Proportions, Sample, make_batch, split_tokens

EOS = 0


def corpus(lengths: list[int]) -> Corpus:
    """Documents of these lengths; every token but the eos at each end is unique."""
    ends = np.cumsum(lengths)
    tokens = np.arange(1, ends[-1] + 1, dtype=np.uint16)
    tokens[ends - 1] = EOS
    return Corpus(tokens, ends - np.asarray(lengths), ends, "content")


def documents(of: Corpus) -> list[list[int]]:
    return [of.tokens[a:b].tolist() for a, b in zip(of.starts, of.ends, strict=True)]


def packed(of: Corpus, seq_len: int, key: tuple[int, ...] | None = (7, 0)) -> PackedDocuments:
    return PackedDocuments(of, seq_len=seq_len, key=key, what="test")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    seq_len=st.integers(1, 13),
    shuffle=st.booleans(),
)
def test_an_epoch_is_every_document_once_joined_and_cut_into_overlapping_samples(lengths, seq_len, shuffle):
    """A sample that starts one token off, skips the rest of a document or a document altogether."""
    source = corpus(lengths)
    if sum(lengths) < seq_len + 1:
        with pytest.raises(DataError, match=str(sum(lengths))):
            packed(source, seq_len)
        return
    samples = packed(source, seq_len, (7, 0) if shuffle else None)
    for epoch in (0, 2, 1):  # out of order, as several workers and a resumed run ask
        order = permutation(len(lengths), 7, 0, epoch) if shuffle else range(len(lengths))
        stream = [token for i in order for token in documents(source)[i]]
        starts = {sum(lengths[j] for j in order[:i]) for i in range(len(lengths))}
        count = (len(stream) - 1) // seq_len
        assert samples.samples_per_epoch == count
        for i in range(count):
            sample = samples[epoch * count + i]
            window = range(i * seq_len, i * seq_len + seq_len + 1)
            assert sample.tokens.tolist() == [stream[t] for t in window]
            assert sample.starts.tolist() == [t - i * seq_len for t in window if t in starts]


def test_a_permutation_is_the_same_on_every_machine():
    """Runs that resume elsewhere, or under another numpy, would see other data: the order is part of the format."""
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    assert sorted(permutation(1000, 5, 0)) == list(range(1000))


def test_epochs_and_seeds_and_sources_have_different_orders():
    """One order repeated every epoch, or shared by the parts of a blend."""
    orders = [tuple(permutation(50, *key)) for key in [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]]
    assert len(set(orders)) == 4


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=3, max_size=12), seq_len=st.integers(2, 11))
def test_masked_documents_restart_positions_and_hide_the_next_documents_first_token(lengths, seq_len):
    """Attention that leaks across documents, positions that run on, a loss for guessing an unrelated beginning; and,
    for a batch of one, labels that share memory with the tokens."""
    source = corpus(lengths)
    if sum(lengths) < seq_len + 1:
        return
    samples = packed(source, seq_len)
    numbers = list(range(2 * samples.samples_per_epoch))
    batch = make_batch([samples[n] for n in numbers], numbers, mask_documents=True)
    for row, number in enumerate(numbers):
        position, document = 0, 0
        starts = set(samples[number].starts.tolist())
        for t in range(seq_len):
            if t > 0 and t in starts:
                position, document = 0, document + 1
            assert (batch.positions[row, t], batch.documents[row, t]) == (position, document)
            expected = IGNORE_INDEX if t + 1 in starts else samples[number].tokens[t + 1]
            assert batch.labels[row, t] == expected
            position += 1
        # The end of a document is predicted; only what follows it is not.
        ignored = batch.labels[row] == IGNORE_INDEX
        assert (batch.tokens[row][ignored] == EOS).all()
        assert batch.tokens[row].tolist() == samples[number].tokens[:-1].tolist()
        alone = make_batch([samples[number]], [number], mask_documents=True)
        assert torch.equal(alone.tokens[0], batch.tokens[row])
        assert torch.equal(alone.labels[0], batch.labels[row])
    assert batch.documents.dtype == torch.int32
    assert batch.samples.tolist() == numbers


def test_without_masking_every_position_has_a_label_and_counts_on():
    """Boundaries applied though nobody asked for them."""
    samples = packed(corpus([3, 4, 5, 6]), 5)
    batch = make_batch([samples[0], samples[1]], [10, 11], mask_documents=False)
    assert batch.documents is None
    assert (batch.labels != IGNORE_INDEX).all()
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert all(t.is_contiguous() for t in (batch.tokens, batch.labels, batch.positions))


def test_flat_tokens_in_order_follow_the_contract():
    """Sample i is tokens[i T : (i+1) T + 1], also past the end of the array, where the next epoch begins."""
    tokens = np.arange(100, 171, dtype=np.int32)
    samples = FlatTokens(tokens, seq_len=7, key=None, what="test", eos_id=None)
    assert samples.samples_per_epoch == 10
    for i in range(25):
        assert samples[i].tokens.tolist() == tokens[(i % 10) * 7 : (i % 10 + 1) * 7 + 1].tolist()


def test_shuffled_flat_tokens_are_the_same_samples_once_per_epoch_in_new_order():
    """Samples drawn with replacement, or the same order every epoch."""
    samples = FlatTokens(np.arange(71), seq_len=7, key=(1, 0), what="test", eos_id=None)
    epochs = [[int(samples[e * 10 + i].tokens[0]) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(0, 70, 7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[0])
    assert samples[3].tokens[0] == epochs[0][3]


def test_flat_tokens_find_documents_by_their_end():
    """A document that begins at its eos instead of after it."""
    tokens = np.array([5, 6, EOS, 7, EOS, EOS, 8, 9, 10])
    samples = FlatTokens(tokens, seq_len=8, key=None, what="test", eos_id=EOS)
    assert samples[0].starts.tolist() == [3, 5, 6]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 400), fraction=st.floats(0.001, 0.95))
def test_held_out_documents_are_never_trained_on(count, fraction):
    """Validation loss measured on what was trained on. One at least is held out, and one at least is left."""
    source = corpus([3] * count)
    train, validation = source.split(fraction)
    a, b = set(train.starts.tolist()), set(validation.starts.tolist())
    assert not a & b
    assert a | b == set(source.starts.tolist())
    assert len(b) == min(count - 1, max(1, round(fraction * count)))


def test_a_single_document_is_cut_for_validation():
    """One big text file: holding out documents would leave nothing to train on."""
    train, validation = corpus([1000]).split(0.1)
    assert documents(train)[0] + documents(validation)[0] == documents(corpus([1000]))[0]
    assert validation.num_tokens == 100


def test_no_validation_fraction_holds_out_nothing():
    """A document lost to a validation nobody runs."""
    train, validation = corpus([3, 4]).split(0.0)
    assert train.num_tokens == 7
    assert validation.num_tokens == 0


def test_flat_tokens_hold_out_their_end_and_keep_the_order_of_the_rest():
    """A hash-chosen validation would disturb the promised order."""
    tokens = np.arange(101)
    train, validation = split_tokens(tokens, 10, 0.2)
    assert train.tolist() == list(range(81))
    assert validation.tolist() == list(range(80, 101))
    assert split_tokens(tokens, 10, 0.0)[0] is tokens


class Numbers:
    """A source whose sample n is the pair (name, n)."""

    def __init__(self, name: int, count: int = 10**9) -> None:
        self.name = name
        self.count = count

    def available(self, wanted: int) -> int:
        return min(wanted, self.count)

    def __getitem__(self, number: int) -> Sample:
        return Sample(np.array([self.name, number]), np.empty(0, np.int64))


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), begin=st.sampled_from([0, 10**12]))
def test_a_blend_takes_each_sources_samples_in_order_and_in_proportion(weights, begin):
    """A sample repeated or skipped within a source, or a proportion that drifts; from the start or resumed far on."""
    blend = Blend([Numbers(k) for k in range(len(weights))], weights)
    taken: list[list[int]] = [[] for _ in weights]
    for n in range(begin, begin + 300):
        source, number = blend[n].tokens.tolist()
        taken[source].append(number)
        if begin == 0:
            for k, weight in enumerate(weights):
                assert abs(len(taken[k]) - weight / sum(weights) * (n + 1)) <= len(weights) / 2 + 1e-9
    for k, numbers in enumerate(taken):
        if numbers:
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert math.isclose(numbers[0], begin * weights[k] / sum(weights), rel_tol=1e-9, abs_tol=2)


def test_a_blend_is_exact_over_a_whole_period():
    """Weights as binary fractions: after 10 samples of 0.7 and 0.3 there are 7 and 3, for ever."""
    proportions = Proportions([0.7, 0.3])
    for period in (0, 10**6):
        names = [proportions.locate(10 * period + i)[0] for i in range(10)]
        assert (names.count(0), names.count(1)) == (7, 3)
    assert Blend([Numbers(0, 30), Numbers(1, 30)], [0.75, 0.25]).available(100) == 40


def test_too_little_data_says_how_little(tmp_path: Path):
    """An endless loop, or a division by zero, on a corpus shorter than one sequence."""
    with pytest.raises(DataError, match=r"holds 7 tokens in 2 documents.*train.seq_len \+ 1 = 8"):
        packed(corpus([3, 4]), 7)
    with pytest.raises(DataError, match="holds 0 tokens"):
        FlatTokens(np.empty(0, np.int32), seq_len=4, key=None, what="test", eos_id=None)
