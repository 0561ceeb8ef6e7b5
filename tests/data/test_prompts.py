"""Prompts: what of a row reaches the chat template, and how an answer to one ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, DataError, PromptsConfig, TokenizerConfig
from data.prompts import Prompt, PromptCounts, read_prompts
from data.tokenizer import Tokenizer, eos_ids_of, load_tokenizer
from tests.data.conversing import CHATML, FORGETS, chat_folder, write_rows

ASKED = [{"role": "user", "content": "one two?"}]
ROW: dict[str, Any] = {"prompt": ASKED, "answer": "3"}
TOOLS = {"tools": json.dumps([{"name": "add"}]), "chat_template_kwargs": {"style": "!"}}
SAYS_TOOLS = "{{ tools | tojson }}{{ style }}" + CHATML


def read(
    tmp_path: Path, rows: list[dict[str, Any]], *, template: str | None = CHATML, **fields: Any
) -> tuple[list[Prompt], str, PromptCounts]:
    """fields: of PromptsConfig."""
    config = DataConfig(
        source="prompts",
        path=str(write_rows(tmp_path / "rows.jsonl", rows)),
        prompts=PromptsConfig(**fields),
        tokenizer=TokenizerConfig(path=str(chat_folder(tmp_path / "tokenizer", template))),
    )
    return read_prompts(config, load_tokenizer(config), max_prompt=99, vocab_size=300)


def test_tools_of_a_row_reach_the_template(tmp_path: Path) -> None:
    """A policy that is sampled by other prompts than those it was fine-tuned on: without its tools."""
    row = ROW | TOOLS
    (prompt,), content, _ = read(tmp_path, [row], template=SAYS_TOOLS)
    assert prompt.text.startswith('[{"name": "add"}]!<|im_start|>user')
    assert prompt.row == row
    answered = row | {"completion": [{"role": "assistant", "content": "three"}]}
    (taught,), _, _ = read(tmp_path, [answered], template=SAYS_TOOLS, completion="completion")
    assert Tokenizer.from_path(tmp_path / "tokenizer").decode(taught.completion_ids) == "three<|im_end|>\n"
    assert read(tmp_path, [row | {"tools": None}], template=SAYS_TOOLS)[1] != content
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: its tools are not JSON"):
        read(tmp_path, [ROW | {"tools": "{"}])


def test_columns_beside_a_prompt_of_text_are_for_rewards_alone(tmp_path: Path) -> None:
    """A row that is refused for a column that no template reads."""
    (prompt,), _, counts = read(tmp_path, [{"prompt": "one", "tools": "hammer and {"}])
    assert (prompt.text, prompt.row["tools"]) == ("one", "hammer and {")
    assert not counts.ends


def test_an_answer_ends_with_what_the_template_writes_behind_it(tmp_path: Path) -> None:
    """A policy that was fine-tuned to end its turns so, and is sampled on until there is no room."""
    end = Tokenizer.from_path(chat_folder(tmp_path / "tokenizer")).encode("<|im_end|>")
    assert read(tmp_path, [{"prompt": "one"}, ROW])[2].ends == frozenset(end)
    assert read(tmp_path, [ROW], system="be brief")[2].ends == frozenset(end)
    # A template that writes no special token, and one that writes no answers.
    assert not read(tmp_path, [ROW], template=FORGETS)[2].ends
    refuses = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}one{% endfor %}"
    )
    assert not read(tmp_path, [ROW], template=refuses)[2].ends


def test_a_folder_may_list_more_tokens_that_end_a_document(tmp_path: Path) -> None:
    assert eos_ids_of(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert eos_ids_of(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert eos_ids_of(tmp_path) == [5, 7]
