"""The inference lab: `python launch/lab.py mode=generate model.path=DIR prompts=IN.jsonl out=OUT.jsonl`.

A line of IN is {"prompt": TEXT} or {"prompt_ids": [...]}; what else is in it goes into its line of OUT, which has
token_ids, text, logprobs and finish_reason. Exit codes: 0 done; 2 configuration error; 1 anything else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

import torch

from inference.config import EngineConfig, SamplingConfig, sampling_problems
from inference.engine import Engine, Prompt, RequestError
from inference.sequence import Completion
from launch.compose import Program, run_program
from launch.errors import exit_code_of
from launch.open_model import LabModelConfig, model_problems, open_model
from parallel.mesh import world_size_from_env
from trainer.config import ConfigError, configuration_errors
from trainer.run_info import write_atomically

MODES = ("generate",)


@dataclass
class LabConfig:
    """The whole configuration; what its parts mean is beside them, and in configs/lab.yaml."""

    mode: str = "generate"  # one of MODES
    device: str = "auto"  # auto (cuda where there is one), cuda, cpu
    prompts: str | None = None  # a file of JSON lines
    prompt: str | None = None  # or one prompt
    out: str | None = None  # a file of JSON lines; None: standard output
    model: LabModelConfig = field(default_factory=LabModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def _no_sweeps(config: LabConfig, name: str) -> None:
    raise ConfigError(["--multirun is for training; run launch/lab.py once for each point"])


LAB = Program("lab", LabConfig, _no_sweeps)


def lab(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    run_program(LAB, arguments, generate)


def generate(config: LabConfig) -> None:
    """Continue prompts. Raises ConfigError before anything is computed for whatever cannot be."""
    found = problems(config)
    if found:
        raise ConfigError(found)
    one: dict[str, Any] = {"prompt": config.prompt}
    lines = [one] if config.prompts is None else list(read_prompts(Path(config.prompts)))
    opened = open_model(config.model, _device(config.device))
    if opened.tokenizer is None and (any("prompt" in line for line in lines) or config.sampling.stop):
        raise ConfigError([f"prompts of text and sampling.stop need a tokenizer: {opened.no_tokenizer}"])
    with configuration_errors():
        engine = Engine(opened.model, config.engine, tokenizer=opened.tokenizer, eos_ids=opened.eos_ids)
    requests: list[Prompt] = [line["prompt"] if "prompt" in line else line["prompt_ids"] for line in lines]
    started = time.perf_counter()
    with configuration_errors(RequestError):
        completions = engine.generate(requests, config.sampling)
    seconds = time.perf_counter() - started
    print(f"attention over the cache: {engine.runner.attention}", file=sys.stderr)
    text = "".join(json.dumps(_line_out(*both)) + "\n" for both in zip(lines, completions, strict=True))
    if config.out is None:
        print(text, end="")
        return
    write_atomically(Path(config.out), text)
    tokens = sum(len(completion.token_ids) for completion in completions)
    print(
        f"{len(lines)} prompts continued by {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f}/s): {config.out}"
    )


def problems(config: LabConfig) -> list[str]:
    """Every reason why this cannot be done that needs no model to be seen; one line each."""
    found = [] if config.mode in MODES else [f"mode={config.mode} is unknown; use {', '.join(MODES)}"]
    if config.device not in ("auto", "cpu", "cuda"):
        found.append(f"device={config.device} is unknown; use auto, cuda or cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        found.append("device=cuda, but torch sees no CUDA device; use device=cpu or auto")
    if world_size_from_env() > 1:
        found.append(f"launch/lab.py was started as {world_size_from_env()} processes and runs in one; use python")
    if (config.prompts is None) == (config.prompt is None):
        found.append("one of prompts=IN.jsonl and prompt=TEXT is needed")
    if config.prompts is not None and not Path(config.prompts).is_file():
        found.append(
            f"prompts={config.prompts} is no file; give JSON lines of {{'prompt': ...}} or {{'prompt_ids': ...}}"
        )
    if config.out is not None and Path(config.out).is_dir():
        found.append(f"out={config.out} is a folder; give a file")
    return found + model_problems(config.model) + sampling_problems(config.sampling)


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
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ConfigError([f"prompts={path}, line {number}: prompt_ids must be a list of whole numbers"])
        yield line


def _line_out(line: dict[str, Any], completion: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }
    if completion.prompt_logprobs is not None:
        found["prompt_logprobs"] = completion.prompt_logprobs
    if completion.top_logprobs:
        found["top_logprobs"] = completion.top_logprobs
    return line | found


def _device(requested: str) -> torch.device:
    cuda = requested == "cuda" or (requested == "auto" and torch.cuda.is_available())
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


if __name__ == "__main__":
    sys.exit(exit_code_of(lab, sys.argv[1:]))
