"""Secrets, kept out of what a run writes: run.json, config.yaml, events, wandb's configuration, messages.

A secret is known by the key it stands under, by its place in a URL, by its form (tokens of Hugging Face and GitHub), or
because a variable of the environment with a secret's name has that value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
SHORTEST = 8
"""Characters of a value in the environment that is looked for in texts: shorter ones may be words."""

# A key with secret, password or credential anywhere, or token, key, pass, pat or jwt at its end: `hub.token`, `apiKey`,
# `DB_PASS`, but not `tokenizer.path`, `num_key_value_heads`, `bypass`, or a tokenizer's `eos_token`. In the plural only
# behind another word (`HF_TOKENS`), which must not be one that counts or sorts tokens of texts: `sample_tokens`.
_MARKS = r"(?:bos|eos|pad|unk|sep|cls|mask)_token"
_COUNTED = (
    r"(?:(?:\w*_)?(?:max|min|num|total)_(?:\w+_)?|(?:\w*_)?(?:sample|completion|valid|prompt|new|batch|batched|cached|block"
    r"|input|output|generated|accepted|drafted|draft|learned|train|trained|special|added|extra|suppress|stop|sort|missing"
    r"|unexpected)_)(?:tokens|keys)"
)
_SECRET = (
    rf"(?<![\w.+~-])(?!(?:[\w.+~-]*[.+~-])?(?:{_MARKS}|{_COUNTED})(?![\w.+~-]))"
    r"(?:[\w.+~-]*(?:(?:secret|passw|passphrase|credential)[\w.-]*|token|key|[._-]pwd|authorization|[._-]tokens|[._-]keys)"
    r"|(?:[\w.+~-]*[._+~-])?(?:pass|pat|jwt))"
)
_SECRET_KEY = re.compile(_SECRET, re.IGNORECASE)
_ASSIGNMENT = re.compile(
    rf"""((?P<name>{_SECRET})["']?\s*[=:]\s*)(?P<value>"[^"]*"|'[^']*'|[^\s,{{}}\[\]]+)""", re.IGNORECASE
)
# Up to the last @ before the path: a password may hold one.
_URL_USER = re.compile(r"(\w://)[^/\s\"'<>]+@")
_URL_QUERY = re.compile(
    r"([?&;][\w.-]*(?:secret|passw|credential|signature|token|key|sig|pwd|jwt)[\w.-]*=)[^&;#\s\"']+", re.IGNORECASE
)
_BEARER = re.compile(r"\b((?:Authorization:\s*\w+|Bearer)\s+)[\w.~+/=-]{16,}", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[\d._]+(?:e[-+]?\d+)?|true|false|null|none", re.IGNORECASE)
_KNOWN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,})")


def is_secret(name: str, value: object = "") -> bool:
    """Whether a configuration key or option, such as `hub.api_key` or `--token`, names a secret.

    value: what stands under it, where that is known. A number, or yes or no, under tokens or keys is none.
    """
    count = name.lower().endswith(("tokens", "keys")) and _NUMBER.fullmatch(str(value)) is not None
    return _SECRET_KEY.fullmatch(name) is not None and not count


def mask_text(text: str) -> str:
    """A text for people with what is certainly a secret in it replaced by MASK.

    Nothing is taken for one by what stands before it, as in `token=7`: texts speak of tokens.
    """
    text = _URL_QUERY.sub(rf"\1{MASK}", _URL_USER.sub(rf"\1{MASK}@", text))
    text = _KNOWN.sub(MASK, _BEARER.sub(rf"\1{MASK}", text))
    for value in _of_environment():
        text = text.replace(value, MASK)
    return text


def mask_argv(argv: Sequence[str]) -> list[str]:
    """A command line with secret values replaced by MASK: key=value, --key=value, --key value, {key: value}, URLs."""
    masked = []
    hide_next = False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if hide_next:
            masked.append(MASK)
        elif equals and is_secret(name, value):
            masked.append(f"{name}={MASK}")
        else:
            masked.append(mask_text(_ASSIGNMENT.sub(_hide, argument)))
        hide_next = not hide_next and argument.startswith("-") and not equals and is_secret(argument)
    return masked


def _hide(match: re.Match[str]) -> str:
    """Of an assignment its name alone."""
    return match[1] + MASK if is_secret(match["name"], match["value"]) else match[0]


def mask_secrets(value: Any, name: str = "") -> Any:
    """A configuration of dicts and lists with the values of secret keys, and secrets in texts, replaced by MASK."""
    if value is not None and is_secret(name, value):
        return MASK
    if isinstance(value, Mapping):
        return {key: mask_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(item) for item in value]
    return mask_text(value) if isinstance(value, str) else value


def _of_environment() -> list[str]:
    """Values of WANDB_API_KEY, HF_TOKEN and the like, the longest first: one may be a part of another."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and is_secret(name, value)}
    found = {value for value in found if not os.path.isabs(value) or not os.path.exists(value)}  # where a key is
    return sorted(found, key=len, reverse=True)
