"""A conversation as the text that a model was trained on, by the Jinja template that comes with its tokenizer."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from data.cache import digest

Message = Mapping[str, Any]
"""At least `role` and `content`."""

Span = tuple[int, int]
"""Of a text: the first character, and that behind the last."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What templates may name, besides the conversation."""

_BEGIN, _END = "_generation_begins", "_generation_ends"


class ChatTemplateError(ValueError):
    """There is no template, or it refuses a conversation; the message says why."""


class ChatTemplate:
    """Renders as transformers' apply_chat_template does, in Jinja's sandbox: a template may come from anyone."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ChatTemplateError for what is no template, or without jinja2."""
        try:
            import jinja2
        except ImportError:
            raise ChatTemplateError(
                "chat templates need the package jinja2; pip install 'lattice-train[serve]'"
            ) from None
        self.source = source
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._special_tokens = dict(special_tokens)
        self._error = jinja2.TemplateError
        try:
            self._render: Callable[..., str] = _environment().from_string(source).render
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template is wrong: {error}") from None

    def fingerprint(self) -> str:
        """Changes when any conversation may get another text."""
        return digest(self.source, self._special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation; add_generation_prompt: with what an answer of the model begins behind.

        variables: whatever else a template reads, as enable_thinking. Raises ChatTemplateError where it refuses.
        """
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        known: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            return self._render(messages=plain, add_generation_prompt=add_generation_prompt, **known)
        except (self._error, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise ChatTemplateError(f"the chat template refuses this conversation: {error}") from None

    def render_marked(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
        """A whole conversation, and which of its text stands between `{% generation %}` and `{% endgeneration %}`.

        Found by rendering it a second time with a mark, made of random digits, at either place. Raises
        ChatTemplateError where `render` does, and for a template that changes its text when it holds marks.
        """
        text = self.render(messages, add_generation_prompt=False, **variables)
        begin, end = (f"\x02{secrets.token_hex(16)}{kind}\x03" for kind in "be")
        marks = {_BEGIN: begin, _END: end}
        marked = self.render(messages, add_generation_prompt=False, **variables, **marks)
        plain, *pieces = marked.split(begin)
        spans: list[Span] = []
        for piece in pieces:
            inside, found, after = piece.partition(end)
            if not found:
                raise ChatTemplateError("the chat template has a generation block within another")
            spans.append((len(plain), len(plain) + len(inside)))
            plain += inside + after
        if plain != text:
            raise ChatTemplateError("the chat template changes what its generation blocks hold after them")
        return text, spans


def load_chat_template(folder: Path | None, *, file: Path | None = None) -> ChatTemplate:
    """The template of a tokenizer's folder, or of a file. Raises ChatTemplateError where there is none.

    In a folder: chat_template.jinja, else tokenizer_config.json's chat_template, of several the one named default.
    """
    config = {} if folder is None else _read_json(folder / "tokenizer_config.json")
    if file is not None:
        return ChatTemplate(file.read_text(encoding="utf-8"), _special_tokens(folder, config))
    if folder is None:
        raise ChatTemplateError("the tokenizer was not read from a folder that could have a chat template")
    own = folder / "chat_template.jinja"
    source = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ChatTemplateError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        )
    return ChatTemplate(source, _special_tokens(folder, config))


def _environment() -> Any:
    """What templates of Hugging Face are written for."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer for training: around it, two variables that are undefined, and so empty,
        but in `render_marked`."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in (_BEGIN, _END))
            return [each.set_lineno(line) for each in (begin, jinja2.nodes.Scope(body), end)]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own escapes HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _special_tokens(folder: Path | None, config: Mapping[str, Any]) -> dict[str, str]:
    """By name, as the files say; tokenizer_config.json before special_tokens_map.json."""
    said = {} if folder is None else _read_json(folder / "special_tokens_map.json")
    said |= {key: value for key, value in config.items() if value is not None}
    found = {}
    for name in SPECIAL_TOKENS:
        value = said.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ChatTemplateError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
