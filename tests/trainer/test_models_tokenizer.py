"""Weights from a Hugging Face folder are trained on ids of the tokenizer they were made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from data.config import DataConfig, TokenizerConfig
from data.loader import load_tokenizer
from data.tokenizer import train_bpe
from models.config import ModelConfig
from tests.parity.harness import tiny_config
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama without a tokenizer."""
    place = tmp_path_factory.mktemp("hf") / "model"
    shape = {"vocab_size": 300, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


def config_with(folder: Path, text: Path, **data: object) -> TrainConfig:
    (text / "a.txt").write_text("some other text " * 50)
    config = tiny_config(text / "run", DataConfig(source="text", path=str(text / "a.txt"), **data))  # type: ignore
    config.model = ModelConfig(family="hf", path=str(folder))
    return config


def test_text_without_a_named_tokenizer_is_read_by_the_models_own(folder: Path, tmp_path: Path) -> None:
    """A BPE trained on the new text: its ids fit the vocabulary, and the weights are trained on nonsense in silence."""
    train_bpe(iter(["what the weights were trained on " * 20]), 290).save(folder)
    try:
        final = finalize(config_with(folder, tmp_path), world_size=1)
        assert final.data.tokenizer.path == str(folder)
        own = transformers.AutoTokenizer.from_pretrained(folder)
        assert load_tokenizer(final.data).encode("were trained") == own("were trained")["input_ids"]
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()


def test_without_a_tokenizer_in_the_folder_one_must_be_named(folder: Path, tmp_path: Path) -> None:
    """The same, where the folder cannot help."""
    with pytest.raises(ConfigError) as refused:
        finalize(config_with(folder, tmp_path), world_size=1)
    (line,) = refused.value.problems
    assert line.startswith(f"data.tokenizer.path is missing: the weights in model.path={folder} belong to a tokenizer")
    other = tmp_path / "other"
    train_bpe(iter(["any " * 20]), 280).save(other)
    named = config_with(folder, tmp_path, tokenizer=TokenizerConfig(path=str(other)))
    assert finalize(named, world_size=1).data.tokenizer.path == str(other)


def test_token_arrays_and_fresh_weights_need_none(folder: Path, tmp_path: Path) -> None:
    """A rule that refuses what is right: ids that are given, and a model that starts from nothing."""
    (tmp_path / "t.npy").write_bytes(b"x")
    arrays = config_with(folder, tmp_path)
    arrays.data = DataConfig(source="tokens", path=str(tmp_path / "t.npy"))
    assert finalize(arrays, world_size=1).data.tokenizer.path is None
    fresh = config_with(folder, tmp_path)
    fresh.model = ModelConfig(vocab_size=300)
    assert finalize(fresh, world_size=1).data.tokenizer.path is None
