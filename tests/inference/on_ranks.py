"""What the tests of serving over several ranks run on each of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.layout import ServingLayout, serving_groups
from inference.ranks import Channel, RankError
from inference.scheduler import Step
from inference.sequence import Completion
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import serving
from models.registry import build_model
from parallel.regions import local_region, local_tensor
from tests.inference.greedy import GREEDY, prompts_of, run_preempting
from tests.models.small import random_decoder


@dataclass
class Served:
    """What a rank found out."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    swapped: int
    recomputed: int
    cached: int
    cache_heads: int
    parameters: int  # that this rank holds
    blocks: int  # forward passes of blocks as they are trained
    few: int  # products of a few rows, in a launch of their own


@dataclass
class Taken:
    """Which way blocks were computed. Filled by `counted`."""

    blocks: int = 0
    few: int = 0


@contextmanager
def counted(model: Decoder, *, few_rows: bool) -> Iterator[Taken]:
    """Count while it is served. few_rows: products of a few rows go the way they go on a GPU in bf16."""
    taken = Taken()

    def block(*_: Any) -> None:
        taken.blocks += 1

    def counting(name: str) -> Any:
        def product(*args: Any, **how: Any) -> Any:
            taken.few += 1
            return getattr(serving.skinny, name)(*args, **how)

        return patch.object(serving, name, product)

    def obstacle(num_rows: int, weight: torch.Tensor) -> str | None:
        if few_rows:
            return None if num_rows <= serving.skinny.MAX_ROWS else "rows"
        return given(num_rows, weight)

    given = serving.skinny.obstacle
    hooks = [each.register_forward_pre_hook(block) for each in model.blocks]
    fused = counting("skinny_linear"), counting("add_skinny_linear")
    with fused[0], fused[1], patch.object(serving.skinny, "obstacle", obstacle):
        yield taken
    for hook in hooks:
        hook.remove()


def shards_of(whole: Decoder, layout: ServingLayout, device: str = "cpu") -> Decoder:
    """The same model over all ranks."""
    groups = serving_groups(layout, torch.device(device).type)
    model = build_model(whole.config, groups=groups).to(device, next(whole.parameters()).dtype)
    values = {name: value.to(device) for name, value in whole.state_dict().items()}
    with torch.no_grad():
        for name, located in model.state_dict().items():
            local_tensor(located).copy_(values[name][local_region(located)])
    return model.eval()


def _served(engine: Engine, completions: list[Completion], taken: Taken) -> Served:
    counts = engine.counts
    return Served(
        tokens=[completion.token_ids for completion in completions],
        logprobs=[completion.logprobs for completion in completions],
        swapped=counts.swapped,
        recomputed=counts.recomputed,
        cached=counts.cached_tokens,
        cache_heads=engine.runner._keys.shape[3],
        parameters=sum(local_tensor(p).numel() for p in engine.runner.model.parameters()),
        blocks=taken.blocks,
        few=taken.few,
    )


def all_ask_alike(
    config: ModelConfig,
    layout: ServingLayout,
    engines: list[EngineConfig],
    lengths: list[int],
    shared: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    few_rows: bool = False,
) -> list[Served]:
    """Greedy continuations by each of some engines, all made to preempt. few_rows: as `counted` says."""
    model = shards_of(random_decoder(config).to(dtype), layout, device)
    found = []
    for seed, settings in enumerate(engines):
        engine = Engine(model, settings)
        with counted(model, few_rows=few_rows) as taken:
            done = run_preempting(engine, prompts_of(lengths, shared=shared), GREEDY, seed=seed)
        found.append(_served(engine, done, taken))
    return found


def prompt_logprobs(config: ModelConfig, layout: ServingLayout, prompts: list[list[int]]) -> list[Any]:
    engine = Engine(
        shards_of(random_decoder(config).double(), layout), EngineConfig(block_size=4, max_batch_tokens=300)
    )
    sampling = SamplingConfig(temperature=0, max_tokens=2, prompt_logprobs=True)
    return [completion.prompt_logprobs for completion in engine.generate(prompts, sampling)]


def collectives_of_a_decode(config: ModelConfig, layout: ServingLayout, few_rows: bool) -> tuple[dict[str, int], Taken]:
    model = shards_of(random_decoder(config).double(), layout)
    engine = Engine(model, EngineConfig(block_size=4))
    engine.add([1, 2, 3], GREEDY)
    engine.step()
    with counted(model, few_rows=few_rows) as taken, CommDebugMode() as comms:
        engine.step()
    return {str(op): count for op, count in comms.get_comm_counts().items()}, taken


def ask(engine: Engine, prompts: list[list[int]], samplings: list[SamplingConfig]) -> dict[int, Completion]:
    """Requests that come one by one, of which one is aborted; the weights change once."""
    chance = random.Random(5)
    waiting = list(zip(prompts, samplings, strict=True))
    done: dict[int, Completion] = {}
    steps = 0
    while waiting or engine.num_unfinished:
        if waiting and (chance.random() < 0.6 or not engine.num_unfinished):
            engine.add(*waiting.pop(0))
        steps += 1
        if steps == 4:
            done[0] = engine.abort(0)
        if steps == 7:
            engine.weights_changed()
        done |= {d.request: d.completion for d in engine.step() if d.completion is not None}
    return done


def led(
    config: ModelConfig,
    layout: ServingLayout,
    settings: EngineConfig,
    prompts: list[list[int]],
    samplings: list[SamplingConfig],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[int, Completion] | int:
    """Rank 0: its completions. Others, which are told everything: how often they stepped."""
    channel = Channel()
    engine = Engine(shards_of(random_decoder(config).to(dtype), layout, device), settings, channel=channel)
    if channel.leads:
        done = ask(engine, prompts, samplings)
        channel.tell(None)
        return done
    steps = 0
    while (orders := channel.hear()) is not None:
        engine.follow(orders)
        steps += 1
    assert engine.num_unfinished == 0
    return steps


def messages(sizes: list[int]) -> list[int]:
    channel = Channel()
    if channel.leads:
        with CommDebugMode() as counted:
            for size in sizes:
                channel.tell(b"x" * size)
        return [sum(counted.get_comm_counts().values())]
    return [len(channel.hear()) for _ in sizes]


def goes_another_way(config: ModelConfig, layout: ServingLayout) -> str | None:
    """Rank 1 drops a request that it was not told to drop: what it says at the next step."""
    channel = Channel()
    engine = Engine(shards_of(random_decoder(config).double(), layout), EngineConfig(block_size=4), channel=channel)
    if channel.leads:
        for prompt in ([1, 2, 3], [4, 5]):
            engine.add(prompt, GREEDY)
        engine.step()
        engine.scheduler.schedule = Step  # type: ignore[method-assign]  # a real one would wait for the other rank
        engine.step()
        return None
    engine.follow(channel.hear())
    engine.abort(1)
    try:
        engine.follow(channel.hear())
    except RankError as error:
        return str(error)
    return "nothing"


def is_left(by: int) -> str | None:
    """Rank `by` closes its connections; what the other one says then."""
    channel = Channel()
    dist.barrier()
    if channel.rank == by:
        dist.destroy_process_group(channel.group)
        return None
    try:
        for _ in range(100):
            channel.tell("step") if channel.leads else channel.hear()
    except RankError as error:
        return str(error)
    return "nothing"
