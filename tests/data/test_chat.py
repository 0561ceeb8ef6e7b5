"""Conversations as transformers renders them, by templates written the ways that models' are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from data.chat import ChatTemplate, ChatTemplateError, load_chat_template
from tests.inference.serving import text_tokenizer

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
BLOCKS = """\
{{ bos_token }}
{% set ns = namespace(seen=0) %}
{% for message in messages %}
    {% if message['role'] == 'system' and not loop.first %}
        {{ raise_exception('The system speaks first') }}
    {% endif %}
  {% if message['role'] == 'skip' %}{% continue %}{% endif %}
[{{ message['role'] | upper }}] {{ message['content'] | trim }}{{ eos_token if message['role'] == 'assistant' }}
    {% set ns.seen = ns.seen + 1 %}
{% endfor %}
{{ ns.seen }}{% if add_generation_prompt %}[ASSISTANT]{% endif %}
"""
STRUCTURED = """\
{% for message in messages %}{% generation %}{% set inner = 1 %}{{ message | tojson }}{% endgeneration %}{{ inner }}
{{ message.content | tojson(indent=2) }}{% if tools is none %} no tools{% endif %}{{ pad_token }}{{ unknown }}
{% endfor %}
{% for word in messages[0].content.split(' ') %}{% if word == 'b' %}{% break %}{% endif %}{{ word }}{% endfor %}
"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "a b c"}],
    [
        {"role": "system", "content": "  be <b>brief</b> & 'good' "},
        {"role": "user", "content": "h\u00e9llo\n\n\u4f60\u597d {{ messages }} {% if %}"},
        {"role": "assistant", "content": "yes", "tool_calls": None},
        {"role": "skip", "content": "x"},
        {"role": "user", "content": "again", "name": "ann"},
    ],
]


@pytest.mark.parametrize("where", ["file", "config", "named"])
@pytest.mark.parametrize("source", [CHATML, BLOCKS, STRUCTURED], ids=["chatml", "blocks", "structured"])
def test_conversations_are_rendered_as_by_transformers(source: str, where: str, tmp_path: Path) -> None:
    """Blanks that Jinja leaves, special tokens, HTML that is escaped, content taken for a template."""
    text_tokenizer().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"pad_token": {"content": "<|endoftext|>", "__type": "AddedToken"}, "bos_token": "<|endoftext|>"}
    if where == "config":
        config["chat_template"] = source
    if where == "named":
        config["chat_template"] = [{"name": "other", "template": "x"}, {"name": "default", "template": source}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_chat_template(tmp_path)
    for conversation in CONVERSATIONS:
        for variables in ({}, {"enable_thinking": False}):
            for prompted in (True, False):
                wanted = theirs.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=prompted, **variables
                )
                assert ours.render(conversation, add_generation_prompt=prompted, **variables) == wanted
        ids = theirs.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        assert text_tokenizer().encode(ours.render(conversation)) == ids


def test_what_a_template_refuses_is_an_error_with_its_words() -> None:
    """Its exception as one of the server; a field that is not there rendered as nothing in a sum."""
    with pytest.raises(ChatTemplateError, match="refuses this conversation: The system speaks first"):
        ChatTemplate(BLOCKS, {}).render([*CONVERSATIONS[0], {"role": "system", "content": "x"}])
    with pytest.raises(ChatTemplateError, match="refuses this conversation"):
        ChatTemplate(CHATML, {}).render([{"role": "user"}])
    with pytest.raises(ChatTemplateError, match="the chat template is wrong: "):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"],
)
def test_a_template_reaches_nothing_but_the_conversation(attack: str) -> None:
    """Code of a model's folder that runs when it is served."""
    try:
        rendered = ChatTemplate(attack, {}).render(CONVERSATIONS[0])
    except ChatTemplateError:
        return
    assert rendered == ""


def test_a_folder_without_a_template_says_so(tmp_path: Path) -> None:
    """An answer by a template that nobody trained with."""
    text_tokenizer().save(tmp_path)
    with pytest.raises(ChatTemplateError, match=r"has no chat template \(chat_template.jinja, or"):
        load_chat_template(tmp_path)
    with pytest.raises(ChatTemplateError, match="not read from a folder"):
        load_chat_template(None)
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}!")
    assert load_chat_template(tmp_path, file=own).render(CONVERSATIONS[0]) == "<|endoftext|>!"
