"""What a step has to read from memory: the least time it can take is that over the bandwidth."""

from __future__ import annotations

import re
import time

import torch

from models.config import ModelConfig
from models.decoder import Decoder
from parallel.regions import local_tensor

_LOOKED_UP = ("embedding.", "positions.")  # a row for each token, not the table


def weight_bytes(model: Decoder, num_tokens: int = 1) -> float:
    """Bytes of weights that a pass over `num_tokens` tokens reads, of those that this rank holds.

    Of E routed experts, k a token, those that any token chooses: 1 - (1 - k/E)^num_tokens of them where all choices are
    equally probable, which is the most there can be on average. Tables that are only looked up are left out (a head
    that is tied to one reads it), and so are layers that only training has.
    """
    config = model.config
    chosen = 1.0
    if config.moe.num_experts:
        chosen = 1 - (1 - config.moe.top_k / config.moe.num_experts) ** num_tokens
    read = 0.0
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and int(block.group(1)) >= config.num_layers:
            continue
        if name.startswith(_LOOKED_UP) and not (config.tie_embeddings and name.startswith(_LOOKED_UP[0])):
            continue
        read += local_tensor(parameter).nbytes * (chosen if ".mlp.experts." in name else 1.0)
    return read


def tokens_read(config: ModelConfig, length: int) -> float:
    """Tokens of the cache that the next token of a sequence of `length` attends to, as a mean over the layers."""
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    return sum(length if window is None else min(length, window) for window in windows) / config.num_layers


def copy_bandwidth(device: torch.device, num_bytes: int = 2**28) -> float:
    """Bytes a second, read and written, that a copy on the device reaches: the best of ten."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * num_bytes / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
