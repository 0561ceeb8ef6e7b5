"""Preferences of every shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.config import DataConfig
from tests.data.conversing import CHATML, chat_config


def said(role: str, content: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def pairs(count: int = 9) -> list[dict[str, Any]]:
    """Rows of answers of very different lengths: text, messages, and messages without a prompt; some with a margin."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        question, good, bad = f"{n} one two" * (n % 4 + 1), f" three {n}" * (n % 3 + 1), f" two{n}" * ((n + 1) % 4 + 1)
        if n % 3 == 0:
            rows.append({"prompt": question, "chosen": good, "rejected": bad})
            continue
        asked, chosen, rejected = said("user", question), said("assistant", good), said("assistant", bad)
        if n % 3 == 1:
            rows.append({"prompt": asked, "chosen": chosen, "rejected": rejected, "margin": 0.1 * n})
        else:
            rows.append({"chosen": asked + chosen, "rejected": asked + rejected})
    return rows


def preference_config(
    tmp_path: Path, rows: list[dict[str, Any]], *, template: str | None = CHATML, **fields: Any
) -> DataConfig:
    """As `chat_config`."""
    config = chat_config(tmp_path, rows, template=template, **fields)
    config.source = "preferences"
    config.mask_documents = True
    return config
