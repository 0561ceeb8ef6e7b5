"""A batch of rollouts: sampled, rewarded, compared within their groups, and chosen from, the same on every layout.

Each data-parallel rank rolls out the prompts that the loader gives it, which the ranks of a pipeline and of cp share
out among themselves; numbers of prompts are those of the run, and what is chosen depends on them alone. So the rollouts
of a step are the same on any number of ranks, where their tokens are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist

from data.loader import Loader
from data.prompts import PromptSamples
from trainer.rl.advantages import group_advantages, is_constant
from trainer.rl.config import RLConfig
from trainer.rl.reward_models import RewardModels
from trainer.rl.rewards import Answer, Rewards, Scored, check_rewards
from trainer.rl.rollouts import Rollout, Sampled, Sampler, Task
from trainer.rl.same_prompts import SamePrompts
from trainer.rl.weights import ServedWeights


@dataclass
class Group:
    """The completions of a prompt."""

    number: int  # of the prompt's sample in the run
    rollouts: list[Rollout]

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts if rollout.reward is not None]


@dataclass
class Totals:
    """Sums over completions, which ranks and rounds add up."""

    completions: int = 0
    rewarded: int = 0
    reward: float = 0.0
    by_function: dict[str, float] = field(default_factory=dict)
    groups: int = 0
    constant_groups: int = 0
    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    errors: list[str] = field(default_factory=list)  # the first of each rank and round

    def add(self, other: Totals) -> None:
        for name in ("completions", "rewarded", "reward", "groups", "constant_groups", "tokens", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, value in other.by_function.items():
            self.by_function[name] = self.by_function.get(name, 0.0) + value
        self.longest = max(self.longest, other.longest)
        self.errors += other.errors

    def metrics(self) -> dict[str, float]:
        """Fields of metrics.jsonl (docs/METRICS.md)."""
        rewarded, completions = max(self.rewarded, 1), max(self.completions, 1)
        return {
            "reward": self.reward / rewarded,
            **{f"reward_{name}": value / rewarded for name, value in sorted(self.by_function.items())},
            "reward_failures": self.completions - self.rewarded,
            "constant_groups": self.constant_groups / max(self.groups, 1),
            "completion_tokens": self.tokens / completions,
            "completion_tokens_max": self.longest,
            "truncated": self.truncated / completions,
        }


class Round(NamedTuple):
    """Completions of a batch of prompts. Filled by `Collector.sample`, without the other ranks."""

    size: int  # completions of each prompt, which follow one another
    sampled: Sampled  # this rank's of those that other ranks have too
    scores: list[Scored] | None  # None: other ranks have a part in them
    seconds: float  # that it took
    gather_seconds: float
    reward_seconds: float  # of these, for the scores


class Collector:
    """Makes the rollouts of one rank, together with all others."""

    def __init__(
        self,
        config: RLConfig,
        *,
        sampler: Sampler,
        weights: ServedWeights,
        rewards: Rewards,
        reward_models: RewardModels,
        data_group: dist.ProcessGroup,
        same_prompts: SamePrompts,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        """data_group: the ranks with other prompts; same_prompts: those that share out the same ones; tp_group: those
        that sample together."""
        self._config = config
        self._sampler = sampler
        self._weights = weights
        self._rewards = rewards
        self._reward_models = reward_models
        self._data_group = data_group
        self._same_prompts = same_prompts
        self._tp_group = tp_group
        self.metrics: dict[str, float] = {}  # of the last `collect`
        self.events: list[tuple[str, str]] = []

    def draw(self, data: Loader, samples: PromptSamples) -> list[Task]:
        """This rank's completions to be sampled, of the batch of prompts that the data has next. Raises DataError."""
        numbers = [number for batch in data.next_step() for number in batch.samples.tolist()]
        return self._tasks(numbers, samples, self._config.group_size)

    def sample(self, tasks: Sequence[Task], *, check: Callable[[], None] | None = None) -> Round:
        """These completions, rewarded by functions unless there are reward models. Raises FloatingPointError.

        Where the engine computes with weights of this rank alone no collective: another thread may call it while this
        one trains. check: called now and then; what it raises ends it.
        """
        config = self._config
        return self._round(tasks, size=config.group_size, temperature=config.temperature, check=check)

    def collect(
        self, data: Loader, samples: PromptSamples, *, first: Round | None = None, waited: float = 0.0
    ) -> list[list[Rollout]]:
        """This rank's rollouts for each of recipe.rl.minibatches updates, without those for which no rank has any.
        Collective over all ranks.

        first: what `sample` has made of what `draw` gave next; None: it is yet to be drawn. waited: seconds for it.
        Raises RewardError on all ranks as recipe.rl.bad_reward says, DataError, FloatingPointError.
        """
        begin, config = time.perf_counter(), self._config
        before = 0.0 if first is None else first.seconds
        totals, kept, rounds, wanted, gathering, rewarding = Totals(), list[Group](), 0, 0, 0.0, 0.0
        informative: dict[int, bool] = {}  # of all ranks' groups, by number
        while rounds < config.sampling_rounds:
            if first is None:
                first = self._same_prompts.together(partial(self.sample, self.draw(data, samples)))
            one, first = first, None
            groups, mine, late = self._rewarded(one)
            gathering += one.gather_seconds
            rewarding += one.reward_seconds + late
            of_ranks = self.all_gather((mine, {group.number: not is_constant(group.rewards) for group in groups}))
            for others, informs in of_ranks:
                totals.add(others)
                informative |= informs
            check_rewards(totals.errors, config)
            kept += groups
            rounds += 1
            wanted = wanted or len(informative)
            if sum(informative.values()) >= wanted:
                break
        # With one round all stay; with more the first that inform, in the order of the data.
        order = sorted(number for number, informs in informative.items() if informs or config.sampling_rounds == 1)
        place = {number: index for index, number in enumerate(order[:wanted])}
        batches: list[list[Rollout]] = [[] for _ in range(config.minibatches)]
        for group in kept:
            if group.number in place:
                batches[place[group.number] % config.minibatches] += self._trained(group)
        here = time.perf_counter() - begin
        seconds = before + here
        self.metrics = (
            totals.metrics()
            | {
                "groups_trained": len(place),
                "sampling_rounds": rounds,
                "rollout_seconds": seconds,
                "rollout_gather_seconds": gathering,
                "reward_seconds": rewarding,
                "rollout_tokens_per_second": totals.tokens / seconds,
            }
            | ({"rollout_wait_seconds": waited + here} if config.overlap else {})
        )
        if totals.errors:
            count = totals.completions - totals.rewarded
            self.events.append(("reward_failed", f"{count} completions are left out; for example: {totals.errors[0]}"))
        filled = [any(of_ranks) for of_ranks in zip(*self.all_gather([bool(batch) for batch in batches]), strict=True)]
        if not any(filled):
            self.events.append(("nothing_learned", self._why_nothing(totals, informs=bool(place))))
        elif not all(filled):
            left = f"{filled.count(False)} of recipe.rl.minibatches={len(filled)} have no completion to learn from"
            why = "; ".join([f"{len(place)} prompts are learned from", *self._left_out(totals)])
            self.events.append(("minibatches_left_out", f"{left}, and make no update: {why}"))
        return [batch for batch, some in zip(batches, filled, strict=True) if some]

    def _why_nothing(self, totals: Totals, *, informs: bool) -> str:
        """Why no completion of a batch carries a loss."""
        why = [] if informs else ["the rewards of no prompt's completions differ"]
        why += self._left_out(totals)
        return f"no loss of any of {totals.completions} completions: {', '.join(why)}"

    def _left_out(self, totals: Totals) -> list[str]:
        """Which completions of prompts that inform carry no loss."""
        found = []
        if totals.errors:
            found.append(f"{totals.completions - totals.rewarded} have no reward")
        if self._config.truncated == "mask" and totals.truncated:
            found.append(f"{totals.truncated} were cut off and recipe.rl.truncated=mask")
        return found

    def groups(
        self, numbers: Sequence[int], samples: PromptSamples, *, size: int, temperature: float = 1.0
    ) -> tuple[list[Group], Totals]:
        """Rewarded completions of the prompts with these numbers, `size` of each, with advantages. Collective."""
        tasks = self._tasks(numbers, samples, size)
        one = self._same_prompts.together(lambda: self._round(tasks, size=size, temperature=temperature))
        groups, totals, _ = self._rewarded(one)
        return groups, totals

    def _tasks(self, numbers: Sequence[int], samples: PromptSamples, size: int) -> list[Task]:
        return [Task(samples[number], number, sample) for number in numbers for sample in range(size)]

    def _round(
        self, tasks: Sequence[Task], *, size: int, temperature: float, check: Callable[[], None] | None = None
    ) -> Round:
        begin = time.perf_counter()
        with self._weights.serving():
            mine = self._same_prompts.mine(tasks)
            sampled = self._sampler.rollouts(mine, temperature=temperature, check=check)
        rewarding = time.perf_counter()
        alone = self._tp_group is None and not self._rewards.models
        scores = self._rewards.of(sampled.answers, check=check) if alone else None
        end = time.perf_counter()
        return Round(size, sampled, scores, end - begin, self._weights.gather_seconds, end - rewarding)

    def _rewarded(self, one: Round) -> tuple[list[Group], Totals, float]:
        """With rewards and advantages, by prompt; and the seconds for scores that it lacked. Collective."""
        begin = time.perf_counter()
        size, rollouts = one.size, self._same_prompts.all(one.sampled.rollouts)
        mine = self._scores(one.sampled.answers, rollouts) if one.scores is None else one.scores
        scores = self._same_prompts.all(mine)
        seconds = time.perf_counter() - begin
        for rollout, scored in zip(rollouts, scores, strict=True):
            rollout.reward, rollout.rewards = scored.total, scored.each
        firsts = range(0, len(rollouts), size)
        groups = [Group(rollouts[i].number, rollouts[i : i + size]) for i in firsts]
        for group in groups:
            rewarded = [rollout for rollout in group.rollouts if rollout.reward is not None]
            advantages = group_advantages(group.rewards, kind=self._config.advantage)
            for rollout, advantage in zip(rewarded, advantages, strict=True):
                rollout.advantage = advantage
        errors = [scored.error for scored in scores if scored.error]
        return groups, _totals(groups, errors), seconds

    def all_gather(self, value: Any) -> list[Any]:
        """One object of every rank with other prompts, in rank order."""
        return all_gather(value, self._data_group)

    def _scores(self, answers: Sequence[Answer], rollouts: Sequence[Rollout]) -> list[Scored]:
        """Of this rank's answers, which are among these rollouts. By the first rank of tp for all: what depends on
        time, as a program in a sandbox, may come out otherwise."""
        by_models = self._reward_models.of([rollout.tokens for rollout in rollouts])
        by_models = {name: self._same_prompts.mine(rewards) for name, rewards in by_models.items()}
        if self._tp_group is None:
            return self._rewards.of(answers, by_models)
        first = dist.get_rank(self._tp_group) == 0
        found: list[Any] = [self._rewards.of(answers, by_models) if first else None]
        dist.broadcast_object_list(found, src=dist.get_global_rank(self._tp_group, 0), group=self._tp_group)
        return found[0]

    def _trained(self, group: Group) -> list[Rollout]:
        """Those of a group that carry a loss."""
        masked = self._config.truncated == "mask"
        return [
            rollout
            for rollout in group.rollouts
            if rollout.reward is not None and not (masked and rollout.finish_reason == "length")
        ]


def all_gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """One object of every rank of a group, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _totals(groups: Sequence[Group], errors: list[str]) -> Totals:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewarded = [rollout for rollout in rollouts if rollout.reward is not None]
    by_function: dict[str, float] = {}
    for rollout in rewarded:
        for name, value in rollout.rewards.items():
            by_function[name] = by_function.get(name, 0.0) + value
    return Totals(
        completions=len(rollouts),
        rewarded=len(rewarded),
        reward=sum(rollout.reward for rollout in rewarded if rollout.reward is not None),
        by_function=by_function,
        groups=len(groups),
        constant_groups=sum(is_constant(group.rewards) for group in groups),
        tokens=sum(rollout.num_generated for rollout in rollouts),
        longest=max((rollout.num_generated for rollout in rollouts), default=0),
        truncated=sum(rollout.finish_reason == "length" for rollout in rollouts),
        errors=errors[:1],
    )
