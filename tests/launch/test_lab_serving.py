"""launch/lab.py mode=serve and mode=chat: from the command line to the end of the process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from inference.engine import Engine
from launch.errors import exit_code_of
from launch.lab import lab
from tests.inference.serving import TEMPLATE, text_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama of transformers, with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("hf") / "talker"
    tokenizer = text_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_serves_until_it_is_told_to_end(
    folder: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that dies of the signal, or hangs; another name than clients were told."""
    port = free_port()
    answers: list[Any] = []
    before = signal.signal(number, print)  # of whoever called it

    def client() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as http:
            for _ in range(600):
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.02)
            else:
                return  # never came up: the test fails of its own, and nothing is killed
            body = {"model": "talker", "messages": [{"role": "user", "content": "one"}], "seed": 1}
            answers.append(http.post("/v1/chat/completions", json=body).json())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=client)
    thread.start()
    code = exit_code_of(lab, ["mode=serve", f"model.path={folder}", f"serve.port={port}", "sampling.max_tokens=5"])
    thread.join()
    assert signal.signal(number, before) is print
    assert code == 0
    assert answers[0]["usage"]["completion_tokens"] == 5
    assert f"serving talker on http://127.0.0.1:{port}/v1" in capsys.readouterr().out


MISTAKES = {
    "model.path=/nowhere": "model.path=/nowhere does not exist; give a Hugging Face folder or a checkpoint",
    "serve.port={taken}": "serve.port={taken} of serve.host=127.0.0.1 cannot be listened on (Address already in use)",
    "serve.port=99999": "serve.port=99999 must be 1 to 65535, or 0 for any that is free",
    "serve.host=no.such.host": "serve.host=no.such.host cannot be listened on",
    "serve.max_queue=-1": "serve.max_queue=-1 must be at least 0",
    "serve.body_seconds=0": "serve.body_seconds=0.0 must be above 0",
    "serve.prot=1": "there is no key serve.prot; did you mean serve.port?",
    "prompt=x": "prompt is of mode=generate; requests come over HTTP",
    "sampling.top_logprobs=3": "each request asks for its own",
    "sampling.json_schema='{{'": "sampling.json_schema is wrong",
    "engine.num_blocks=1": "engine.num_blocks=1 blocks of 16 tokens cannot hold one sequence",
    "model.chat_template=/nowhere": "model.chat_template=/nowhere is no file",
    "model.chat_template={wrong}": "the chat template is wrong",
}


def test_what_cannot_be_served_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback of a library, or a server that answers every request with an error."""
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text("{% for %}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for override, says in MISTAKES.items():
            names = {"taken": taken.getsockname()[1], "wrong": wrong}
            arguments = ["mode=serve", f"model.path={folder}", "serve.port=0", override.format(**names)]
            assert exit_code_of(lab, arguments) == 2, override
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("configuration error: ")
            assert says.format(**names) in line


def test_packages_that_are_missing_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ImportError for who installed the project without its extras."""
    for mode, package in (("serve", "uvicorn"), ("chat", "jinja2")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            assert exit_code_of(lab, [f"mode={mode}", f"model.path={folder}"]) == 2
        says = f"configuration error: mode={mode} needs {package}; pip install 'lattice-train[serve]'\n"
        assert capsys.readouterr().err == says


def typed(monkeypatch: pytest.MonkeyPatch, lines: list[str | type[BaseException]]) -> None:
    """Let input() give these, and then the end."""
    left = iter(lines)

    def ask(prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)


def test_a_conversation_is_kept_until_it_is_reset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second question without the first, or one of the conversation before; a ctrl-C at the prompt that ends it."""
    prompts: list[str] = []
    add = Engine.add
    monkeypatch.setattr(
        Engine, "add", lambda self, prompt, sampling: prompts.append(prompt) or add(self, prompt, sampling)
    )
    typed(
        monkeypatch, ["one", KeyboardInterrupt, "two", "/what", "", "/reset", "three", "x" * 200, "two", "/exit", "no"]
    )
    settings = ["sampling.max_tokens=4", "sampling.regex='[abc]{4}'", "chat.system=be brief"]
    assert exit_code_of(lab, ["mode=chat", f"model.path={folder}", *settings]) == 0
    shown = capsys.readouterr().out
    answers = re.findall(r"^[abc]{4}$", shown, re.M)
    assert len(answers) == 4
    begin = "<system>be brief\n<user>"
    assert prompts[0] == f"{begin}one\n<assistant>"
    assert prompts[1] == f"{begin}one\n<assistant>{answers[0]}\n<user>two\n<assistant>"
    assert prompts[2] == f"{begin}three\n<assistant>"
    assert prompts[4] == f"{begin}three\n<assistant>{answers[2]}\n<user>two\n<assistant>"  # the long one was not said
    assert "leaves room for at most 127" in shown
    assert "(a new conversation)" in shown


def test_ctrl_c_stops_a_reply_and_not_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of the engine that ends in its middle, and blocks nobody frees."""
    step = Engine.step
    steps: list[Engine] = []

    def interrupted(engine: Engine) -> Any:
        steps.append(engine)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    typed(monkeypatch, ["one", "/reset", "two"])
    arguments = ["sampling.max_tokens=20", "sampling.ignore_eos=true", "sampling.regex='[abc]*'"]
    assert exit_code_of(lab, ["mode=chat", f"model.path={folder}", *arguments, "sampling.stop_token_ids=[]"]) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if re.match("[abc]", line))
    assert first.endswith(" (stopped)")
    assert len(first.partition(" ")[0]) <= 3
    assert not second.endswith(" (stopped)")
    assert steps[-1].blocks.num_free == steps[-1].blocks.num_blocks


def test_a_model_without_a_chat_template_does_not_talk(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers to a text that the model was never trained on."""
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    assert exit_code_of(lab, ["mode=chat", f"model.path={tmp_path}"]) == 2
    assert "has no chat template (chat_template.jinja, or" in capsys.readouterr().err


def test_generate_follows_a_schema_of_a_file(folder: Path, tmp_path: Path) -> None:
    """A file's name taken for a schema; a constraint that is lost on the way from the command line."""
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "integer"}, "maxItems": 3}')
    out = tmp_path / "out.jsonl"
    for override, valid in (
        (f"sampling.json_schema=@{tmp_path / 'schema.json'}", lambda text: isinstance(json.loads(text), list)),
        ("sampling.regex='[ab]{3}'", lambda text: re.fullmatch("[ab]{3}", text)),
        ("sampling.choice=[yes,no]", ("yes", "no").__contains__),
    ):
        check: Callable[[str], Any] = valid
        assert exit_code_of(lab, [f"model.path={folder}", "prompt=one", f"out={out}", "sampling.seed=4", override]) == 0
        assert check(json.loads(out.read_text())["text"])
