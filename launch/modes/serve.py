"""mode=serve: an HTTP server that OpenAI's clients speak to (inference/server/)."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from inference.engine import Engine, RequestError
from inference.server.config import serve_problems
from launch.lab_config import LabConfig, chat_template_of, make_engine, open_served, sampling_of, say_what_computes
from trainer.config import ConfigError, configuration_errors

NEEDED = ("starlette", "uvicorn", "httptools", "prometheus_client", "jinja2")


def problems(config: LabConfig) -> list[str]:
    """Every reason why `serve` and the defaults of requests cannot be used; one line each."""
    found = serve_problems(config.serve, launched="TORCHELASTIC_RUN_ID" in os.environ)
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        found.append(f"mode=serve needs {', '.join(missing)}; pip install 'lattice-train[serve]'")
    found += [
        f"{name} is of mode=generate; requests come over HTTP" for name in ("prompts", "prompt", "out")
        if getattr(config, name) is not None
    ]  # fmt: skip
    if config.sampling.top_logprobs or config.sampling.prompt_logprobs:
        found.append(
            "sampling.top_logprobs and sampling.prompt_logprobs are no defaults; each request asks for its own"
        )
    return found


def serve(config: LabConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError before the model is read for a port that cannot be had."""
    from inference.server.service import Service, bind  # not everybody has what it needs

    with configuration_errors():
        listener = bind(config.serve)
    sampling = sampling_of(config)
    opened = open_served(config)
    engine = make_engine(opened, config.engine, config.speculation)
    _check_defaults(engine, config)
    assert config.model.path is not None
    name = config.serve.name or Path(config.model.path).expanduser().resolve().name
    if name in opened.adapters:
        raise ConfigError([f"model.adapters.{name} has the name of the model; give it another, or set serve.name"])
    template = chat_template_of(opened, config.model)
    if isinstance(template, Exception):
        print(f"no chat completions: {template}", file=sys.stderr)
    if opened.tokenizer is None:
        print(f"prompts must be token ids: {opened.no_tokenizer}", file=sys.stderr)
    say_what_computes(engine)
    service = Service(engine, config.serve, name=name, template=template, defaults=sampling)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    asyncio.run(service.run(listener, ready=lambda: print(f"serving {name} on http://{shown}:{port}/v1", flush=True)))


def _check_defaults(engine: Engine, config: LabConfig) -> None:
    """Raises ConfigError for defaults that no request could be served with."""
    try:
        with configuration_errors(RequestError):
            engine.prepare([0], replace(sampling_of(config), max_tokens=None))
    except ConfigError as error:
        raise ConfigError(
            [f"{problem} (of `sampling`, the defaults of requests)" for problem in error.problems]
        ) from None
