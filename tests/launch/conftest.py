"""What tests of several programs start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from data.tokenizer import train_bpe


def small_llama(path: Path, *, heads: int = 6, inner: int = 37, max_length: int = 32) -> Path:
    """A folder of a small random Llama of transformers, with a tokenizer."""
    tokenizer = train_bpe(iter(["one two three two one " * 9]), 290)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + 3,
        hidden_size=24,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("hf") / "model")
