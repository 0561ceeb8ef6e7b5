"""Shared fixtures. The rank pool is forked here, at import, before any test starts a thread."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

# One thread per process: with several ranks on few cores, more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Whether there is a GPU is asked before the pool is forked: of its driver's management library, because the CUDA
# runtime, once called, works in no forked process.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import pytest
import torch

# Kernels on CPU tensors run in Triton's interpreter (kernels/backend.py), which has to be on before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Imported before the fork, so that not every rank imports them again; the first torch.compile takes most of these.
import torch._dynamo.testing
import torch._inductor.compile_fx
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

from tests.pool import RankPool

torch.set_num_threads(1)
_POOL = RankPool()


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """`ranks.run(world_size, function, *args)` runs a module-level function on gloo ranks."""
    return _POOL


@pytest.fixture(autouse=True)
def _begins_alike() -> None:
    """Which sizes dynamo traces as symbols depends on what it compiled before, and which numbers are drawn on how many
    were: no test may depend on the order of tests, nor on luck."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    random.seed(0)


def _state_of_the_process() -> dict[str, object]:
    """What one test can change under the feet of those that happen to follow it in the same process."""
    return {
        "process group": dist.is_initialized(),
        "working directory": os.getcwd(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
    }


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """The test that leaves something behind fails, and not another one, on another machine, in another order."""
    environment, before = dict(os.environ), _state_of_the_process()
    yield
    for name in os.environ.keys() - environment.keys():  # programs and libraries set some for their process
        del os.environ[name]
    os.environ.update(environment)
    after = _state_of_the_process()
    if after["process group"]:
        dist.destroy_process_group()
    left = {name: (before[name], value) for name, value in after.items() if value != before[name]}
    assert not left, f"the test has changed, and not set back (before, after): {left}"


def pytest_sessionfinish() -> None:
    _POOL.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="all that CI runs, with tests marked so that take long")
    parser.addoption("--exhaustive", action="store_true", help="all of tests/, with all parameters of each")


def _left_out(config: pytest.Config, items: list[pytest.Item]) -> set[pytest.Item]:
    """What is not run unless it is asked for: by name, or by an option."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.getoption("--exhaustive"):
        return set()
    thorough = config.getoption("--thorough")
    markers = ["exhaustive"] if thorough else ["exhaustive", "thorough"]
    left_out = {item for item in items if any(item.get_closest_marker(marker) for marker in markers)}
    of_function: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item not in left_out and item.get_closest_marker("some"):
            of_function.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in of_function.values():
        marker = cases[0].get_closest_marker("some")
        assert marker is not None
        if thorough and marker.kwargs.get("unless_thorough"):
            continue
        num = min(marker.args[0], len(cases))
        kept = {cases[round(i * (len(cases) - 1) / max(num - 1, 1))] for i in range(num)}  # first, last, evenly between
        if thorough and (kind := marker.kwargs.get("thorough_each")):
            kept |= set({kind(item.callspec.params): item for item in reversed(cases)}.values())  # type: ignore[attr-defined]
        left_out |= set(cases) - kept
    return left_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if left_out := _left_out(config, items):
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    absent, reason = (
        ("interpreter", "kernels run on the GPU here, not in the interpreter")
        if torch.cuda.is_available()
        else ("gpu", "needs a CUDA device")
    )
    for item in items:
        if item.get_closest_marker(absent):
            item.add_marker(pytest.mark.skip(reason=reason))
