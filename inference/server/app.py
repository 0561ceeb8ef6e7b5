"""The HTTP side: routes, bodies, streams, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.engine import Delta
from inference.server.calls import Call, Reader
from inference.server.config import ServeConfig
from inference.server.errors import ApiError
from inference.server.metrics import Metrics
from inference.server.replies import Reply, Vocabulary
from inference.server.worker import EngineWorker, Mailbox

READERS = 4
"""Threads that parse and tokenize."""
ARRIVING_BYTES = 2**28
"""Of all bodies that are being received or read."""
UNREAD_BYTES = 2**26
"""Of a body that is too large, and is received to nowhere: a client that is still sending when its connection is closed
sees a reset in place of the answer."""
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Json(Response):
    """An answer that is one object."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode(errors="replace")


class App:
    """What is behind the routes."""

    def __init__(self, worker: EngineWorker, reader: Reader, metrics: Metrics, config: ServeConfig) -> None:
        self.worker, self.reader, self.metrics, self.config = worker, reader, metrics, config
        self.vocabulary = Vocabulary(reader.engine.tokenizer)
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._arriving = 0  # bytes

    def asgi(self) -> ASGIApp:
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/metrics", self.prometheus, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _unforeseen}
        app = Starlette(routes=routes, exception_handlers=handlers)
        return _Counted(app, self.metrics, {route.path for route in routes})

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat)

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._model(name) for name in self.reader.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.reader.check_name(name)
        return Json(self._model(name))

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def health(self, request: Request) -> Response:
        worker = self.worker
        if worker.broken:
            return Json({"status": "failed", "problem": worker.problem}, status_code=503)
        if worker.closed is not None:
            return Json({"status": "closing", "problem": worker.closed}, status_code=503)
        if worker.problem is not None:
            return Json({"status": "failing", "problem": worker.problem}, status_code=503)
        return Json({"status": "ok"})

    def _model(self, name: str) -> dict[str, Any]:
        length, base = self.reader.engine.runner.max_seq_len, self.reader.name
        found = {"id": name, "object": "model", "created": 0, "owned_by": "lattice", "max_model_len": length}
        return found if name == base else found | {"root": name, "parent": base}

    async def _answer(self, request: Request, read: Callable[[bytes], Call]) -> Response:
        """Read a call and queue it."""
        self.worker.check_room(1)  # before anything is read
        call = await self._read(request, read)
        mailbox = self.worker.submit(call.sequences)
        return _Answer(Reply(call, model=call.model, vocabulary=self.vocabulary), mailbox, self.worker.cancel)

    async def _read(self, request: Request, read: Callable[[bytes], Call]) -> Call:
        """The call in a body; received here, parsed and tokenized in a thread."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.body_seconds):
                await self._receive(request, body)
            return await asyncio.get_running_loop().run_in_executor(self._threads, read, bytes(body))
        except TimeoutError:
            if max(len(body), _declared(request)) > self.config.max_body_bytes:
                raise self._too_large() from None
            message = f"the body did not arrive within {self.config.body_seconds} s"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise _gone() from None
        finally:
            self._arriving -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        most, declared, size = self.config.max_body_bytes, _declared(request), 0
        if declared > most + UNREAD_BYTES or (declared > most and "expect" in request.headers):  # asks before it sends
            raise self._too_large()
        async for part in request.stream():
            size += len(part)
            if size > most + UNREAD_BYTES:
                break
            if len(body) > most:
                continue
            body += part
            self._arriving += len(part)
            if self._arriving > ARRIVING_BYTES:
                retry = {"Retry-After": "1", "Connection": "close"}
                raise ApiError(429, "too much is being received; try again later", code="queue_full", headers=retry)
        if size > most:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.config.max_body_bytes} bytes"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


class _Answer(Response):
    """A call's answer, whole or as server-sent events. Whatever ends it, it leaves nothing behind in the engine."""

    def __init__(self, reply: Reply, mailbox: Mailbox, cancel: Callable[[Mailbox], None]) -> None:
        self.background = None
        self._reply, self._mailbox, self._cancel = reply, mailbox, cancel
        self._pending = len(mailbox.sequences)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(_fail_when_gone(receive, self._mailbox))
        try:
            if self._reply.call.stream:
                await self._stream(send)
            else:
                while self._pending:
                    self._reply.add(await self._take())
                await Json(self._reply.whole())(scope, receive, send)
        finally:
            watch.cancel()
            self._cancel(self._mailbox)

    async def _stream(self, send: Send) -> None:
        body = self._reply.opening() + self._reply.chunks(await self._take())  # fails while a status can still say so
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            while self._pending:
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                body = self._reply.chunks(await self._take())
            body += self._reply.closing()
        except ApiError as error:
            body = f"data: {json.dumps(error.body())}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _take(self) -> list[tuple[int, Delta]]:
        deltas = await self._mailbox.take()
        self._pending -= sum(delta.completion is not None for _, delta in deltas)
        return deltas


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        path = path if path in self._paths else "other"  # clients must not make labels

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)


def _declared(request: Request) -> int:
    """Bytes of the body, as far as its head says."""
    declared = request.headers.get("content-length", "")
    return int(declared[:20]) if declared.isdecimal() else 0


def _gone() -> ApiError:
    """Nobody hears it; the count of answers does."""
    return ApiError(499, "the client is gone")


async def _fail_when_gone(receive: Receive, mailbox: Mailbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.fail(_gone())


async def _api_error(request: Request, error: ApiError) -> Response:
    return Json(error.body(), status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """A path or a method that is not there."""
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _unforeseen(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "the server has an error of its own; its log says which"))
