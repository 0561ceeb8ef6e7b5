"""Conversations: rows as TRL and ShareGPT write them, as a text of which some spans are to be learned.

What a span is, is found in text and never by looking for tokens, which other texts may hold as well:

- A template that marks answers (`{% generation %}`) says so itself.
- Of any other, an answer is what the conversation up to its end has more than the conversation before it with the
  generation prompt, which is what a model sees when it is asked. That holds only where each of the two texts begins the
  next, and a template of which they do not (one that drops earlier thoughts) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.chat import ChatTemplate, ChatTemplateError, Message, Span
from data.config import DataError

ROLES = {  # of ShareGPT's `from`
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class RowAt(NamedTuple):
    """Where a row stands."""

    path: Path
    number: int  # of its line, from 1, or in a .parquet file of the row, from 0

    def __str__(self) -> str:
        return f"{self.path}, {'row' if self.path.suffix == '.parquet' else 'line'} {self.number}"


class UnusableRow(ValueError):
    """A row that no example can be made of. `kind`: one of columns, malformed, empty, refused, unlearned, alike."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Conversation:
    """What is asked and what answers it, both in messages or both in text."""

    prompt: Sequence[Message] | str  # empty: all is in `answer`
    answer: Sequence[Message] | str
    variables: Mapping[str, Any]  # that the template reads


@dataclass(frozen=True)
class MarkedText:
    text: str
    spans: list[Span]  # to be learned, ascending
    ends: bool  # the end of a document follows, and is learned


def read_rows(path: Path) -> Iterator[tuple[RowAt, Any]]:
    """(where it stands, row) of every row of a .jsonl or .parquet file; a line that is no JSON is an UnusableRow.

    Raises DataError where the file cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            number = 0
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    for row in batch.to_pylist():
                        yield RowAt(path, number), row
                        number += 1
            return
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield RowAt(path, number), _parsed(line)
    except (OSError, ValueError) as error:
        raise DataError(f"data.path: {path} cannot be read: {type(error).__name__}: {error}") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return UnusableRow("malformed", f"it is not JSON ({error})")


def conversation_of(row: Any, *, text_field: str, loss_on: str, system: str | None) -> Conversation:
    """A row of any known shape: messages, conversations (ShareGPT), prompt and completion, or text, in this order.

    A column tools (a list, or JSON) and a column chat_template_kwargs are for the template. system: of
    `data.conversations`. Raises UnusableRow.
    """
    row, variables = row_of(row)
    if "messages" in row or "conversations" in row:
        messages = messages_of(row, "messages" if "messages" in row else "conversations")
        if isinstance(row.get("system"), str) and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": row["system"]}, *messages]
        prompt = []
        if loss_on == "completion":
            prompt, messages = messages[:-1], messages[-1:]
            if messages[0]["role"] != "assistant":
                raise UnusableRow("unlearned", f"its last turn is the {messages[0]['role']}'s, and nothing answers it")
        return with_system(prompt, messages, system, variables)
    if "prompt" in row and "completion" in row:
        prompt, answer = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(answer, str):
            if not answer:
                raise UnusableRow("empty", "its completion is empty")
            return Conversation(prompt, answer, {})
        if isinstance(prompt, str) or isinstance(answer, str):
            raise UnusableRow("malformed", "of prompt and completion one is text and one is not; give both alike")
        return with_system(messages_of(row, "prompt"), messages_of(row, "completion"), system, variables)
    if isinstance(row.get(text_field), str):
        if not row[text_field]:
            raise UnusableRow("empty", "its text is empty")
        if loss_on != "all":
            raise UnusableRow(
                "unlearned",
                f"it is text, in which no answer stands apart; use data.conversations.loss_on=all, not {loss_on}",
            )
        return Conversation("", row[text_field], {})
    raise UnusableRow(
        "columns",
        f"it has the columns {', '.join(row) or 'none'}; give messages, conversations, prompt and completion, or "
        f"{text_field}",
    )


def row_of(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of a row that hold something, and the variables of the template. Raises UnusableRow."""
    if isinstance(row, UnusableRow):
        raise row
    if not isinstance(row, dict):
        raise UnusableRow("malformed", f"it is no object but {type(row).__name__}")
    row = {name: value for name, value in row.items() if value is not None}
    return row, _variables(row)


def _variables(row: Mapping[str, Any]) -> dict[str, Any]:
    variables = dict(row.get("chat_template_kwargs", {}))
    tools = row.get("tools")
    try:
        variables["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise UnusableRow("malformed", f"its tools are not JSON ({error})") from None
    return variables


def messages_of(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The messages in a column, with role and content; ShareGPT's from and value are renamed."""
    found = row[column]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise UnusableRow("malformed", f"its {column} is no list of messages")
    if not found:
        raise UnusableRow("empty", f"its {column} holds no message")
    messages = []
    for number, message in enumerate(found):
        plain = {name: value for name, value in message.items() if value is not None}
        if "role" not in plain and "from" in plain:
            said = plain.pop("from")
            if said not in ROLES:
                raise UnusableRow("malformed", f"{column}[{number}] is from {said!r}; known are {', '.join(ROLES)}")
            plain = {"role": ROLES[said], "content": plain.pop("value", None), **plain}
        if not isinstance(plain.get("role"), str):
            raise UnusableRow("malformed", f"{column}[{number}] has no role, but {', '.join(plain) or 'nothing'}")
        messages.append(plain)
    return messages


def with_system(
    prompt: list[dict[str, Any]], answer: list[dict[str, Any]], system: str | None, variables: dict[str, Any]
) -> Conversation:
    """With `data.conversations.system` before messages that have none. Raises UnusableRow for an empty answer."""
    if system is not None and all(message["role"] != "system" for message in [*prompt, *answer]):
        first: list[dict[str, Any]] = [{"role": "system", "content": system}]
        if prompt:
            prompt = first + prompt
        else:
            answer = first + answer
    return _checked(Conversation(prompt, answer, variables))


def _checked(conversation: Conversation) -> Conversation:
    for message in conversation.answer:
        assert not isinstance(message, str)
        if message["role"] == "assistant" and not any(message.get(name) for name in _SAYS):
            raise UnusableRow("empty", "an answer in it is empty")
    return conversation


_SAYS = ("content", "tool_calls", "reasoning_content", "thinking")


def marked_text(conversation: Conversation, template: ChatTemplate | None, *, loss_on: str) -> MarkedText:
    """The text of a conversation and what of it is learned (`data.conversations.loss_on`).

    Raises UnusableRow where the template refuses it, and DataError without a template, or with one by which an answer
    cannot be told from the rest.
    """
    if isinstance(conversation.prompt, str) and isinstance(conversation.answer, str):
        begin = 0 if loss_on == "all" else len(conversation.prompt)
        text = conversation.prompt + conversation.answer
        return MarkedText(text, [(begin, len(text))], ends=True)
    if template is None:
        raise DataError(
            "data.conversations.template is missing: the tokenizer's folder has no chat template (chat_template.jinja, "
            "or chat_template in tokenizer_config.json); give a Jinja file"
        )
    assert not isinstance(conversation.prompt, str)
    assert not isinstance(conversation.answer, str)
    rendered = _Rendered(template, [*conversation.prompt, *conversation.answer], conversation.variables)
    try:
        if loss_on == "all":
            return MarkedText(rendered.text(), [(0, len(rendered.text()))], ends=False)
        asked = len(conversation.prompt)
        if loss_on == "completion":
            return MarkedText(rendered.text(), [rendered.answer(asked, len(rendered.messages))], ends=False)
        return MarkedText(rendered.text(), rendered.assistant(asked), ends=False)
    except ChatTemplateError as error:
        raise UnusableRow("refused", str(error)) from None


class _Rendered:
    """A conversation, its text, and where in the text its turns stand."""

    def __init__(self, template: ChatTemplate, messages: list[Message], variables: Mapping[str, Any]) -> None:
        self._template = template
        self.messages = messages
        self._variables = variables
        self._text: str | None = None

    def text(self) -> str:
        if self._text is None:
            self._text = self._template.render(self.messages, add_generation_prompt=False, **self._variables)
        return self._text

    def assistant(self, first: int) -> list[Span]:
        """The assistant's turns from message `first` on."""
        if not self._template.marks_answers:
            turns = range(first, len(self.messages))
            return [self.answer(i, i + 1) for i in turns if self.messages[i]["role"] == "assistant"]
        self._text, spans = self._template.render_marked(self.messages, **self._variables)
        begin = self.answer(first, len(self.messages))[0] if first else 0
        return [span for span in spans if span[0] >= begin]

    def answer(self, begin: int, end: int) -> Span:
        """Messages begin .. end-1, without the generation prompt before them."""
        render, whole = self._template.render, self.text()
        before = render(self.messages[:begin], add_generation_prompt=True, **self._variables)
        after = whole
        if end < len(self.messages):
            after = render(self.messages[:end], add_generation_prompt=False, **self._variables)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                "data.conversations.template: by this chat template a turn is not written as it was asked for (turn "
                f"{begin} of {len(self.messages)}), so the answer cannot be told from the rest; give a template that "
                "marks answers by {% generation %}, or use data.conversations.loss_on=all"
            )
        return len(before), len(after)
