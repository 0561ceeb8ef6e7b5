"""One training step: forward and backward of every micro-batch, one update. The same arithmetic on every layout.

    loss = sum of token losses / number of valid tokens, both over the global batch

Each rank divides by the global count before backward, so gradients only ever need to be summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from data.batch import Batch
from kernels.linear_cross_entropy import VocabularyShard
from models.decoder import Decoder, Head
from models.fp8 import Fp8Linears
from parallel.activation_budget import Choice
from parallel.data import DataParallel
from parallel.fused import Parts, separate
from parallel.pipeline.stages import Stage
from parallel.regions import Located
from trainer.loss import count_all_valid, count_valid, token_loss_sum
from trainer.loss_scale import LossScale
from trainer.optim import Optimizer, clip_coefficient, global_grad_norm
from trainer.routing import RoutingMonitor


class Passes(Protocol):
    """Forward and backward over this rank's micro-batches, plain or pipelined. Collective over all ranks."""

    def backward(self, state: TrainState, microbatches: list[Batch], per_token: torch.Tensor) -> torch.Tensor:
        """Leave in every master's `.grad` that of per_token * token losses, summed over micro-batches and ranks.

        per_token: fp32 [1 + D], for the next token and each of D further ones (`Batch.ahead`). Returns the sums of the
        token losses of these micro-batches, fp64 [1 + D].
        """
        ...

    def loss_sum(self, state: TrainState, microbatches: list[Batch]) -> torch.Tensor:
        """Sum of the token losses of these micro-batches, of the next token alone, 0-d fp64, without gradients."""
        ...

    def logits(self, state: TrainState, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Logits [B, V] fp32 that follow tokens [B, T] at `position`, on every rank."""
        ...


@dataclass
class TrainState:
    """Everything a step reads and changes."""

    model: Decoder
    data_parallel: DataParallel
    optimizer: Optimizer
    loss_scale: LossScale
    token_group: dist.ProcessGroup  # ranks with different tokens of the global batch
    device: torch.device
    grad_clip: float  # largest global gradient norm; 0: none
    compile_loss: bool
    fused: Mapping[str, Parts] = field(default_factory=dict)  # of the masters, by name: parallel.fused.fused_parameters
    passes: Passes = field(default_factory=lambda: PlainPasses())
    loss_weights: torch.Tensor | None = None  # [1 + D]: trainer.loss.loss_weights; None: the next token is all
    vocabulary: VocabularyShard | None = None  # this rank's words of the output layer; None: all
    routing: RoutingMonitor | None = None  # of a mixture of experts
    fp8: Fp8Linears | None = None  # the layers that multiply in fp8
    stage_group: dist.ProcessGroup | None = None  # ranks with the other stages of the model; None: this one has all
    copies: frozenset[str] = frozenset()  # masters here that are copies of another stage's (a tied embedding)
    activation_plan: dict[str, Choice] = field(
        default_factory=dict
    )  # by block; empty: no budget. Filled by build_state
    step: int = 0  # updates attempted so far; filled by train_step

    def weights(self) -> dict[str, Located]:
        """What makes the model, by name: masters, and buffers, which every rank holds whole. Of fused parameters their
        parts: names and whole shapes depend on no layout."""
        return separate(self.data_parallel.masters | dict(self.model.named_buffers()), self.fused)

    def state_tensors(self) -> dict[str, Located]:
        """Every tensor a checkpoint holds, by name, as of `weights`. Loaded in place."""
        tensors = {f"model/{name}": tensor for name, tensor in self.data_parallel.masters.items()}
        tensors |= {f"model/{name}": tensor for name, tensor in self.model.named_buffers()}
        tensors |= {f"optim/{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        if self.fp8 is not None:
            tensors |= {f"fp8/{name}": tensor for name, tensor in self.fp8.state_tensors().items()}
        tensors |= {f"loss_scale/{name}": t for name, t in self.loss_scale.state_tensors().items()}
        return separate(tensors, self.fused)


@dataclass
class StepMetrics:
    """Results of a step, still on the device: reading them waits for the step."""

    loss: torch.Tensor  # 0-d fp32; mean over the valid tokens of the global batch, before the update
    grad_norm: torch.Tensor  # 0-d fp32; global L2 norm before clipping
    skipped: torch.Tensor  # 0-d fp32; 1 if nothing was updated: loss or gradients not finite, or choices left over
    valid_tokens: torch.Tensor  # 0-d int64; tokens with a label in the global batch
    loss_scale: torch.Tensor  # 0-d fp32; what this step's loss was scaled by
    extra: dict[str, torch.Tensor] = field(default_factory=dict)  # more metrics by name, 0-d


def forward_loss_sum(
    state: TrainState,
    batch: Batch,
    *,
    aux_scale: torch.Tensor | None = None,
    stage: Stage | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums of this micro-batch's token losses, fp32 [1 + D]: of the next token and of those in `batch.ahead`.

    Their backward adds aux_scale times the auxiliary losses'. Of a pipeline stage before the last: its hidden states.
    """

    def head(labels: torch.Tensor) -> Head:
        return partial(token_loss_sum, labels=labels, compile=state.compile_loss, vocabulary=state.vocabulary)

    result = state.model(
        batch.tokens,
        positions=batch.positions,
        documents=batch.documents,
        samples=batch.samples,
        indices=batch.indices,
        cut=batch.cut,
        aux_scale=aux_scale,
        head=head(batch.labels),
        ahead=[(tokens, head(labels)) for tokens, labels in batch.ahead],
        stage=stage,
        hidden=hidden,
    )
    return result.view(-1) if stage is None or stage.is_last else result


class PlainPasses:
    """The whole model on this rank: one micro-batch after the other."""

    def backward(self, state: TrainState, microbatches: list[Batch], per_token: torch.Tensor) -> torch.Tensor:
        loss_sum = torch.zeros_like(per_token, dtype=torch.float64)  # millions of tokens: fp32 would round
        aux_scale = None if state.routing is None else state.routing.aux_scale(state.loss_scale.scale)
        for i, batch in enumerate(microbatches):
            state.data_parallel.start_microbatch(last=i == len(microbatches) - 1)
            loss = forward_loss_sum(state, batch, aux_scale=aux_scale)
            loss.backward(per_token)
            loss_sum += loss.detach()
        state.data_parallel.finish_backward()
        return loss_sum

    def loss_sum(self, state: TrainState, microbatches: list[Batch]) -> torch.Tensor:
        return torch.cat([forward_loss_sum(state, batch).double() for batch in microbatches]).sum()

    def logits(self, state: TrainState, tokens: torch.Tensor, position: int) -> torch.Tensor:
        return state.model(tokens, head=logits_head(state.model, position)).float()


def logits_head(model: nn.Module, position: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A head for Decoder.forward: logits [B, V] after one token, of all words whatever part of them a rank has."""

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert isinstance(model.head, nn.Module)
        return model.head(hidden[:, position], weight)

    return head


def train_step(state: TrainState, microbatches: list[Batch], *, lr: float) -> StepMetrics:
    """Accumulate gradients over this rank's micro-batches (already on the device) and update the weights once."""
    valid = torch.stack([count_all_valid(b) for b in microbatches]).sum(0)
    dist.all_reduce(valid, group=state.token_group)
    scale = state.loss_scale.scale.clone()
    per_token = scale / valid.clamp(min=1)
    if state.loss_weights is not None:
        per_token = per_token * state.loss_weights
    if state.fp8 is not None:
        state.fp8.begin_step(first=state.step == 0)

    loss_sums = state.passes.backward(state, microbatches, per_token)
    if state.fp8 is not None:
        state.fp8.end_step()
    dist.all_reduce(loss_sums, group=state.token_group)
    loss, *further = (loss_sums / valid.clamp(min=1)).float().unbind()

    counted = [master for name, master in state.data_parallel.masters.items() if name not in state.copies]
    grad_norm = (
        global_grad_norm(counted, stages=state.stage_group, kernel=state.optimizer.norm_kernel).to(state.device) / scale
    )
    usable = torch.isfinite(grad_norm) & torch.isfinite(loss_sums).all()
    report = None if state.routing is None else state.routing.collect()
    if state.routing is not None and report is not None:
        usable &= state.routing.all_computed(report)
    skipped = 1.0 - usable.float()
    coefficient = clip_coefficient(grad_norm, state.grad_clip) / scale
    # What the next forward needs first travels while others are updated.
    publish = partial(state.data_parallel.publish, written=state.optimizer.written)
    state.optimizer.step(lr=lr, grad_scale=coefficient, skip=skipped, updated=publish)
    extra = {f"mtp_loss_{k}": loss_k for k, loss_k in enumerate(further, start=1)}
    if state.routing is not None and report is not None:
        extra |= state.routing.finish(report, skipped)
    state.loss_scale.update(skipped)
    state.step += 1
    return StepMetrics(
        loss=loss, grad_norm=grad_norm, skipped=skipped, valid_tokens=valid[0], loss_scale=scale, extra=extra
    )


@torch.no_grad()
def evaluate(state: TrainState, steps: Iterable[list[Batch]]) -> float:
    """Mean loss over the valid tokens of these lists of micro-batches, of all ranks. All ranks call it together."""
    totals = torch.zeros(2, dtype=torch.float64, device=state.device)  # loss sum, valid tokens
    state.model.eval()
    for step in steps:
        on_device = [batch.to(state.device) for batch in step]
        totals[0] += state.passes.loss_sum(state, on_device)
        totals[1] += torch.stack([count_valid(batch.labels) for batch in on_device]).sum()
    state.model.train()
    dist.all_reduce(totals, group=state.token_group)
    return (totals[0] / totals[1].clamp(min=1)).item()
