"""Exact match on generated answers: held-out questions are answered greedily at each validation (`recipe.answers`).

The engine samples on the weights that are trained, as rollouts of recipe=grpo do (trainer/rl/serving.py). Which
questions those are depends on the rows alone, and each data-parallel rank answers every so many of them: so the share
is the same on every layout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from data.config import parts
from data.questions import read_questions
from data.tokenizer import Tokenizer
from parallel.mesh import Meshes
from parallel.problem import Problem, values
from trainer.config import TrainConfig
from trainer.rl.answers_config import COMPARISONS
from trainer.rl.collect import all_gather
from trainer.rl.config import WEIGHTS, RLConfig
from trainer.rl.maths import final_answer, plain, same_answer
from trainer.rl.problems import layout_problems
from trainer.rl.rollouts import Rollout, Task
from trainer.rl.same_prompts import SamePrompts
from trainer.rl.serving import Room, start_sampler
from trainer.step import TrainState


def answers_problems(config: TrainConfig) -> list[str]:
    """Why a validation cannot answer questions, one line each."""
    recipe, train, chosen, found = config.recipe, config.train, config.recipe.answers, list[str]()
    asks = ("recipe.answers.prompts", chosen.prompts)
    count = f"{asks[0]}={asks[1]}"
    if chosen.prompts < 0:
        return [Problem(f"{count} must not be negative", values(asks[0], [0, 32]))]
    if not chosen.prompts:
        return ["recipe.rl is set and has no effect with recipe.answers.prompts=0; leave it out"] * (
            recipe.rl != RLConfig()
        )
    if chosen.compare not in COMPARISONS:
        why = f"recipe.answers.compare={chosen.compare} is unknown"
        found.append(Problem(why, values("recipe.answers.compare", COMPARISONS)))
    if all(part.source != "conversations" for part in parts(config.data)):
        why = f"{count} with data.source={config.data.source}: its rows have no answers"
        found.append(Problem(why, values(asks[0], [0]), words="use data=conversations"))
    if train.eval_interval <= 0:
        why = f"{count} with train.eval_interval={train.eval_interval}: answers are part of a validation"
        found.append(Problem(why, values("train.eval_interval", [100]), values(asks[0], [0])))
    longest = chosen.max_tokens
    if longest is not None and not 1 <= longest < train.seq_len:
        why = (
            f"recipe.answers.max_tokens={longest} must be at least 1 and leave room for a prompt in "
            f"train.seq_len={train.seq_len}"
        )
        fitting = [max(1, train.seq_len // 2), None]
        found.append(Problem(why, values("recipe.answers.max_tokens", fitting)))
    default = RLConfig()
    for name in (field.name for field in fields(RLConfig) if field.name not in ("weights", "engine")):
        if getattr(recipe.rl, name) != getattr(default, name):
            found.append(f"recipe.rl.{name} is set and has no effect with recipe.name={recipe.name}; leave it out")
    if recipe.rl.weights not in WEIGHTS:
        why = f"recipe.rl.weights={recipe.rl.weights} is unknown"
        found.append(Problem(why, values("recipe.rl.weights", list(WEIGHTS))))
    return found + layout_problems(config, asks=asks)


@dataclass
class _Answered:
    """An answer to a question. Filled by `HeldOutAnswers.validate`."""

    text: str
    right: bool
    truncated: bool


class HeldOutAnswers:
    """The questions of a run, and an engine that answers them."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """Raises DataError for rows that cannot be asked or answered."""
        chosen, seq_len = config.recipe.answers, config.train.seq_len
        self._compare = chosen.compare
        self._tokenizer = tokenizer
        self._questions = read_questions(
            config.data,
            tokenizer,
            count=chosen.prompts,
            max_prompt=seq_len - 1,
            found_in=final_answer if chosen.compare == "final" else plain,
        )
        self._events: list[tuple[str, str, dict[str, Any]]] = []

    def start(self, config: TrainConfig, state: TrainState, mesh: Meshes) -> None:
        """Make the engine, with a cache for the longest of this run's questions and answers. Collective."""
        chosen, seq_len, ranks = config.recipe.answers, config.train.seq_len, mesh.samples.size()
        self._group, self._rank, self._num_ranks = mesh.samples.get_group(), mesh.samples.get_local_rank(), ranks
        self._same_prompts = SamePrompts(mesh)
        prompts = self._questions.prompts
        longest = max(len(prompt.ids) for prompt in prompts)
        room = Room(
            num_sequences=-(-len(prompts) // (ranks * self._same_prompts.size)),
            max_len=seq_len if chosen.max_tokens is None else min(seq_len, longest + chosen.max_tokens),
            max_tokens=chosen.max_tokens,
            ends=sorted(self._questions.ends),
        )
        self._sampler, self._weights = start_sampler(config, state, mesh, self._tokenizer, room)

    def validate(self) -> dict[str, float]:
        """The share of questions that the weights of now answer as their rows do, and how many there are. Collective.

        Raises FloatingPointError where the model gives NaN.
        """
        prompts = self._questions.prompts
        tasks = [Task(prompts[n], n, 0) for n in range(self._rank, len(prompts), self._num_ranks)]
        self._sampler.engine.weights_changed()

        def answer() -> list[Rollout]:
            with self._weights.serving():
                return self._sampler.rollouts(self._same_prompts.mine(tasks), temperature=0.0).rollouts

        rollouts = self._same_prompts.all(self._same_prompts.together(answer))
        mine = [self._judged(rollout) for rollout in rollouts]
        of_ranks = all_gather((sum(one.right for one in mine), sum(one.truncated for one in mine)), self._group)
        right, truncated = (sum(counts) for counts in zip(*of_ranks, strict=True))
        self._events = []
        if mine:  # of rank 0 always: the first question is its own
            self._events = [self._event(mine[0], right, truncated)]
        return {"exact_match": right / len(prompts), "completions": len(prompts)}

    def _event(self, first: _Answered, right: int, truncated: int) -> tuple[str, str, dict[str, Any]]:
        prompts = self._questions.prompts
        text = f"{right} of {len(prompts)} held-out prompts answered as their rows are"
        if truncated:
            text += f"; {truncated} answers were cut off"
        if left_out := self._questions.left_out:
            text += f"; {len(left_out)} rows left out, for example, {left_out[0]}"
        expected = prompts[0].row["answer"]
        return "answers", text, {"prompt": prompts[0].text, "sample": first.text, "expected": expected}

    def events(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Of the last `validate`, on rank 0: how many, and the first question with its answer."""
        return self._events

    def _judged(self, rollout: Rollout) -> _Answered:
        ((begin, end),) = rollout.spans
        text = self._tokenizer.decode(rollout.tokens[begin:end], skip_special_tokens=True)
        expected = self._questions.prompts[rollout.number].row["answer"]
        if self._compare == "final":
            found = final_answer(text)
            right = found is not None and same_answer(found, expected)
        else:
            right = plain(text) == expected
        return _Answered(text, right, rollout.finish_reason == "length")


def held_out_answers(config: TrainConfig, tokenizer: Tokenizer | None) -> HeldOutAnswers | None:
    """Those of a run that wants some, once the loader of its validation is open. Raises DataError."""
    if not config.recipe.answers.prompts:
        return None
    assert tokenizer is not None  # conversations have one
    return HeldOutAnswers(config, tokenizer)
