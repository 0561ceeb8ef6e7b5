"""Conversations of every shape, and a tokenizer with a chat template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from data.config import ConversationsConfig, DataConfig, TokenizerConfig
from data.tokenizer import train_bpe

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
MARKED = CHATML.replace(
    "{{- message.content + '<|im_end|>\\n' }}\n    {%- else",
    "{%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}\n    {%- else",
)
ENDS_AFTER_MARK = CHATML.replace(
    "{{- message.content + '<|im_end|>\\n' }}\n    {%- else",
    "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n    {%- else",
)
FORGETS = """\
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- set said = message.content %}
    {{- said.split('</think>') | last if message.role == 'assistant' and not loop.last else said }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""

TURNS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two?"},
        {"role": "assistant", "content": " three  "},
        {"role": "user", "content": "h\u00e9llo \u4f60\u597d"},
        {"role": "assistant", "content": "two\n\n\U0001f642"},
    ],
    [{"role": "user", "content": "two"}, {"role": "assistant", "content": "one <|im_end|> one"}],
    [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "\U0001f642\U0001f642"}],
    *(
        [
            {"role": "user", "content": f"{n} one two" * (n % 4 + 1)},
            {"role": "assistant", "content": f"three {n}" * (n % 3 + 1)},
        ]
        for n in range(9)
    ),
]


@cache
def _tokenizer_json() -> str:
    core = tokenizers.Tokenizer.from_str(train_bpe(iter(["one two three user assistant " * 9]), 290).to_json())
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    core.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)  # as those of Llama 3 and Qwen
    return core.to_str()


def chat_folder(path: Path, template: str | None = CHATML) -> Path:
    """A tokenizer's folder, of fewer than 300 ids."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tokenizer_json())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_config(
    tmp_path: Path, rows: list[dict[str, Any]], *, template: str | None = CHATML, **fields: Any
) -> DataConfig:
    """Over rows written below tmp_path; fields: of ConversationsConfig, but for `data`: more of DataConfig."""
    data = fields.pop("data", {})
    conversations = ConversationsConfig(**fields)
    return DataConfig(
        source="conversations",
        path=str(write_rows(tmp_path / "rows.jsonl", rows)),
        conversations=conversations,
        tokenizer=TokenizerConfig(path=str(chat_folder(tmp_path / "tokenizer", template))),
        mask_documents=data.pop("mask_documents", conversations.packing),
        validation_fraction=data.pop("validation_fraction", 0.0),
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
        **data,
    )
