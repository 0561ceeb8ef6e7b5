"""Reinforcement learning with groups of completions: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO.

A step samples recipe.rl.group_size completions of each prompt by an engine on the trainer's own weights, rewards them,
takes a completion's advantage from the others of its prompt, and descends the gradient of trainer/rl/objective.py. The
variants are settings of `recipe.rl`; configs/recipe has a file for each.

train.global_batch_size counts completions, train.micro_batch_size rows of train.seq_len tokens that they are packed
into. With train.compile rows are filled up to that length, and the last micro-batch to an eighth of those rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data.batch import IGNORE_INDEX, Batch
from data.loader import Loader
from data.prompts import PromptSamples
from models.decoder import Decoder
from parallel.mesh import Meshes, groups_in_layers
from trainer.config import TrainConfig
from trainer.loss import Objective, vocabulary_shard
from trainer.recipes.loaders import open_prompts
from trainer.recipes.recipe import Recipe, StepReport
from trainer.reference import Reference, load_reference
from trainer.rl.collect import Collector, Round, all_gather
from trainer.rl.config import rl_problems
from trainer.rl.objective import PolicyObjective
from trainer.rl.overlap import Beside, WeightCopy
from trainer.rl.packing import Packed, in_step, of_rollouts, optional_columns, rollout_batches
from trainer.rl.problems import data_problems, layout_problems
from trainer.rl.reward_models import RewardModels
from trainer.rl.rewards import Rewards, check_rewards, import_path
from trainer.rl.rollouts import Rollout, answers
from trainer.rl.same_prompts import RolloutError, SamePrompts
from trainer.rl.serving import Room, start_sampler
from trainer.sequence import SequenceParts, row_step
from trainer.step import TrainState


class RolledOut(NamedTuple):
    """A batch of rollouts. Filled by `GroupPolicyOptimization`."""

    updates: list[list[Rollout]]  # this rank's, of each update
    metrics: dict[str, float]  # the same on all ranks
    events: list[Any]  # pairs of kind and text


class GroupPolicyOptimization(Recipe):
    """recipe=grpo, dr_grpo, dapo, gspo, cispo, rloo."""

    reads: tuple[str, ...] = ("rl", "reference", "reference_path", "reference_offload")
    validates_prompts = True
    columns: tuple[str, ...] = ()  # that every micro-batch has, besides packing.FLOATS

    def __init__(self) -> None:
        self._samples: dict[str, PromptSamples] = {}  # by split
        self._buffer: list[list[Rollout]] = []  # of updates that are still to be made, this rank's rollouts
        self._ahead: RolledOut | None = None  # with recipe.rl.rollout_lag, the batch that comes after them
        self._restored: Mapping[str, Any] = {}  # what a checkpoint has of both, of all ranks
        self._beside: Beside[Round] | None = None  # with recipe.rl.overlap, who makes that batch
        self._copies: list[WeightCopy] = []  # by whose weights
        self._used = False  # a batch has been made ahead by this process
        self._report = StepReport()
        self._reference: Reference | None = None

    def problems(self, config: TrainConfig) -> list[str]:
        held_by = ("recipe.rl.kl_weight", config.recipe.rl.kl_weight)
        return rl_problems(config.recipe.rl) + data_problems(config, held_by) + layout_problems(config)

    def open_data(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        train, size = config.train, config.recipe.rl.group_size
        loader, self._samples[split] = open_prompts(
            config,
            # One completion for each held-out prompt, in batches of as many as in training.
            num_prompts=train.global_batch_size // size if split == "train" else train.global_batch_size,
            split=split,
            rank=rank,
            world_size=world_size,
            device_type=device_type,
        )
        self._tokenizer = loader.tokenizer
        return loader

    def objective(self, config: TrainConfig, mesh: Meshes, device: torch.device) -> Objective:
        self._objective = PolicyObjective(
            config.recipe.rl,
            device=device,
            vocabulary=vocabulary_shard(config.model.vocab_size, groups_in_layers(mesh, config.parallel)),
            batch_invariant=config.train.batch_invariant,
            groups=groups_in_layers(mesh, config.parallel),
            token_groups=[mesh.tokens.get_group(), *([mesh.batch["pp"].get_group()] if config.parallel.pp > 1 else [])],
        )
        return self._objective

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        rl = config.recipe.rl
        assert self._tokenizer is not None
        self._config, self._state, self._group = config, state, mesh.samples.get_group()
        self._parts, self._same_prompts = SequenceParts(config, mesh), SamePrompts(mesh)
        environment = None if rl.environment is None else import_path(rl.environment)
        room = Room.of_rollouts(config, mesh, self._tokenizer, self._samples["train"])
        assert isinstance(state.model, Decoder)
        self._sampled_by = state.model
        if rl.overlap:
            self._beside = Beside(state.device)
            self._sampled_by = self._copy_of(state.model)
        sampler, weights = start_sampler(
            config,
            state,
            mesh,
            self._tokenizer,
            room,
            environment=environment,
            model=self._sampled_by,
            stream=self._beside and self._beside.stream,
        )
        self._engine = sampler.engine
        tp = groups_in_layers(mesh, config.parallel).tp
        rewards = Rewards(rl)
        self._collector = Collector(
            rl,
            sampler=sampler,
            weights=weights,
            rewards=rewards,
            reward_models=RewardModels(
                rewards.models,
                config,
                mesh,
                state.device,
                tokenizer=self._tokenizer,
                all_gather=partial(all_gather, group=self._group),
            ),
            data_group=self._group,
            same_prompts=self._same_prompts,
            tp_group=None if tp is None else tp.get_group(),
        )
        if self.needs_reference(config):
            self._reference = load_reference(config, state, mesh)
        if self._restored:
            rank, size = mesh.samples.get_local_rank(), mesh.samples.size()
            self._buffer = shared_out(self._restored["rollouts"], rank, size)
            if ahead := self._restored.get("ahead"):
                self._ahead = RolledOut(shared_out(ahead["rollouts"], rank, size), ahead["metrics"], ahead["events"])

    def _copy_of(self, model: Decoder) -> Decoder:
        """What `_take_weights` brings up to date, while the model itself is trained."""
        copy = WeightCopy(model, self._config)
        copy.take()
        self._copies.append(copy)
        return copy.model

    def needs_reference(self, config: TrainConfig) -> bool:
        return config.recipe.rl.kl_weight > 0

    # ---- a step

    def collect(self, data: Loader) -> list[Batch]:
        fresh = not self._buffer
        self._report = StepReport()
        if fresh:
            made = self._next(data)
            self._report.metrics |= made.metrics
            self._report.events = [(kind, text) for kind, text in made.events]
            self._buffer = made.updates
        rollouts = self._buffer.pop(0)
        packed = self._packed(rollouts)
        positions = sum(len(rollout.tokens) - 1 for rollout in rollouts)
        self._report.positions = sum(self._collector.all_gather(positions))
        return [one.batch for one in packed]

    def prepare(self, microbatches: list[Batch]) -> list[Batch]:
        if not self._config.recipe.rl.kl_weight:
            return microbatches
        begin = time.perf_counter()
        found = self._reference_logprobs(microbatches)
        metrics = self._report.metrics
        metrics["logprob_seconds"] = metrics.get("logprob_seconds", 0.0) + time.perf_counter() - begin
        return [batch.with_columns(reference=each) for batch, each in zip(microbatches, found, strict=True)]

    def report(self) -> StepReport:
        return self._report

    def measured(self) -> dict[str, torch.Tensor]:
        return {"sampler_max_delta": self._objective.largest_delta()}

    def _next(self, data: Loader) -> RolledOut:
        """The batch of rollouts to learn from."""
        self._settle()
        now = self._ahead or self._roll_out(data)  # one that is there is learned from, also without a lag from now on
        self._ahead = None
        # What is compiled at its first use, by rollouts or by an update, is so with nothing beside it.
        if self._beside is not None and self._used:
            self._begin_roll_out(data, self._beside)
        elif self._config.recipe.rl.rollout_lag:
            self._ahead, self._used = self._roll_out(data), True
        return now

    def _roll_out(self, data: Loader) -> RolledOut:
        """A batch by the current weights."""
        self._take_weights()
        return self._rolled_out(data)

    def _take_weights(self) -> None:
        """Let the engine sample by the weights of now."""
        for copy in self._copies:
            copy.take()
        self._engine.weights_changed()

    def _begin_roll_out(self, data: Loader, beside: Beside[Round]) -> None:
        """Begin with a batch by the current weights, which `_settle` completes."""
        self._data = data
        tasks = self._collector.draw(data, self._samples["train"])
        self._take_weights()
        beside.start(lambda check: self._collector.sample(tasks, check=check))

    def _settle(self) -> None:
        """Wait for the batch that is being made, if there is one, and complete it. Collective.

        Raises on all ranks what went wrong on any.
        """
        if self._beside is None or not self._beside.busy:
            return
        begin, failure = time.perf_counter(), None
        try:
            made = self._beside.wait()
        except Exception as error:
            failure = error
        waited = time.perf_counter() - begin
        # A rank whose rollouts failed would not come to the next collective, where others wait.
        mine = None if failure is None else (dist.get_rank(), f"{type(failure).__name__}: {failure}")
        of_ranks = self._collector.all_gather(self._same_prompts.of_each(mine))
        if failure is not None:
            raise failure
        if failed := [one for alike in of_ranks for one in alike if one is not None]:
            raise RolloutError("rollouts failed on rank {}: {}".format(*failed[0]))
        self._ahead = self._rolled_out(self._data, made, waited)

    def _rolled_out(self, data: Loader, first: Round | None = None, waited: float = 0.0) -> RolledOut:
        """A batch by the weights that were taken last. first, waited: of `Collector.collect`."""
        rl = self._config.recipe.rl
        batches = self._collector.collect(data, self._samples["train"], first=first, waited=waited)
        begin = time.perf_counter()
        metrics = self._collector.metrics | self._complete(batches)
        metrics["logprob_seconds"] = time.perf_counter() - begin
        events, self._collector.events = self._collector.events, []
        # Of nothing one step is made, which changes no weights: a run that learns nothing has to end as well.
        updates = [list(batch) for _ in range(rl.epochs) for batch in batches] or [[]]
        return RolledOut(updates, metrics, events)

    def _complete(self, batches: list[list[Rollout]]) -> dict[str, float]:
        """Give rollouts what the models of when they were made say of them; what there is to report. Collective."""
        for batch in batches if self._config.recipe.rl.keeps_old else ():
            packed = self._packed(batch)
            parts = self._parts_of(packed)
            self._set_old(packed, self._whole(self._policy_logprobs(parts), parts))
        return {}

    def _parts_of(self, packed: list[Packed]) -> list[Batch]:
        """This rank's tokens of these micro-batches, on its device."""
        return [self._parts.of(one.batch).to(self._state.device) for one in packed]

    def _whole(self, found: list[torch.Tensor], parts: list[Batch]) -> list[torch.Tensor]:
        """[B, S] of whole rows, of what was found for each of the parts. Collective."""
        return [self._parts.whole(each, part) for each, part in zip(found, parts, strict=True)]

    def _set_old(self, packed: list[Packed], logprobs: list[torch.Tensor]) -> None:
        """logprobs: [B, S] of whole rows."""
        for one, of_labels in zip(packed, logprobs, strict=True):
            for rollout, numbers in of_rollouts(one, of_labels):
                rollout.old = numbers

    def _policy_logprobs(self, microbatches: list[Batch]) -> list[torch.Tensor]:
        """[B, T] of the labels of each part, as the trainer computes them, by the weights that rollouts were made
        by."""
        temperature = self._config.recipe.rl.temperature
        return self._state.passes.token_logprobs(self._sampled_by, microbatches, temperature=temperature)

    def _reference_logprobs(self, microbatches: list[Batch]) -> list[torch.Tensor]:
        assert self._reference is not None
        return self._reference.token_logprobs(microbatches, temperature=self._config.recipe.rl.temperature)

    def _packed(self, rollouts: list[Rollout]) -> list[Packed]:
        """In as many micro-batches as the rank that has most: sharded weights are gathered for each, on all ranks."""
        train, rl = self._config.train, self._config.recipe.rl
        packed = rollout_batches(
            rollouts,
            seq_len=train.seq_len,
            micro_batch_size=train.micro_batch_size,
            normalization=rl.normalization,
            constant=rl.max_tokens or train.seq_len,
            few_shapes=train.compile,
            row_step=row_step(self._config.parallel),
        )
        gather = self._collector.all_gather
        columns = sorted({*self.columns, *(name for names in gather(optional_columns(rollouts)) for name in names)})
        batches = in_step([one.batch for one in packed], self._config, gather, columns=columns)
        rows = [one.rows for one in packed] + [[] for _ in range(len(batches) - len(packed))]
        filled = [some + [[]] * (len(batch.tokens) - len(some)) for batch, some in zip(batches, rows, strict=True)]
        return [Packed(batch, some) for batch, some in zip(batches, filled, strict=True)]

    # ---- a run that goes on

    def state_dict(self) -> dict[str, Any]:
        """Rollouts of updates that are still to be made: the weights they were sampled by are gone."""
        self._settle()
        ahead = None
        if self._ahead is not None:
            made = self._ahead
            ahead = {"rollouts": self._saved(made.updates), "metrics": made.metrics, "events": made.events}
        return {"rollouts": self._saved(self._buffer), "ahead": ahead}

    def _saved(self, updates: list[list[Rollout]]) -> list[Any]:
        return self._collector.all_gather([[rollout.state_dict() for rollout in batch] for batch in updates])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ahead = state.get("ahead")
        self._restored = {
            "rollouts": _restored(state.get("rollouts", [])),
            "ahead": ahead and ahead | {"rollouts": _restored(ahead["rollouts"])},
        }

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()

    # ---- validation

    def validate(self, state: TrainState, steps: Iterable[list[Batch]]) -> dict[str, float]:
        """Greedy completions of held-out prompts: their mean reward, and how many give the row's answer."""
        self._settle()
        self._take_weights()
        samples = self._samples["validation"]
        assert self._tokenizer is not None
        right = known = count = reward = failures = 0.0
        errors: list[str] = []
        for step in steps:
            numbers = []
            for batch in step:
                real = (batch.labels != IGNORE_INDEX).any(1)
                numbers += batch.samples[real].tolist()
            groups, totals = self._collector.groups(numbers, samples, size=1, temperature=0.0)
            for group in groups:
                (rollout,) = group.rollouts
                row = samples[group.number].row
                if "answer" in row:
                    known += 1
                    right += answers(rollout, self._tokenizer, str(row["answer"]))
            count, reward = count + totals.rewarded, reward + totals.reward
            failures, errors = failures + totals.completions - totals.rewarded, errors + totals.errors
        of_ranks = self._collector.all_gather(((right, known, count, reward, failures), errors))
        check_rewards([error for _, errors in of_ranks for error in errors], self._config.recipe.rl)
        sums = [sum(values) for values in zip(*(sums for sums, _ in of_ranks), strict=True)]
        found = {"reward": sums[3] / max(sums[2], 1), "completions": sums[2], "reward_failures": sums[4]}
        return found | ({"exact_match": sums[0] / sums[1]} if sums[1] else {})

    def validation_metrics(self, found: Mapping[str, float]) -> dict[str, float]:
        return {f"validation_{name}": value for name, value in found.items()}

    def describe_data(self, data: Loader) -> str:
        left_out = "".join(f"; left out, for example, {why}" for why in data.left_out)
        return "of the training split: " + ", ".join(f"{n} {c:,}" for n, c in data.counts.items() if c) + left_out


def _restored(of_ranks: list[Any]) -> list[list[list[Rollout]]]:
    return [[[Rollout.of_state(one) for one in batch] for batch in mine] for mine in of_ranks]


def shared_out(of_ranks: list[list[list[Rollout]]], rank: int, size: int) -> list[list[Rollout]]:
    """A rank's rollouts of each update, from those of each rank that saved them; each is trained on once."""
    if len(of_ranks) == size:
        return of_ranks[rank]
    updates = [[one for mine in batches for one in mine] for batches in zip(*of_ranks, strict=True)]
    return [batch[rank * len(batch) // size : (rank + 1) * len(batch) // size] for batch in updates]
