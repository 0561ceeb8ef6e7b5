"""A short sample at the end of training: the plain forward, one token at a time, on any layout.

All ranks run it together (sharded layers need every rank) and draw the same tokens. For serving see the inference lab.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from data.tokenizer import Tokenizer
from kernels.philox import uniform
from trainer.config import ConfigError
from trainer.step import TrainState


def check_prompt(tokenizer: Tokenizer, prompt: str, *, vocab_size: int) -> None:
    """Raise ConfigError if the model has no embedding for a token of the prompt, before hours of training end in it."""
    largest = max(_prompt_ids(tokenizer, prompt))
    if largest >= vocab_size:
        raise ConfigError([
            f"train.sample_prompt={prompt!r} has the token id {largest}, outside model.vocab_size={vocab_size}; use "
            "the tokenizer that made the data, another prompt, or train.sample_tokens=0"
        ])  # fmt: skip


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return list(tokenizer.encode(prompt)) or [tokenizer.eos_id]  # where a document begins


@torch.no_grad()
def sample_text(
    state: TrainState,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    num_tokens: int,
    max_seq_len: int,
    seed: int,
    temperature: float = 0.7,
    top_k: int = 40,
) -> str:
    """prompt continued by num_tokens tokens; the context is the last max_seq_len of them.

    The window has a fixed length (padded on the right, which causal attention never looks at), so compiled blocks see
    one shape.
    """
    state.begin_forwards()
    state.model.eval()
    ids = _prompt_ids(tokenizer, prompt)
    for i in range(num_tokens):
        context = ids[-max_seq_len:]
        window = torch.zeros(1, max_seq_len, dtype=torch.int64, device=state.device)
        window[0, : len(context)] = torch.tensor(context)
        last = len(context) - 1
        logits = state.passes.logits(state, window, last)
        top, candidates = (logits[0] / temperature).topk(min(top_k, logits.shape[-1]))
        cumulative = top.softmax(-1).cumsum(-1)
        draw = uniform(seed, "sample", torch.tensor([i], device=state.device))
        choice = int((cumulative < draw).sum().clamp(max=len(candidates) - 1))
        token_of_rank0 = candidates[choice : choice + 1].clone()
        dist.broadcast(token_of_rank0, src=0)
        token = int(token_of_rank0)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    state.model.train()
    return tokenizer.decode(ids)
