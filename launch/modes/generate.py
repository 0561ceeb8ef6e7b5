"""mode=generate: prompts in, completions out, as JSON lines.

A line of IN is {"prompt": TEXT} or {"prompt_ids": [...]}, with "adapter": NAME where one of model.adapters is to answer
it; what else is in it goes into its line of OUT, which has token_ids, text, logprobs and finish_reason.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.engine import Prompt, RequestError
from inference.sequence import Completion
from launch.lab_config import LabConfig, make_engine, open_served, sampling_of, say_what_computes
from launch.modes.files import out_problems, prompt_problems, read_prompts
from trainer.config import ConfigError, configuration_errors
from trainer.run_info import write_atomically


def generate(config: LabConfig) -> None:
    """Continue prompts. Raises ConfigError before anything is computed for whatever cannot be."""
    one: dict[str, Any] = {"prompt": config.prompt}
    lines = [one] if config.prompts is None else list(read_prompts(Path(config.prompts)))
    sampling = sampling_of(config)
    opened = open_served(config)
    if opened.tokenizer is None and (any("prompt" in line for line in lines) or config.sampling.stop):
        raise ConfigError([f"prompts of text and sampling.stop need a tokenizer: {opened.no_tokenizer}"])
    engine = make_engine(opened, config.engine, config.speculation)
    requests: list[Prompt] = [line["prompt"] if "prompt" in line else line["prompt_ids"] for line in lines]
    started = time.perf_counter()
    with configuration_errors(RequestError):
        completions = engine.generate(requests, sampling, [line.get("adapter") for line in lines])
    seconds = time.perf_counter() - started
    say_what_computes(engine)
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
    """Every reason why `prompts`, `prompt` and `out` cannot be used; one line each."""
    return prompt_problems(config, needed=True) + out_problems(config)


def _line_out(line: dict[str, Any], completion: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }
    if completion.error is not None:
        found["error"] = completion.error
    if completion.prompt_logprobs is not None:
        found["prompt_logprobs"] = completion.prompt_logprobs
    if completion.top_logprobs:
        found["top_logprobs"] = completion.top_logprobs
    if completion.speculation is not None:
        drafts = completion.speculation
        found["speculation"] = asdict(drafts) | {"acceptance": drafts.acceptance, "mean_length": drafts.mean_length}
    return line | found
