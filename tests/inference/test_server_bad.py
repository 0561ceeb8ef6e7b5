"""What a server is sent that it cannot serve, and what happens to it: an answer, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.server.config import ServeConfig, serve_problems
from inference.server.errors import EngineFailedError
from inference.server.service import bind
from tests.inference.serving import (
    Running,
    model_with_a_token_that_gives_nan,
    serving,
    text_engine,
    text_tokenizer,
)

LIMITS = ServeConfig(max_queue=4, max_choices=6, max_body_bytes=20_000)
TALK = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(text_engine(), LIMITS) as running:
        yield running


COMPLETIONS: list[tuple[object, int, str]] = [
    (b"", 400, "the body is not JSON"),
    (b"{", 400, "the body is not JSON"),
    (b'{"prompt": "\xff"}', 400, "the body is not JSON"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "NaN is not JSON"),
    (b'{"prompt": ' + b"[" * 9000, 400, "the body is not JSON"),
    (b'{"prompt": "x", "seed": ' + b"9" * 9000 + b"}", 400, "the body is not JSON"),
    ([1], 400, "must be a JSON object"),
    ({}, 400, "prompt is missing"),
    ({"prompt": 5}, 400, "prompt must be a string"),
    ({"prompt": []}, 400, "prompt must be a string"),
    ({"prompt": [[]]}, 400, "the prompt has no tokens"),
    ({"prompt": ""}, 400, "the prompt has no tokens"),
    ({"prompt": [1, "x"]}, 400, "prompt must be a string"),
    ({"prompt": [True]}, 400, "prompt must be a string"),
    ({"prompt": [99999]}, 400, "token id 99999, outside of the model's vocabulary"),
    ({"prompt": [-1]}, 400, "prompt must be a string"),
    ({"prompt": "\ud800"}, 400, "prompt must be a string"),
    ({"prompt": "x" * 200}, 400, "the prompt has 200 tokens"),
    ({"prompt": "x", "max_tokens": 96}, 400, "max_tokens=96 behind a prompt of 1 tokens"),
    ({"prompt": "x" * 30_000}, 413, "larger than 20000 bytes"),
    ({"prompt": ["x"] * 7}, 400, "prompt has 7 entries"),
    ({"prompt": ["x"] * 4, "n": 2}, 400, "8 choices of 6"),
    ({"prompt": "x", "n": 0}, 400, "n must be a whole number from 1 to 6"),
    ({"prompt": "x", "n": 1.5}, 400, "n must be a whole number"),
    ({"prompt": "x", "n": True}, 400, "n must be a whole number"),
    ({"prompt": "x", "temperature": -1}, 400, "temperature=-1.0 must be at least 0"),
    ({"prompt": "x", "temperature": "hot"}, 400, "temperature must be a number"),
    ({"prompt": "x", "temperature": 1e300}, 400, "temperature must be a number"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p=0.0 must be above 0"),
    ({"prompt": "x", "seed": -1}, 400, "seed must be a whole number from 0"),
    ({"prompt": "x", "stop": ""}, 400, "stop must be"),
    ({"prompt": "x", "stop": ["a"] * 17}, 400, "stop must be at most 16"),
    ({"prompt": "x", "stop": 5}, 400, "stop must be"),
    ({"prompt": "x", "stop_token_ids": "x"}, 400, "stop_token_ids must be"),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens=0 asks for nothing"),
    ({"prompt": "x", "logprobs": 21}, 400, "logprobs must be a whole number from 0 to 20"),
    ({"prompt": "x", "logprobs": 1, "echo": True}, 400, "logprobs above 0 with echo"),
    ({"prompt": "x", "stream": "yes"}, 400, "stream must be true or false"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options is for stream=true"),
    ({"prompt": "x", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x is not a field"),
    ({"prompt": "x", "best_of": 3}, 400, "best_of is not supported"),
    ({"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
    ({"prompt": "x", "temprature": 1}, 400, "temprature is not a field"),
    ({"prompt": "x", "model": "gpt-4"}, 404, "the model 'gpt-4' is not served here; use 'tiny'"),
    ({"prompt": "x", "regex": "[a"}, 400, "regex is wrong"),
    ({"prompt": "x", "regex": "a", "choice": ["b"]}, 400, "regex and choice exclude each other"),
    ({"prompt": "x", "json_schema": {"type": "objec"}}, 400, "json_schema is wrong"),
    ({"prompt": "x", "json_schema": {"$ref": "#"}}, 400, "json_schema allows nothing"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format.type must be"),
    ({"prompt": "x", "grammar": "x" * 70_000}, 413, "larger than"),
]
CHATS: list[tuple[object, int, str]] = [
    ({}, 400, "messages must be"),
    ({"messages": []}, 400, "messages must be"),
    ({"messages": ["x"]}, 400, "messages[0] must be an object with a role"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0] must be an object with a role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content must be"),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, 400, "halves of surrogate pairs"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "parts of text only"),
    ({"messages": TALK, "top_logprobs": 2}, 400, "top_logprobs needs logprobs=true"),
    ({"messages": TALK, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
    ({"messages": TALK, "chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs cannot set messages"),
    ({"messages": TALK, "prompt": "x"}, 400, "prompt is not a field"),
    ({"messages": TALK * 60}, 400, "tokens; engine.max_seq_len=96 leaves room"),
]
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
NEVER_ENDING = [
    (b"\x16\x03\x01 this is not HTTP\r\n\r\n", b"400"),
    (POST + b"Content-Length: 100\r\n\r\n{", b"408"),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 5, b"413"),  # no end
]


def test_whatever_is_wrong_gets_an_answer_that_says_so(server: Running) -> None:
    """A traceback, a server that hangs, a field that is ignored. In the end it serves as before."""
    cases = [("/v1/completions", *case) for case in COMPLETIONS] + [("/v1/chat/completions", *case) for case in CHATS]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, body, status, says in cases:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post(path, content=content)
            error = answer.json()["error"]
            assert (answer.status_code, says in error["message"]) == (status, True), (body, error)
            assert set(error) == {"message", "type", "param", "code"}
        for method, path, status in (
            ("GET", "/v1/completions", 405),
            ("GET", "/nowhere", 404),
            ("PUT", "/health", 405),
        ):
            answer = client.request(method, path)
            assert (answer.status_code, "error" in answer.json()) == (status, True)
        good = client.post("/v1/completions", json={"prompt": "one", "max_tokens": 3, "temperature": 0})
        assert good.status_code == 200
        assert client.get("/health").json() == {"status": "ok"}
    wanted = text_engine().generate(["one"], SamplingConfig(temperature=0, max_tokens=3))[0]
    assert good.json()["choices"][0]["text"] == wanted.text


def test_bad_requests_beside_good_ones_hurt_nobody(server: Running) -> None:
    """An error of one request that ends, or changes, another that is under way."""

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=90) as client:
            bodies = [json.dumps(body).encode() for body, status, _ in COMPLETIONS[7:] if status == 400]
            bad = [client.post("/v1/completions", content=body) for body in bodies]
            good = {"prompt": "one", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
            return await asyncio.gather(*(client.post("/v1/completions", json=good) for _ in range(3)), *bad)

    answers = asyncio.run(all_of_them())
    wanted = text_engine().generate(["one"], SamplingConfig(temperature=0, max_tokens=30, ignore_eos=True))[0]
    assert [answer.json()["choices"][0]["text"] for answer in answers[:3]] == [wanted.text] * 3
    assert {answer.status_code for answer in answers[3:]} <= {400, 429}


def test_what_is_no_http_or_never_comes_to_an_end() -> None:
    """A connection that occupies the server for ever."""
    with serving(text_engine(), replace(LIMITS, body_seconds=0.5)) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        for sent, answer in NEVER_ENDING:
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(sent)
                assert answer in connection.recv(1000)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_client_that_sends_all_of_a_body_that_is_too_large_hears_so(server: Running) -> None:
    """An answer that a plain client, which reads when it has sent, never sees: its connection was reset."""
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    size = 6 * 2**20
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(6):
            connection.sendall(b"x" * 2**20)
        assert b"413" in connection.recv(1000)
    with socket.create_connection(address, timeout=30) as connection:  # as curl does: nothing is sent until then
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head % size)
        assert b"413" in connection.recv(1000)


def test_a_full_server_says_so_and_takes_requests_again_later(server: Running) -> None:
    """A queue without end, or one that stays full. engine.max_sequences=8 and serve.max_queue=4 are 12."""
    body = {"prompt": ["one"] * 6, "max_tokens": 40, "ignore_eos": True}

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=180) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6)))

    answers = asyncio.run(flood())
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert server.post("/v1/completions", {"prompt": "one", "max_tokens": 2}).status_code == 200


def test_a_request_that_never_fits_is_not_told_to_come_again() -> None:
    """429 for ever, by an empty server. engine.max_sequences=8 and serve.max_queue=1 are 9."""
    with serving(text_engine(), ServeConfig(max_queue=1)) as server:
        body = {"prompt": ["one", "two"], "max_tokens": 1, "n": 5}
        refused = server.post("/v1/completions", body)
        assert refused.status_code == 400
        assert "10 sequences (prompts times n)" in refused.json()["error"]["message"]
        assert "engine.max_sequences=8, and serve.max_queue=1 wait; use at most 9" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers
        assert server.post("/v1/completions", body | {"prompt": "one", "n": 9}).status_code == 200


def until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_blocks(server: Running, stream: bool) -> None:
    """A request that goes on for nobody."""
    engine = server.engine
    steps = slowed(engine)
    body = json.dumps({"prompt": "one", "n": 3, "max_tokens": 90, "ignore_eos": True, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head + body)
        until(lambda: len(engine.scheduler.running) == 3)
    left = len(steps)
    until(lambda: engine.num_unfinished == 0)
    assert len(steps) - left < 40  # of 90
    assert engine.blocks.num_free == engine.blocks.num_blocks
    del engine.step  # type: ignore[method-assign]


def slowed(engine: Engine) -> list[float]:
    """Make every step take a little; the times of steps."""
    steps: list[float] = []
    step = engine.step

    def slow() -> Any:
        steps.append(time.monotonic())
        time.sleep(0.01)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    return steps


def test_nan_is_an_error_of_the_request_that_has_it() -> None:
    """Other requests of the batch that fail, or a server that calls itself healthy with weights that are broken."""
    tokenizer = text_tokenizer()
    for overlap in (False, True):
        config = EngineConfig(block_size=4, max_sequences=8, overlap=overlap)
        engine = Engine(model_with_a_token_that_gives_nan(7), config, tokenizer=tokenizer)
        wanted = engine.generate([[1, 2, 3]], SamplingConfig(seed=1, max_tokens=5, top_k=1))[0]
        with serving(engine) as server:
            answers: dict[str, httpx.Response] = {}

            def ask(name: str, prompt: object, server: Running = server, answers: Any = answers) -> None:
                body = {"prompt": prompt, "seed": 1, "max_tokens": 5, "top_k": 1}
                answers[name] = server.post("/v1/completions", body)

            threads = [
                threading.Thread(target=ask, args=item)
                for item in (("good", [1, 2, 3]), ("bad", [1, 7, 3]), ("both", [[1, 2, 3], [7]]))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert answers["good"].json()["choices"][0]["text"] == wanted.text
            for name in ("bad", "both"):
                assert answers[name].status_code == 500
                assert "the model gives NaN" in answers[name].json()["error"]["message"]
            ask("again", [7])
            health = httpx.get(f"{server.url}/health")
            assert (health.status_code, health.json()["status"]) == (503, "failing")
            assert "the model gives NaN" in health.json()["problem"]
            ask("after", [1, 2, 3])
            assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_fails_answers_everybody_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Clients that wait for ever for a thread that is no more."""
    engine = text_engine()
    with serving(engine) as server:

        def fail() -> Any:
            raise RuntimeError("the device is gone")

        engine.step = fail  # type: ignore[method-assign]
        first = server.post("/v1/completions", {"prompt": "one", "stream": True})
        assert first.status_code == 500
        assert "the device is gone" in first.json()["error"]["message"]
        assert server.post("/v1/completions", {"prompt": "one"}).status_code == 503
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert isinstance(server.failure, EngineFailedError)
    assert "the device is gone" in capsys.readouterr().err


@pytest.mark.parametrize("drain", [30.0, 0.05])
def test_a_server_that_ends_lets_requests_end_or_answers_them(drain: float) -> None:
    """A client that is cut off without a word; a server that never ends; requests that come too late."""
    engine = text_engine()
    slowed(engine)
    with serving(engine, ServeConfig(drain_seconds=drain)) as server:
        answers: list[httpx.Response] = []
        body = {"prompt": "one", "max_tokens": 30, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        thread.start()
        until(lambda: engine.num_unfinished == 1)
        server.shut_down()
        if drain > 1:
            until(lambda: server.post("/v1/completions", body).status_code == 503)
            assert httpx.get(f"{server.url}/health").json()["status"] == "closing"
        thread.join()
    assert answers[0].status_code == (200 if drain > 1 else 503)
    assert server.failure is None


def test_a_port_in_use_and_a_name_that_is_none_are_one_error() -> None:
    """A traceback of a library after minutes of loading."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"serve.port={port} of serve.host=127.0.0.1 .*in use.*; use another port"
        ):
            bind(ServeConfig(port=port))
    with pytest.raises(ValueError, match=r"serve.host=no.such.host .*; use serve.host=127.0.0.1"):
        bind(ServeConfig(host="no.such.host"))


def silent_stream(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection whose client asks for a stream and then reads nothing."""
    data = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
    connection.sendall(head + data)
    return connection


LONG = {"prompt": "one", "n": 6, "max_tokens": 90, "ignore_eos": True, "stream": True, "logprobs": 20}


def test_a_client_that_stops_reading_is_gone_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that waits for ever for its client: its connection, its task and what it has not read stay, and while
    the request runs, its blocks. Others must not notice."""
    monkeypatch.setattr("inference.server.service.SEND_BYTES", 2048)
    engine = text_engine()
    steps = slowed(engine)
    with serving(engine, ServeConfig(write_seconds=0.2)) as server, silent_stream(server, LONG) as connection:
        until(lambda: len(engine.scheduler.running) == 6)
        good = server.post("/v1/completions", {"prompt": "one", "max_tokens": 5, "temperature": 0})
        assert good.status_code == 200
        until(lambda: engine.num_unfinished == 0)
        assert len(steps) < 80  # of 90
        assert engine.blocks.num_free == engine.blocks.num_blocks
        connection.settimeout(5)
        received = b""
        while part := connection.recv(2**20):
            received += part
        assert b"[DONE]" not in received  # only what the kernel held


def test_a_client_that_reads_slowly_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is broken off although its client reads."""
    monkeypatch.setattr("inference.server.service.SEND_BYTES", 2048)
    with (
        serving(text_engine(), ServeConfig(write_seconds=0.2)) as server,
        silent_stream(server, LONG | {"n": 1}) as connection,
    ):
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            time.sleep(0.01)
            received += connection.recv(4096)
    assert received.count(b'"finish_reason":"length"') + received.count(b'"finish_reason": "length"') == 1


def test_what_waits_for_a_slow_client_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads too slowly for what is made for it: the server would keep all of it."""
    monkeypatch.setattr("inference.server.service.SEND_BYTES", 2048)
    engine = text_engine()
    steps = slowed(engine)
    with serving(engine, ServeConfig(max_unread=100)) as server, silent_stream(server, LONG) as connection:
        until(lambda: len(engine.scheduler.running) == 6)
        until(lambda: engine.num_unfinished == 0)
        assert len(steps) < 80
        received = b""
        connection.settimeout(5)
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(2**20)
        assert b"100 pieces wait for a client that is too slow" in received


def test_draining_ends_before_the_launcher_kills() -> None:
    """A default, or a setting, that torchrun does not wait for: requests that are cut off although they might end."""
    assert ServeConfig().drain_seconds == 20
    assert serve_problems(ServeConfig(drain_seconds=60)) == []
    assert serve_problems(ServeConfig(), launched=True) == []
    (problem,) = serve_problems(ServeConfig(drain_seconds=26), launched=True)
    assert "serve.drain_seconds=26 cannot be kept under torchrun, which kills" in problem
    assert problem.endswith("use at most 25")
