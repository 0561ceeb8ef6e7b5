"""mode=eval: perplexity of a text, or tasks of EleutherAI's lm-evaluation-harness.

One JSON object goes to `out` or standard output, a line or the harness's table to stderr.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import ChatTemplateError
from data.tokenizer import Tokenizer
from inference.config import EngineConfig, longest
from inference.engine import Engine
from inference.scoring import likelihood
from launch.lab_config import LabConfig, chat_template_of, make_engine, open_served, say_what_computes
from launch.modes.files import out_problems, write_json
from launch.open_model import OpenedModel
from models.config import ModelConfig
from trainer.config import ConfigError, configuration_errors

_OF_TASKS = ("tasks_path", "num_fewshot", "limit")
_OF_TEXT = ("window", "stride")


def problems(config: LabConfig) -> list[str]:
    """Every reason why these settings cannot be used that no model is needed to see; one line each."""
    settings, found = config.eval, []
    if (settings.text is None) == (not settings.tasks):
        found.append("one of eval.text=FILE (perplexity) and eval.tasks=[NAME,...] (lm-evaluation-harness) is needed")
    elif settings.text is None:
        found += [f"eval.{name} is of eval.text, which is not there" for name in _OF_TEXT if getattr(settings, name)]
        if not harness_is_there():
            found.append("eval.tasks needs lm-eval; pip install 'lattice-train[eval]'")
    else:
        found += [f"eval.{name} is of eval.tasks, which are not there" for name in _OF_TASKS if getattr(settings, name)]
    for name, least in (("window", 2), ("stride", 1), ("num_fewshot", 0), ("limit", 1), ("max_gen_toks", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            found.append(f"eval.{name}={value} must be at least {least}, or null")
    if settings.window is not None and settings.stride is not None and settings.stride > settings.window:
        found.append(
            f"eval.stride={settings.stride} leaves tokens out between windows of eval.window={settings.window}; use at "
            f"most {settings.window}"
        )
    if settings.text is not None and not Path(settings.text).expanduser().is_file():
        found.append(f"eval.text={settings.text} is no file; give a text in UTF-8, or tokens as .npy")
    if settings.tasks_path is not None and not Path(settings.tasks_path).expanduser().is_dir():
        found.append(f"eval.tasks_path={settings.tasks_path} is no folder; give one with tasks in YAML")
    found += [
        f"{name} is of mode=generate; mode=eval reads eval.text or eval.tasks" for name in ("prompts", "prompt")
        if getattr(config, name) is not None
    ]  # fmt: skip
    return found + out_problems(config)


def evaluate(config: LabConfig) -> None:
    """Measure. Raises ConfigError for a text or a task that cannot be used with this model."""
    opened = open_served(config)
    began = time.perf_counter()
    report = _perplexity(config, opened) if config.eval.text is not None else _tasks(config, opened)
    model = {
        "model": config.model.path,
        "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - began,
    }
    write_json(config, report | model)


def harness_is_there() -> bool:
    """Whether lm-eval is installed."""
    return importlib.util.find_spec("lm_eval") is not None


# ---- perplexity


def _perplexity(config: LabConfig, opened: OpenedModel) -> dict[str, Any]:
    settings = config.eval
    tokens, num_bytes = _read_text(config, opened)
    window = settings.window or _room(config.engine, opened.model.config, behind=1)
    stride = settings.stride or window // 2
    if stride > window:
        raise ConfigError([f"eval.stride={stride} leaves tokens out between windows of {window}; use at most {window}"])
    engine = _engine(config, opened, min(window, len(tokens)) + 1)
    with configuration_errors():
        found = likelihood(engine, tokens, window=window, stride=stride)
    report: dict[str, Any] = {
        "text": settings.text,
        "tokens": len(tokens),
        "scored_tokens": len(found.scored),
        "window": window,
        "stride": stride,
        "nll": found.nll,
        "perplexity": found.perplexity,
        "bits_per_byte": None,
        "bytes": None,
    }
    said = f"perplexity {found.perplexity:.4f} over {len(found.scored)} tokens (windows of {window}, stride {stride})"
    if num_bytes is not None:
        assert isinstance(opened.tokenizer, Tokenizer)
        scored = set(found.scored)
        missing = [token for place, token in enumerate(tokens) if place not in scored]
        # A token that begins the document is none of the text's.
        lost = sum(len(opened.tokenizer.token_bytes(t)) for t in missing if t != opened.tokenizer.bos_id)
        report["bytes"] = num_bytes - lost
        report["bits_per_byte"] = found.bits_per_byte(report["bytes"])
        said += f", {report['bits_per_byte']:.4f} bits per byte"
    print(said, file=sys.stderr)
    return report


def _read_text(config: LabConfig, opened: OpenedModel) -> tuple[list[int], int | None]:
    """Tokens, and how many bytes of text they are; None: only the tokens are known. Raises ConfigError."""
    path, vocab_size = Path(config.eval.text or "").expanduser(), opened.model.config.vocab_size
    num_bytes = None
    if path.suffix == ".npy":
        try:
            array = np.load(path)
        except ValueError as error:
            raise ConfigError([f"eval.text={path} is no array of NumPy ({error})"]) from None
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ConfigError([
                f"eval.text={path} has shape {array.shape} of {array.dtype}; tokens are one dimension of whole numbers"
            ])  # fmt: skip
        tokens = array.tolist()
    else:
        if opened.tokenizer is None:
            raise ConfigError([f"eval.text={path} is text and needs a tokenizer: {opened.no_tokenizer}"])
        try:
            text = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise ConfigError([f"eval.text={path} is not UTF-8 ({error}); give a text, or tokens as .npy"]) from None
        tokens, num_bytes = opened.tokenizer.encode(text), len(text.encode())
        if config.eval.bos and opened.tokenizer.bos_id is not None:
            tokens = [opened.tokenizer.bos_id, *tokens]
    if len(tokens) < 2:
        raise ConfigError([f"eval.text={path} has {len(tokens)} tokens; the first has no context, so 2 are needed"])
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise ConfigError([
            f"eval.text={path} has the token {outside[0]}, outside of the model's vocabulary of {vocab_size}; use the "
            "tokenizer that the model was trained with"
        ])  # fmt: skip
    return tokens, num_bytes


def _room(engine: EngineConfig, model: ModelConfig, *, behind: int) -> int:
    """Tokens of a window: all that the model was made for, unless engine.max_seq_len, or positions that end there,
    leave no room for the `behind` places that the engine keeps behind a prompt."""
    most = longest(engine, model)
    ends = engine.max_seq_len is not None or model.positions == "learned" or model.rope.scaling == "ntk"
    return most - behind if ends else most


def _engine(config: LabConfig, opened: OpenedModel, length: int) -> Engine:
    """Raises ConfigError where sequences of that length do not fit."""
    settings = config.engine
    if settings.max_seq_len is not None and settings.max_seq_len < length:
        raise ConfigError([
            f"windows of {length - 1} tokens and the place behind them do not fit into engine.max_seq_len="
            f"{settings.max_seq_len}; use eval.window={settings.max_seq_len - 1} or less"
        ])  # fmt: skip
    engine = make_engine(opened, replace(settings, max_seq_len=length), config.speculation)
    say_what_computes(engine)
    return engine


# ---- tasks


def _tasks(config: LabConfig, opened: OpenedModel) -> dict[str, Any]:
    """What the harness reports, without the samples. Raises ConfigError for a task that it does not know."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from inference.harness import EngineLM, prefix_of

    settings = config.eval
    if opened.tokenizer is None:
        raise ConfigError([f"eval.tasks give text and need a tokenizer: {opened.no_tokenizer}"])
    template = chat_template_of(opened, config.model)
    if settings.apply_chat_template and isinstance(template, ChatTemplateError):
        raise ConfigError([f"eval.apply_chat_template=true, but {template}; set model.chat_template to a Jinja file"])
    own = None if settings.tasks_path is None else str(Path(settings.tasks_path).expanduser())
    manager = TaskManager(include_path=own)
    if unknown := [name for name in settings.tasks if not manager.match_tasks([name])]:
        raise ConfigError([f"eval.tasks={unknown} are unknown to lm-eval {lm_eval.__version__}; see lm-eval ls tasks"])
    engine = _engine(config, opened, _room(config.engine, opened.model.config, behind=2) + 2)
    model = EngineLM(
        engine,
        prefix_id=prefix_of(opened.tokenizer),
        template=None if isinstance(template, ChatTemplateError) else template,
        max_gen_toks=settings.max_gen_toks,
    )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=settings.apply_chat_template,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=settings.bootstrap_iters,
    )
    print(make_table(results), file=sys.stderr)
    kept = {name: results[name] for name in ("results", "groups", "versions", "n-shot", "n-samples") if name in results}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return {"lm_eval": lm_eval.__version__, "limit": settings.limit} | plain
