"""A connection that does not wait for ever for its client to read."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def connections_of(seconds: float) -> type[HttpToolsProtocol]:
    """The protocol of connections that are broken off when nothing could be written for so long.

    What is written goes to the kernel at once, or holds up the next write: there is no other buffer. A client that
    reads slowly goes on, one that reads nothing is gone: whoever waits to write to it is told so, as when it closes.
    """

    class Connection(_Connection):
        patience = seconds

    return Connection


class _Connection(HttpToolsProtocol):
    patience: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing pauses as soon as the kernel does not take everything

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_watch()
        super().connection_lost(exc)

    def _wait(self, left: int) -> None:
        self._watch = self.loop.call_later(self.patience, self._judge, left)

    def _judge(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < before:
            self._wait(left)
        else:
            self.transport.abort()  # closing would wait for what cannot be written

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
