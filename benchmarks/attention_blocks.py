"""Times every block size of the attention kernels on one GPU: what kernels.attention's `Tuned` tables are filled from.

    python benchmarks/attention_blocks.py > blocks.json

Prints the hardware, then a JSON object per kernel, problem and block: TFLOP/s of the products that the mask leaves, or
the error of a block that does not fit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from benchmarks.roofline.attention import SHAPES, WINDOW, documents_of, pairs_seen
from kernels.attention import fused, kernel, kernel_backward
from kernels.backend import Tuned

TABLES: dict[str, Tuned[kernel.Block]] = {
    "forward": kernel.FORWARD,
    "backward_queries": kernel_backward.BACKWARD_QUERIES,
    "backward_keys": kernel_backward.BACKWARD_KEYS,
}


def milliseconds(run: Callable[[], Any], of_kernel: str) -> float:
    """Median time of one of the kernels of `run` on the GPU."""
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    times = sorted(e.device_time_total for e in profile.events() if e.name == f"_attention_{of_kernel}")
    return times[len(times) // 2] / 1000


def measure(name: str, block: kernel.Block, run: Callable[[], Any]) -> float:
    with TABLES[name].forced(block):
        return milliseconds(run, name)


def main() -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}))
    for B, T, H, G, K in SHAPES:
        q, k, v = (torch.randn(B, T, h, K, device=device, dtype=dtype, requires_grad=True) for h in (H, G, G))
        grad = torch.randn_like(q)
        for mask_name, window, documents in [
            ("causal", None, None),
            ("window", WINDOW, None),
            ("documents", None, documents_of(B, T)),
        ]:
            pairs = pairs_seen(torch.zeros(B, T, dtype=torch.int32) if documents is None else documents, window)
            here = None if documents is None else documents.to(device)
            mask = fused.build_mask(T, device, window=window, documents=here)

            def run(mask: Any = mask, q: Any = q, k: Any = k, v: Any = v, grad: Any = grad) -> None:
                torch.autograd.grad(fused.attention(q, k, v, mask)[0], (q, k, v), grad)

            # Products of queries, keys and features: scores and output; scores, dP and dQ; scores, dP, dK and dV.
            for name, products in {"forward": 2, "backward_queries": 3, "backward_keys": 4}.items():
                for block in TABLES[name].configs:
                    if block.queries * block.keys < 64 * 32:
                        continue  # of fp32
                    found: dict[str, Any] = {"kernel": name, "mask": mask_name, "shape": [B, T, H, G, K]}
                    found |= {"block": block.__dict__}
                    try:
                        took = measure(name, block, run)
                        found |= {"ms": took, "tflops": 2 * products * H * K * pairs / took / 1e9}
                    except triton.runtime.errors.OutOfResources as error:
                        found["error"] = str(error)
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
