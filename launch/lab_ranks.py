"""A mode of the lab on several processes: rank 0 runs it, the others do what it needs of them.

A mode need not know: it gets its model from `open_served` and engines from `make_engine`, which tell the other ranks.
They open the same model, each its part, make the same engines, and follow their steps (inference/ranks.py). One that
wants more of them than an engine's steps says so with `call_on_ranks`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from inference.config import EngineConfig, engine_problems
from inference.engine import Engine
from inference.layout import ServingLayout, serving_groups
from inference.ranks import Channel, Orders, RankError, lost_ranks_named
from inference.speculation.config import SpeculationConfig
from launch.open_model import (
    LabModelConfig,
    OpenedModel,
    model_config_of,
    open_model,
    open_random_model,
    shape_config,
)
from launch.open_speculation import open_speculation
from models.config import ModelConfig
from parallel.dims import divisors
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.mesh import init_distributed
from parallel.problem import Problem, values
from trainer.agreement import check_same_on_all_ranks, describe
from trainer.config import ConfigError, configuration_errors
from trainer.validate_tensor import problems_of_model

T = TypeVar("T")


class Crew(NamedTuple):
    """The processes that serve together, as one of them sees them."""

    channel: Channel
    groups: ModelParallel
    device: torch.device
    models: list[OpenedModel]  # opened so far, in the same order on all of them
    engines: list[Engine]


@dataclass
class _Open:
    model: LabModelConfig
    shape: str | None = None  # of random weights, in place of a model.path
    whole: bool = False


@dataclass
class _Make:
    model: int  # number in Crew.models
    engine: EngineConfig
    speculation: SpeculationConfig


@dataclass
class _Call:
    model: int  # number in Crew.models
    function: Callable[..., Any]  # of a module, which travels by its name
    arguments: tuple[Any, ...]


@dataclass
class _End:
    """Rank 0 is done."""


class Verdict(ValueError):
    """What a mode concludes, after all was computed and written: an error of rank 0 alone."""


_CREWS: dict[dist.ProcessGroup | None, Crew] = {}
"""The one at work on each default group."""


def start_crew(layout: ServingLayout, device: torch.device) -> Crew:
    """The crew of all processes. Collective; starts the process group, unless there is one."""
    init_distributed(device, layout.timeout_seconds)
    crew = _CREWS[dist.group.WORLD] = Crew(Channel(), serving_groups(layout, device.type), device, [], [])
    return crew


def layout_problems_of_model(layout: ServingLayout, model: ModelConfig) -> list[str]:
    """Every reason why a model, resolved, cannot be cut like this; with the nearest degrees that its layers allow."""
    candidates = [d for d in divisors(model.num_heads) if not _expert_problems(replace(layout, tp=d), model)]
    return [*problems_of_model(model, layout.tp, candidates=candidates), *_expert_problems(layout, model)]


def _expert_problems(layout: ServingLayout, model: ModelConfig) -> list[str]:
    moe, tp, ep = model.moe, layout.tp, layout.ep
    if not moe.num_experts:
        why = f"parallel.ep={ep} shares out experts, and model.moe.num_experts=0 has none"
        return [Problem(why, values("parallel.ep", [1]))] if ep > 1 else []
    found: list[str] = []
    size = moe.intermediate_size
    legal = [d for d in divisors(tp) if moe.num_experts % d == 0 and size % (tp // d) == 0]
    if moe.num_experts % ep or size % (tp // ep):
        why = (
            f"parallel.ep={ep} of parallel.tp={tp} ranks does not share out model.moe.num_experts={moe.num_experts} "
            f"experts equally, each cut over {tp // ep} ranks by its model.moe.intermediate_size={size} features"
        )
        found.append(Problem(why, values("parallel.ep", legal, near=ep), words="another parallel.tp" * (not legal)))
    if (moe.num_shared * size) % tp:
        why = f"parallel.tp={tp} does not divide the {moe.num_shared * size} inner features of the shared experts"
        fitting = [d for d in divisors(moe.num_shared * size) if model.num_heads % d == 0]
        found.append(Problem(why, values("parallel.tp", fitting, near=tp)))
    return found


def run_on_ranks(
    mode: Callable[[], None],
    layout: ServingLayout,
    model: LabModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    shape: str | None = None,
) -> None:
    """Run a mode on rank 0 while the others follow. Every process calls this with the same arguments.

    shape: of a model with random weights, in place of model.path (open_model.shape_config). Raises ConfigError, before
    any process group exists, for a model that cannot be served like this.
    """
    config = model_config_of(model) if shape is None else shape_config(shape)
    found = [*layout_problems_of_model(layout, config), *engine_problems(engine, config)]
    if engine.deterministic:
        why = f"engine.deterministic=true cannot be with parallel.tp={layout.tp}, whose sums depend on the batch"
        found.append(Problem(why, values("parallel.tp", [1]), values("engine.deterministic", [False])))
    if found:
        raise ConfigError(found)
    with lost_ranks_named("another rank has ended, or has not answered in time"):
        crew = start_crew(layout, device)
        settings = {"parallel": asdict(layout), "model": asdict(model), "engine": asdict(engine)}
        check_same_on_all_ranks(settings | {"bench": {"random_weights": shape}})
        if not crew.channel.leads:
            with _without_signals():
                _follow(crew)
            _end(crew)
            return
        try:
            mode()
        except (ConfigError, Verdict):  # between steps: the others wait for the next one
            crew.channel.tell(_End())
            _end(crew)
            raise
        crew.channel.tell(_End())
        _end(crew)


@contextmanager
def _without_signals() -> Iterator[None]:
    """SIGTERM and SIGINT, which launchers and terminals send to all ranks, are for rank 0 to answer.

    A server that is told to end needs the others for the requests that it still has. They end when rank 0 does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(crew: Crew) -> None:
    del _CREWS[dist.group.WORLD]
    crew.channel.close()


def open_on_ranks(model: LabModelConfig, shape: str | None = None) -> OpenedModel:
    """Rank 0: open a model, or one of that shape with random weights, its parts on all ranks of the crew. Raises
    ConfigError where one of them cannot."""
    crew = _CREWS[dist.group.WORLD]
    crew.channel.tell(_Open(model, shape))
    return _open(crew, _Open(model, shape))


def open_whole_on_ranks(model: LabModelConfig) -> OpenedModel:
    """Rank 0: open a model that is not cut, for itself. The others read it as well, since ranks verify the files of a
    checkpoint together, and keep nothing of it."""
    crew = _CREWS[dist.group.WORLD]
    crew.channel.tell(_Open(model, whole=True))
    return _open(crew, _Open(model, whole=True))


def make_on_ranks(opened: OpenedModel, config: EngineConfig, speculation: SpeculationConfig) -> Engine:
    """Rank 0: make an engine for one of the crew's models on all ranks. Raises ConfigError for what it refuses."""
    crew = _CREWS[dist.group.WORLD]
    number = next(number for number, model in enumerate(crew.models) if model is opened)
    crew.channel.tell(_Make(number, config, speculation))
    return _make(crew, number, config, speculation)


def call_on_ranks(opened: OpenedModel, function: Callable[..., T], *arguments: Any) -> T:
    """Rank 0: call function(model, *arguments) on all ranks of the crew at once, each with its part of the model."""
    crew = _CREWS[dist.group.WORLD]
    number = next(number for number, model in enumerate(crew.models) if model is opened)
    crew.channel.tell(_Call(number, function, arguments))
    return function(opened.model, *arguments)


def _follow(crew: Crew) -> None:
    """Any other rank: do what rank 0 does."""
    while not isinstance(message := crew.channel.hear(), _End):
        if isinstance(message, Orders):
            crew.engines[message.engine].follow(message)
            continue
        if isinstance(message, _Call):
            message.function(crew.models[message.model].model, *message.arguments)
            continue
        try:
            if isinstance(message, _Open):
                _open(crew, message)
            elif isinstance(message, _Make):
                _make(crew, message.model, message.engine, message.speculation)
        except ConfigError:
            pass  # rank 0 raises it as well, and says what comes next


def _open(crew: Crew, asked: _Open) -> OpenedModel:
    groups = NO_GROUPS if asked.whole else crew.groups

    def opened() -> OpenedModel:
        if asked.shape is not None:
            return open_random_model(asked.shape, asked.model.dtype, crew.device, groups)
        return open_model(asked.model, crew.device, groups)

    found = _agreed(opened)
    if not asked.whole:
        crew.models.append(found)
    return found


def _make(crew: Crew, model: int, config: EngineConfig, speculation: SpeculationConfig) -> Engine:
    opened, number = crew.models[model], len(crew.engines)

    def make() -> Engine:
        drafting = open_speculation(opened, speculation)
        with configuration_errors():
            return Engine(
                opened.model,
                config,
                tokenizer=opened.tokenizer,
                eos_ids=opened.eos_ids,
                speculation=drafting,
                adapters=opened.adapters,
                channel=crew.channel,
                number=number,
            )

    crew.engines.append(_agreed(make))
    return crew.engines[-1]


def _agreed(function: Callable[[], T]) -> T:
    """function() on every rank. What goes wrong on one of them is raised on all."""
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    problems = error.problems if isinstance(error, ConfigError) else None
    everyone: list[tuple[list[str] | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (problems, None if error is None else describe(error)))
    if error is not None and problems is None:
        raise error
    if wrong := dict.fromkeys(line for lines, _ in everyone for line in lines or ()):
        raise ConfigError(list(wrong))
    for rank, (_, what) in enumerate(everyone):
        if what is not None:
            raise RankError(f"rank {rank}: {what}")
    return result
