"""The server as a whole: a port, the engine's thread, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from data.chat import ChatTemplate, ChatTemplateError
from inference.config import SamplingConfig
from inference.engine import Engine
from inference.server.app import App
from inference.server.calls import Reader
from inference.server.config import LAST_SECONDS, ServeConfig
from inference.server.connection import connections_of
from inference.server.errors import EngineFailedError
from inference.server.metrics import Metrics
from inference.server.worker import EngineWorker

BACKLOG = 2048
SEND_BYTES = 2**17
"""Of the kernel's buffer of a connection, which it doubles: what a client that stopped reading leaves unnoticed."""


def bind(config: ServeConfig) -> socket.socket:
    """The socket to listen on. Raises ValueError where that cannot be, before a model is read."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # connections inherit it
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        other = "another port, or 0 for any that is free"
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            other = "serve.host=127.0.0.1 for this machine alone, 0.0.0.0 for all networks"
        raise ValueError(
            f"serve.port={config.port} of serve.host={config.host} cannot be listened on "
            f"({os.strerror(error.errno) if error.errno and error.errno > 0 else error}); use {other}"
        ) from None


class Service:
    """Serves an engine on a socket until it is told to end."""

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        *,
        name: str,
        template: ChatTemplate | ChatTemplateError,
        defaults: SamplingConfig | None = None,
    ) -> None:
        """name: of the model. defaults: what a request is continued by where it says nothing."""
        self.engine, self.config = engine, config
        self.reader = Reader(engine, name, defaults or SamplingConfig(), template, config.max_choices)
        self._end, self._at_once = asyncio.Event(), asyncio.Event()

    async def run(self, listener: socket.socket, *, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `shut_down`; on the main thread, also until SIGTERM or SIGINT.

        Then requests have config.drain_seconds to end, and what has not is answered with 503. A second signal does not
        wait. Raises EngineFailedError at the end if the engine has failed.
        """
        metrics = Metrics(self.engine)
        worker = EngineWorker(
            self.engine,
            metrics,
            max_sequences=self.engine.config.max_sequences + self.config.max_queue,
            max_unread=self.config.max_unread,
        )
        app = App(worker, self.reader, metrics, self.config)
        server = _Uvicorn(
            uvicorn.Config(
                app.asgi(),
                http=connections_of(self.config.write_seconds),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="error",
                access_log=False,
                timeout_graceful_shutdown=LAST_SECONDS,
                server_header=False,
            )
        )
        with self._signals():
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            ready()
            ending = asyncio.ensure_future(self._end.wait())
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            worker.close("the server is shutting down")
            await worker.drain(self.config.drain_seconds, unless=self._at_once)
            server.should_exit = True
            await serving
            ending.cancel()
            await worker.stop()
            app.close()
        if worker.broken:
            raise EngineFailedError(f"the engine failed while it was served: {worker.problem}")

    def shut_down(self) -> None:
        """End; a second time: without waiting for requests. To be called in the event loop."""
        if self._end.is_set():
            self._at_once.set()
        self._end.set()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            loop.add_signal_handler(number, self.shut_down)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)  # which leaves Python's default
                if handler is not None:  # None: it was not set from Python
                    signal.signal(number, handler)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `Service`; uvicorn would raise them again at the end, and the process would die of them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
