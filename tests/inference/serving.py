"""A server on a port of its own, in a thread, and small models with text for it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import httpx
import tokenizers
import torch

from data.chat import ChatTemplate, ChatTemplateError
from data.tokenizer import Tokenizer, train_bpe
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.server.config import ServeConfig
from inference.server.service import Service, bind
from models.decoder import Decoder
from tests.models.small import random_decoder, tiny

NAME = "tiny"
TEMPLATE = """\
{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
SMALL = EngineConfig(block_size=4, max_batch_tokens=64, max_sequences=8)


@cache
def text_tokenizer() -> Tokenizer:
    """290 tokens at most, all bytes among them."""
    return train_bpe(iter(["one two three two one " * 9]), 290)


@cache
def text_model() -> Decoder:
    """For any text of `text_tokenizer`; its vocabulary is larger by a few rows, as models' often are."""
    return random_decoder(tiny(vocab_size=text_tokenizer().vocab_size + 3, max_seq_len=96)).double()


@cache
def bos_tokenizer() -> Tokenizer:
    """The same, but text begins with <s>, which is a token behind all others."""
    core = tokenizers.Tokenizer.from_str(text_tokenizer().to_json())
    core.add_special_tokens(["<s>"])
    special = [("<s>", core.token_to_id("<s>"))]
    core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", special)
    return Tokenizer(core, eos_token=text_tokenizer().eos_token, bos_token="<s>")


def text_engine(config: EngineConfig = SMALL, tokenizer: Tokenizer | None = None) -> Engine:
    tokenizer = tokenizer or text_tokenizer()
    return Engine(text_model(), config, tokenizer=tokenizer, eos_ids=[tokenizer.eos_id])


def model_with_a_token_that_gives_nan(token: int) -> Decoder:
    """It gives NaN to whoever has that token."""
    model = random_decoder(tiny(vocab_size=text_tokenizer().vocab_size, max_seq_len=96, tie_embeddings=False)).double()
    assert model.embedding is not None
    with torch.no_grad():
        model.embedding.weight[token] = float("nan")
    return model


class Running:
    """A server that answers at `url`."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self.loop: asyncio.AbstractEventLoop | None = None
        self.failure: BaseException | None = None
        self._client = httpx.Client(timeout=90)

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def shut_down(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.service.shut_down)

    def post(self, path: str, body: object) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._client.post(f"{self.url}{path}", content=content)

    def metric(self, name: str) -> float:
        """The value of a metric without labels, or with those in the name."""
        lines = self._client.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def serving(
    engine: Engine,
    config: ServeConfig | None = None,
    *,
    template: str | None = TEMPLATE,
    defaults: SamplingConfig | None = None,
) -> Iterator[Running]:
    """Serve an engine; at the end every block must be free again, if the engine has not failed."""
    config = replace(config or ServeConfig(), port=0)
    listener = bind(config)
    made = ChatTemplateError("the folder has none") if template is None else ChatTemplate(template, {})
    service = Service(engine, config, name=NAME, template=made, defaults=defaults)
    running = Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    ready = threading.Event()

    async def run() -> None:
        running.loop = asyncio.get_running_loop()
        await service.run(listener, ready=ready.set)

    def thread() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            running.failure = error
            ready.set()

    worker = threading.Thread(target=thread)
    worker.start()
    try:
        assert ready.wait(20)
        assert running.failure is None
        yield running
    finally:
        if worker.is_alive():
            running.shut_down()
            worker.join(30)
        assert not worker.is_alive()
    if running.failure is None:
        assert engine.num_unfinished == 0
        assert engine.blocks.num_free == engine.blocks.num_blocks
