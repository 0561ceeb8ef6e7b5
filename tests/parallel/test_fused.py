"""Fused projections: which rows are whose, and that nobody but the GEMM can tell."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.config import DataConfig
from models.registry import build_model
from parallel.fused import Parts, fused_parameters, separate
from parallel.regions import Piece
from tests.models.small import random_decoder, sample_tokens, tiny
from tests.parity.harness import (
    changed,
    gradient_deviation,
    loss_deviation,
    run_on,
    text_corpus,
    tiny_config,
    weight_deviation,
    whole,
)
from tests.parity.interrupted import run_part_on
from tests.pool import RankPool
from trainer.adamw_kernel import KernelAdamW
from trainer.config import OptimConfig
from trainer.muon import Muon


def fused(matrices: dict[str, Tensor], ranks: int) -> Tensor:
    """The order of rows, written down once more: rank by rank, of each matrix its share."""
    shares = [matrix.chunk(ranks) for matrix in matrices.values()]
    return torch.cat([share[rank] for rank in range(ranks) for share in shares])


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.integers(1, 4),
    per_rank=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    cuts=st.integers(1, 5),
)
def test_every_row_is_found_once_where_it_is(ranks: int, per_rank: list[int], cuts: int) -> None:
    """An offset of the wrong rank; rows at the edge of a shard, in nobody's part or in two."""
    parts = Parts({str(i): rows * ranks for i, rows in enumerate(per_rank)}, ranks)
    matrices = {name: torch.arange(rows) + 1000 * int(name) for name, rows in parts.rows.items()}
    rows = fused(matrices, ranks)
    found: dict[str, list[int]] = {name: [] for name in parts.rows}
    block = len(rows) // ranks
    for rank in range(ranks):
        step = -(-block // cuts)
        for first in range(rank * block, (rank + 1) * block, step):
            last = min(first + step, (rank + 1) * block)
            for name in parts.rows:
                begin, num_rows, number = parts.rows_among(name, first, last)
                here = rows[first:last][begin : begin + num_rows]
                assert torch.equal(here, matrices[name][number : number + num_rows])
                found[name] += here.tolist()
    assert found == {name: matrix.tolist() for name, matrix in matrices.items()}


def test_rows_of_several_ranks_have_no_parts() -> None:
    """A whole tensor in the order of two ranks, taken for one in the order of one."""
    with pytest.raises(ValueError, match="those of several ranks"):
        Parts({"a": 4, "b": 2}, 2).separate(torch.zeros(6, 3))


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return self.calls["mm"] + self.calls["addmm"]


@pytest.mark.parametrize(("changes", "layers"), [({}, 4), ({"gated_mlp": False, "qkv_bias": True}, 4)])
def test_a_block_has_one_product_for_each_input(changes: dict[str, Any], layers: int) -> None:
    """Weights that are fused and then multiplied in pieces; more products in backward than two per layer. Negative
    control: separate layers."""
    counts = {}
    for is_fused in (True, False):
        model = random_decoder(tiny(num_layers=1, fused_projections=is_fused, **changes))
        with _Products() as forward:
            hidden = model(sample_tokens(), head=lambda hidden, weight: hidden)
        with _Products() as backward:
            hidden.sum().backward()
        counts[is_fused] = (forward.products, backward.products)
    assert counts[True] == (layers, 2 * layers)
    separate_layers = layers + (3 if not changes else 2)
    assert counts[False] == (separate_layers, 2 * separate_layers)


def test_state_dicts_are_those_of_separate_layers_and_views() -> None:
    """Files that only one of both models reads; copies, which a load would fill for nothing."""
    config = tiny(qkv_bias=True, mlp_bias=True)
    models = {is_fused: build_model(replace(config, fused_projections=is_fused)) for is_fused in (True, False)}
    source = random_decoder(models[False].config)
    state = source.state_dict()
    assert models[True].state_dict().keys() == state.keys()
    models[True].load_state_dict(state)
    assert torch.allclose(models[True].eval()(sample_tokens()), source(sample_tokens()), atol=1e-5)
    models[True].state_dict()["blocks.1.mlp.up.bias"].fill_(7.0)
    assert (models[True].get_parameter("blocks.1.mlp.gate_up.bias")[-37:] == 7).all()
    names = {name.split(".", 2)[-1] for name in fused_parameters(models[True])}
    assert names == {f"{layer}.{kind}" for layer in ("attention.qkv", "mlp.gate_up") for kind in ("weight", "bias")}
    assert not fused_parameters(models[False])


def _updated(rule: str, sizes: dict[str, int], *, is_fused: bool) -> dict[str, Tensor]:
    """On each rank of two: three updates of sharded matrices by a rule; whole tensors by the names of separate ones."""
    generator = torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if rule == "adamw" else torch.float32

    def draw() -> dict[str, Tensor]:
        return {f"a.{n}.weight": torch.randn(rows, 512, generator=generator).to(dtype) for n, rows in sizes.items()}

    parts = {"a.abc.weight": Parts(sizes)} if is_fused else {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {"a.abc.weight": torch.cat(list(tensors.values()))} if is_fused else tensors
        return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}

    parameters = {name: nn.Parameter(tensor) for name, tensor in placed(draw()).items()}
    decay = dict.fromkeys(parameters, 0.1)
    update: Muon | KernelAdamW
    if rule == "muon":
        update = Muon(parameters, decay, OptimConfig(), fused=parts)
    else:
        update = KernelAdamW(parameters, decay, OptimConfig(state_dtype="int8"), seed=1, fused=parts)
    for step in range(3):
        for name, gradient in placed(draw()).items():
            parameters[name].grad = gradient
        with torch.no_grad():
            update.update(
                lr=0.1, grad_scale=torch.tensor(1.0), skip=torch.tensor(0.0), num_steps=torch.tensor(step + 1.0)
            )
    found = separate({f"model/{name}": tensor for name, tensor in parameters.items()} | update.state(), parts)
    return {name: whole(tensor) for name, tensor in found.items()}


@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_parts_are_updated_as_they_would_be_alone(ranks: RankPool, rule: str) -> None:
    """q, k and v orthogonalised as one matrix; random bits of another place, or 8-bit moments of another row. Shards
    cut a matrix anywhere."""
    sizes = {"a": 9, "b": 2, "c": 4}
    together = ranks.run(2, _updated, rule, sizes, is_fused=True)[0]
    alone = ranks.run(2, _updated, rule, sizes, is_fused=False)[0]
    assert together.keys() == alone.keys()
    assert [name for name in alone if not torch.equal(together[name], alone[name])] == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("fused"))


def test_separate_products_train_the_same_model(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Initial weights that depend on the order of rows, rows of k in v's place."""
    config = tiny_config(tmp_path / "fused", corpus, train__steps=3, optim__name="muon", parallel__zero_stage=1)
    config.model.qkv_bias = config.model.mlp_bias = True
    apart = changed(config, tmp_path / "apart")
    apart.model.fused_projections = False
    outcome, reference = run_on(ranks, 2, config), run_on(ranks, 1, apart)
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5
    assert weight_deviation(outcome, reference) <= 1e-3


def test_checkpoints_move_between_fused_and_separate_layers(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """From ranks of tp, whose order of rows is their own, to ranks that share keys and fuse less, to shards of another
    order and to one process that fuses nothing. Rows read by the name of the one and written by that of the other."""
    model = {"model__hidden_size": 32, "model__num_heads": 4, "model__num_kv_heads": 2, "model__intermediate_size": 52}
    first = tiny_config(tmp_path / "run", corpus, train__steps=1, checkpoint__at_end=True, parallel__tp=2, **model)
    first.schedule.warmup_steps, first.parallel.zero_stage = 0, 1
    written = run_part_on(ranks, 4, first)
    assert "optim/exp_avg/blocks.1.attention.k.weight" in written.state_at_end
    shares_keys = "gate_up fused; q, k and v are not: parallel.tp=4 ranks share model.num_kv_heads=2"
    for world_size, tp, stage in ((4, 4, 1), (2, 1, 3), (1, 1, 0)):
        layout = {"parallel__tp": tp, "parallel__zero_stage": stage}
        config = changed(first, tmp_path / "run", checkpoint__at_end=False, **layout)
        config.model.fused_projections = world_size > 1
        state = run_part_on(ranks, world_size, config).state_at_start
        said = json.loads((tmp_path / "run" / "run.json").read_text())["kernels"]["projections"]
        assert said == {4: shares_keys, 2: "gate_up and qkv fused", 1: "separate"}[world_size]
        assert state.keys() == written.state_at_end.keys()
        assert [name for name in state if not torch.equal(state[name], written.state_at_end[name])] == []


def test_a_piece_says_what_state_is_asked_for() -> None:
    """The shape of the whole parameter, or of this rank's rows, where that of the part is meant."""
    tensor = Piece(torch.zeros(2, 3), torch.Size((4, 3)), (slice(2, 4), slice(0, 3)), None)  # type: ignore[arg-type]
    assert (tensor.ndim, tensor.numel(), tensor.dtype, tensor.is_meta) == (2, 12, torch.float32, False)
