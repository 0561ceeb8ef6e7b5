"""PolicyObjective: what a step of policy gradients minimises, as sums over tokens and their counts.

    L = (sum over tokens i of w_i (t_i l_i + kl_weight k_i)) / C - entropy_weight * (sum of H_i) / N

with l_i of trainer/rl/losses.py, t_i the truncated importance weight, k_i the estimate of the KL
divergence from the reference, w_i and C by the normalisation: 1/|o| and the
number of completions (sequence), 1 and the number of tokens N (token), 1/max_tokens and that of completions (constant).
All are sums and counts of the global batch, so L does not depend on micro-batches, packing or ranks. What else is
reported are sums with the weight 0, and the largest difference between trainer and sampler, which is a maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from kernels.linear_cross_entropy import VocabularyShard
from models.decoder import Head
from parallel.collectives import Axis
from parallel.groups import ModelParallel
from trainer.loss import count_valid, token_losses_and_entropies
from trainer.rl.config import RLConfig
from trainer.rl.losses import importance_weights, kl_divergence, policy_losses

REPORTED = ("ratio", "clipped_below", "clipped_above", "importance_weight", "sampler_kl")
"""Means over tokens that are not minimised."""


class PolicyObjective:
    """trainer.loss.Objective of rollouts as trainer/rl/packing.py lays them out."""

    def __init__(
        self,
        config: RLConfig,
        *,
        device: torch.device,
        vocabulary: VocabularyShard | None,
        batch_invariant: bool,
        groups: ModelParallel,
        token_groups: Sequence[dist.ProcessGroup],
    ) -> None:
        """groups: those inside the model's layers. token_groups: which together reach all ranks with other tokens of
        the global batch, and those that have their losses."""
        self._config = config
        self._vocabulary = vocabulary
        self._batch_invariant = batch_invariant
        self._context = None if groups.cp is None else Axis.of(groups.cp)
        self._token_groups = token_groups
        self.names: Sequence[str] = (*(["kl"] if config.kl_weight else []), "entropy", *REPORTED)
        of_kl = [config.kl_weight] if config.kl_weight else []
        weights = [1.0, *of_kl, -config.entropy_weight, *[0.0] * len(REPORTED)]
        self.weights = torch.tensor(weights, device=device)
        self._largest = torch.zeros((), device=device)

    def counts(self, batch: Batch) -> Tensor:
        tokens = count_valid(batch.labels)
        per_token = self._config.normalization == "token"
        first = tokens if per_token else batch.columns["last"].sum(dtype=torch.int64)
        weighted = 2 if self._config.kl_weight else 1
        return torch.stack([first] * weighted + [tokens] * (1 + len(self.names) - weighted))

    def head(self, batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return self._sums(hidden, weight, batch)

        return head

    def ahead(self, batch: Batch) -> list[tuple[Tensor, Head]]:
        return []

    def largest_delta(self) -> Tensor:
        """max |log pi_trainer - log pi_sampler| over the tokens since the last call, of all ranks. Collective."""
        found, self._largest = self._largest, torch.zeros_like(self._largest)
        for group in self._token_groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return found

    def _sums(self, hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        config, columns = self._config, batch.columns
        losses, entropies = token_losses_and_entropies(
            hidden,
            weight,
            batch.labels,
            vocabulary=self._vocabulary,
            temperature=config.temperature,
            batch_invariant=self._batch_invariant,
        )
        logprobs, sampler = -losses, columns["sampler"]
        rows, length = batch.labels.shape
        length *= 1 if self._context is None else self._context.size  # of whole rows, whose sequences are numbered
        sequences = columns["sequence"] + length * torch.arange(rows, device=logprobs.device)[:, None]
        valid = (columns["weight"] != 0).to(logprobs.dtype)
        old = columns["old"] if "old" in columns else logprobs.detach()
        found = policy_losses(
            logprobs.flatten(),
            old.flatten(),
            columns["advantage"].flatten(),
            kind=config.loss,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            # Tokens without a label are a sequence of their own, whose ratio would be a mean of nothing.
            sequences=torch.where(valid > 0, sequences, rows * length).flatten(),
            num_sequences=rows * length + 1,
            context=self._context,
        )
        corrected = torch.ones_like(logprobs)
        if config.importance_cap:
            corrected = importance_weights(old, sampler, cap=config.importance_cap)
        loss = (found.loss.view_as(logprobs) * corrected * columns["weight"]).sum()
        of_kl = []
        if config.kl_weight:
            kl = kl_divergence(logprobs, columns["reference"], kind=config.kl_estimator)
            of_kl.append((kl * columns["weight"]).sum())
        with torch.no_grad():
            delta = (old - sampler) * valid  # both by the weights that the rollouts were made with
            self._largest = torch.maximum(self._largest, delta.abs().amax().to(self._largest.dtype))
            # KL(sampler || trainer) at tokens that the sampler drew.
            reported = [found.ratio, found.below, found.above, corrected, kl_divergence(-delta, 0 * delta, kind="k3")]
            sums = [(value.view_as(valid) * valid).sum() for value in reported]
        return torch.stack([loss, *of_kl, entropies.sum(), *sums])
