"""Memory beside weights and cache: what is reserved is what steps take, and what would grow with a batch is bounded."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from inference import memory, pages, sampling
from inference.blocks import Copy
from inference.config import EngineConfig, SamplingConfig, engine_problems
from inference.graphs import GraphSizes
from inference.memory import Demand, GraphSize, working_memory
from inference.pages import fitting_blocks, make_copies, make_pages
from inference.runner import EVERYTHING, ModelRunner, largest_step
from inference.sampling import sample, settings_of
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from tests.models.small import random_decoder, tiny


class Peak(TorchDispatchMode):
    """The most bytes of what was computed here that existed at a time. What an op makes inside of itself is not seen:
    references of kernels are ops, as the kernels are."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        output = func(*args, **(kwargs or {}))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in before:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return output


SHAPES = {
    "llama": lambda: tiny(max_seq_len=150, hidden_size=96, intermediate_size=300, vocab_size=61),
    "wide": lambda: tiny(max_seq_len=150, hidden_size=24, intermediate_size=37, vocab_size=4001),
    "gpt2": lambda: tiny(
        max_seq_len=150, hidden_size=96, intermediate_size=384, norm="layernorm", positions="learned", gated_mlp=False,
        activation="gelu", num_kv_heads=6, head_dim=16,
    ),
    "experts": lambda: tiny(
        max_seq_len=150, hidden_size=96, moe=MoEConfig(num_experts=8, top_k=3, intermediate_size=80, num_shared=1)
    ),
    "latent": lambda: tiny(
        max_seq_len=150, hidden_size=96, num_kv_heads=6,
        mla=MLAConfig(kv_rank=48, nope_dim=16, rope_dim=8, value_dim=16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.0), EVERYTHING], ids=["greedy", "everything"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_largest_step_takes_what_is_reserved_for_it(name: str, sampling: SamplingConfig) -> None:
    """A tensor that arithmetic forgot: the cache gets its memory, and the first full batch ends the server. More than
    twice as much as is needed would be cache that nobody has."""
    config = EngineConfig(block_size=4, max_sequences=12, max_batch_tokens=200, max_seq_len=150, num_blocks=40)
    model = random_decoder(SHAPES[name]())
    runner = ModelRunner(model, config)
    step = largest_step(config, model.config, sampling)
    assert sum(chunk.num_tokens for chunk in step.chunks) == runner.memory_demand.tokens == 200
    runner.launch(step)  # what is kept from the first time on
    with Peak() as peak:
        runner.launch(step)
    reserved = runner.memory.step
    assert peak.most <= reserved
    if sampling is EVERYTHING:
        assert peak.most >= reserved / 2


def test_graphs_are_reserved_by_what_they_put_out() -> None:
    """Logits of every captured size stay in memory: 1.4 GB with a vocabulary of 128,256."""
    model = random_decoder(tiny())
    sizes = GraphSizes(256, 8192)
    graphs = [GraphSize(key.tokens, key.sequences) for key in sizes.every_key()]
    assert (len(graphs), sum(size.rows for size in graphs)) == (27 + 24, 2695 + 2624)
    for key in sizes.every_key():
        assert sizes.size_of(key.sequences, key.tokens, decodes=key.decodes) == key[1:]
    demand = Demand(tokens=8192, rows=256)
    without, with_graphs = (working_memory(model, d, 4) for d in (demand, demand._replace(graphs=graphs)))
    outputs = (2695 + 2624) * model.config.vocab_size * 4
    assert (without.graphs, without.total + with_graphs.graphs) == (0, with_graphs.total)
    assert outputs < with_graphs.graphs < outputs + without.activations
    few = GraphSizes(256, 8192, [8, 1, 64])
    assert [few.size_of(n, n, decodes=True) for n in (1, 2, 64, 65)] == [(1, 1), (8, 8), (64, 64), None]


@pytest.mark.parametrize("total", [24 * 10**9, 80 * 10**9])
def test_an_8b_model_on_a_small_card_leaves_room_for_steps(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the memory given to the cache. By arithmetic alone: nothing of that size is made."""
    config = ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        max_seq_len=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = random_decoder_on_meta(config)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights == pytest.approx(16.06e9, rel=0.001)
    sizes = GraphSizes(256, 8192)
    graphs = [GraphSize(key.tokens, key.sequences) for key in sizes.every_key()]
    working = working_memory(model, Demand(tokens=8192, rows=256, graphs=graphs, cuda=True, fused=True), 2)
    assert 2e9 < working.total < 6e9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - weights, total))

    class OnCuda:
        device, dtype, itemsize = torch.device("cuda"), torch.bfloat16, 2

    blocks = fitting_blocks(model, EngineConfig(max_sequences=256), OnCuda(), 0, working)  # type: ignore[arg-type]
    cache = make_pages(model, EngineConfig(), blocks, torch.bfloat16, torch.device("meta")).nbytes
    assert 0.9 * total - 2**24 < weights + cache + working.total <= 0.9 * total
    with pytest.raises(ValueError, match=r"less engine.max_batch_tokens or engine.max_sequences \(steps take "):
        fitting_blocks(
            model, EngineConfig(max_sequences=256, memory_fraction=0.7), OnCuda(), 0, working._replace(other=10**12)  # type: ignore[arg-type]
        )  # fmt: skip


def random_decoder_on_meta(config: ModelConfig) -> Any:
    from models.decoder import Decoder
    from models.registry import resolve_model

    return Decoder(resolve_model(config)).to(torch.bfloat16)


def test_rows_sampled_some_at_a_time_are_those_sampled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings or random numbers of another row, in the second piece."""
    model = random_decoder(tiny())
    config = EngineConfig(block_size=4, max_sequences=7, max_batch_tokens=70, num_blocks=40)
    everything = replace(EVERYTHING, frequency_penalty=0.2, repetition_penalty=1.3, top_logprobs=3, min_p=0.01)
    step = largest_step(config, model.config, everything)
    sequences = [chunk.sequence for chunk in step.chunks]
    settings = settings_of(sequences, vocab_size=61, device=torch.device("cpu"))
    logits = 3 * torch.randn(7, 61, generator=torch.Generator().manual_seed(0))
    whole = sample(logits, settings)
    monkeypatch.setattr(sampling, "SAMPLED_LOGITS", 61 * 3)
    with Peak() as peak:
        pieces = sample(logits, settings)
    for one, other in zip(whole, pieces, strict=True):
        assert one is not None
        assert torch.equal(one, other)
    assert peak.largest <= 3 * 62 * 8  # fp64 sums of three rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_blocks_travel_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swapped sequence of 100,000 tokens copied at once: as much memory again as it has in the cache, when there is
    none."""
    monkeypatch.setattr(pages, "STAGING_BYTES", 3 * 2 * 4 * 5 * dtype.itemsize)  # of [2, P, 4, 5]: three blocks
    values = torch.arange(2 * 20 * 4 * 5).reshape(2, 20, 4, 5) % 251 - 125
    here = values.to(dtype)
    there = torch.zeros(2, 16, 4, 5, dtype=dtype)
    wanted_here, wanted_there = here.clone().float(), there.clone().float()
    copies = [Copy(block, 15 - block, True) for block in range(11)]
    copies += [Copy(15 - block, 2 * block, False) for block in range(10)] + [Copy(1, 0, True), Copy(0, 15, True)]
    for source, target, to_host in copies:
        (wanted_there if to_host else wanted_here)[:, target] = (wanted_here if to_host else wanted_there)[:, source]
    with Peak() as peak:
        make_copies(copies, [(here, there)])
    assert torch.equal(here.float(), wanted_here)
    assert torch.equal(there.float(), wanted_there)
    assert peak.largest <= pages.STAGING_BYTES
    assert memory.STAGING_BYTES == 2**26  # the same that is reserved


def test_sizes_of_graphs_that_cannot_be_are_one_error() -> None:
    """A graph for more sequences than a step has, or a setting without effect."""
    model = tiny()
    for config, says in (
        (EngineConfig(graph_sizes=[0, 4, 300]), r"graph_sizes=\[0, 4, 300\] has 0, .*; use \[1, 4, 256\]"),
        (EngineConfig(graph_sizes=[4], cuda_graphs=False), "has no effect with engine.cuda_graphs=false"),
    ):
        (problem,) = engine_problems(config, model)
        assert re.search(says, problem), problem
