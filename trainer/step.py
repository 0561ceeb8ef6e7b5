"""One training step: forward and backward of every micro-batch, one update. The same arithmetic on every layout.

    loss = sum of token losses / number of valid tokens, both over the global batch

Each rank divides by the global count before backward, so gradients only ever need to be summed. What is summed and
counted is the recipe's `Objective` (trainer/loss.py); the above is that of pretraining.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch.profiler import record_function

from data.batch import Batch
from models.decoder import Decoder, Head
from models.fp8 import Fp8Linears
from models.speculator import Speculator
from parallel.activation_budget import Choice
from parallel.data import DataParallel
from parallel.fused import Parts, separate
from parallel.regions import Located
from trainer.heads import in_evaluation
from trainer.loss import Objective, count_valid
from trainer.loss_scale import LossScale
from trainer.optim import Optimizer, clip_coefficient, global_grad_norm
from trainer.routing import RoutingMonitor


class Passes(Protocol):
    """Forward and backward over this rank's micro-batches, plain or pipelined. Collective over all ranks."""

    def backward(self, state: TrainState, microbatches: list[Batch], scales: torch.Tensor) -> torch.Tensor:
        """Leave in every master's `.grad` that of scales * the objective's sums, over micro-batches and ranks.

        scales: fp32 [1 + D]. Returns the sums of these micro-batches, fp64 [1 + D].
        """
        ...

    def sums(self, state: TrainState, microbatches: list[Batch]) -> torch.Tensor:
        """The objective's sums of these micro-batches, fp64 [1 + D], without gradients."""
        ...

    def logits(self, state: TrainState, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Logits [B, V] fp32 that follow tokens [B, T] at `position`, on every rank."""
        ...

    def per_token(
        self, model: Decoder, microbatches: list[Batch], head: Callable[[Batch], Head], *, everywhere: bool = True
    ) -> list[torch.Tensor]:
        """What head(batch), given to Decoder.forward, finds of every token of a micro-batch: [B, T] fp32 of each.

        Without gradients and dropout; on every rank of a pipeline, and under cp of this rank's tokens. model: the one
        these passes run (state.model of a TrainState). everywhere: False leaves the findings, then of any shape, where
        the pipeline ends; other ranks get tensors without elements.
        """
        ...

    def token_logprobs(
        self, model: Decoder, microbatches: list[Batch], *, temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """log p(label | tokens before it) in nats, 0 where there is no label: `per_token` of `token_losses`."""
        ...


@dataclass
class TrainState:
    """Everything a step reads and changes. Filled by trainer/build.py, where nothing else is said."""

    model: Decoder | Speculator
    data_parallel: DataParallel
    optimizer: Optimizer
    loss_scale: LossScale
    token_group: dist.ProcessGroup  # ranks with different tokens of the global batch
    device: torch.device
    grad_clip: float  # largest global gradient norm; 0: none
    objective: Objective  # the recipe's
    passes: Passes
    fused: Mapping[str, Parts] = field(default_factory=dict)  # of the masters, by name: parallel.fused.fused_parameters
    routing: RoutingMonitor | None = None  # of a mixture of experts
    fp8: Fp8Linears | None = None  # the layers that multiply in fp8
    stage_group: dist.ProcessGroup | None = None  # ranks with the other stages of the model; None: this one has all
    copies: frozenset[str] = frozenset()  # masters here that are copies of another stage's (a tied embedding)
    # What each block keeps for its backward; empty: no budget was given.
    activation_plan: dict[str, Choice] = field(default_factory=dict)
    # Models that are trained beside this one over the same micro-batches, each by an objective of its own, by the
    # names that their tensors and metrics begin with (the value model of PPO). Filled by Trainer.
    beside: Mapping[str, TrainState] = field(default_factory=dict)
    lr_factor: float = 1.0  # where this is trained beside another: its learning rate is the run's times this (Trainer)
    begun: dict[str, torch.Tensor] = field(default_factory=dict)  # PiSSA: adapters as they began (trainer/adapters.py)
    before_update: Callable[[], None] | None = None  # called when gradients are complete (trainer/health.py)
    step: int = 0  # updates attempted so far (train_step)

    def weights(self) -> dict[str, Located]:
        """What makes the model, by name: masters, and buffers, which every rank holds whole. Of fused parameters their
        parts: names and whole shapes depend on no layout."""
        return separate(self.data_parallel.masters | dict(self.model.named_buffers()), self.fused)

    def state_tensors(self) -> dict[str, Located]:
        """Every tensor a checkpoint holds, by name, as of `weights`. Loaded in place."""
        tensors = {f"model/{name}": tensor for name, tensor in self.data_parallel.masters.items()}
        tensors |= {f"model/{name}": tensor for name, tensor in self.model.named_buffers()}
        tensors |= {f"model/{name}": tensor for name, tensor in self.begun.items()}
        tensors |= {f"optim/{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        if self.fp8 is not None:
            tensors |= {f"fp8/{name}": tensor for name, tensor in self.fp8.state_tensors().items()}
        tensors |= {f"loss_scale/{name}": t for name, t in self.loss_scale.state_tensors().items()}
        beside = {f"{name}/{n}": t for name, other in self.beside.items() for n, t in other.state_tensors().items()}
        return separate(tensors, self.fused) | beside

    def publish(self) -> None:
        """Give models the weights that `state_tensors` were filled with. Collective."""
        for state in (self, *self.beside.values()):
            state.data_parallel.publish()
            if state.fp8 is not None:
                state.fp8.weights_changed()

    def begin_forwards(self) -> None:
        """Before forwards outside of `train_step`. Collective."""
        if self.fp8 is not None:
            self.fp8.begin()

    def set_step(self, step: int) -> None:
        for state in (self, *self.beside.values()):
            state.step = step
            if state.fp8 is not None:
                state.fp8.started = step > 0


@dataclass
class StepMetrics:
    """Results of a step, still on the device: reading them waits for the step."""

    loss: torch.Tensor  # 0-d fp32; the objective's first sum by its count, before the update; of tokens: their mean
    grad_norm: torch.Tensor  # 0-d fp32; global L2 norm before clipping
    skipped: torch.Tensor  # 0-d fp32; 1 if nothing was updated: loss or gradients not finite, or choices left over
    valid_tokens: torch.Tensor  # 0-d int64; tokens with a label in the global batch
    loss_scale: torch.Tensor  # 0-d fp32; what this step's loss was scaled by
    extra: dict[str, torch.Tensor] = field(default_factory=dict)  # more metrics by name, 0-d


def train_step(state: TrainState, microbatches: list[Batch], *, lr: float) -> StepMetrics:
    """Accumulate gradients over this rank's micro-batches (already on the device) and update the weights once.

    Then the same for the models beside it; a step counts as skipped where the update of any of them was.
    """
    counts = count(state.objective, microbatches)
    dist.all_reduce(counts, group=state.token_group)
    valid_tokens, counts = counts[0], counts[1:]
    scale = state.loss_scale.scale.clone()
    scales = state.objective.weights * (scale / counts.clamp(min=1))
    if state.fp8 is not None:
        state.fp8.begin_step(first=state.step == 0)

    with record_function("forward and backward"):
        sums = state.passes.backward(state, microbatches, scales)
    if state.fp8 is not None:
        state.fp8.end_step()
    dist.all_reduce(sums, group=state.token_group)
    loss, *further = (sums / counts.clamp(min=1)).float().unbind()

    counted = [master for name, master in state.data_parallel.masters.items() if name not in state.copies]
    grad_norm = (
        global_grad_norm(counted, stages=state.stage_group, kernel=state.optimizer.norm_kernel).to(state.device) / scale
    )
    usable = torch.isfinite(grad_norm) & torch.isfinite(sums).all()
    report = None if state.routing is None else state.routing.collect()
    if state.routing is not None and report is not None:
        usable &= state.routing.all_computed(report)
    skipped = 1.0 - usable.float()
    coefficient = clip_coefficient(grad_norm, state.grad_clip) / scale
    if state.before_update is not None:
        state.before_update()
    # What the next forward needs first travels while others are updated.
    publish = partial(state.data_parallel.publish, written=state.optimizer.written)
    with record_function("update"):
        # Of no tokens there is nothing to learn, and moments would move the weights all the same.
        idle = torch.maximum(skipped, (valid_tokens == 0).float())
        state.optimizer.step(lr=lr, grad_scale=coefficient, skip=idle, updated=publish)
    if state.fp8 is not None:
        state.fp8.weights_changed()
    extra = dict(zip(state.objective.names, further, strict=True))
    if state.routing is not None and report is not None:
        extra |= state.routing.finish(report, skipped)
    state.loss_scale.update(skipped)
    state.step += 1
    # After the update, before which `before_update` looks at the whole state.
    for name, other in state.beside.items():
        theirs = train_step(other, microbatches, lr=lr * other.lr_factor)
        skipped = torch.maximum(skipped, theirs.skipped)
        found = {"loss": theirs.loss, "grad_norm": theirs.grad_norm} | theirs.extra
        extra |= {f"{name}_{field}": value for field, value in found.items()}
    return StepMetrics(
        loss=loss, grad_norm=grad_norm, skipped=skipped, valid_tokens=valid_tokens, loss_scale=scale, extra=extra
    )


def count(objective: Objective, microbatches: list[Batch]) -> torch.Tensor:
    """Valid tokens of these micro-batches, then the objective's counts: [2 + D] int64."""
    return torch.stack([torch.cat([count_valid(b.labels)[None], objective.counts(b)]) for b in microbatches]).sum(0)


@torch.no_grad()
def evaluate(state: TrainState, steps: Iterable[list[Batch]]) -> dict[str, float]:
    """The objective's numbers, `loss` first, over these lists of micro-batches, of all ranks, which call it together.

    Of those in `state.objective.names`, the ones that batches are made for: multi-token prediction's are not there.
    """
    sums = torch.zeros((), dtype=torch.float64, device=state.device)
    counts = torch.zeros((), dtype=torch.int64, device=state.device)
    state.begin_forwards()
    with in_evaluation(state.model):
        for step in steps:
            on_device = [batch.to(state.device) for batch in step]
            sums = sums + state.passes.sums(state, on_device)
            counts = counts + count(state.objective, on_device)[1:]
    totals = torch.stack([sums, counts.double()])
    dist.all_reduce(totals, group=state.token_group)
    return dict(zip(["loss", *state.objective.names], (totals[0] / totals[1].clamp(min=1)).tolist(), strict=False))
