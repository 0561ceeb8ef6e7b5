"""What the tests of pipelines run on each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.tensor import DTensor

import trainer.step
from data.batch import Batch
from parallel.fully_sharded import FullyShardedDataParallel
from parallel.pipeline.actions import Action
from parallel.pipeline.executor import _Run
from parallel.pipeline.layout import PipelineLayout
from parallel.pipeline.weight_gradients import Key, WeightGradients
from tests.parity.harness import Outcome, run_here
from trainer.config import TrainConfig
from trainer.pipelined import PipelinedPasses
from trainer.sequence import SequenceParts
from trainer.trainer import Trainer
from trainer.validate import finalize


def _lose_weight_gradient(original: Callable[..., None]) -> Callable[..., None]:
    def run(store: WeightGradients, key: Key) -> None:
        if key == (1, 1):
            store._waiting.pop(key)
        else:
            original(store, key)

    return run


def _mix_sequences(original: Callable[..., None]) -> Callable[..., None]:
    def forward(run: _Run, stage: int, microbatch: int) -> None:
        key = (False, stage, microbatch)
        if stage == 1 and microbatch == 1:
            run.produced[key] = run.produced[key].flip(0)
        original(run, stage, microbatch)

    return forward


def _one_stage(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda parameters, stages, kernel: original(parameters, kernel=kernel)


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "tied_not_summed": (PipelinedPasses, "_sum_tied", lambda original: lambda passes: None),
    "lost_weight_gradient": (WeightGradients, "run", _lose_weight_gradient),
    "mixed_sequences": (_Run, "_forward", _mix_sequences),
    "norm_of_one_stage": (trainer.step, "global_grad_norm", _one_stage),
}


def run_broken(config: TrainConfig, fault: str) -> Outcome | None:
    """Train with a fault. Gradients and norms are rank 0's view, without comparing copies between ranks."""
    where, name, breaking = FAULTS[fault]
    with ExitStack() as stack:
        stack.enter_context(patch.object(where, name, breaking(getattr(where, name))))
        stack.enter_context(patch("tests.parity.harness.torch.equal", lambda one, other: True))
        return run_here(config)


def run_with_lengths(config: TrainConfig) -> Outcome | None:
    """Train on micro-batches of which every sample's number decides the length: 24 of its tokens, or 17."""

    def cut(_: SequenceParts, batch: Batch) -> Batch:
        length = 24 if batch.samples[0] % 2 else 17
        tokens, labels, positions = (x[:, :length] for x in (batch.tokens, batch.labels, batch.positions))
        documents = None if batch.documents is None else batch.documents[:, :length]
        return replace(batch, tokens=tokens, labels=labels, positions=positions, documents=documents)

    with patch.object(SequenceParts, "of", cut):
        return run_here(config)


def run_and_answer(config: TrainConfig) -> dict[str, Any]:
    """What a run returns on this rank."""
    running = Trainer(finalize(config, world_size=dist.get_world_size()))
    try:
        return running.run()
    finally:
        running.close()


def count_messages(config: TrainConfig) -> Counter[str]:
    """Messages and all-reduces of one step on this rank."""
    counts: Counter[str] = Counter()
    running = Trainer(finalize(config, world_size=dist.get_world_size()))
    batch, reduce = dist.batch_isend_irecv, dist.all_reduce

    def counting_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        counts.update(operation.op.__name__ for operation in operations)
        return batch(operations)

    def counting_reduce(*args: Any, **kwargs: Any) -> dist.Work | None:
        counts["all_reduce"] += 1
        return reduce(*args, **kwargs)

    try:
        with patch.object(dist, "batch_isend_irecv", counting_batch), patch.object(dist, "all_reduce", counting_reduce):
            running._launch_step()
    finally:
        running.close()
    return counts


def count_schedules(config: TrainConfig) -> int:
    """How many schedules this rank makes for three steps."""
    running = Trainer(finalize(config, world_size=dist.get_world_size()))
    try:
        with patch.object(PipelineLayout, "training", autospec=True, side_effect=PipelineLayout.training) as training:
            for _ in range(3):
                running._launch_step()
    finally:
        running.close()
    return training.call_count


@dataclass
class Gathers:
    """What a step gathered on this rank. Filled by count_gathers."""

    num_gathers: int = 0
    layers_in_memory: list[int] = field(default_factory=list)  # when an Unshard came
    started: list[bool] = field(default_factory=list)  # of each use: whether a gather began before the wait for input


def count_gathers(config: TrainConfig) -> tuple[Gathers, Gathers]:
    """Of the second step, and of the third, in which Unshard does nothing."""
    running = Trainer(finalize(config, world_size=dist.get_world_size()))
    blocks = list(running.state.model.blocks.children())
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch 2.13, 2.11
    original, gather, wait = getattr(dist, name), FullyShardedDataParallel.gather, _Run.await_input
    early, without = Gathers(), Gathers()
    now = early
    since_unshard = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal since_unshard
        since_unshard += 1
        now.num_gathers += 1
        return original(*args, **kwargs)

    def watching(data_parallel: FullyShardedDataParallel, names: list[str]) -> None:
        nonlocal since_unshard
        whole = [block for block in blocks if not all(isinstance(p, DTensor) for p in block.parameters())]
        now.layers_in_memory.append(len(whole))
        since_unshard = 0
        if now is early:
            gather(data_parallel, names)

    def waiting(run: _Run, action: Action) -> None:
        now.started.append(since_unshard > 0)
        wait(run, action)

    try:
        running._launch_step()
        with (
            patch.object(dist, name, counting),
            patch.object(FullyShardedDataParallel, "gather", watching),
            patch.object(_Run, "await_input", waiting),
        ):
            running._launch_step()
            now = without
            running._launch_step()
    finally:
        running.close()
    return early, without
