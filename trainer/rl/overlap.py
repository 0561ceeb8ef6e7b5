"""Rollouts beside an update: a copy of the weights to sample by, and a thread to do it in (`recipe.rl.overlap`).

While the updates of a batch are made, a thread samples the completions of the next one by the weights from before these
updates, and asks reward functions about them. It takes part in no collective: what ranks tell each other about
rollouts, reward models, and log-probabilities by the old weights are the main thread's, once the thread has ended. Nor
does it touch data or random numbers, which are a token's own. So a run has the bits that it has without.

On CUDA all that an engine does, whichever thread asks it to, is given to one stream of its own. Tensors do not travel
between streams but for the copy of the weights, which is written on the trainer's stream while the other is known to be
idle, and read on the other: nothing has to be recorded for the allocator. What comes out are lists on the host.

Memory: the copy has one more time, in the compute dtype, what is trained of the policy (2 bytes a parameter in bf16;
with adapters these alone, frozen weights being shared), and with recipe=ppo of the value model. The cache of the engine
and the activations of an update are there at the same time, as they are without.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from inference.device import on_device
from inference.weights import receive_weights
from models.decoder import Decoder
from trainer.config import TrainConfig
from trainer.rl.twin import empty_twin, tensors_of
from trainer.watchdog import ROLLOUTS

logger = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE_SECONDS = 30.0
"""That a run which has failed, or ends, waits for a reward function that was asked."""


class Abandoned(Exception):
    """Nobody wants what the thread was to find out any more."""


class WeightCopy:
    """A model that computes what another one did when `take` was last called, while that one is trained."""

    def __init__(self, source: Decoder, config: TrainConfig) -> None:
        """source: with whole weights on this rank (ZeRO 0 to 2, no tp). The copy has no values before `take`."""
        copy = empty_twin(source, config, source.groups)
        self._pairs: list[tuple[Tensor, Tensor]] = []  # of the copy and of the source
        self._source, self.model = source, copy
        given: dict[int, nn.Parameter] = {}  # a tied weight has several places
        held = {name: tensor for name, _, _, tensor in tensors_of(source)}
        for name, module, kind, _ in list(tensors_of(copy)):
            tensor = held[name]
            if not isinstance(tensor, nn.Parameter):
                setattr(module, kind, self._follow(tensor))
                continue
            if id(tensor) not in given:
                given[id(tensor)] = self._copied(tensor)
            setattr(module, kind, given[id(tensor)])
        left = [name for name, tensor in chain(copy.named_parameters(), copy.named_buffers()) if tensor.is_meta]
        assert not left, f"the copy lacks {left}"

    def _copied(self, parameter: nn.Parameter) -> nn.Parameter:
        """One with the same values: what no update changes is itself."""
        if not parameter.requires_grad:
            return parameter
        return nn.Parameter(self._follow(parameter.detach()), requires_grad=False)

    def _follow(self, tensor: Tensor) -> Tensor:
        mine = torch.empty_like(tensor)
        self._pairs.append((mine, tensor))
        return mine

    @torch.no_grad()
    def take(self) -> None:
        """Take the values of now. On CUDA enqueued: on the stream that the source is trained on, while nothing else
        reads the copy."""
        receive_weights(self._source)
        torch._foreach_copy_([mine for mine, _ in self._pairs], [theirs for _, theirs in self._pairs])


class Beside(Generic[T]):
    """Work in a thread of its own, one piece at a time, and on CUDA on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Steps that decode are short kernels, and an update's are long: in its turn each would wait for one of these.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._result: list[T] = []
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether there is something to `wait` for."""
        return self._thread is not None

    def start(self, work: Callable[[Callable[[], None]], T]) -> None:
        """Begin with work(check), which calls check() now and then and lets pass what that raises.

        It sees all that the current stream was given so far.
        """
        assert self._thread is None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self._device))
        self._thread = threading.Thread(target=self._run, args=(work,), name=ROLLOUTS, daemon=True)
        self._thread.start()

    def wait(self) -> T:
        """What the work has found out. Raises what it raised. What the current stream is given from now on waits for
        what was given to the other."""
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        if self.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self.stream)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._result.pop()

    def close(self) -> None:
        """Leave what is under way. It ends with the step of the engine, or the calls of reward functions, that it is
        in; one that does not return is left to the end of the process."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            logger.warning("a reward function or environment has not returned for %g s", PATIENCE_SECONDS)
        self._thread = None

    def _run(self, work: Callable[[Callable[[], None]], T]) -> None:
        with ExitStack() as stack:
            # A thread's own settings, all of which begin at their defaults.
            stack.enter_context(on_device(self._device))
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            stack.enter_context(torch.no_grad())
            try:
                self._result.append(work(self._check))
            except BaseException as error:  # `wait` raises it where somebody sees it
                self._failure = error

    def _check(self) -> None:
        if self._stop.is_set():
            raise Abandoned


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Inside, work is given to a CUDA stream, behind what the current one was given, which then waits for it. None: no
    other stream."""
    if stream is None:
        yield
        return
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)
