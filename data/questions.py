"""Held-out rows as questions: what stands before the last answer of a conversation, and that answer.

Questions are those of the examples that a run's validation has (data/examples.py), in the order of their rows. Of
messages the last one of the assistant is the answer, and a question is all before it by the chat template, with the
generation prompt; of a row with a prompt and a completion in text, it is the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from typing import Any

from data.chat import ChatTemplate, ChatTemplateError
from data.config import BlendPart, DataConfig, DataError, parts
from data.conversations import Conversation, RowAt, UnusableRow, conversation_of, read_rows
from data.examples import Examples, open_examples, template_of
from data.prompts import Prompt, last_special
from data.tokenizer import Tokenizer


@dataclass
class Questions:
    """Filled by `read_questions`."""

    prompts: list[Prompt] = field(default_factory=list)  # whose row has `answer`: what is to be found in an answer
    ends: set[int] = field(default_factory=set)  # tokens that end an answer
    left_out: list[str] = field(default_factory=list)  # rows that no question was made of, and why


def read_questions(
    config: DataConfig, tokenizer: Tokenizer, *, count: int, max_prompt: int, found_in: Callable[[str], str | None]
) -> Questions:
    """The first `count` questions of the held-out rows, of a blend from each of its parts in turn; all, if fewer.

    max_prompt: tokens of the longest prompt that leaves room for an answer; longer ones are left out. found_in: what of
    an answer's text is compared; None: nothing in it can be. Raises DataError where data.conversations.unusable=error
    and a row has no answer, for a template that does not end answers, and where no question is left.
    """
    found = Questions(ends={tokenizer.eos_id})
    of_parts = [
        _of_part(part, config, tokenizer, found, max_prompt=max_prompt, found_in=found_in)
        for part in parts(config)
        if part.source == "conversations"
    ]
    in_turn = (one for one in chain.from_iterable(zip_longest(*of_parts)) if one is not None)
    found.prompts = list(islice(in_turn, count))
    if not found.prompts:
        why = found.left_out[0] if found.left_out else "none is held out; raise data.validation_fraction"
        raise DataError(f"no held-out row of data.path={config.path} can be answered: {why}")
    return found


def _of_part(
    part: BlendPart,
    config: DataConfig,
    tokenizer: Tokenizer,
    found: Questions,
    *,
    max_prompt: int,
    found_in: Callable[[str], str | None],
) -> Iterator[Prompt]:
    """The questions of one source, as they are asked for; `ends` and `left_out` of `found` grow."""
    chosen = config.conversations
    template = template_of(chosen, tokenizer)
    examples = open_examples(part, chosen, tokenizer, config.cache_dir).split(config.validation_fraction)[1]
    for where, row in _rows(examples):
        try:
            conversation = conversation_of(
                row, text_field=part.text_field, loss_on=chosen.loss_on, system=chosen.system
            )
            asked, answer, ends = question_of(conversation, template)
            prompt = _prompt(asked, answer, tokenizer, found, ends=ends, found_in=found_in)
        except UnusableRow as unusable:
            what = f"data.path: {where}: {unusable}"
            if chosen.unusable == "error":
                raise DataError(
                    f"{what}; mend it, leave such rows out by data.conversations.unusable=skip, or use "
                    "recipe.answers.prompts=0"
                ) from None
            found.left_out.append(what)
            continue
        except DataError as error:
            raise DataError(f"{error} (seen at {where})") from None
        if len(prompt.ids) > max_prompt:
            found.left_out.append(
                f"data.path: {where}: a prompt of {len(prompt.ids)} tokens leaves no room for an answer in "
                f"train.seq_len={max_prompt + 1}"
            )
            continue
        yield prompt


def _rows(examples: Examples) -> Iterator[tuple[RowAt, Any]]:
    """The rows that examples were made of, in their order."""
    for number, path in enumerate(examples.files):
        wanted = set(examples.rows[examples.rows[:, 0] == number, 1].tolist())
        if wanted:
            yield from ((where, row) for where, row in read_rows(path) if where.number in wanted)


def question_of(conversation: Conversation, template: ChatTemplate | None) -> tuple[str, str, bool]:
    """(what is asked, the last answer as it is written behind that, whether the end of a document follows).

    Raises UnusableRow where nothing is asked, and DataError for a template that writes a question otherwise once it is
    answered.
    """
    if isinstance(conversation.prompt, str) and isinstance(conversation.answer, str):
        if not conversation.prompt:
            raise UnusableRow("unasked", "nothing in it stands apart as its answer")
        return conversation.prompt, conversation.answer, True
    messages = [message for part in (conversation.prompt, conversation.answer) for message in _messages(part)]
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise UnusableRow("unasked", "no message in it is an answer of the assistant to one before")
    assert template is not None  # no example was made of such a row without one
    try:
        asked = template.render(messages[:last], add_generation_prompt=True, **conversation.variables)
        whole = template.render(messages[: last + 1], add_generation_prompt=False, **conversation.variables)
    except ChatTemplateError as error:
        raise UnusableRow("refused", str(error)) from None
    if not whole.startswith(asked):
        raise DataError(
            "data.conversations.template: by this chat template an answer is not written as it was asked for, and has "
            "nothing to be compared with; give another template, or use recipe.answers.prompts=0"
        )
    return asked, whole[len(asked) :], False


def _messages(part: Any) -> Iterable[Any]:
    assert not isinstance(part, str)
    return part


def _prompt(
    asked: str,
    answer: str,
    tokenizer: Tokenizer,
    found: Questions,
    *,
    ends: bool,
    found_in: Callable[[str], str | None],
) -> Prompt:
    """Raises UnusableRow for an answer in which nothing can be compared, DataError for one that does not end."""
    ids = tokenizer.encode(answer)
    if not ends:
        last = last_special(ids, tokenizer)
        if last is None:
            raise DataError(
                "data.conversations.template: by this chat template no special token ends an answer, so that no answer "
                "that is generated ends; give another template, or use recipe.answers.prompts=0"
            )
        found.ends.add(last)
    expected = found_in(tokenizer.decode(ids, skip_special_tokens=True))
    if not expected:
        raise UnusableRow("empty", f"its answer {answer!r} has nothing that recipe.answers.compare finds")
    prompt = tokenizer.encode(asked)
    if not prompt:
        raise UnusableRow("empty", "its prompt has no tokens")
    return Prompt(prompt, asked, {"answer": expected}, ids)
