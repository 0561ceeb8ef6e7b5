"""What determinism costs on one GPU with random weights: the engine and the trainer's forward, with and without.

    python benchmarks/deterministic.py --out benchmarks/results/deterministic_h200.json

Of the shape of Llama 3.1 8B in bf16: a request of 512 -> 128 tokens, 64 requests of 128 -> 256, and 16 prompts of 4096,
by engines with and without engine.deterministic; the forward pass and loss of 2 x 4096 tokens, as a trainer validates
with and without train.batch_invariant; and of Llama 3.2 1B's shape forward and backward of the same tokens. Prints a
JSON object for each, with tokens/s of both and their ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

import torch

from benchmarks.serving import random_shape, timed
from inference.config import EngineConfig
from inference.engine import Engine
from models.decoder import Decoder
from models.invariant import make_batch_invariant
from trainer.loss import token_loss_sum

LARGE, SMALL = ["model=llama3_8b"], ["model=llama3_1b"]
CASES: dict[str, tuple[list[int], list[int]]] = {  # tokens of prompts and of continuations
    "batch1": ([512], [128]),
    "batch64": ([128] * 64, [256] * 64),
    "prefill": ([4096] * 16, [1] * 16),
}
ENGINE = EngineConfig(max_seq_len=4352, max_sequences=64, max_batch_tokens=16384, prefix_cache=False)
ROWS, SEQ_LEN = 2, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}

    def note(case: str, invariant: bool, tokens: int, run: Callable[[], float]) -> None:
        run()
        seconds = statistics.median(run() for _ in range(args.repeats))
        of_case = found.setdefault(case, {})
        of_case["deterministic" if invariant else "ordinary"] = tokens / seconds

    for invariant in (False, True):
        model = _model(LARGE, invariant)
        engine = Engine(model, replace(ENGINE, deterministic=invariant))
        for case, (lengths, new) in CASES.items():
            tokens = sum(lengths) if case == "prefill" else sum(new)
            note(case, invariant, tokens, partial(timed, engine, lengths, new, 0.0, seed=0))
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        note("trainer_forward", invariant, ROWS * SEQ_LEN, partial(_forward, model))
        del model
        gc.collect()
        torch.cuda.empty_cache()
        model = _model(SMALL, invariant)
        note("trainer_forward_backward", invariant, ROWS * SEQ_LEN, partial(_forward, model, backward=True))
        del model
        gc.collect()
        torch.cuda.empty_cache()
    results: list[dict[str, Any]] = [
        {"case": case, **speeds, "deterministic_of_ordinary": speeds["deterministic"] / speeds["ordinary"]}
        for case, speeds in found.items()
    ]
    for result in results:
        print(json.dumps(result), flush=True)
    if args.out:
        where = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "unit": "tokens/s"}
        Path(args.out).write_text(json.dumps({"environment": where, "results": results}, indent=1) + "\n")


def _model(overrides: list[str], invariant: bool) -> Decoder:
    model = random_shape(overrides)
    if invariant:
        make_batch_invariant(model)
    return model


def _forward(model: Decoder, *, backward: bool = False) -> float:
    """Seconds of forward and loss, and of their gradients."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    tokens = torch.randint(0, 100_000, (ROWS, SEQ_LEN + 1), generator=generator, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    head = partial(token_loss_sum, labels=tokens[:, 1:].contiguous(), batch_invariant=model.batch_invariant)
    with torch.set_grad_enabled(backward):
        loss = model(tokens[:, :-1], head=head)
        if backward:
            loss.backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


if __name__ == "__main__":
    main()
