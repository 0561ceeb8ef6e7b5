"""The engine's thread, and how the event loop talks to it.

Commands go in by a queue that is emptied between two steps; what steps add comes out together, with at most one wake-up
of the event loop under way, however many sequences and steps it is of.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from queue import Empty, SimpleQueue
from typing import NamedTuple

from inference.engine import Delta, Engine
from inference.sequence import Completion, Sequence
from inference.server.errors import ApiError
from inference.server.metrics import Metrics, Timing

RETRY_SECONDS = 1


class Mailbox:
    """What the sequences of one call have got and nobody has taken yet. Of the event loop."""

    def __init__(self, sequences: Seq[Sequence], metrics: Metrics) -> None:
        self.sequences = sequences
        self.timings = [Timing(metrics) for _ in sequences]
        self.unfinished = len(sequences)
        self.requests: list[int] = []  # numbers of the sequences; of the engine's thread
        self._deltas: list[tuple[int, Delta]] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_unread(self) -> int:
        return len(self._deltas)

    def put(self, index: int, delta: Delta) -> None:
        self._deltas.append((index, delta))
        self._wake()

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._wake()

    async def take(self) -> list[tuple[int, Delta]]:
        """Everything since the last time, at least one delta; each with the place of its sequence. Raises ApiError."""
        while not self._deltas and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        taken, self._deltas = self._deltas, []
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Event(NamedTuple):
    """What the engine's thread has to say about one sequence."""

    mailbox: Mailbox
    place: int  # of the sequence in its call
    time: float
    delta: Delta | None = None
    ended: Completion | None = None  # it holds nothing any more
    error: ApiError | None = None


class EngineWorker:
    """Steps an engine in a thread of its own. Everything but `_run` and what it calls is of the event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, *, max_sequences: int, max_unread: int) -> None:
        """max_sequences: that may be unfinished at a time; max_unread: deltas of a call that nobody took."""
        self.max_sequences, self.max_unread = max_sequences, max_unread
        self.num_sequences = 0
        self.problem: str | None = None  # why the newest requests failed
        self.broken = False  # the engine stepped for the last time
        self.closed: str | None = None  # why nothing more is taken
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._mailboxes: set[Mailbox] = set()
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._places: dict[int, tuple[Mailbox, int]] = {}  # by request; of the engine's thread
        self._events: deque[_Event] = deque()
        self._woken = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def check_room(self, count: int) -> None:
        """Raises ApiError: 429 when there is no room for so many sequences, 400 when there never is, 503 when none are
        taken any more."""
        if self.closed is not None:
            raise ApiError(503, self.closed, code="unavailable")
        if count > self.max_sequences:
            running = self._engine.config.max_sequences
            raise ApiError(
                400,
                f"{count} sequences (prompts times n) are more than this server takes at a time: it runs "
                f"engine.max_sequences={running}, and serve.max_queue={self.max_sequences - running} wait; use at most "
                f"{self.max_sequences}",
                code="too_many_sequences",
            )
        if self.num_sequences + count > self.max_sequences:
            raise ApiError(
                429,
                f"{self.num_sequences} sequences are running or waiting and {self.max_sequences} may; try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )

    def submit(self, sequences: Seq[Sequence]) -> Mailbox:
        """Queue sequences. Raises ApiError as `check_room`."""
        self.check_room(len(sequences))
        mailbox = Mailbox(sequences, self._metrics)
        self.num_sequences += len(sequences)
        self._idle.clear()
        self._mailboxes.add(mailbox)
        self._commands.put(lambda: self._enqueue(mailbox))
        return mailbox

    def cancel(self, mailbox: Mailbox) -> None:
        """Drop what is unfinished of it before the next step. Of one that has ended: nothing."""
        if mailbox.unfinished:
            self._commands.put(lambda: self._abort(mailbox))

    def close(self, reason: str) -> None:
        """Take nothing more."""
        self.closed = self.closed or reason

    async def drain(self, seconds: float, *, unless: asyncio.Event) -> None:
        """Wait for what is unfinished; what is so after some seconds, or when `unless` happens, fails."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, unless)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for mailbox in list(self._mailboxes):
            mailbox.fail(ApiError(503, "the server was shut down before this request had ended", code="shutdown"))
            self.cancel(mailbox)
        await self._idle.wait()

    async def stop(self) -> None:
        """End the thread, behind the step it is at."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _deliver(self) -> None:
        """Hand out everything that came from the thread."""
        self._woken = False  # first: what is added from here on wakes the loop again, or is found below
        while self._events:
            mailbox, index, now, delta, ended, error = self._events.popleft()
            if error is not None:
                mailbox.fail(error)
            elif delta is not None:
                mailbox.timings[index].token(delta, now)
                self._put(mailbox, index, delta)
            self._judge(ended, error)
            if ended is not None:
                mailbox.timings[index].ended(ended, mailbox.sequences[index].num_prompt)
                mailbox.unfinished -= 1
                self.num_sequences -= 1
                if not mailbox.unfinished:
                    self._mailboxes.discard(mailbox)
        if not self.num_sequences:
            self._idle.set()

    def _put(self, mailbox: Mailbox, index: int, delta: Delta) -> None:
        if mailbox.num_unread < self.max_unread:
            mailbox.put(index, delta)
            return
        mailbox.fail(ApiError(503, f"{self.max_unread} pieces wait for a client that is too slow", code="slow_client"))
        self.cancel(mailbox)

    def _judge(self, ended: Completion | None, error: ApiError | None) -> None:
        """Keep in mind that a model gives NaN, until a request comes to a good end again."""
        if ended is not None and not self.broken:
            if error is not None and ended.finish_reason == "nan":
                self.problem = error.message
            elif ended.finish_reason in ("stop", "length"):
                self.problem = None

    def _broke(self, message: str) -> None:
        self.broken, self.problem = True, message
        self.close(f"the engine has failed: {message}")

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        while True:
            try:
                if not self._obey():
                    return
                self._step()
            except Exception as error:
                traceback.print_exc()
                self._fail(f"{type(error).__name__}: {error}")
                break
        while (command := self._commands.get()) is not None:
            command()
            self._fail("the engine has failed")

    def _obey(self) -> bool:
        """Do what was asked for since the last step; wait while there is nothing to do. False: the end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.num_unfinished)
            except Empty:
                return True
            if command is None:
                return False
            command()
            self._tell()

    def _step(self) -> None:
        deltas = self._engine.step()
        now = time.monotonic()
        for delta in deltas:
            end = delta.completion
            mailbox, index = self._places[delta.request] if end is None else self._places.pop(delta.request)
            error = None
            if end is not None and end.error is not None:
                error = ApiError(500, end.error, code=end.finish_reason)
            self._events.append(_Event(mailbox, index, now, delta, end, error))
        self._tell()

    def _enqueue(self, mailbox: Mailbox) -> None:
        mailbox.requests = [self._engine.enqueue(sequence) for sequence in mailbox.sequences]
        self._places.update((request, (mailbox, index)) for index, request in enumerate(mailbox.requests))

    def _abort(self, mailbox: Mailbox) -> None:
        for request in mailbox.requests:
            if request in self._places:  # else it has ended
                _, index = self._places.pop(request)
                self._events.append(_Event(mailbox, index, time.monotonic(), ended=self._engine.abort(request)))

    def _fail(self, message: str) -> None:
        """The engine is not to be trusted any more: everything unfinished fails."""
        self._loop.call_soon_threadsafe(self._broke, message)
        failed = ApiError(500, f"the engine has failed: {message}", code="engine_failed")
        places, self._places = self._places, {}
        for mailbox, index in places.values():
            ended = Completion(finish_reason="error")
            self._events.append(_Event(mailbox, index, time.monotonic(), ended=ended, error=failed))
        self._tell()

    def _tell(self) -> None:
        """Wake the event loop, if there is something and it is not being woken already."""
        if self._events and not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)
