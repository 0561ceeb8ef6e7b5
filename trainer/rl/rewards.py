"""What a completion is worth: Python functions of it and reward models, each with a weight.

A reward function takes an `Answer`, and the keyword arguments it is configured with, and returns a finite number:

    def short(answer: Answer, *, tokens: int = 100) -> float:
        return 1.0 if len(answer.token_ids) <= tokens else 0.0

It is named by its import path, `mypackage.rewards:short`, or is one of REWARDS. One that raises or returns anything but
a finite number ends the run with the prompt and the completion it was given, or leaves that completion out of its
group, as `recipe.rl.bad_reward` says; how many were left out is a metric, and the first of each step an event. Reward
models are in trainer/rl/reward_models.py.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np

from trainer.rl.config import MODEL, RewardConfig, RLConfig
from trainer.rl.maths import expected_answer, final_answer, same_answer
from trainer.rl.sandbox import run_program


@dataclass(frozen=True)
class Answer:
    """A completion, as a reward function sees it."""

    prompt: str
    text: str  # of all the model's turns, without special tokens
    token_ids: Sequence[int]  # that it generated, the one that ended it included
    finish_reason: str  # stop, or length where it was cut off
    row: Mapping[str, Any]  # of the data, with all its columns
    turns: Sequence[str] = ()  # with an environment: what was said, the model and the environment in turn
    environment: Any = None  # the object that answered, as the completion left it; None: there was none
    failure: str = ""  # of the environment, which ended the completion: it is left out as if a function had failed


Reward = Callable[..., float]
NO_MODELS: Mapping[str, Sequence[float]] = MappingProxyType({})


class RewardError(ValueError):
    """A reward function raised, or returned no finite number; the message says which, of what."""


@dataclass
class Scored:
    """Rewards of one answer. Filled by `Rewards.of`."""

    total: float | None  # weighted sum; None: a function failed
    each: dict[str, float] = field(default_factory=dict)  # by name, before its weight
    error: str = ""  # of the function that failed


def maths(answer: Answer, *, column: str = "answer") -> float:
    """1 where the text ends in the row's answer (trainer/rl/maths.py), else 0."""
    found = final_answer(answer.text)
    return float(found is not None and same_answer(found, expected_answer(_column(answer, column))))


def exact(answer: Answer, *, column: str = "answer") -> float:
    """1 where the text is the row's answer but for blanks around it, else 0."""
    return float(answer.text.strip() == _column(answer, column).strip())


def code(answer: Answer, *, column: str = "tests", seconds: float = 5.0, memory_mb: int = 512) -> float:
    """1 where the text's last block of code, or all of it, passes the row's tests (Python that raises if not), else 0.

    Both run in one interpreter with limits, the tests last: what that cannot keep out is in trainer/rl/sandbox.py.
    """
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", answer.text, flags=re.DOTALL)
    program = blocks[-1] if blocks else answer.text
    _column(answer, column)
    tests = answer.row[column]
    lines = tests if isinstance(tests, str) else "\n".join(tests)
    return float(run_program(program, lines, seconds=seconds, memory_mb=memory_mb).passed)


def finished(answer: Answer) -> float:
    """1 where the model ended the completion itself, 0 where it was cut off."""
    return float(answer.finish_reason == "stop")


REWARDS: Mapping[str, Reward] = {"math": maths, "exact": exact, "code": code, "finished": finished}


def _column(answer: Answer, column: str) -> str:
    if column not in answer.row:
        raise KeyError(f"the row has no column {column!r}; it has {', '.join(answer.row)}")
    return str(answer.row[column])


def find_reward(name: str) -> Reward:
    """The function of a name or an import path. Raises ValueError."""
    if ":" not in name:
        if name not in REWARDS:
            raise ValueError(f"{name} is unknown; use {', '.join((*REWARDS, MODEL))}, or package.module:function")
        return REWARDS[name]
    return import_path(name)


def check_arguments(function: Reward, reward: RewardConfig) -> None:
    """Raises ValueError for keyword arguments that it does not take, or lacks: it would fail at every answer."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in functions nobody knows
        return
    try:
        signature.bind(None, **reward.arguments)
    except TypeError as error:
        raise ValueError(
            f"{reward.function} cannot be called with an answer and arguments={reward.arguments}: {error}; it is "
            f"{reward.function.rpartition(':')[2]}{signature}"
        ) from None


def import_path(path: str) -> Any:
    """What package.module:name stands for, which can be called. Raises ValueError."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module does when it is imported
        what = f"{path} cannot be imported: {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            what += "; modules are looked for in the working directory and on PYTHONPATH"
        raise ValueError(what) from error
    if not callable(found):
        raise ValueError(f"{path} is {type(found).__name__}, which cannot be called; name a function or a class")
    return found


class Rewards:
    """All functions of a configuration, and what they and reward models are worth together."""

    def __init__(self, config: RLConfig) -> None:
        """Raises ValueError for a function that is not there, naming its field."""
        self._parts: list[tuple[str, float, Reward | None]] = []  # None: of a reward model
        self.models: dict[str, RewardConfig] = {}  # reward models by name
        for number, one in enumerate(config.rewards):
            name = _name(one, number, config)
            if one.function == MODEL:
                self.models[name] = one
                self._parts.append((name, one.weight, None))
                continue
            try:
                function = find_reward(one.function)
                check_arguments(function, one)
            except ValueError as error:
                raise ValueError(f"recipe.rl.rewards[{number}].function={error}") from None
            self._parts.append((name, one.weight, partial(function, **one.arguments)))
        self._threads = config.reward_threads

    def of(
        self,
        answers: Sequence[Answer],
        by_models: Mapping[str, Sequence[float]] = NO_MODELS,
        *,
        check: Callable[[], None] | None = None,
    ) -> list[Scored]:
        """Rewards of all answers, in their order. by_models: what each of `models` gives them. check: called before
        each answer is looked at; what it raises ends it."""
        given = [{name: values[place] for name, values in by_models.items()} for place in range(len(answers))]
        score = partial(self._score, check=check)
        if self._threads == 1 or len(answers) < 2:
            return list(map(score, answers, given))
        return _by_threads(score, list(zip(answers, given, strict=True)), self._threads)

    def _score(self, answer: Answer, given: Mapping[str, float], *, check: Callable[[], None] | None) -> Scored:
        if check is not None:
            check()
        if answer.failure:
            return Scored(None, error=f"{answer.failure}, after the completion {_shown(answer)}")
        each: dict[str, float] = {}
        for name, _, function in self._parts:
            try:
                value = given[name] if function is None else function(answer)
            except Exception as error:
                return Scored(None, error=_complaint(name, f"raised {type(error).__name__}: {error}", answer))
            if isinstance(value, Real | np.bool_) and math.isfinite(value):
                each[name] = float(value)
            else:
                return Scored(None, error=_complaint(name, f"returned {value!r}, no finite number", answer))
        return Scored(sum(weight * each[name] for name, weight, _ in self._parts), each)


def _by_threads(score: Callable[..., Scored], asked: Sequence[tuple[Any, ...]], threads: int) -> list[Scored]:
    """score(*one) of all, in their order. By threads that the process does not wait for when it ends, as it does for
    those of concurrent.futures: a function that never returns must not keep it."""
    scored: list[Scored | None] = [None] * len(asked)
    numbers, taking, failures = iter(range(len(asked))), threading.Lock(), list[BaseException]()

    def work() -> None:
        while not failures:
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            try:
                scored[number] = score(*asked[number])
            except BaseException as error:  # raised below, where it is seen
                failures.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(asked)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return [one for one in scored if one is not None]


def check_rewards(errors: Sequence[str], config: RLConfig) -> None:
    """Raise RewardError for the first of the errors of all ranks, where recipe.rl.bad_reward=error."""
    if errors and config.bad_reward == "error":
        raise RewardError(
            f"{errors[0]}; mend it, or leave such completions out of training by recipe.rl.bad_reward=skip"
        )


def _name(one: RewardConfig, number: int, config: RLConfig) -> str:
    """In metrics: the function's own name, with its number where several have it."""
    short = one.function.rpartition(":")[2]
    same = [other for other in config.rewards if other.function.rpartition(":")[2] == short]
    return short if len(same) == 1 else f"{short}_{number}"


def _complaint(name: str, what: str, answer: Answer) -> str:
    return f"the reward function {name} {what}, of the completion {_shown(answer)}"


def _shown(answer: Answer) -> str:
    completion, prompt = (text if len(text) <= 80 else f"{text[:77]}..." for text in (answer.text, answer.prompt))
    return f"{completion!r} of {prompt!r}"
