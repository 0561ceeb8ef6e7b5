"""One training step: forward and backward of every micro-batch, one update. The same arithmetic on every layout.

    loss = sum of token losses / number of valid tokens, both over the global batch

Each rank divides by the global count before backward, so gradients only ever need to be summed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from data.batch import Batch
from parallel.data import DataParallel
from trainer.loss import count_valid, token_loss_sum
from trainer.loss_scale import LossScale
from trainer.optim import Optimizer, clip_coefficient, global_grad_norm
from trainer.routing import RoutingMonitor


@dataclass
class TrainState:
    """Everything a step reads and changes."""

    model: nn.Module
    data_parallel: DataParallel
    optimizer: Optimizer
    loss_scale: LossScale
    token_group: dist.ProcessGroup  # ranks with different tokens of the global batch
    device: torch.device
    grad_clip: float  # largest global gradient norm; 0: none
    compile_loss: bool
    routing: RoutingMonitor | None = None  # of a mixture of experts
    step: int = 0  # updates attempted so far; filled by train_step


@dataclass
class StepMetrics:
    """Results of a step, still on the device: reading them waits for the step."""

    loss: torch.Tensor  # 0-d fp32; mean over the valid tokens of the global batch, before the update
    grad_norm: torch.Tensor  # 0-d fp32; global L2 norm before clipping
    skipped: torch.Tensor  # 0-d fp32; 1 if loss or gradients were not finite and nothing was updated
    valid_tokens: torch.Tensor  # 0-d int64; tokens with a label in the global batch
    loss_scale: torch.Tensor  # 0-d fp32; what this step's loss was scaled by
    extra: dict[str, torch.Tensor] = field(default_factory=dict)  # more metrics by name, 0-d


def forward_loss_sum(state: TrainState, batch: Batch, *, aux_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of this micro-batch's token losses, 0-d fp32; its backward adds aux_scale times the auxiliary losses'."""
    return state.model(
        batch.tokens,
        positions=batch.positions,
        documents=batch.documents,
        samples=batch.samples,
        aux_scale=aux_scale,
        head=partial(token_loss_sum, labels=batch.labels, compile=state.compile_loss),
    )


def train_step(state: TrainState, microbatches: list[Batch], *, lr: float) -> StepMetrics:
    """Accumulate gradients over this rank's micro-batches (already on the device) and update the weights once."""
    valid = torch.stack([count_valid(b.labels) for b in microbatches]).sum()
    dist.all_reduce(valid, group=state.token_group)
    scale = state.loss_scale.scale.clone()
    per_token = scale / valid.clamp(min=1)
    aux_scale = None if state.routing is None else state.routing.aux_scale(scale)

    loss_sum = torch.zeros((), dtype=torch.float64, device=state.device)  # millions of tokens: fp32 would round
    for i, batch in enumerate(microbatches):
        state.data_parallel.start_microbatch(last=i == len(microbatches) - 1)
        loss = forward_loss_sum(state, batch, aux_scale=aux_scale)
        (loss * per_token).backward()
        loss_sum += loss.detach()
    state.data_parallel.finish_backward()
    dist.all_reduce(loss_sum, group=state.token_group)
    loss = (loss_sum / valid.clamp(min=1)).float()

    grad_norm = global_grad_norm(state.data_parallel.masters.values()).to(state.device) / scale
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
    skipped = 1.0 - finite.float()
    coefficient = clip_coefficient(grad_norm, state.grad_clip) / scale
    state.optimizer.step(lr=lr, grad_scale=coefficient, skip=skipped)
    state.data_parallel.publish()
    extra = {} if state.routing is None else state.routing.finish(skipped)
    state.loss_scale.update(skipped)
    state.step += 1
    return StepMetrics(
        loss=loss, grad_norm=grad_norm, skipped=skipped, valid_tokens=valid, loss_scale=scale, extra=extra
    )


@torch.no_grad()
def evaluate(state: TrainState, batches: Iterable[Batch]) -> float:
    """Mean loss over the valid tokens of these batches, summed over ranks. All ranks call it together."""
    totals = torch.zeros(2, dtype=torch.float64, device=state.device)  # loss sum, valid tokens
    state.model.eval()
    for batch in batches:
        on_device = batch.to(state.device)
        totals[0] += forward_loss_sum(state, on_device)
        totals[1] += count_valid(on_device.labels)
    state.model.train()
    dist.all_reduce(totals, group=state.token_group)
    return (totals[0] / totals[1].clamp(min=1)).item()
