"""What is asked of a model besides the loss: heads for Decoder.forward, and how a micro-batch is given to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from data.batch import Batch
from models.decoder import Decoder, Head
from parallel.pipeline.stages import Stage
from trainer.loss import token_losses, vocabulary_shard


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What of a micro-batch Decoder.forward takes."""
    names = ("tokens", "positions", "documents", "samples", "indices", "cut")
    return {name: getattr(batch, name) for name in names}


def forward_head(
    model: Decoder, batch: Batch, head: Head, *, stage: Stage | None = None, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """What a head makes of a micro-batch, or the hidden states of a pipeline stage before the last."""
    return model(
        **model_inputs(batch),
        head=head,
        stage=stage,
        hidden=hidden,
    )


def logprobs_head(model: Decoder, temperature: float = 1.0) -> Callable[[Batch], Head]:
    """Heads for `Passes.per_token`: log-probabilities of labels [B, T], under logits divided by temperature."""
    vocabulary = vocabulary_shard(model.config.vocab_size, model.groups)

    def of_batch(batch: Batch) -> Head:
        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            losses = token_losses(
                hidden,
                weight,
                batch.labels,
                vocabulary=vocabulary,
                temperature=temperature,
                batch_invariant=model.batch_invariant,
            )
            return -losses.float()

        return head

    return of_batch


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout and routers' reports while this lasts."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def logits_head(model: nn.Module, position: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A head for Decoder.forward: logits [B, V] after one token, of all words whatever part of them a rank has."""

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert isinstance(model.head, nn.Module)
        return model.head(hidden[:, position], weight)

    return head
