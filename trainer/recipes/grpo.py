"""Reinforcement learning with groups of completions: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO.

A step samples recipe.rl.group_size completions of each prompt by an engine on the trainer's own weights, rewards them,
takes a completion's advantage from the others of its prompt, and descends the gradient of trainer/rl/objective.py. The
variants are settings of `recipe.rl`; configs/recipe has a file for each.

train.global_batch_size counts completions, train.micro_batch_size rows of train.seq_len tokens that they are packed
into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from data.batch import IGNORE_INDEX, Batch
from data.loader import Loader
from data.prompts import PromptSamples, build_prompt_loader
from parallel.mesh import Meshes, groups_in_layers
from parallel.problem import Problem, multiples, values
from trainer.config import ConfigError, RecipeConfig, TrainConfig, configuration_errors
from trainer.frozen import FrozenModel, load_frozen, resolve_beside
from trainer.loss import Objective, vocabulary_shard
from trainer.recipes.pretrain import Pretrain, StepReport
from trainer.rl.collect import Collector
from trainer.rl.config import rl_problems
from trainer.rl.objective import PolicyObjective
from trainer.rl.packing import Packed, empty_batch, rollout_batches, set_old
from trainer.rl.rewards import Rewards, check_rewards, import_path
from trainer.rl.rollouts import Rollout, answers
from trainer.rl.serving import start_sampler
from trainer.step import TrainState


class GroupPolicyOptimization(Pretrain):
    """recipe=grpo, dr_grpo, dapo, gspo, cispo, rloo."""

    reads = ("rl", "reference_path", "reference_offload")

    def __init__(self) -> None:
        self._samples: dict[str, PromptSamples] = {}  # by split
        self._buffer: list[list[Rollout]] = []  # of updates that are still to be made, this rank's rollouts
        self._restored: list[list[list[Rollout]]] = []  # the same of each rank, from a checkpoint
        self._report = StepReport()
        self._reference: FrozenModel | None = None

    def problems(self, config: TrainConfig) -> list[str]:
        return rl_problems(config.recipe.rl) + _data_problems(config) + _layout_problems(config)

    def open_data(self, config: TrainConfig, *, split: str, rank: int, world_size: int, device_type: str) -> Loader:
        train, size = config.train, config.recipe.rl.group_size
        loader, self._samples[split] = build_prompt_loader(
            config.data,
            # One completion for each held-out prompt, in batches of as many as in training.
            num_prompts=train.global_batch_size // size if split == "train" else train.global_batch_size,
            max_prompt=train.seq_len - 1,
            rank=rank,
            world_size=world_size,
            seed=train.seed,
            split=split,
            vocab_size=config.model.vocab_size,
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
            token_group=mesh.tokens.get_group(),
        )
        return self._objective

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        rl = config.recipe.rl
        assert self._tokenizer is not None
        self._config, self._state, self._group = config, state, mesh.samples.get_group()
        environment = None if rl.environment is None else import_path(rl.environment)
        sampler, weights = start_sampler(config, state, mesh, self._tokenizer, environment=environment)
        self._engine = sampler.engine
        tp = groups_in_layers(mesh, config.parallel).tp
        self._collector = Collector(
            rl,
            sampler=sampler,
            weights=weights,
            rewards=Rewards(rl),
            data_group=self._group,
            tp_group=None if tp is None else tp.get_group(),
        )
        if rl.kl_weight:
            self._reference = load_reference(config, mesh, state.device)
        if self._restored:
            rank, size = mesh.samples.get_local_rank(), mesh.samples.size()
            self._buffer = shared_out(self._restored, rank, size)

    # ---- a step

    def collect(self, data: Loader) -> list[Batch]:
        fresh = not self._buffer
        self._report = StepReport()
        if fresh:
            self._roll_out(data)
            self._report.metrics |= self._collector.metrics
            self._report.events, self._collector.events = self._collector.events, []
        rollouts = self._buffer.pop(0)
        packed = self._packed(rollouts)
        positions = sum(len(rollout.tokens) - 1 for rollout in rollouts)
        self._report.positions = sum(self._collector.all_gather(positions))
        return [one.batch for one in packed]

    def prepare(self, microbatches: list[Batch]) -> list[Batch]:
        if self._reference is None or "weight" not in microbatches[0].columns:  # prompts, to be validated on
            return microbatches
        found = self._reference.token_logprobs(microbatches)
        return [batch.with_columns(reference=each) for batch, each in zip(microbatches, found, strict=True)]

    def report(self) -> StepReport:
        return self._report

    def measured(self) -> dict[str, torch.Tensor]:
        return {"sampler_max_delta": self._objective.largest_delta()}

    def _roll_out(self, data: Loader) -> None:
        """Fill the buffer by the current weights."""
        rl = self._config.recipe.rl
        self._engine.weights_changed()
        batches = self._collector.collect(data, self._samples["train"])
        if rl.updates > 1:
            for batch in batches:
                packed = self._packed(batch)
                microbatches = [one.batch.to(self._state.device) for one in packed]
                found = self._state.passes.token_logprobs(self._state.model, microbatches)  # type: ignore[arg-type]
                for one, logprobs in zip(packed, found, strict=True):
                    set_old(one, logprobs.cpu())
        self._buffer = [list(batch) for _ in range(rl.epochs) for batch in batches]

    def _packed(self, rollouts: list[Rollout]) -> list[Packed]:
        """In as many micro-batches as the rank that has most: sharded weights are gathered for each, on all ranks."""
        train, rl = self._config.train, self._config.recipe.rl
        packed = rollout_batches(
            rollouts,
            seq_len=train.seq_len,
            micro_batch_size=train.micro_batch_size,
            normalization=rl.normalization,
            constant=rl.max_tokens or train.seq_len,
        )
        most = max(1, *self._collector.all_gather(len(packed)))
        old = any(self._collector.all_gather(any(rollout.old for rollout in rollouts)))
        packed += [Packed(empty_batch(["old"] if old else []), [[]]) for _ in range(most - len(packed))]
        return packed

    # ---- a run that goes on

    def state_dict(self) -> dict[str, Any]:
        """Rollouts of updates that are still to be made: the weights they were sampled by are gone."""
        mine = [[rollout.state_dict() for rollout in batch] for batch in self._buffer]
        return {"rollouts": self._collector.all_gather(mine)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        of_ranks = state.get("rollouts", [])
        self._restored = [[[Rollout.of_state(one) for one in batch] for batch in mine] for mine in of_ranks]

    # ---- validation

    def validate(self, state: TrainState, steps: Iterable[list[Batch]]) -> dict[str, float]:
        """Greedy completions of held-out prompts: their mean reward, and how many give the row's answer."""
        self._engine.weights_changed()
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


def load_reference(config: TrainConfig, mesh: Meshes, device: torch.device) -> FrozenModel:
    """The model that the policy is held near. Raises ConfigError. Collective."""
    recipe = config.recipe
    with configuration_errors():
        beside = resolve_beside(recipe.reference_path, config)
        if beside.vocab_size != config.model.vocab_size:
            raise ConfigError(
                [
                    f"recipe.reference_path={recipe.reference_path} has a vocabulary of {beside.vocab_size} words and "
                    f"the model one of {config.model.vocab_size}; give a reference with the same tokenizer"
                ]
            )
        return load_frozen(beside, config, mesh, device, offload=recipe.reference_offload)


def shared_out(of_ranks: list[list[list[Rollout]]], rank: int, size: int) -> list[list[Rollout]]:
    """A rank's rollouts of each update, from those of each rank that saved them; each is trained on once."""
    if len(of_ranks) == size:
        return of_ranks[rank]
    updates = [[one for mine in batches for one in mine] for batches in zip(*of_ranks, strict=True)]
    return [batch[rank * len(batch) // size : (rank + 1) * len(batch) // size] for batch in updates]


def _data_problems(config: TrainConfig) -> list[str]:
    found: list[str] = []
    data, train, rl = config.data, config.train, config.recipe.rl
    name = f"recipe.name={config.recipe.name}"
    if data.source != "prompts":
        found.append(f"{name} with data.source={data.source} has nothing to answer; use data=prompts")
    elif data.tokenizer.path is None and config.model.path is None:
        found.append(
            "data.tokenizer.path is missing: prompts need the tokenizer that the model was made for; give its folder"
        )
    elif not data.mask_documents:
        found.append(
            Problem(
                "data.mask_documents=false lets the completions of a row see one another",
                values("data.mask_documents", [True]),
            )
        )
    if rl.group_size > 1 and train.global_batch_size % rl.group_size:
        size = train.global_batch_size
        found.append(
            Problem(
                f"train.global_batch_size={size} completions do not divide into groups of recipe.rl.group_size="
                f"{rl.group_size}",
                values("train.global_batch_size", multiples(rl.group_size, size), near=size),
            )
        )
    if rl.max_tokens is not None and rl.max_tokens >= train.seq_len:
        found.append(
            f"recipe.rl.max_tokens={rl.max_tokens} leaves no room for a prompt in train.seq_len={train.seq_len}; use "
            f"at most {train.seq_len - 1}"
        )
    if train.sample_tokens:
        what = f"train.sample_tokens={train.sample_tokens} continues a text, and {name} answers prompts"
        found.append(Problem(what, values("train.sample_tokens", [0])))
    if rl.kl_weight and config.recipe.reference_path is None and config.checkpoint.resume not in ("auto", "never"):
        found.append(
            f"recipe.reference_path is missing: the policy begins with checkpoint.resume={config.checkpoint.resume}, "
            "which no reference can be read from; give a Hugging Face folder (launch/convert.py export makes one)"
        )
    for field in ("reference_path", "reference_offload"):
        if not rl.kl_weight and (value := getattr(config.recipe, field)):
            why = f"recipe.{field}={value} has no effect with recipe.rl.kl_weight=0"
            found.append(Problem(why, values(f"recipe.{field}", [getattr(RecipeConfig(), field)])))
    for number, one in enumerate(rl.rewards):
        try:
            Rewards(replace(rl, rewards=[one]))
        except ValueError as error:
            found.append(str(error).replace("rewards[0]", f"rewards[{number}]"))
    if rl.environment is not None:
        try:
            import_path(rl.environment)
        except ValueError as error:
            found.append(f"recipe.rl.environment={error}")
    return found


def _layout_problems(config: TrainConfig) -> list[str]:
    """What an engine cannot serve while it is trained."""
    found: list[str] = []
    parallel, rl, model, train = config.parallel, config.recipe.rl, config.model, config.train
    name = f"recipe.name={config.recipe.name}"

    def refuse(field: str, value: object, why: str, instead: object) -> None:
        found.append(Problem(f"{field}={value} does not work with {name}: {why}", values(field, [instead])))

    if parallel.pp > 1:
        refuse("parallel.pp", parallel.pp, "the engine serves whole models, not stages of a pipeline", 1)
    if parallel.cp > 1:
        refuse("parallel.cp", parallel.cp, "layers split sequences over cp, and a step of the engine has many", 1)
    if parallel.ep > 1:
        refuse("parallel.ep", parallel.ep, "experts are on ranks with other prompts, at their own pace", 1)
    if parallel.sequence_parallel:
        why = "layers split tokens over tp, and a step of the engine has any number of them"
        refuse("parallel.sequence_parallel", "true", why, False)
    if parallel.tp > 1 and parallel.zero_stage == 3:
        why = "shards of tp's shards are not served; stages 0 to 2 are"
        refuse("parallel.zero_stage", 3, f"with parallel.tp={parallel.tp} {why}", 2)
    if parallel.cpu_offload:
        refuse("parallel.cpu_offload", "true", "weights on the host would be gathered for every token", False)
    if train.compile:
        refuse("train.compile", "true", "rows have the length of what was sampled, each of which compiles anew", False)
    if config.precision.fp8:
        why = "scales are those of a whole batch, which the engine has not"
        refuse("precision.compute", config.precision.compute, why, "bf16")
    if model.moe.num_experts:
        why = "auxiliary losses are means over rows, of which a step has another number each time"
        refuse("model.moe.num_experts", model.moe.num_experts, why, 0)
    for field in ("dropout", "attention_dropout"):
        if value := getattr(model, field):
            refuse(f"model.{field}", value, "completions are sampled without, by other probabilities", 0.0)
    if config.adapter.name != "none":
        refuse("adapter.name", config.adapter.name, "the engine does not serve adapters beside their weights", "none")
    if model.mtp.depth:
        refuse("model.mtp.depth", model.mtp.depth, "its losses are those of texts", 0)
    if model.speculator.kind != "none":
        refuse("model.speculator.kind", model.speculator.kind, "heads are trained beside a model that stays", "none")
    if parallel.zero_stage == 3 and rl.weights == "in_place":
        found.append(
            Problem(
                "recipe.rl.weights=in_place with parallel.zero_stage=3 has no whole weights anywhere",
                values("recipe.rl.weights", ["gather", "stream"]),
            )
        )
    if parallel.zero_stage < 3 and rl.weights in ("gather", "stream"):
        found.append(
            Problem(
                f"recipe.rl.weights={rl.weights} with parallel.zero_stage={parallel.zero_stage}: the model computes "
                "with whole weights already",
                values("recipe.rl.weights", ["in_place"]),
            )
        )
    if rl.engine.cuda_graphs and parallel.zero_stage == 3:
        found.append(
            Problem(
                "recipe.rl.engine.cuda_graphs=true with parallel.zero_stage=3: gathered weights lie elsewhere "
                "each time",
                values("recipe.rl.engine.cuda_graphs", [False]),
            )
        )
    return found
