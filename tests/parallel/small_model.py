"""A small model for data parallelism, its layouts, and what one process makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.data import DataParallel
from parallel.dims import ParallelConfig, ParallelDims
from parallel.mesh import build_mesh
from parallel.parallelize import BlockOptions, parallelize
from parallel.precision import PrecisionConfig
from trainer.config import OptimConfig
from trainer.optim import build_optimizer

NUM_BLOCKS = 3
NUM_WORDS = 11  # in the data; at most the size of the vocabulary


@dataclass(frozen=True)
class Sizes:
    """Of a model. Odd ones make shards uneven on every number of ranks."""

    width: int = 13
    hidden: int = 17
    vocab: int = 11


ODD = Sizes()


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """The shape parallelize expects: blocks, and parameters before and after them; a tied table."""

    def __init__(self, sizes: Sizes = ODD) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab, sizes.width)
        self.blocks = nn.ModuleList(_Block(sizes.width, sizes.hidden) for _ in range(NUM_BLOCKS))
        self.final_norm = nn.LayerNorm(sizes.width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.embedding.weight)


def weights(sizes: Sizes = ODD) -> dict[str, torch.Tensor]:
    """Values of every parameter, by name."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.3 * math.sqrt(ODD.width / sizes.width)
    with torch.device("meta"):
        model = Model(sizes)
    return {n: torch.randn(p.shape, generator=generator) * scale for n, p in model.named_parameters()}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [8, 5]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(NUM_WORDS, (8, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def build(
    stage: int,
    dp_replicate: int,
    *,
    precision: PrecisionConfig | None = None,
    bucket_mb: float = 0.002,
    sizes: Sizes = ODD,
    device: str = "cpu",
    **axes: Any,
) -> tuple[nn.Module, DataParallel]:
    """A model in the given layout with `weights`; buckets of ~2 KiB, so that there are several. Collective."""
    precision = precision or PrecisionConfig()
    config = ParallelConfig(dp_replicate=dp_replicate, zero_stage=stage, bucket_mb=bucket_mb, **axes)
    mesh = build_mesh(ParallelDims.resolve(config, dist.get_world_size()), torch.device(device).type)
    with torch.device("meta"):
        model = Model(sizes)
    data_parallel = parallelize(
        model, mesh, config, precision=precision, blocks=BlockOptions(), device=torch.device(device)
    )
    values = {name: value.to(device) for name, value in weights(sizes).items()}
    for name, master in data_parallel.masters.items():
        if isinstance(master, DTensor):
            local = distribute_tensor(values[name], master.device_mesh, master.placements).to_local()
            master.to_local().detach().copy_(local)
        else:
            master.detach().copy_(values[name])
    data_parallel.publish()
    return model, data_parallel


def full(t: torch.Tensor) -> torch.Tensor:
    """A copy of all of it."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def steps(
    stage: int,
    dp_replicate: int,
    num_micro: int,
    compute: str,
    num_steps: int,
    sizes: Sizes = ODD,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Gradients of the first step and weights after AdamW steps, gathered whole, and logits. Collective."""
    precision = PrecisionConfig(compute=compute)
    model, data_parallel = build(stage, dp_replicate, precision=precision, sizes=sizes, device=device)
    first = data_parallel.needed_first
    optimizer = build_optimizer(data_parallel.masters, OptimConfig(lr=1e-2), copies=data_parallel.copies, first=first)
    inputs, labels = (tensor.to(device) for tensor in data())
    rank, world = dist.get_rank(), dist.get_world_size()
    one, zero = torch.tensor(1.0, device=device), torch.tensor(0.0, device=device)
    out: dict[str, torch.Tensor] = {}
    for step in range(num_steps):
        mine = inputs.chunk(world)[rank].chunk(num_micro), labels.chunk(world)[rank].chunk(num_micro)
        for i, (x, y) in enumerate(zip(*mine, strict=True)):
            data_parallel.start_microbatch(last=i == num_micro - 1)
            logits = model(x).float()
            (F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / labels.numel()).backward()
        data_parallel.finish_backward()
        if step == 0:
            out |= {f"grad/{n}": full(m.grad) for n, m in data_parallel.masters.items()}  # type: ignore[arg-type]
        publish = partial(data_parallel.publish, written=optimizer.written)
        optimizer.step(lr=1e-2, grad_scale=one, skip=zero, updated=publish)
    out |= {f"weight/{n}": full(m) for n, m in data_parallel.masters.items()}
    with torch.no_grad():
        out["logits"] = model(inputs).float()
    return out


def oracle(num_steps: int, sizes: Sizes = ODD) -> dict[str, torch.Tensor]:
    """What `steps` returns by torch alone: one process, torch.optim.AdamW."""
    model = Model(sizes)
    model.load_state_dict(weights(sizes))
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith("embedding")]
    kept = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.startswith("embedding")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    inputs, labels = data()
    out: dict[str, torch.Tensor] = {}
    for step in range(num_steps):
        F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
        if step == 0:
            out |= {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    out |= {f"weight/{n}": p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        out["logits"] = model(inputs)
    return out
