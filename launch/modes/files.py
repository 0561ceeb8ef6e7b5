"""What modes read and write: prompts in, JSON out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.lab_config import LabConfig
from launch.open_model import OpenedModel
from trainer.config import ConfigError
from trainer.run_info import write_atomically


def write_json(config: LabConfig, report: dict[str, Any]) -> None:
    """One object to `out`, or to standard output."""
    text = json.dumps(report, indent=1) + "\n"
    if config.out is None:
        print(text, end="")
    else:
        write_atomically(Path(config.out), text)


def prompt_problems(config: LabConfig, *, needed: bool) -> list[str]:
    """Every reason why `prompts` and `prompt` cannot be used; one line each. needed: one of them must be given."""
    found = []
    if (config.prompts is not None and config.prompt is not None) or (
        needed and config.prompts is None and config.prompt is None
    ):
        found.append(
            "one of prompts=IN.jsonl and prompt=TEXT is needed" if needed else "give prompts or prompt, not both"
        )
    if config.prompts is not None and not Path(config.prompts).is_file():
        found.append(
            f"prompts={config.prompts} is no file; give JSON lines of {{'prompt': ...}} or {{'prompt_ids': ...}}"
        )
    return found


def out_problems(config: LabConfig) -> list[str]:
    """Every reason why `out` cannot be used; one line each."""
    return (
        [f"out={config.out} is a folder; give a file"] if config.out is not None and Path(config.out).is_dir() else []
    )


def length_problems(name: str, bounds: list[int]) -> list[str]:
    """What is wrong with a setting that says how long things are: [all] or [least, most]; one line each."""
    if len(bounds) in (1, 2) and 1 <= bounds[0] <= bounds[-1]:
        return []
    return [f"{name}={bounds} must be one length, such as [128], or least and most, such as [1,128]"]


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of prompts; empty lines are left out. Raises ConfigError naming the first wrong line."""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ConfigError([f"prompts={path}, line {number} is not JSON: {error}"]) from None
        if not isinstance(line, dict) or ("prompt" in line) == ("prompt_ids" in line):
            raise ConfigError([f"prompts={path}, line {number} must be an object with either prompt or prompt_ids"])
        ids = line.get("prompt_ids", [])
        if not isinstance(line.get("prompt", ""), str):
            raise ConfigError([f"prompts={path}, line {number}: prompt must be a string"])
        if not isinstance(line.get("adapter", ""), str | None):
            raise ConfigError([f"prompts={path}, line {number}: adapter must be a string"])
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ConfigError([f"prompts={path}, line {number}: prompt_ids must be a list of whole numbers"])
        yield line


def token_prompts(config: LabConfig, opened: OpenedModel) -> list[list[int]] | None:
    """`prompts` or `prompt` as tokens; None: neither is given. Raises ConfigError for what are none of the model."""
    if config.prompts is None and config.prompt is None:
        return None
    lines = [{"prompt": config.prompt}] if config.prompts is None else list(read_prompts(Path(config.prompts)))
    if opened.tokenizer is None and any("prompt" in line for line in lines):
        raise ConfigError([f"prompts of text need a tokenizer: {opened.no_tokenizer}"])
    found, vocab_size = [], opened.model.config.vocab_size
    for number, line in enumerate(lines):
        tokens = line.get("prompt_ids")
        if tokens is None:
            assert opened.tokenizer is not None
            beginning = opened.tokenizer.beginning if config.sampling.add_special_tokens else ()
            tokens = [*beginning, *opened.tokenizer.encode(line["prompt"])]
        if not tokens or not all(0 <= token < vocab_size for token in tokens):
            raise ConfigError([f"prompts[{number}] has no tokens, or some outside of the vocabulary of {vocab_size}"])
        found.append(list(tokens))
    if not found:
        raise ConfigError([f"prompts={config.prompts} has no lines"])
    return found
