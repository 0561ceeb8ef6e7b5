"""Completions that a student is taught on: its own, or those that the rows of the data have (GKD, 2306.13649, alg. 1).

Of the prompts of a step each is answered by the student with the probability recipe.on_policy, by the engine on its
weights of now; the others' answers are the rows'. Who answers, and what, depends on (run seed, number of the prompt's
sample) and the weights alone: not on ranks, and not on when a run was interrupted, so that there is nothing to save.
No gradient passes through sampling.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from data.batch import Batch
from data.prompts import Prompt, PromptSamples
from trainer.config import TrainConfig
from trainer.rl.packing import in_step, rollout_batches
from trainer.rl.rollouts import Rollout, Sampler, Task
from trainer.rl.same_prompts import SamePrompts
from trainer.rl.weights import ServedWeights
from trainer.sequence import row_step


class Answered(NamedTuple):
    """A step. Filled by `StudentAnswers.step`."""

    batches: list[Batch]  # this rank's micro-batches
    metrics: dict[str, float]  # fields of metrics.jsonl, the same on all ranks
    positions: int  # that the step trains on, of all ranks


@dataclass
class StudentAnswers:
    """Makes the micro-batches of a step, and those of a validation."""

    config: TrainConfig
    sampler: Sampler
    weights: ServedWeights
    data_group: dist.ProcessGroup  # ranks with other prompts
    same_prompts: SamePrompts

    def step(self, numbers: Sequence[int], samples: PromptSamples) -> Answered:
        """This rank's, of the prompts with these numbers, whose completions alone carry labels. Collective."""
        begin, seed, share = time.perf_counter(), self.config.train.seed, self.config.recipe.on_policy
        own = [number for number in numbers if is_own(seed, number, share)]
        sampled = self.sampled(own, samples, temperature=1.0)
        seconds, gathering = time.perf_counter() - begin, self.weights.gather_seconds
        by_number = {rollout.number: rollout for rollout in sampled}
        for number in numbers:
            if number not in by_number:
                by_number[number] = of_row(samples[number], number, max_len=self.config.train.seq_len)
        rollouts = [by_number[number] for number in numbers]
        mine = {
            "prompts": len(rollouts),
            "own": len(sampled),
            "tokens": sum(rollout.num_generated for rollout in sampled),
            "truncated": sum(rollout.finish_reason == "length" for rollout in sampled),
            "positions": sum(len(rollout.tokens) - 1 for rollout in rollouts),
        }
        of_ranks = self._all_gather((mine, max((rollout.num_generated for rollout in sampled), default=0)))
        total = {name: sum(counts[name] for counts, _ in of_ranks) for name in mine}
        completions = max(total["own"], 1)
        metrics = {
            "on_policy": total["own"] / total["prompts"],
            "completion_tokens": total["tokens"] / completions,
            "completion_tokens_max": max(longest for _, longest in of_ranks),
            "truncated": total["truncated"] / completions,
            "rollout_seconds": seconds,
            "rollout_gather_seconds": gathering,
            "rollout_tokens_per_second": total["tokens"] / seconds,
        }
        return Answered(self.batches(rollouts), metrics, total["positions"])

    def sampled(self, numbers: Sequence[int], samples: PromptSamples, *, temperature: float) -> list[Rollout]:
        """The student's answers, in the order of these numbers; temperature 0: greedy. Collective."""
        self.sampler.engine.weights_changed()
        tasks = [Task(samples[number], number, 0) for number in self.same_prompts.mine(numbers)]

        def sample() -> list[Rollout]:
            with self.weights.serving():
                return self.sampler.rollouts(tasks, temperature=temperature).rollouts

        return self.same_prompts.all(self.same_prompts.together(sample))

    def batches(self, rollouts: Sequence[Rollout]) -> list[Batch]:
        """As many micro-batches on every rank: sharded weights are gathered for each. Collective."""
        train = self.config.train
        packed = rollout_batches(
            rollouts,
            seq_len=train.seq_len,
            micro_batch_size=train.micro_batch_size,
            normalization="token",
            constant=1,
            few_shapes=train.compile,
            row_step=row_step(self.config.parallel),
        )
        return in_step([one.batch for one in packed], self.config, self._all_gather)

    def _all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self.data_group)
        dist.all_gather_object(values, value, group=self.data_group)
        return values


def is_own(seed: int, number: int, share: float) -> bool:
    """Whether the student answers the prompt with this number: for `share` of all numbers, of a fixed hash."""
    drawn = int.from_bytes(hashlib.sha256(f"on_policy/{seed}/{number}".encode()).digest()[:8], "little")
    return drawn < share * 2**64


def of_row(prompt: Prompt, number: int, *, max_len: int) -> Rollout:
    """The completion that the row has, cut to max_len tokens with the prompt, as one that was sampled."""
    begin, tokens = len(prompt.ids), [*prompt.ids, *prompt.completion_ids][:max_len]
    reason = "stop" if len(tokens) == begin + len(prompt.completion_ids) else "length"
    return Rollout(number, 0, tokens, [(begin, len(tokens))], [0.0] * (len(tokens) - begin), reason)
