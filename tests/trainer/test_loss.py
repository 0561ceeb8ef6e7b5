"""The loss of a global batch does not depend on how it is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.batch import IGNORE_INDEX
from trainer.loss import count_valid, token_loss_sum

ROWS, TOKENS, D, V = 6, 9, 5, 23


class TinyModel(nn.Module):
    """Embedding, a non-linear layer, output layer: gradients reach parameters before, in and after the head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, D, generator=generator, dtype=torch.float64))
        self.hidden = nn.Parameter(torch.randn(D, D, generator=generator, dtype=torch.float64))
        self.output = nn.Parameter(torch.randn(V, D, generator=generator, dtype=torch.float64))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return token_loss_sum(torch.tanh(self.embedding[tokens] @ self.hidden), self.output, labels)


def uneven_batch() -> tuple[Tensor, Tensor]:
    """Rows with 9, 1, 0, 5, 0 and 2 valid tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (ROWS, TOKENS), generator=generator)
    labels = torch.randint(V, (ROWS, TOKENS), generator=generator)
    for row, valid in enumerate((9, 1, 0, 5, 0, 2)):
        labels[row, valid:] = IGNORE_INDEX
    return tokens, labels


def train_on(parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the batch, run as one micro-batch per part (row indices), as trainer.loss says."""
    tokens, labels = uneven_batch()
    model = TinyModel()
    num_valid = sum(count_valid(labels[rows]) for rows in parts)
    loss = torch.zeros((), dtype=torch.float64)
    for rows in parts:
        part = model(tokens[rows], labels[rows]) / num_valid
        part.backward()
        loss += part.detach()
    return loss, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def textbook() -> tuple[Tensor, list[Tensor]]:
    """Mean cross entropy of the whole batch by torch, the independent reference."""
    tokens, labels = uneven_batch()
    model = TinyModel()
    logits = torch.tanh(model.embedding[tokens] @ model.hidden) @ model.output.t()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(ROWS)), st.lists(st.integers(0, ROWS), max_size=4))
def test_any_split_into_parts_gives_the_loss_and_gradients_of_the_whole(order: list[int], cuts: list[int]) -> None:
    """A division by the valid tokens of a part, or a part without any (some are even empty) that adds NaN."""
    bounds = [0, *sorted(cuts), ROWS]
    parts = [torch.tensor(order[a:b], dtype=torch.int64) for a, b in pairwise(bounds)]
    (loss, gradients), (expected_loss, expected_gradients) = train_on(parts), textbook()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert len(gradients) == len(expected_gradients) == 3
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_the_mean_of_means_is_another_loss() -> None:
    """Negative control: a batch so even that the usual mistake gives the right answer."""
    tokens, labels = uneven_batch()
    model = TinyModel()
    parts = [rows for rows in torch.arange(ROWS).split(1) if count_valid(labels[rows]) > 0]
    means = [model(tokens[rows], labels[rows]) / count_valid(labels[rows]) for rows in parts]
    loss, gradients = textbook()
    wrong = torch.stack(means).mean()
    wrong.backward()
    assert abs(wrong.item() / loss.item() - 1) > 0.05
    assert model.hidden.grad is not None
    assert (model.hidden.grad - gradients[1]).abs().max() > 0.05 * gradients[1].abs().max()


def test_valid_labels_are_counted_exactly() -> None:
    """A float count, which stops growing at 2^24 tokens, or a count of label 0 as padding."""
    _, labels = uneven_batch()
    labels[0, 0] = 0
    count = count_valid(labels)
    assert count.dtype == torch.int64
    assert count.shape == ()
    assert count.item() == 9 + 1 + 5 + 2
    assert count_valid(torch.full((2, 3), IGNORE_INDEX)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_fp32_whatever_the_compute_dtype(dtype: torch.dtype) -> None:
    """A sum in bf16 has three digits: steps of 32 nats at 4096 tokens of 2 nats."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 1024, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    labels = torch.randint(V, (4, 1024), generator=generator)
    loss = token_loss_sum(hidden, weight, labels)
    logits = nn.functional.linear(hidden, weight).double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
