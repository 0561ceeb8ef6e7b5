"""mode=chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

from data.chat import ChatTemplate, ChatTemplateError
from inference.config import SamplingConfig
from inference.engine import Engine, RequestError
from launch.lab_config import LabConfig, chat_template_of, make_engine, open_served, sampling_of
from trainer.config import ConfigError

HELP = "/reset begins anew, /exit (or ctrl-D) ends; ctrl-C stops a reply"


def problems(config: LabConfig) -> list[str]:
    """Every reason why there can be no conversation; one line each."""
    found = [
        f"{name} is of mode=generate; mode=chat asks for what to say" for name in ("prompts", "prompt", "out")
        if getattr(config, name) is not None
    ]  # fmt: skip
    if importlib.util.find_spec("jinja2") is None:
        found.append("mode=chat needs jinja2; pip install 'lattice-train[serve]'")
    return found


def chat(config: LabConfig) -> None:
    """Talk until /exit or the end of the input. Raises ConfigError for a model without a chat template."""
    sampling = sampling_of(config)
    opened = open_served(config)
    if opened.tokenizer is None:
        raise ConfigError([f"mode=chat needs a tokenizer: {opened.no_tokenizer}"])
    template = chat_template_of(opened, config.model)
    if isinstance(template, ChatTemplateError):
        raise ConfigError([f"mode=chat: {template}; set model.chat_template to a Jinja file, or use mode=generate"])
    talk = Conversation(
        make_engine(opened, config.engine, config.speculation), template, sampling, system=config.chat.system
    )
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (edits the line that input() reads)
        print(HELP)
    while (said := _ask()) is not None:
        if said in ("/exit", "/quit"):
            return
        if said == "/reset":
            talk.reset()
            print("(a new conversation)")
        elif said.startswith("/"):
            print(f"({HELP})")
        elif said.strip():
            _print_reply(talk, said)


class Conversation:
    """What was said, and an engine that goes on."""

    def __init__(
        self, engine: Engine, template: ChatTemplate, sampling: SamplingConfig, *, system: str | None = None
    ) -> None:
        self._engine, self._template, self._system = engine, template, system
        self._sampling = replace(sampling, add_special_tokens=False)  # the template writes them
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but what the system says."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def reply(self, said: str, *, stopped: threading.Event) -> Iterator[str]:
        """The model's answer, as it comes; it ends early once `stopped` is set, and is remembered as far as it came.

        Raises ChatTemplateError and RequestError where there can be none; nothing was said then.
        """
        messages = [*self.messages, {"role": "user", "content": said}]
        prompt = self._template.render(messages)
        request = self._engine.add(prompt, self._sampling)
        answer = ""
        try:
            while self._engine.num_unfinished and not stopped.is_set():
                for delta in self._engine.step():
                    answer += delta.text
                    yield delta.text
        finally:
            if self._engine.num_unfinished:
                self._engine.abort(request)
            self.messages = [*messages, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    """A line from the user; None: there are no more."""
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print(f"\n({HELP})")


def _print_reply(talk: Conversation, said: str) -> None:
    with _interrupts() as stopped:
        try:
            for text in talk.reply(said, stopped=stopped):
                print(text, end="", flush=True)
            print(" (stopped)" if stopped.is_set() else "")
        except (ChatTemplateError, RequestError) as error:
            print(f"({error}; /reset begins anew)")


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by ctrl-C, which would otherwise end a step of the engine in its middle."""
    pressed = threading.Event()

    def press(number: int, frame: FrameType | None) -> None:
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
