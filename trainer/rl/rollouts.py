"""Rollouts: completions that the engine samples from the weights that are trained.

What a rollout is depends on the weights, and on (run seed, number of the prompt's sample, number of the completion,
position) alone: the engine draws each token by Philox of these (inference/sampling.py). So it does not depend on ranks,
on what is batched with it, or on when a run was interrupted. Tokens are kept as they were generated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist

from data.prompts import Prompt
from data.tokenizer import Tokenizer
from inference.config import SamplingConfig
from inference.engine import Engine
from inference.sequence import Completion
from trainer.rl.environment import Environment
from trainer.rl.maths import expected_answer, final_answer, same_answer
from trainer.rl.rewards import Answer
from trainer.rl.weights import Lockstep

T = TypeVar("T")


class Task(NamedTuple):
    """A completion to be sampled."""

    prompt: Prompt
    number: int  # of the prompt's sample in the run
    sample: int  # of the completions of this prompt


@dataclass
class Rollout:
    """A completion of one prompt, by `Sampler.rollouts`; the fields from `reward` on by whoever rewards it."""

    number: int  # of the prompt's sample in the run
    sample: int  # of the completions of this prompt
    tokens: list[int]  # of the prompt, then of the completion: generated ones, and those an environment put in
    spans: list[tuple[int, int]]  # of tokens, the generated ones
    logprobs: list[float]  # of generated tokens, in their order, as the engine drew them
    finish_reason: str  # stop, length, or failed where its environment did
    old: list[float] = field(default_factory=list)  # the same by the trainer, where weights change before an update
    reward: float | None = None  # None: a reward function failed, and it is left out
    rewards: dict[str, float] = field(default_factory=dict)  # by function
    advantage: float = 0.0
    # PPO, of generated tokens; else empty
    advantages: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.logprobs)

    def state_dict(self) -> dict[str, Any]:
        """In JSON values."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Rollout:
        return cls(**{**state, "spans": [(begin, end) for begin, end in state["spans"]]})


class Sampled(NamedTuple):
    """Filled by `Sampler.rollouts`, in the order of its tasks."""

    rollouts: list[Rollout]
    answers: list[Answer]  # the same as rewards see them


@dataclass
class _Episode:
    """A rollout that is under way."""

    place: int  # among the tasks
    rollout: Rollout
    environment: Environment | None
    said: list[str] = field(default_factory=list)  # by the model and the environment in turn
    failure: str = ""  # of the environment, which ended it


class Sampler:
    """An engine, and what completions are sampled by."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_len: int,
        max_tokens: int | None,
        lockstep: Lockstep,
        environment: Callable[[], Environment] | None = None,
        max_turns: int = 1,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        """seed: the run's. max_len: tokens of prompt and completion; max_tokens: of the completion. environment: makes
        one for each completion, which then has up to max_turns turns of the model; it is asked on the first rank of
        tp_group, for all of them."""
        self.engine = engine
        self._lockstep = lockstep
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_len = max_len
        self._max_tokens = max_tokens
        self._environment = environment
        self._max_turns = max_turns
        self._tp_group = tp_group

    def rollouts(
        self, tasks: Sequence[Task], *, temperature: float, check: Callable[[], None] | None = None
    ) -> Sampled:
        """A completion for each task. temperature: 0 is greedy. All ranks of tp call it with the same tasks.

        check: called before each step of the engine; what it raises ends it. Raises FloatingPointError where the model
        gives NaN.
        """
        episodes: dict[int, _Episode] = {}
        answers: list[Answer | None] = [None] * len(tasks)
        rollouts: list[Rollout | None] = [None] * len(tasks)
        for place, task in enumerate(tasks):
            episode = _Episode(place, Rollout(task.number, task.sample, list(task.prompt.ids), [], [], ""), None)
            if self._begin(task, episode):
                self._ask(episode, episodes, temperature)
                continue
            rollouts[place], answers[place] = episode.rollout, self._answer(task, episode)
        while self._lockstep.any_busy(self.engine.num_unfinished > 0):
            if check is not None:
                check()
            for delta in self.engine.step() if self.engine.num_unfinished else self._lockstep.idle():
                if delta.completion is None:
                    continue
                episode = episodes.pop(delta.request)
                if not self._take(episode, delta.completion):
                    self._ask(episode, episodes, temperature)
                    continue
                task = tasks[episode.place]
                rollouts[episode.place] = episode.rollout
                answers[episode.place] = self._answer(task, episode)
        return Sampled([one for one in rollouts if one is not None], [one for one in answers if one is not None])

    def _begin(self, task: Task, episode: _Episode) -> bool:
        """Whether there is something to sample: no environment, or one that has started."""
        if self._environment is None:
            return True
        failure = self._of_first_rank(partial(self._start, task, episode))
        if failure:
            self._fail(episode, failure)
        return not failure

    def _start(self, task: Task, episode: _Episode) -> str:
        """What went wrong."""
        assert self._environment is not None
        try:
            episode.environment = self._environment()
            episode.environment.start(task.prompt.text, task.prompt.row)
        except Exception as error:  # a user's code, which a reward function may be as well
            return f"raised {type(error).__name__} when it started: {error}"
        return ""

    def _reply(self, episode: _Episode) -> tuple[str | None, str]:
        """What an environment says to the model's last turn, and what went wrong."""
        assert episode.environment is not None
        try:
            reply = episode.environment.reply(episode.said[-1])
        except Exception as error:
            return None, f"raised {type(error).__name__}: {error}"
        if reply is not None and not isinstance(reply, str):
            return None, f"replied {reply!r}, neither text nor None"
        return reply, ""

    def _of_first_rank(self, ask: Callable[[], T]) -> T:
        """What the first rank of tp gets, on all: a user's code may do otherwise on each, and then ranks would part."""
        if self._tp_group is None:
            return ask()
        found: list[Any] = [ask() if dist.get_rank(self._tp_group) == 0 else None]
        dist.broadcast_object_list(found, src=dist.get_global_rank(self._tp_group, 0), group=self._tp_group)
        return cast("T", found[0])

    def _fail(self, episode: _Episode, what: str) -> None:
        episode.failure, episode.rollout.finish_reason = f"the environment {what}", "failed"

    def _ask(self, episode: _Episode, episodes: dict[int, _Episode], temperature: float) -> None:
        rollout = episode.rollout
        sampling = SamplingConfig(
            temperature=temperature,
            tempered_logprobs=temperature > 0,
            seed=rollout_seed(self._seed, rollout.number, rollout.sample),
            max_tokens=self._room(rollout),
        )
        episodes[self.engine.add(rollout.tokens, sampling)] = episode

    def _room(self, rollout: Rollout) -> int:
        """Tokens that may still be generated."""
        room = self._max_len - len(rollout.tokens)
        return room if self._max_tokens is None else min(room, self._max_tokens - rollout.num_generated)

    def _take(self, episode: _Episode, completion: Completion) -> bool:
        """Add a turn of the model, and what the environment says to it; whether the rollout has ended."""
        rollout = episode.rollout
        if completion.finish_reason == "nan":
            raise FloatingPointError(completion.error)
        begin = len(rollout.tokens)
        rollout.tokens += completion.token_ids
        rollout.spans.append((begin, len(rollout.tokens)))
        rollout.logprobs += completion.logprobs
        rollout.finish_reason = str(completion.finish_reason)
        episode.said.append(self._tokenizer.decode(completion.token_ids, skip_special_tokens=True))
        if self._environment is None or completion.finish_reason == "length":
            return True
        if len(rollout.spans) == self._max_turns:
            rollout.finish_reason = "length"
            return True
        reply, failure = self._of_first_rank(partial(self._reply, episode))
        if failure:
            self._fail(episode, failure)
        if reply is None:
            return True
        ids = self._tokenizer.encode(reply)
        episode.said.append(reply)
        if self._room(rollout) <= len(ids):
            rollout.finish_reason = "length"
            return True
        rollout.tokens += ids
        return False

    def _answer(self, task: Task, episode: _Episode) -> Answer:
        rollout = episode.rollout
        generated = [token for begin, end in rollout.spans for token in rollout.tokens[begin:end]]
        return Answer(
            prompt=task.prompt.text,
            text="".join(episode.said[::2]),
            token_ids=generated,
            finish_reason=rollout.finish_reason,
            row=task.prompt.row,
            turns=() if self._environment is None else tuple(episode.said),
            environment=episode.environment,
            failure=episode.failure,
        )


def answers(rollout: Rollout, tokenizer: Tokenizer, answer: str) -> bool:
    """Whether what was generated ends in this answer (trainer/rl/maths.py)."""
    generated = [token for begin, end in rollout.spans for token in rollout.tokens[begin:end]]
    found = final_answer(tokenizer.decode(generated, skip_special_tokens=True))
    return found is not None and same_answer(found, expected_answer(answer))


def rollout_seed(seed: int, number: int, sample: int) -> int:
    """32 bits of the run's seed, the number of a prompt's sample and that of the completion."""
    return int.from_bytes(hashlib.sha256(f"rollout/{seed}/{number}/{sample}".encode()).digest()[:4], "little")
