"""Training of heads that draft for a model (model.speculator): the model computes, the heads learn.

The model is whole on every rank, in the dtype of the activations, without gradients, optimizer state or a place in
checkpoints: these are the heads' alone. Targets are tokens, or states, one place further on than those of the model.

    medusa   sum_j decay^j L_j        L_j: cross entropy of head j, from the state at i, with token i + 1 + j
    eagle    w C + S                  from the state h_i and token i + 1 to a state f_i that stands for h_(i+1):
                                      C = - sum_x p(x | h_(i+1)) log p(x | f_i), S = smooth L1 of f_i - h_(i+1)

(2401.10774, section 2.2.1; 2401.15077, section 4.2.) Sums over valid tokens, divided by the number in the global batch,
as all losses here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.batch import IGNORE_INDEX, Batch
from models.config import ModelConfig
from models.decoder import Decoder, Head
from models.hf import load_hf_weights
from models.init import initialize
from models.layers.attention import build_context
from models.registry import build_model
from models.speculator import MedusaHead, Speculator
from parallel.dims import ParallelDims
from parallel.fused import fused_parameters
from parallel.mesh import Meshes
from parallel.parallelize import BlockOptions, compile_block, parallelize
from parallel.regions import Located, local_region, local_tensor
from trainer.config import TrainConfig
from trainer.heads import logits_head
from trainer.loss import NextToken, choose_loss_kernel, token_loss_sum
from trainer.loss_scale import LossScale
from trainer.optim import build_optimizer
from trainer.passes import PlainPasses
from trainer.step import TrainState

CHUNK_TOKENS = 1024
"""Of which both distributions over the vocabulary exist at a time."""


def build_speculator_state(config: TrainConfig, dims: ParallelDims, mesh: Meshes, device: torch.device) -> TrainState:
    """`trainer.build.build_state` of heads: before they, or their model, have values (`load_model`, then `weights`)."""
    compiled = config.train.compile_backend if config.train.compile else None
    dtype = config.precision.compute_dtype
    with torch.device("meta"):
        model = build_model(config.model, seed=config.train.seed).to(dtype)
        heads = Speculator(config.model.speculator, config.model, config.train.seed)
    model.to_empty(device=device).requires_grad_(False).eval()
    if compiled is not None:
        for block in model.blocks:
            compile_block(block, backend=compiled)
    data_parallel = parallelize(
        heads,
        mesh,
        config.parallel,
        precision=config.precision,
        blocks=BlockOptions(compile_backend=compiled),
        device=device,
    )
    heads.train()
    fused = fused_parameters(heads)
    spoken = config.model.speculator
    medusa = spoken.kind == "medusa"
    weights = [spoken.decay**j for j in range(1, len(heads.blocks) + 1)] if medusa else [spoken.token_weight, 1.0]
    return TrainState(
        model=heads,
        data_parallel=data_parallel,
        optimizer=build_optimizer(
            data_parallel.masters,
            config.optim,
            seed=config.train.seed,
            fused=fused,
            copies=data_parallel.copies,
            first=data_parallel.needed_first,
        ),
        loss_scale=LossScale(config.precision, device),
        token_group=mesh.tokens.get_group(),
        device=device,
        grad_clip=config.train.grad_clip,
        objective=NextToken(
            weights=torch.tensor(weights, device=device),
            names=[f"head_{j}_loss" for j in range(2, len(weights) + 1)] if medusa else ["state_loss"],
        ),
        fused=fused,
        passes=HeadPasses(model, heads, loss_kernel=choose_loss_kernel(config, device.type)),
    )


def load_model(state: TrainState, config: ModelConfig) -> None:
    """The weights of the model that the heads are for, from the folder in config.path."""
    assert isinstance(state.passes, HeadPasses)
    assert config.path is not None
    load_hf_weights(config.path, state.passes.base.state_dict(), config)


def start_heads(state: TrainState, seed: int) -> None:
    """Heads as they begin: Medusa's output layers are the model's."""
    assert isinstance(state.passes, HeadPasses)
    weights, base = state.weights(), state.passes.base
    initialize(weights, state.model.initializers(), seed)
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith(".output.weight"):
                _copy(weight, base.output_weight())


def _copy(weight: Located, whole: Tensor) -> None:
    """Into a master, of which this rank may hold some rows."""
    local_tensor(weight).copy_(whole[local_region(weight)])


def targets(batch: Batch, config: ModelConfig) -> Batch:
    """The batch with a head's labels for labels, and those of the others, or the later tokens, in `ahead`.

    Of whole sequences. As `Batch.look_ahead` of a model: a label in another document carries no loss.
    """
    if config.speculator.kind == "medusa":
        first, *others = batch.look_ahead(config.speculator.num_heads).ahead
        return replace(batch, labels=first[1], ahead=tuple(others))
    (later,) = batch.look_ahead(1).ahead
    return replace(batch, labels=later[1], ahead=(later,))


class HeadPasses:
    """trainer.step.Passes of heads over this rank's micro-batches, whose sums are those of `losses`."""

    def __init__(self, base: Decoder, heads: Speculator, *, loss_kernel: str = "torch") -> None:
        self.base, self.heads, self.loss_kernel = base, heads, loss_kernel

    def backward(self, state: TrainState, microbatches: list[Batch], scales: Tensor) -> Tensor:
        total = torch.zeros_like(scales, dtype=torch.float64)
        for number, batch in enumerate(microbatches):
            state.data_parallel.start_microbatch(last=number == len(microbatches) - 1)
            losses = self.losses(batch, kernel=self.loss_kernel)
            losses.backward(scales)
            total += losses.detach()
        state.data_parallel.finish_backward()
        return total

    def sums(self, state: TrainState, microbatches: list[Batch]) -> Tensor:
        return torch.stack([self.losses(batch, kernel=self.loss_kernel).double() for batch in microbatches]).sum(0)

    def logits(self, state: TrainState, tokens: Tensor, position: int) -> Tensor:
        """The model's own: heads say nothing alone."""
        return self.base(tokens, head=logits_head(self.base, position)).float()

    def per_token(
        self, model: Decoder, microbatches: list[Batch], head: Callable[[Batch], Head], *, everywhere: bool = True
    ) -> list[Tensor]:
        return PlainPasses().per_token(model, microbatches, head, everywhere=everywhere)

    def token_logprobs(self, model: Decoder, microbatches: list[Batch], *, temperature: float = 1.0) -> list[Tensor]:
        return PlainPasses().token_logprobs(model, microbatches, temperature=temperature)

    def losses(self, batch: Batch, *, kernel: str = "torch") -> Tensor:
        """Sums of the losses of a batch of `targets`, [heads] or [cross entropy, smooth L1], fp32 (fp64 for fp64)."""
        hidden = self._states(batch)
        if self.heads.config.kind == "medusa":
            of_heads = (batch.labels, *(labels for _, labels in batch.ahead))
            heads = zip(self.heads.blocks, of_heads, strict=True)
            return torch.stack([_loss_of_head(head, wanted, hidden, kernel) for head, wanted in heads])
        ((later, labels),) = batch.ahead
        assert self.base.embedding is not None
        context = build_context(
            self.base.config,
            seq_len=hidden.shape[1],
            device=hidden.device,
            dtype=hidden.dtype,
            positions=batch.positions,
            documents=batch.documents,
            samples=batch.samples,
        )
        found = self.heads.continue_states(hidden, self.base.embedding(later), context)
        valid = labels != IGNORE_INDEX
        found, wanted = found[valid], hidden.roll(-1, 1)[valid]  # the last place of a sequence is not valid
        return torch.stack([
            distillation_sum(found, wanted, self.base.output_weight()),
            F.smooth_l1_loss(found, wanted, reduction="none").to(accumulated(found)).mean(-1).sum(),
        ])  # fmt: skip

    @torch.no_grad()
    def _states(self, batch: Batch) -> Tensor:
        """The model's hidden states [B, T, D]."""
        return self.base(
            batch.tokens,
            positions=batch.positions,
            documents=batch.documents,
            samples=batch.samples,
            head=lambda hidden, _weight: hidden,
        )


def _loss_of_head(head: torch.nn.Module, labels: Tensor, hidden: Tensor, kernel: str) -> Tensor:
    assert isinstance(head, MedusaHead)
    states = head(hidden)  # first: the weight of the output layer is in place once this has run
    return token_loss_sum(states, head.output.weight, labels, kernel)


def distillation_sum(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """- sum_x p(x | wanted) log p(x | found) of states [N, D] under one output layer [V, D], summed over N; 0-d.

    In pieces whose logits are made again in backward. A gradient for `found` alone.
    """
    of_piece = partial(_distillation_of_piece, weight=weight.detach())
    pieces = zip(found.split(CHUNK_TOKENS), wanted.detach().split(CHUNK_TOKENS), strict=True)
    sums = [checkpoint(of_piece, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(sums).sum() if sums else found.sum().to(accumulated(found))


def _distillation_of_piece(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    p = F.linear(wanted, weight).to(accumulated(wanted)).softmax(-1)
    return -(p * F.linear(found, weight).to(accumulated(found)).log_softmax(-1)).sum()


def accumulated(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
