"""Shared fixtures. The rank pool is forked here, at import, before any test starts a thread."""

from __future__ import annotations

import os

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
def _compiled_alone() -> None:
    """Which sizes dynamo traces as symbols depends on what it compiled before: no test may depend on their order."""
    torch._dynamo.reset()


def pytest_sessionfinish() -> None:
    _POOL.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="all of tests/, with those marked so that take long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    absent, reason = (
        ("interpreter", "kernels run on the GPU here, not in the interpreter")
        if torch.cuda.is_available()
        else ("gpu", "needs a CUDA device")
    )
    for item in items:
        if item.get_closest_marker(absent):
            item.add_marker(pytest.mark.skip(reason=reason))
