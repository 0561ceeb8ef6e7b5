"""Serving over the GPUs at hand: NCCL between the layers, messages on the host beside it, in fp32 against the CPU."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from inference.config import SamplingConfig
from inference.engine import Engine
from inference.layout import ServingLayout
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from parallel.mesh import init_distributed, pick_device
from tests.inference import on_ranks
from tests.inference.greedy import GREEDY, prompts_of
from tests.inference.test_ranks import LENGTHS, RECOMPUTING, SAMPLINGS, SHARED, SWAPPING, even
from tests.models.small import random_decoder

pytestmark = pytest.mark.gpu

MODELS: dict[str, ModelConfig] = {
    "dense": even(),
    "wide": even(hidden_size=64, head_dim=64, num_kv_heads=4, intermediate_size=256),  # as kernels/skinny_linear wants
    "one_kv_head": even(num_kv_heads=1, tie_embeddings=True),
    "masked": even(attention_sinks=True, sliding_window=5, sliding_window_layers=[1]),
    "moe": even(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=32, num_shared=1)),
    "mla": even(num_kv_heads=None, head_dim=None, mla=MLAConfig(kv_rank=20, nope_dim=8, rope_dim=8, value_dim=12)),
}
Results = dict[str, list[Any]]
"""By name of the case, what each rank found."""


def _layouts(world_size: int) -> dict[str, tuple[str, ServingLayout]]:
    layouts = {name: (name, ServingLayout(tp=world_size)) for name in MODELS}
    return layouts | {"moe_ep": ("moe", ServingLayout(tp=world_size, ep=2))}


def _serve_here(file: str) -> None:
    """Body of a subprocess: every case in turn; rank 0 leaves the results."""
    device = pick_device("cuda")
    init_distributed(device, timeout_seconds=60)
    faulthandler.dump_traceback_later(240, exit=True)
    world, results = dist.get_world_size(), {}
    on = {"device": str(device)}

    def everyone(name: str, mine: Any) -> None:
        results[name] = [None] * world
        dist.all_gather_object(results[name], mine)

    for name, (model, layout) in _layouts(world).items():
        for dtype in (torch.float32, torch.bfloat16):
            engines = [SWAPPING, RECOMPUTING]
            mine = on_ranks.all_ask_alike(MODELS[model], layout, engines, LENGTHS, SHARED, dtype=dtype, **on)
            everyone(f"{name} {dtype}", mine)
    prompts = prompts_of(LENGTHS, shared=SHARED)
    layout = ServingLayout(tp=world)
    everyone("led", on_ranks.led(MODELS["dense"], layout, SWAPPING, prompts, SAMPLINGS, dtype=torch.float32, **on))
    if dist.get_rank() == 0:
        torch.save(results, file)
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    num_gpus = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())
    if num_gpus == 1:
        pytest.skip("needs two GPUs")
    file = tmp_path_factory.mktemp("tp") / "results.pt"
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}", __file__, file],
        env=os.environ
        | {"NCCL_DEBUG": "WARN", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        cwd=root, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert file.exists(), done.stdout[-3000:] + done.stderr[-6000:]
    return torch.load(file, weights_only=False)  # written just now


@pytest.mark.parametrize("name", [*MODELS, "moe_ep"])
def test_greedy_tokens_in_fp32_are_those_of_the_cpu(results: Results, name: str) -> None:
    """A collective on the wrong stream; pages of another rank's heads; a cut that only the kernels see."""
    model = random_decoder(MODELS[name.removesuffix("_ep")])
    expected = Engine(model, SWAPPING).generate(prompts_of(LENGTHS, shared=SHARED), GREEDY)
    for found in results[f"{name} {torch.float32}"]:
        for served in found:
            assert served.tokens == [completion.token_ids for completion in expected]
        assert found[0].swapped > 0
        assert found[1].recomputed > 0


@pytest.mark.parametrize("name", [*MODELS, "moe_ep"])
def test_all_ranks_have_the_same_tokens_in_bf16(results: Results, name: str) -> None:
    """Ranks whose products round differently, each going on with a token of its own."""
    first, *others = results[f"{name} {torch.bfloat16}"]
    for other in others:
        assert [served.tokens for served in other] == [served.tokens for served in first]
    for served in first:
        assert (served.blocks == 0) == (name != "mla")
        assert (served.few > 0) == (name == "wide")


def test_ranks_follow_the_first_one(results: Results) -> None:
    """Messages and NCCL in each other's way; a seed that draws something else on a GPU."""
    alone = Engine(random_decoder(MODELS["dense"]).cuda(), replace(SWAPPING, max_sequences=4))
    samplings: list[SamplingConfig] = SAMPLINGS
    done = on_ranks.ask(alone, prompts_of(LENGTHS, shared=SHARED), samplings)
    leader, *others = results["led"]
    assert {request: completion.token_ids for request, completion in leader.items()} == {
        request: completion.token_ids for request, completion in done.items()
    }
    assert len(set(others)) == 1


if __name__ == "__main__":
    _serve_here(*sys.argv[1:])
