"""Forward and backward of a whole model on this rank, one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from data.batch import Batch
from models.decoder import Decoder, Head
from parallel.pipeline.stages import Stage
from trainer.heads import forward_head, in_evaluation, logits_head, logprobs_head, model_inputs
from trainer.step import TrainState


def forward_loss_sum(
    state: TrainState,
    batch: Batch,
    *,
    aux_scale: torch.Tensor | None = None,
    stage: Stage | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """The objective's sums of this micro-batch, fp32 [1 + D].

    Their backward adds aux_scale times the auxiliary losses'. Of a pipeline stage before the last: its hidden states.
    """
    result = state.model(
        **model_inputs(batch),
        aux_scale=aux_scale,
        head=state.objective.head(batch),
        ahead=state.objective.ahead(batch),
        stage=stage,
        hidden=hidden,
    )
    return result.view(-1) if stage is None or stage.is_last else result


class PlainPasses:
    """The whole model on this rank: one micro-batch after the other."""

    def backward(self, state: TrainState, microbatches: list[Batch], scales: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(scales, dtype=torch.float64)  # millions of tokens: fp32 would round
        aux_scale = None if state.routing is None else state.routing.aux_scale(state.loss_scale.scale)
        for i, batch in enumerate(microbatches):
            state.data_parallel.start_microbatch(last=i == len(microbatches) - 1)
            sums = forward_loss_sum(state, batch, aux_scale=aux_scale)
            sums.backward(scales)
            total += sums.detach()
        state.data_parallel.finish_backward()
        return total

    def sums(self, state: TrainState, microbatches: list[Batch]) -> torch.Tensor:
        return torch.stack([forward_loss_sum(state, batch).double() for batch in microbatches]).sum(0)

    def logits(self, state: TrainState, tokens: torch.Tensor, position: int) -> torch.Tensor:
        return state.model(tokens, head=logits_head(state.model, position)).float()

    def per_token(
        self, model: Decoder, microbatches: list[Batch], head: Callable[[Batch], Head], *, everywhere: bool = True
    ) -> list[torch.Tensor]:
        with in_evaluation(model), torch.no_grad():
            return [forward_head(model, batch, head(batch)) for batch in microbatches]

    def token_logprobs(
        self, model: Decoder, microbatches: list[Batch], *, temperature: float = 1.0
    ) -> list[torch.Tensor]:
        return self.per_token(model, microbatches, logprobs_head(model, temperature))
