"""ALiBi in a whole model, against transformers' MPT, whose positions it is; no family here has it as its default."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MptConfig, MptForCausalLM

from models.decoder import Decoder
from tests.models.small import random_decoder, sample_tokens, tiny

SHAPE = {"hidden_size": 24, "intermediate_size": 96, "num_kv_heads": None, "norm": "layernorm", "tie_embeddings": True}


def _mpt_with_weights_of(model: Decoder, num_heads: int) -> MptForCausalLM:
    config = MptConfig(d_model=24, n_heads=num_heads, n_layers=2, vocab_size=61, max_seq_len=32)
    theirs = MptForCausalLM(config).eval()
    ours = model.state_dict()

    def block(i: int) -> dict[str, Tensor]:
        fused = torch.cat([ours[f"blocks.{i}.attention.{name}.weight"] for name in "qkv"])
        return {
            "norm_1.weight": ours[f"blocks.{i}.attention_norm.weight"],
            "attn.Wqkv.weight": fused,
            "attn.out_proj.weight": ours[f"blocks.{i}.attention.o.weight"],
            "norm_2.weight": ours[f"blocks.{i}.mlp_norm.weight"],
            "ffn.up_proj.weight": ours[f"blocks.{i}.mlp.up.weight"],
            "ffn.down_proj.weight": ours[f"blocks.{i}.mlp.down.weight"],
        }

    weights = {f"transformer.blocks.{i}.{name}": weight for i in range(2) for name, weight in block(i).items()}
    weights |= {
        "transformer.wte.weight": ours["embedding.weight"],
        "transformer.norm_f.weight": ours["final_norm.weight"],
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return theirs


@pytest.mark.parametrize("num_heads", [4, 6])
@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_logits_with_alibi_are_those_of_mpt(attention: str, num_heads: int) -> None:
    """A penalty of the wrong sign or scale, slopes given to the wrong heads, distances from the other end."""
    changes = {"activation": "gelu", "gated_mlp": False, "num_heads": num_heads, "attention": attention}
    model = random_decoder(tiny(positions="alibi", **SHAPE, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("bias"):  # MPT's norms have none
                parameter.zero_()
        tokens = sample_tokens()
        expected = _mpt_with_weights_of(model, num_heads)(tokens).logits
        actual = model(tokens)
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        model.config.positions = "none"  # negative control: the penalty is what is compared
        assert (model(tokens) - expected).abs().max() > 1e-2 * expected.abs().max()
