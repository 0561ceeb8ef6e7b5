"""A short sample at the end of training: the plain forward, one token at a time, on any layout.

All ranks run it together (sharded layers need every rank) and draw the same tokens. For serving see the inference lab.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from data.tokenizer import Tokenizer
from kernels.philox import uniform
from trainer.step import TrainState


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
    state.model.eval()
    ids = list(tokenizer.encode(prompt)) or [0]
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
