"""Environments: what answers a model within a rollout, such as a tool that it calls.

A class with these two methods, named by `recipe.rl.environment=package.module:Class`; one object for each completion.
What `reply` returns is tokenised by itself and put behind the tokens that were generated, which stay as they are, so it
has to hold all that a chat template would put around it. Its tokens carry no loss. An environment that raises ends its
completion, which `recipe.rl.bad_reward` then says what to do about; reward functions see the object as
`Answer.environment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Environment(Protocol):
    def start(self, prompt: str, row: Mapping[str, Any]) -> None:
        """A completion of this prompt begins; row: of the data, with all its columns."""
        ...

    def reply(self, text: str) -> str | None:
        """What follows a turn of the model, before its next one; None: nothing does, the completion has ended.

        text: of the turn, without special tokens. It has to depend on nothing but what was said before: rollouts are
        made again when a run is resumed.
        """
        ...
