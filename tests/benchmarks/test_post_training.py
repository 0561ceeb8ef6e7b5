"""benchmarks/post_training.py: its runs are legal, and TRL's are of as much work."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.hf_trl import _arguments
from benchmarks.post_training import COMPLETIONS, PAIRS, ROWS, pairs
from benchmarks.word_problems import make
from launch.compose import compose_one
from trainer.validate import finalize


def test_every_run_is_legal_and_its_peer_does_as_much(tmp_path: Path) -> None:
    make(tmp_path / "words", num_examples=200, num_pairs=40, num_prompts=100)
    shape = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "hf")
    for file in (tmp_path / "words/tokenizer").iterdir():
        shutil.copy(file, tmp_path / "hf")
    for name, pair in pairs("llama3_1b", tmp_path / "words", tmp_path / "hf", 24, 16).items():
        steps = [f"train.steps={pair.steps}", f"schedule.warmup_steps={pair.steps // 8}", "precision=bf16"]
        config = finalize(compose_one([*pair.changes, *steps, f"run.dir={tmp_path / 'run'}"]), world_size=1)
        peer = _arguments().parse_args(pair.peer)
        assert peer.batch == config.train.global_batch_size == {"dpo": PAIRS, "grpo": COMPLETIONS}.get(name, ROWS)
        assert peer.micro_batch == config.train.micro_batch_size
        assert peer.seq_len == config.train.seq_len
        assert (peer.lora, peer.nf4) == ((config.adapter.rank, True) if name == "qlora" else (0, False))
        if name == "grpo":
            assert (peer.group_size, peer.max_tokens) == (config.recipe.rl.group_size, config.recipe.rl.max_tokens)
