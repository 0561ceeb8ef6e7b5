"""Multi-token prediction outside of training: later tokens of a batch, Hugging Face folders, what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.batch import IGNORE_INDEX, Batch
from models.config import ModelConfig, problems
from models.flops import flops_per_token
from models.hf import export_hf_weights, load_hf_weights
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from models.mtp_config import MTPConfig
from models.registry import build_model, hf_config, resolve_model
from tests.models.oracle import eager, ours
from tests.models.small import random_decoder, sample_tokens, tiny
from trainer.identity import model_identity


def deepseek(depth: int, **changes: Any) -> ModelConfig:
    """A small DeepSeek-V3."""
    return tiny(
        family="deepseek_v3",
        num_kv_heads=None,
        mla=MLAConfig(kv_rank=8, q_rank=7, nope_dim=4, rope_dim=6, value_dim=5),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=5, num_shared=1, first_dense=1, router="sigmoid"),
        mtp=MTPConfig(depth=depth),
        **changes,
    )


def exported(config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """Weights of a random model, written to `folder`."""
    weights = random_decoder(config).state_dict()
    export_hf_weights(weights.__getitem__, config, folder, dtype=torch.float32)
    return weights


@pytest.mark.parametrize("tied", [False, True])
def test_a_deepseek_folder_keeps_its_layers_for_multi_token_prediction(tied: bool, tmp_path: Path) -> None:
    """A name that published files do not have, halves of the projection swapped, a model that transformers misreads."""
    weights = exported(deepseek(2, tie_embeddings=tied), tmp_path / "out")
    files = load_file(tmp_path / "out" / "model.safetensors")
    table, head = weights["embedding.weight"], weights["embedding.weight" if tied else "head.weight"]
    for k in range(2):  # behind layers 0 and 1
        theirs = f"model.layers.{2 + k}"
        assert torch.equal(files[f"{theirs}.eh_proj.weight"], weights[f"blocks.{2 + k}.look_ahead.project.weight"])
        assert torch.equal(files[f"{theirs}.shared_head.norm.weight"], weights[f"blocks.{2 + k}.output_norm.weight"])
        assert torch.equal(files[f"{theirs}.embed_tokens.weight"], table)
        assert torch.equal(files[f"{theirs}.shared_head.head.weight"], head)
        assert {f"{theirs}.{n}.weight" for n in ("enorm", "hnorm", "input_layernorm", "mlp.gate")} <= files.keys()
    for depth in (2, 1, 0):
        loaded = ours(tmp_path / "out", mtp=MTPConfig(depth=depth))
        state = loaded.state_dict()
        assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == set(map(str, range(2 + depth)))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in state.items())
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **eager("deepseek_v3")).eval()
    tokens = sample_tokens()
    torch.testing.assert_close(loaded(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)


def test_more_depth_than_a_folder_has_and_families_without_words_for_it_are_refused(tmp_path: Path) -> None:
    """Blocks that start from nothing in a pretrained model, or are lost on export."""
    config = deepseek(1)
    exported(config, tmp_path / "out")
    with pytest.raises(ValueError, match=r"model\.mtp\.depth=2, .* use at most 1"):
        resolve_model(ModelConfig(family="hf", path=str(tmp_path / "out"), mtp=MTPConfig(depth=2)))
    with pytest.raises(ValueError, match=r"llama cannot express model\.mtp=MTPConfig\(depth=1"):
        hf_config(tiny(mtp=MTPConfig(depth=1)))


def test_a_missing_tensor_of_a_wanted_layer_is_named(tmp_path: Path) -> None:
    """A folder without the layer, from which a model with random blocks would be made."""
    exported(deepseek(1), tmp_path / "out")
    config = resolve_model(ModelConfig(family="hf", path=str(tmp_path / "out"), mtp=MTPConfig(depth=1)))
    deeper = replace(config, mtp=MTPConfig(depth=2))
    with pytest.raises(ValueError, match=r"model\.layers\.3"):
        load_hf_weights(tmp_path / "out", build_model(deeper).state_dict(), deeper)


def test_the_weight_of_the_loss_may_change_between_runs_and_the_depth_may_not() -> None:
    """A run that goes on with 0.1, as DeepSeek-V3 did, refused; or one with blocks that the checkpoint lacks."""
    assert model_identity(tiny(mtp=MTPConfig(1, 0.3))) == model_identity(tiny(mtp=MTPConfig(1, 0.1)))
    assert model_identity(tiny(mtp=MTPConfig(1))) != model_identity(tiny())


@pytest.mark.parametrize(
    ("mtp", "message"),
    [
        (MTPConfig(depth=-1), "model.mtp.depth=-1 must not be negative"),
        (MTPConfig(depth=1, loss_weight=0.0), "model.mtp.loss_weight=0.0 must be positive"),
        (MTPConfig(depth=8), "model.mtp.depth=8 leaves the last block no target"),
    ],
)
def test_what_cannot_be_trained_is_refused(mtp: MTPConfig, message: str) -> None:
    """A loss over no tokens."""
    assert any(message in problem for problem in problems(ModelConfig(mtp=mtp), seq_len=8))


def test_later_tokens_and_their_labels_end_with_the_document() -> None:
    """A target in another document, or beyond the sequence; a cut over the cp axis that leaves later tokens behind."""
    batch = Batch(
        tokens=torch.tensor([[5, 6, 7, 8, 9, 4]]),
        labels=torch.tensor([[6, 7, IGNORE_INDEX, 9, 4, 3]]),
        positions=torch.tensor([[0, 1, 2, 0, 1, 2]]),
        documents=torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32),
        samples=torch.tensor([0]),
    )
    masked = batch.look_ahead(2).ahead
    assert [tokens.tolist() for tokens, _ in masked] == [[[6, 7, 8, 9, 4, 0]], [[7, 8, 9, 4, 0, 0]]]
    none = IGNORE_INDEX
    assert masked[0][1].tolist() == [[7, none, none, 4, 3, none]]
    assert masked[1][1].tolist() == [[none, none, none, 3, none, none]]
    open_ = replace(batch, documents=None, labels=torch.tensor([[6, 7, 8, 9, 4, 3]])).look_ahead(1)
    assert open_.ahead[0][1].tolist() == [[7, 8, 9, 4, 3, none]]
    part = open_.take(torch.tensor([1, 4]))
    assert [x.tolist() for x in part.ahead[0]] == [[[7, 4]], [[8, 3]]]
    assert batch.look_ahead(0) is batch


def test_flops_count_the_blocks_and_their_use_of_the_head() -> None:
    """MFU without the third of a small model that these blocks are. Oracle: torch's own count."""
    config = tiny(mtp=MTPConfig(depth=2), attention="reference")
    model = build_model(config)
    tokens = torch.zeros(1, 16, dtype=torch.int64)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T).sum()

    with FlopCounterMode(display=False) as counter:
        model(tokens, head=head, ahead=[(tokens, head)] * 2).sum().backward()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert flops_per_token(config, 16) * 16 == counter.get_total_flops() + 6 * norms * 16
