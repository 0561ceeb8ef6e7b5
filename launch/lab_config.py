"""The configuration of launch/lab.py, and what every mode begins with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.chat import ChatTemplate, ChatTemplateError, load_chat_template
from inference.config import EngineConfig, SamplingConfig, sampling_problems
from inference.engine import Engine
from inference.layout import ServingLayout, layout_problems
from inference.memory import gib
from inference.runner import num_ranks
from inference.server.config import ServeConfig
from inference.speculation.config import SpeculationConfig
from launch.lab_ranks import make_on_ranks, open_on_ranks, run_on_ranks
from launch.modes.config import BenchConfig, CompareConfig, EvalConfig, ParityConfig
from launch.open_model import LabModelConfig, OpenedModel, model_problems, open_model, open_random_model
from launch.open_speculation import drafting_problems, open_speculation, say_how_drafts_fared
from models.invariant import make_batch_invariant
from parallel.mesh import world_size_from_env
from trainer.config import ConfigError, configuration_errors

DEVICES = ("auto", "cuda", "cpu")
WITH_ADAPTERS = ("generate", "serve")
"""Modes whose requests say which adapter they are for."""


@dataclass
class ChatConfig:
    """`chat`."""

    system: str | None = None  # what the system says before everything


@dataclass
class LabConfig:
    """The whole configuration; what its parts mean is beside them, and in configs/lab.yaml."""

    mode: str = "generate"  # one of launch/lab.py's MODES
    device: str = "auto"  # auto (cuda where there is one), cuda, cpu
    prompts: str | None = None  # a file of JSON lines
    prompt: str | None = None  # or one prompt
    out: str | None = None  # a file of JSON lines; None: standard output
    model: LabModelConfig = field(default_factory=LabModelConfig)
    parallel: ServingLayout = field(default_factory=ServingLayout)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)


def common_problems(config: LabConfig) -> list[str]:
    """What no mode can work with and what no model is needed to see; one line each."""
    found = []
    if config.device not in DEVICES:
        found.append(f"device={config.device} is unknown; use {', '.join(DEVICES)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        found.append("device=cuda, but torch sees no CUDA device; use device=cpu or auto")
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device_of(config.device).type == "cuda" and on_node > torch.cuda.device_count():
        found.append(
            f"{on_node} processes were started on this node, which has {torch.cuda.device_count()} CUDA devices; use "
            f"torchrun --nproc-per-node {torch.cuda.device_count()}, or device=cpu"
        )
    found += layout_problems(config.parallel, world_size=world_size_from_env())
    needed = config.mode != "compare" and (config.mode != "bench" or config.bench.random_weights is None)
    found += model_problems(config.model, needed=needed) + sampling_problems(config.sampling)
    if config.model.adapters and config.mode not in WITH_ADAPTERS:
        modes = " and ".join(WITH_ADAPTERS)
        found.append(f"model.adapters is of mode={modes}, whose requests name one; mode={config.mode} serves the model")
    return found + drafting_problems(config.speculation, config.model)


def sampling_of(config: LabConfig) -> SamplingConfig:
    """`sampling`, with the texts of files that json_schema=@FILE and grammar=@FILE name. Raises ConfigError."""
    texts: dict[str, Any] = {}
    for name in ("json_schema", "grammar"):
        value = getattr(config.sampling, name)
        if value is not None and value.startswith("@"):
            try:
                texts[name] = Path(value[1:]).expanduser().read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError([f"sampling.{name}={value}: the file cannot be read ({error})"]) from None
    return replace(config.sampling, **texts)


def chat_template_of(opened: OpenedModel, config: LabModelConfig) -> ChatTemplate | ChatTemplateError:
    """The chat template of a model, or why there is none. Raises ConfigError for a file that was named and is none."""
    folder = None if opened.tokenizer is None else opened.tokenizer.folder
    file = None if config.chat_template is None else Path(config.chat_template).expanduser()
    try:
        return load_chat_template(folder, file=file)
    except ChatTemplateError as error:
        if file is not None:
            raise ConfigError([f"model.chat_template={file}: {error}"]) from None
        return error


def device_of(requested: str) -> torch.device:
    """This process's device, that LabConfig.device stands for."""
    cuda = requested == "cuda" or (requested == "auto" and torch.cuda.is_available())
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def run_mode(mode: Callable[[LabConfig], None], config: LabConfig) -> None:
    """Run a mode, on rank 0 where several processes were started. Raises ConfigError."""
    if world_size_from_env() == 1:
        mode(config)
        return
    shape = config.bench.random_weights if config.mode == "bench" else None
    device = device_of(config.device)
    run_on_ranks(lambda: mode(config), config.parallel, config.model, config.engine, device, shape=shape)


def open_served(config: LabConfig, shape: str | None = None) -> OpenedModel:
    """The model of a configuration, on all ranks together, or one of that shape with random weights.

    Raises ConfigError for a path that holds none.
    """
    if world_size_from_env() > 1:
        return open_on_ranks(config.model, shape)
    if shape is not None:
        return open_random_model(shape, config.model.dtype, device_of(config.device))
    return open_model(config.model, device_of(config.device))


def prepare(opened: OpenedModel, config: EngineConfig) -> None:
    """Make the model what engine.deterministic asks for. Raises ConfigError where it cannot be."""
    if config.deterministic:
        with configuration_errors():
            make_batch_invariant(opened.model)


def make_engine(opened: OpenedModel, config: EngineConfig, speculation: SpeculationConfig) -> Engine:
    """An engine for a model from `open_served`. Raises ConfigError for what it refuses."""
    if world_size_from_env() > 1:
        return make_on_ranks(opened, config, speculation)
    prepare(opened, config)
    drafting = open_speculation(opened, speculation)
    with configuration_errors():
        return Engine(
            opened.model,
            config,
            tokenizer=opened.tokenizer,
            eos_ids=opened.eos_ids,
            speculation=drafting,
            adapters=opened.adapters,
        )


def say_what_computes(engine: Engine) -> None:
    """On stderr, for whoever wonders about speed or last bits."""
    invariant = ", batch-invariant" if engine.runner.model.batch_invariant else ""
    cache = "" if engine.config.cache_dtype == "auto" else f", in {engine.config.cache_dtype}"
    print(f"attention over the cache: {engine.runner.attention}{cache}{invariant}", file=sys.stderr)
    runner, size = engine.runner, engine.config.block_size
    held = gib(runner.num_blocks * size * runner.cache_bytes_per_token)
    print(
        f"cache: {runner.num_blocks} blocks of {size} tokens, {held} GiB; {runner.memory.describe()}", file=sys.stderr
    )
    if engine.warmed_up is not None:
        graphs, seconds = engine.warmed_up
        print(f"warm-up: {graphs} graphs in {seconds:.1f} s", file=sys.stderr)
    for warning in doubts(engine):
        print(f"note: {warning}", file=sys.stderr)
    say_how_drafts_fared(engine)


def doubts(engine: Engine) -> list[str]:
    """What can be served and is perhaps not meant; one line each."""
    found = []
    model, words = engine.runner.model.config, None if engine.tokenizer is None else engine.tokenizer.vocab_size
    if words is not None and words > model.vocab_size:
        found.append(
            f"the tokenizer has {words} tokens and the model {model.vocab_size}: text that needs others is refused; "
            "if that is much, set model.tokenizer to the one that the model was trained with"
        )
    if engine.runner.max_seq_len > model.max_seq_len:
        found.append(
            f"engine.max_seq_len={engine.runner.max_seq_len} is beyond the {model.max_seq_len} tokens that the model "
            "was made for"
        )
    graphs = engine.config.cuda_graphs is not False and engine.runner.device.type == "cuda"
    if graphs and num_ranks(engine.runner.model) > 1:
        found.append("over several ranks steps are launched operation by operation: CUDA graphs are of one process")
    return found
