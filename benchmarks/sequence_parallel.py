"""Whether parallel.sp_chunks pays: the time of one block under tensor and sequence parallelism, by number of chunks.

    torchrun --nproc-per-node 2 benchmarks/sequence_parallel.py --out benchmarks/results/sequence_parallel_2xh200.json
    torchrun --nproc-per-node 4 benchmarks/sequence_parallel.py

A block of Llama 3 8B in bf16 over all GPUs. Prints one JSON object: for each number of chunks, compiled and not, the
milliseconds of a forward and a backward (median of --repeats, of the slowest rank); and those of the block's gathers
and scatters alone, uncut and one after the other, which bound what chunks can hide: two of the eight, the scatters of
backward, are hidden without them. A number of chunks that does not divide the tokens of a rank is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from models.config import ModelConfig
from models.layers.attention import build_context
from models.registry import build_model, resolve_model
from parallel.collectives import Axis, start_all_gather, start_reduce_scatter, wait
from parallel.groups import ModelParallel
from parallel.parallelize import compile_block
from parallel.regions import local_tensor

MODES = ["eager", "compiled"]
LLAMA3_8B = ModelConfig(
    vocab_size=1024,  # of no account in a block
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=131072,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    args = parser.parse_args(argv)
    torch.cuda.set_device(local_rank := int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    try:
        result = measure(LLAMA3_8B, torch.device("cuda"), **{k: v for k, v in vars(args).items() if k != "out"})
    except ValueError as error:  # the same on every rank
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    if local_rank == 0:
        print(json.dumps(result, indent=2))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(
    config: ModelConfig,
    device: torch.device,
    *,
    seq_len: int,
    batch: int,
    chunks: Sequence[int],
    modes: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    """The object as a dict, the same on every rank. Raises ValueError for chunks that do not divide a rank's tokens."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    tokens = seq_len // mesh.size()
    if wrong := [n for n in chunks if n < 1 or tokens % n]:
        raise ValueError(f"--chunks {wrong[0]} does not divide the {tokens} tokens of a rank")
    config = resolve_model(config)
    x = torch.randn(batch, tokens, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tp": mesh.size(),
        "seq_len": seq_len,
        "batch": batch,
        "ms": {},
        "ms_of_collectives_alone": _slowest(_collectives(x.detach(), mesh), repeats, device),
    }
    for mode in modes:
        for n in chunks:
            run = _block(config, x, mesh, seq_len=seq_len, chunks=n, compiled=mode == "compiled")
            result["ms"][f"{mode}, {n} chunks"] = _slowest(run, repeats, device)
            torch._dynamo.reset()
    return result


def _block(
    config: ModelConfig, x: Tensor, mesh: DeviceMesh, *, seq_len: int, chunks: int, compiled: bool
) -> Callable[[], None]:
    """A forward and a backward of one block."""
    groups = ModelParallel(tp=mesh, sequence_parallel=True, sp_chunks=chunks)
    with x.device:
        model = build_model(config, groups=groups).to(x.dtype)
    block = model.blocks[0]
    for parameter in block.parameters():
        local_tensor(parameter.detach()).normal_(std=0.02)
    context = build_context(
        config,
        seq_len=seq_len,
        device=x.device,
        dtype=x.dtype,
        positions=None,
        documents=None,
        samples=None,
        groups=groups,
    )
    if compiled:
        compile_block(block, backend="inductor" if x.is_cuda else "aot_eager")
    leaves = [x, *block.parameters()]
    grad = torch.ones_like(x)

    def run() -> None:
        torch.autograd.grad(block(x, context=context), leaves, grad)

    return run


def _collectives(x: Tensor, mesh: DeviceMesh) -> Callable[[], None]:
    """The four gathers and four scatters of a block, forward and backward."""
    axis = Axis.of(mesh)
    whole = x.repeat(1, axis.size, 1)

    def run() -> None:
        for _ in range(4):
            wait(start_all_gather(x, axis))
            wait(start_reduce_scatter(whole, axis, dim=1))

    return run


def _slowest(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median milliseconds over repeats, of the slowest rank; three runs before are not counted."""
    milliseconds = []
    for _ in range(3 + repeats):
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        milliseconds.append((time.perf_counter() - start) * 1000)
    found: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, statistics.median(milliseconds[3:]))
    return round(max(found), 4)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
