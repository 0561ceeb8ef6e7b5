"""Which tokens of a conversation are learned, whatever shape its row has, and what of bad rows is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from data.config import DataConfig, DataError, parts, problems
from data.examples import Examples, open_examples
from data.tokenizer import Tokenizer
from tests.data.conversing import CHATML, ENDS_AFTER_MARK, FORGETS, MARKED, TURNS, chat_config, chat_folder

ROWS = [{"messages": turns} for turns in TURNS]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def opened(config: DataConfig) -> Examples:
    tokenizer = Tokenizer.from_path(str(config.tokenizer.path))
    return open_examples(parts(config)[0], config.conversations, tokenizer, config.cache_dir)


def listed(examples: Examples) -> list[tuple[list[int], list[bool]]]:
    """(ids, learned) of each."""
    ranges = zip(examples.corpus.starts, examples.corpus.ends, strict=True)
    return [(examples.corpus.tokens[a:b].tolist(), examples.learned[a:b].astype(bool).tolist()) for a, b in ranges]


def texts_learned(config: DataConfig) -> list[str]:
    """The text of the learned tokens of each example."""
    tokenizer = Tokenizer.from_path(str(config.tokenizer.path))
    return [tokenizer.decode(np.asarray(ids)[np.asarray(mask)]) for ids, mask in listed(opened(config))]


@pytest.mark.parametrize("template", [MARKED, ENDS_AFTER_MARK], ids=["newline-inside", "newline-outside"])
def test_ids_and_assistant_masks_are_those_of_transformers(template: str, tmp_path: Path) -> None:
    """A mask shifted by a token, or without the further tokens of a character: blanks at the edge of an answer,
    answers that hold a special token, characters of several tokens."""
    found = listed(opened(chat_config(tmp_path, ROWS, template=template)))
    # Where a post-processor cuts blanks off the places of tokens, transformers loses answers that begin with one.
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for turns, (ids, learned) in zip(TURNS, found, strict=True):
        wanted = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == wanted["input_ids"]
        assert learned == [bool(each) for each in wanted["assistant_masks"]]
        assert 0 < sum(learned) < len(learned)


def test_answers_found_by_prefixes_are_those_that_a_template_marks(tmp_path: Path) -> None:
    """A generation prompt that is learned, or an answer's first token that is not."""
    marked = listed(opened(chat_config(tmp_path / "a", ROWS, template=MARKED)))
    assert listed(opened(chat_config(tmp_path / "b", ROWS, template=CHATML))) == marked
    assert marked != listed(opened(chat_config(tmp_path / "c", ROWS, template=ENDS_AFTER_MARK)))  # a test that can fail


def test_every_shape_of_a_conversation_gives_the_same_example(tmp_path: Path) -> None:
    """ShareGPT's names, a system prompt in its column, prompt and completion in messages, parquet's empty fields."""
    import pyarrow
    import pyarrow.parquet

    wanted = listed(opened(chat_config(tmp_path / "messages", ROWS)))
    share = [{"conversations": [{"from": NAMES[m["role"]], "value": m["content"]} for m in turns]} for turns in TURNS]
    share[0] = {"system": "be brief", "conversations": share[0]["conversations"][1:]}
    assert listed(opened(chat_config(tmp_path / "share", share))) == wanted
    tables = tmp_path / "table"
    tables.mkdir()
    rows = [{"messages": [{**m, "tool_calls": None} for m in turns], "text": None} for turns in TURNS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tables / "rows.parquet")
    config = chat_config(tmp_path / "parquet", ROWS)
    config.path = str(tables)
    assert listed(opened(config)) == wanted
    split = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TURNS]
    given = listed(opened(chat_config(tmp_path / "split", split)))
    assert [ids for ids, _ in given] == [ids for ids, _ in wanted]
    assert given[1:] == wanted[1:]
    assert sum(given[0][1]) < sum(wanted[0][1])  # of two answers, that in the prompt is not learned
    last = listed(opened(chat_config(tmp_path / "last", ROWS, loss_on="completion")))
    assert last == given == listed(opened(chat_config(tmp_path / "both", split, loss_on="completion")))


def test_what_is_learned_is_what_loss_on_says(tmp_path: Path) -> None:
    """Prompts that are learned, an end that is not."""
    row = [{"messages": TURNS[0]}]
    answers = [" three  <|im_end|>\n", "two\n\n\U0001f642<|im_end|>\n"]
    assert texts_learned(chat_config(tmp_path / "1", row)) == ["".join(answers)]
    assert texts_learned(chat_config(tmp_path / "2", row, loss_on="completion")) == [answers[1]]
    (everything,) = texts_learned(chat_config(tmp_path / "3", row, loss_on="all"))
    assert everything.startswith("system\nbe brief")  # but for the first token
    assert everything.endswith(answers[1])
    text = [{"prompt": "one two", "completion": " three"}]
    for loss_on in ("assistant", "completion"):
        assert texts_learned(chat_config(tmp_path / loss_on, text, loss_on=loss_on, template=None)) == [
            " three<|endoftext|>"
        ]
    assert texts_learned(chat_config(tmp_path / "4", [{"text": "two one"}], loss_on="all")) == ["wo one<|endoftext|>"]


def test_a_system_prompt_is_put_before_conversations_without_one(tmp_path: Path) -> None:
    """Two of them in one, or none."""
    config = chat_config(tmp_path, ROWS[:2], system="sys", loss_on="all")
    found = texts_learned(config)
    assert found[0].startswith("system\nbe brief<|im_end|>")
    assert found[1].startswith("system\nsys<|im_end|>\n<|im_start|>user")


def test_tools_of_a_row_reach_the_template(tmp_path: Path) -> None:
    """Tools that a model is trained to call without having seen them."""
    template = "{{ tools | tojson }}{{ style }}" + CHATML
    row = {**ROWS[1], "tools": json.dumps([{"name": "add"}]), "chat_template_kwargs": {"style": "!"}}
    (found,) = listed(opened(chat_config(tmp_path, [row], template=template)))
    assert Tokenizer.from_path(tmp_path / "tokenizer").decode(found[0]).startswith('[{"name": "add"}]!<|im_start|>user')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "answer": "y"}, r"has the columns question, answer; give messages, conversations, prompt"),
        ({"messages": []}, "its messages holds no message"),
        ({"messages": "hi"}, "its messages is no list of messages"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role, but content"),
        (
            {"conversations": [{"from": "martian", "value": "x"}]},
            r"conversations\[0\] is from 'martian'; known are system",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "an answer in it is empty",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "none of its tokens carries a loss"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "refuses this conversation"),
        ({"prompt": "x", "completion": ""}, "its completion is empty"),
        (
            {"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]},
            "of prompt and completion one is text",
        ),
        ({"text": "x"}, "in which no answer stands apart; use data.conversations.loss_on=all"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "its tools are not JSON"),
        ([1], "it is no object but list"),
    ],
)
def test_a_bad_row_is_named_or_left_out_and_counted(row: Any, message: str, tmp_path: Path) -> None:
    """A dataset of which half was dropped silently."""
    rows = [ROWS[1], row, row, ROWS[2]]
    with pytest.raises(DataError, match=rf"rows.jsonl, line 2: .*{message}.*\(1 more rows are unusable\)"):
        opened(chat_config(tmp_path, rows))
    examples = opened(chat_config(tmp_path, rows, unusable="skip"))
    assert len(examples.corpus.starts) == 2
    assert list(examples.unusable.values()) == [2]
    assert list(examples.unusable) == list(examples.why)
    with pytest.raises(DataError, match=r"holds no row that an example can be made of: .*line 1"):
        opened(chat_config(tmp_path / "all", [row], unusable="skip"))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    """A traceback out of a parser."""
    config = chat_config(tmp_path, ROWS)
    with open(str(config.path), "a") as file:
        file.write("{oh\n")
    with pytest.raises(DataError, match=rf"line {len(ROWS) + 1}: it is not JSON"):
        opened(config)


def test_a_template_by_which_answers_cannot_be_told_is_refused(tmp_path: Path) -> None:
    """An answer without its thoughts, learned as if the model had seen them, or a mask at the wrong place."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "hm</think>y"}]
    rows = [{"messages": [*turns, *turns]}]
    with pytest.raises(DataError, match=r"a turn is not written as it was asked for .*generation.*line 1\)"):
        opened(chat_config(tmp_path, rows, template=FORGETS, unusable="skip"))
    assert texts_learned(chat_config(tmp_path / "last", rows, template=FORGETS, loss_on="completion")) == [
        "hm</think>y"
    ]
    nested = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
    with pytest.raises(DataError, match="a generation block within another"):
        opened(chat_config(tmp_path / "nested", ROWS, template=nested))
    measured = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}{{ x | length }}"
    with pytest.raises(DataError, match="changes what its generation blocks hold"):
        opened(chat_config(tmp_path / "measured", ROWS, template=measured))
    with pytest.raises(DataError, match=r"has no chat template \(chat_template.jinja, or"):
        opened(chat_config(tmp_path / "none", ROWS, template=None))


def test_another_template_makes_other_examples(tmp_path: Path) -> None:
    """Those of before, from the cache."""
    first = listed(opened(chat_config(tmp_path, ROWS)))
    own = tmp_path / "own.jinja"
    own.write_text(CHATML.replace("im_start", "im_end"))
    changed = listed(opened(chat_config(tmp_path, ROWS, template=CHATML)))
    assert changed == first
    config = chat_config(tmp_path, ROWS)
    config.conversations.template = str(own)
    assert listed(opened(config)) != first


def test_wrong_settings_are_one_line_each(tmp_path: Path) -> None:
    """A setting that is believed in and not read."""
    config = chat_config(tmp_path, ROWS, loss_on="user", too_long="cut", unusable="drop", template=CHATML)
    config.conversations.template = "nowhere.jinja"
    config.mask_documents = False
    found = problems(config)
    assert [line.partition("=")[0].partition(" is")[0] for line in found] == [
        "data.conversations.loss_on",
        "data.conversations.too_long",
        "data.conversations.unusable",
        "data.conversations.template",
        "data.mask_documents",
    ]
    assert problems(chat_config(tmp_path, ROWS)) == []
    config = chat_config(tmp_path, ROWS)
    config.path = str(chat_folder(tmp_path / "tokenizer") / "chat_template.jinja")
    assert problems(config) == [f"data.path={config.path}: cannot read .jinja files; .jsonl .parquet"]
