"""What a rank of a pipeline does, as data: computations, messages to other stages, and collectives of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is computed. B does the work of I and W in one."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"  # backward, without the gradients of linear weights
    WEIGHT = "W"  # the gradients that I left out


@dataclass(frozen=True)
class Action:
    """One computation of one stage for one micro-batch."""

    kind: Kind
    stage: int
    microbatch: int

    @property
    def walks_layers(self) -> bool:
        """Whether it computes with the parameters of its stage: W has all it needs from I."""
        return self.kind is not Kind.WEIGHT

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Unshard:
    """Start to gather the parameters that a computation begins with; it does not wait for them, the computation does.

    Only where parameters lie in shards while they are not computed with: ZeRO stage 3.
    """

    use: Action

    @property
    def stage(self) -> int:
        return self.use.stage

    def __str__(self) -> str:
        return f"unshard({self.use})"


@dataclass(frozen=True)
class Reduce:
    """Start to sum the gradients of a stage over ranks: they have had their last contribution of this run."""

    stage: int

    def __str__(self) -> str:
        return f"reduce({self.stage})"


@dataclass(frozen=True)
class Message:
    """What passes between the output of one stage and the input of the next: hidden states, or their gradient."""

    is_gradient: bool
    stage: int  # that computes with it
    microbatch: int
    source: int  # rank
    target: int

    def __str__(self) -> str:
        what = "gradient" if self.is_gradient else "hidden states"
        return f"{what} {self.microbatch} for stage {self.stage} from rank {self.source} to {self.target}"


@dataclass(frozen=True)
class Exchange:
    """Messages a rank starts to send and receive together."""

    messages: tuple[Message, ...]


Collective = Unshard | Reduce
Step = Action | Collective | Exchange
