"""Prompts that completions are sampled for: rows with a prompt, and columns that rewards are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.batch import Batch
from data.cache import digest
from data.chat import ChatTemplate, ChatTemplateError, load_chat_template
from data.config import ROW_SUFFIXES, DataConfig, DataError, expand
from data.conversations import RowAt, UnusableRow, read_rows, row_of
from data.loader import Loader
from data.order import EpochOrder
from data.reader import RandomAccessReader, Slice
from data.sources import Files
from data.tokenizer import Tokenizer, load_tokenizer, parallel


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    ids: list[int]  # as the tokenizer wrote it; completions are put behind these ids, and nothing is tokenised again
    text: str
    row: Mapping[str, Any]  # all its columns: answers, tests, and what else a reward reads
    completion_ids: list[int] = field(default_factory=list)  # of data.prompts.completion, where it is set


@dataclass
class PromptCounts:
    """What else there is to say of the rows. Filled by `read_prompts`."""

    too_long: int = 0  # of which no prompt was made
    why: list[str] = field(default_factory=list)  # the first of each kind of these
    ends: frozenset[int] = frozenset()  # tokens that end an answer by the chat template, where prompts are messages


class PromptSamples:
    """Prompts by number, epoch after epoch without end: each once in an epoch, in an order of its own."""

    def __init__(self, prompts: list[Prompt], *, key: tuple[int, ...] | None, ends: frozenset[int]) -> None:
        """key: of the permutations, (seed, ...); None: in the order of the rows. ends: of PromptCounts."""
        self.ends = ends
        self._prompts = prompts
        self._order = EpochOrder(len(prompts), key)

    def available(self, wanted: int) -> int:
        return min(wanted, len(self._prompts))

    def __getitem__(self, number: int) -> Prompt:
        return self._prompts[self._order[number]]


class PromptReader(RandomAccessReader):
    """Batches whose `samples` are numbers of prompts: tokens are the prompts', filled up with 0, and so are labels."""

    samples: PromptSamples  # type: ignore[assignment]

    def read(self, numbers: list[int]) -> Batch:
        prompts = [self.samples[number].ids for number in numbers]
        tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, ids in zip(tokens, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        positions = torch.arange(tokens.shape[1]).repeat(len(prompts), 1)
        return Batch(tokens, tokens.clone(), positions, None, torch.tensor(numbers, dtype=torch.int64))


def build_prompt_loader(
    config: DataConfig,
    *,
    num_prompts: int,
    max_prompt: int,
    rank: int,
    world_size: int,
    seed: int,
    split: str,
    vocab_size: int,
    device_type: str,
) -> tuple[Loader, PromptSamples]:
    """The loader of data-parallel rank `rank`, and the prompts that its batches number.

    num_prompts: of a global batch; max_prompt: tokens of the longest prompt that leaves room for an answer. split:
    "train" or "validation", which is the last data.validation_fraction of the rows. Raises DataError.
    """
    tokenizer = load_tokenizer(config)
    prompts, content, counts = read_prompts(config, tokenizer, max_prompt=max_prompt, vocab_size=vocab_size)
    held_out = round(len(prompts) * config.validation_fraction)
    if config.validation_fraction > 0:
        held_out = max(1, held_out)
    if held_out >= len(prompts):
        raise DataError(
            f"data.validation_fraction={config.validation_fraction} holds out all {len(prompts)} prompts of "
            f"data.path={config.path}; lower it, or give more rows"
        )
    training = split == "train"
    chosen = prompts[: len(prompts) - held_out] if training else prompts[len(prompts) - held_out :]
    samples = PromptSamples(chosen, key=(seed, 0) if config.shuffle and training else None, ends=counts.ends)
    reader = PromptReader(
        samples,  # type: ignore[arg-type]
        Slice(num_prompts, max(1, num_prompts // world_size), rank, world_size),
        mask_documents=config.mask_documents,
        vocab_size=vocab_size,
    )
    reader.counts.update({"prompts": len(chosen), "prompts_too_long": counts.too_long})
    reader.left_out += counts.why
    identity: dict[str, Any] = {
        "seed": seed if config.shuffle else None,
        "validation_fraction": config.validation_fraction,
        "content": content,
    }
    loader = Loader(
        reader,
        identity=identity,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
        pin=device_type == "cuda",
        tokenizer=tokenizer,
    )
    return loader, samples


def read_prompts(
    config: DataConfig, tokenizer: Tokenizer, *, max_prompt: int, vocab_size: int
) -> tuple[list[Prompt], str, PromptCounts]:
    """All prompts in the files of config.path, in their order; a hash of all that they are made of.

    Raises DataError for a row without a prompt, for one that the template refuses, for a token outside of the model's
    vocabulary, where config.prompts.too_long=error and a prompt is, and where no prompt is left.
    """
    files = expand(str(config.path), ROW_SUFFIXES)
    source = Files(str(config.path), Path("/"), [file.resolve() for file in files], text_field=config.prompts.field)
    template = _template(config, tokenizer)
    rows = [(where, row) for path in source.files for where, row in read_rows(path)]
    variables = [_variables(row, where, config) for where, row in rows]
    texts = [_text(row, where, config, template, known) for (where, row), known in zip(rows, variables, strict=True)]
    read = config.prompts.completion is not None
    answers = [
        _completion(row, where, config, template, text, known) if read else ("", False)
        for (where, row), text, known in zip(rows, texts, variables, strict=True)
    ]
    with parallel():
        encoded = tokenizer.encode_batch(texts)
        completions = tokenizer.encode_batch([text for text, _ in answers])
    prompts, counts = [], PromptCounts(ends=_ends([row for _, row in rows], variables, config, template, tokenizer))
    for (where, row), text, ids, completion, (_, ends) in zip(rows, texts, encoded, completions, answers, strict=True):
        if not ids:
            raise DataError(f"data.path: {where}: its prompt has no tokens; give one that is not empty")
        if max(ids) >= vocab_size:
            raise DataError(
                f"data.path: {where}: the token id {max(ids)} is outside model.vocab_size={vocab_size}; use the "
                "tokenizer the model was made for"
            )
        if len(ids) > max_prompt:
            counts.too_long += 1
            what = f"data.path: {where}: a prompt of {len(ids)} tokens leaves no room for an answer in {max_prompt + 1}"
            if config.prompts.too_long == "error":
                raise DataError(f"{what}; raise train.seq_len, or leave such rows out by data.prompts.too_long=skip")
            counts.why = counts.why or [what]
            continue
        if max(completion, default=0) >= vocab_size:
            raise DataError(
                f"data.path: {where}: the token id {max(completion)} is outside model.vocab_size={vocab_size}; use the "
                "tokenizer the model was made for"
            )
        prompts.append(Prompt(ids, text, row, [*completion, tokenizer.eos_id] if ends else completion))
    if not prompts:
        raise DataError(f"data.path={config.path} holds no prompt that fits; {counts.why or 'its files are empty'}")
    content = digest("prompts", 1, source.fingerprint(), tokenizer.fingerprint(), config.prompts.system, max_prompt)
    found = digest(content, template.fingerprint() if template is not None else None)
    if any(value is not None for known in variables for value in known.values()):
        found = digest(found, variables)
    return prompts, digest(found, config.prompts.completion) if read else found, counts


def _template(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """None where the tokenizer's folder has none: prompts of text need none."""
    chosen = config.prompts.template
    try:
        return load_chat_template(tokenizer.folder, file=None if chosen is None else Path(chosen).expanduser())
    except ChatTemplateError as error:
        if chosen is None and "has no chat template" in str(error):
            return None
        raise DataError(f"data.prompts.template: {error}") from None


def _variables(row: Any, where: RowAt, config: DataConfig) -> dict[str, Any]:
    """What a row with messages has for the template: its tools, and its chat_template_kwargs."""
    if not isinstance(row, dict) or not isinstance(row.get(config.prompts.field), list):
        return {}
    try:
        return row_of(row)[1]
    except UnusableRow as error:
        raise DataError(f"data.path: {where}: {error}") from None


def _ends(
    rows: list[Any],
    variables: list[dict[str, Any]],
    config: DataConfig,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
) -> frozenset[int]:
    """The special token that the template writes last behind an answer, which data/questions.py asks for as well: many
    templates end turns with another token than documents end with. It is that of the first row with messages."""
    for row, known in zip(rows, variables, strict=True):
        asked = row[config.prompts.field]
        if template is None or isinstance(asked, str):
            continue
        said = "an answer"
        try:
            whole = template.render(
                [*_asked(asked, config), {"role": "assistant", "content": said}], add_generation_prompt=False, **known
            )
        except ChatTemplateError:  # it writes no answers
            break
        _, found, behind = whole.rpartition(said)
        last = last_special(tokenizer.encode(behind), tokenizer) if found else None
        return frozenset() if last is None else frozenset([last])
    return frozenset()


def last_special(ids: list[int], tokenizer: Tokenizer) -> int | None:
    """The special token that ids end with; a template may write blanks behind it."""
    for token in reversed(ids):
        if tokenizer.is_special(token):
            return token
        if tokenizer.decode([token]).strip():
            return None
    return None


def _asked(prompt: list[Any], config: DataConfig) -> list[Any]:
    """Messages, with data.prompts.system before those that have none."""
    if config.prompts.system is None or prompt[0].get("role") == "system":
        return prompt
    return [{"role": "system", "content": config.prompts.system}, *prompt]


def _text(
    row: Any, where: RowAt, config: DataConfig, template: ChatTemplate | None, variables: Mapping[str, Any]
) -> str:
    """The text of a row's prompt: as it is, or messages by the template, with what an answer begins with."""
    if isinstance(row, UnusableRow):
        raise DataError(f"data.path: {where}: {row}")
    column = config.prompts.field
    prompt = row.get(column) if isinstance(row, dict) else None
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
        columns = _listed(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"data.path: {where}: data.prompts.field={column} is neither text nor messages there; it has {columns}"
        )
    if template is None:
        raise DataError(
            f"data.path: {where}: its prompt is messages, and the tokenizer's folder has no chat template; give a "
            "Jinja file as data.prompts.template"
        )
    try:
        return template.render(_asked(prompt, config), add_generation_prompt=True, **variables)
    except ChatTemplateError as error:
        raise DataError(f"data.path: {where}: {error}") from None


def _completion(
    row: Any,
    where: RowAt,
    config: DataConfig,
    template: ChatTemplate | None,
    prompt: str,
    variables: Mapping[str, Any],
) -> tuple[str, bool]:
    """(text of a row's answer, behind that of its prompt; whether eos follows it, which templates write themselves)."""
    column = config.prompts.completion
    assert column is not None
    said, asked = row.get(column), row[config.prompts.field]
    if isinstance(said, str) and said:
        if isinstance(asked, str):
            return said, True
        said = [{"role": "assistant", "content": said}]
    if isinstance(asked, str) or not isinstance(said, list) or not said or not all(isinstance(m, dict) for m in said):
        raise DataError(
            f"data.path: {where}: data.prompts.completion={column} is no answer to that prompt: text, or messages to "
            f"messages, that are not empty; it has {_listed(row)}"
        )
    assert template is not None
    try:
        whole = template.render([*_asked(asked, config), *said], add_generation_prompt=False, **variables)
    except ChatTemplateError as error:
        raise DataError(f"data.path: {where}: {error}") from None
    if not whole.startswith(prompt) or whole == prompt:
        raise DataError(
            f"data.path: {where}: the chat template does not begin a conversation with its answer as it begins one "
            "without; give a prompt of text, or another template"
        )
    return whole[len(prompt) :], False


def _listed(names: Iterable[str]) -> str:
    return f"the columns {', '.join(names)}"
