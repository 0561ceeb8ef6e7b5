"""Hydra's errors in one readable line: the override, what is wrong with it, and what to write instead."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from trainer.config import TrainConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def explain(error: Exception, override: str | None = None, *, schema: type = TrainConfig) -> str:
    """One line for what composing a `schema` raised. override: the one that is wrong, if that is known."""
    if override is None:
        named = re.search(r"override (\S+=.*)", str(error))
        override = named.group(1) if named else None
    key = "" if override is None else override.partition("=")[0].lstrip("+~")
    line = _wrong_choice(error, key) or _wrong_key(error, key, schema)
    line = line or _wrong_value(error, key) or _wrong_form(error, key)
    # A parser says in which file and line it stopped, on lines of their own.
    line = line or (" ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else _first_line(error))
    return line if override is None or line.startswith(override) else f"{override}: {line}"


def no_such_key(key: str, schema: type = TrainConfig) -> str:
    """What to say about a key that nothing reads."""
    known = known_keys(OmegaConf.structured(schema))
    if inside := [name for name in known if name.startswith(f"{key}.")]:
        return f"{key} is not a value; set {', '.join(inside)}"
    close = difflib.get_close_matches(key, known, n=1)
    return f"there is no key {key}" + (f"; did you mean {close[0]}?" if close else "")


def known_keys(node: Any, prefix: str = "") -> list[str]:
    """Every key of a configuration, dotted."""
    keys = []
    for key in node:
        keys.append(f"{prefix}{key}")
        child = node._get_node(key)  # as it is written: an interpolation is not followed
        if isinstance(child, DictConfig) and not child._is_none():
            keys += known_keys(child, f"{prefix}{key}.")
    return keys


def mappings(node: Any, prefix: str = "") -> list[str]:
    """The keys of a configuration whose values are dictionaries of any keys, dotted."""
    found = []
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and OmegaConf.get_type(child) is dict:
            found.append(f"{prefix}{key}")
        elif isinstance(child, DictConfig) and not child._is_none():
            found += mappings(child, f"{prefix}{key}.")
    return found


def _wrong_choice(error: Exception, key: str) -> str | None:
    """A group, such as model=, that is set to something that is not one of its files."""
    missing = re.search(r"Could not (?:find|load) '([^']*)'", str(error))
    group = missing.group(1).rpartition("/")[0] if missing else key
    files = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")) if group else []
    if not files or not (missing or isinstance(error, (ValueError, TypeError))):
        return None
    problem = f"there is no configs/{missing.group(1)}.yaml" if missing else f"{group} is chosen by name"
    return f"{problem}; use one of {', '.join(files)}"


def _wrong_key(error: Exception, key: str, schema: type) -> str | None:
    unknown = re.search(r"Key '([^']*)' not in", str(error.__cause__))
    key = key or getattr(error.__cause__, "full_key", None) or ""
    if unknown and unknown.group(1) not in key.split("."):  # inside of a value: data.blend=[{wight: 1}]
        return f"{key} has no key {unknown.group(1)}"
    if unknown or "Could not override" in str(error) or "not in struct" in str(error):
        return no_such_key(key, schema)
    if "Could not append" in str(error) or "Multiple values for" in str(error):
        return f"{key} is there already; leave out the +"
    return None


def _wrong_value(error: Exception, key: str) -> str | None:
    cause = str(error.__cause__ or error)
    field = getattr(error.__cause__ or error, "full_key", None) or key
    if "Float" in cause:
        return f"{field} must be a number"
    if "Integer" in cause:
        return f"{field} must be a whole number"
    if "not a valid bool" in cause:
        return f"{field} must be true or false"
    if "is not a ListConfig" in cause:
        return f"{field} must be a list"
    if "not Optional" in cause or "missing mandatory value" in cause:
        return f"{field} must have a value"
    return None


def _wrong_form(error: Exception, key: str) -> str | None:
    text = str(error)
    if "Ambiguous value" in text:
        return "several values are a sweep, which needs --multirun; a list is written [a,b]"
    if "missing EQUAL" in text:
        return f"a value is missing; write {key}=VALUE"
    if "does not support deletion" in str(error.__cause__):
        return f"{key} cannot be removed; set it to a value"
    if type(error).__name__ == "OverrideParseException":
        return f"the value cannot be read; put it in quotes of its own, as in \"{key}='...'\""
    return None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
