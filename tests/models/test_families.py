"""Every family against transformers: logits, gradients, and refusal of what is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import FAMILY_NAMES, ModelConfig
from models.registry import FAMILIES, resolve_model
from parallel.fused import fused_parameters, separate
from tests.models.oracle import CASES, CLASSES, GPT2, LLAMA, OPT, gradients_by_our_name, pair
from tests.models.small import sample_tokens

TOLERANCE = 1e-5


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a fraction of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    """A wrong mask, scale, rotation, norm, activation or weight name, in any family."""
    reference, model = pair(case, tmp_path)
    tokens = sample_tokens()
    expected = reference(tokens).logits
    logits = model(tokens)
    assert relative_error(logits, expected) < TOLERANCE
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * direction).sum().backward()
    (logits * direction).sum().backward()
    expected_grads = gradients_by_our_name(reference, model)
    held = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    grads = separate(held, fused_parameters(model))
    for name, expected_grad in expected_grads.items():
        grad = grads[name]
        assert isinstance(grad, torch.Tensor)
        scale = expected_grad
        if name.endswith("k.bias") and model.config.positions != "rope":
            # One vector added to all keys moves all scores of a query alike and changes no softmax: this gradient is
            # zero but for rounding, so it is measured against that of the queries' bias.
            scale = expected_grads[name.replace("k.bias", "q.bias")]
        assert (grad - expected_grad).abs().max() <= 2 * TOLERANCE * scale.abs().max(), name


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
@pytest.mark.parametrize("case", ["mistral", "qwen3_windows", "gpt2"])
def test_either_attention_gives_the_logits_of_transformers(case: str, implementation: str, tmp_path: Path) -> None:
    """An implementation that differs in window edge or head grouping."""
    reference, model = pair(case, tmp_path, attention=implementation)
    tokens = sample_tokens()
    assert relative_error(model(tokens), reference(tokens).logits) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2_windows", {"sliding_window_layers": [0, 2]}),
        ("llama", {"norm_eps": 1e-2}),
        ("gpt2", {"activation": "gelu"}),
    ],
)
def test_the_comparison_notices_a_small_mistake(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Negative control: a tolerance so wide, or a case so easy, that a wrong model would pass."""
    reference, model = pair(case, tmp_path)
    config = model.config
    for name, value in change.items():
        setattr(config, name, value)
    wrong = type(model)(config)
    wrong.load_state_dict(model.state_dict())
    tokens = sample_tokens()
    assert relative_error(wrong.eval()(tokens), reference(tokens).logits) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
def test_a_rope_scaling_is_not_plain_rope(name: str, tmp_path: Path) -> None:
    """Negative control: a case whose scaling changes nothing at its lengths would prove nothing."""
    case = {"linear": "llama_linear", "dynamic": "llama_ntk", "yarn": "llama_yarn", "llama3": "llama3"}[name]
    reference, model = pair(case, tmp_path)
    model.config.rope.scaling = "none"
    tokens = sample_tokens()
    assert relative_error(model(tokens), reference(tokens).logits) > 100 * TOLERANCE


def test_older_folders_with_rope_theta_and_rope_scaling_mean_the_same(tmp_path: Path) -> None:
    """Folders written before transformers 5, which name the rope fields otherwise."""
    _, model = pair("llama3", tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    scaling = content.pop("rope_parameters")
    content["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    content["rope_scaling"] = scaling
    path.write_text(json.dumps(content))
    assert resolve_model(ModelConfig(family="hf", path=str(tmp_path))) == model.config


def test_every_family_has_its_name_in_the_config_and_an_oracle() -> None:
    """A family added in one place only."""
    assert set(FAMILIES) == set(FAMILY_NAMES) == set(CLASSES) == {family for family, _ in CASES.values()}


REFUSED = [
    ("llama", {**LLAMA, "rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ("llama", {**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {**LLAMA, "rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("llama", {**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ("llama", {**LLAMA, "hidden_act": "quick_gelu"}, "quick_gelu"),
    ("llama", {**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {**LLAMA, "attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("llama", {k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size"),
    ("mistral", {**LLAMA, "attention_bias": True}, "attention_bias"),
    ("qwen2", {**LLAMA, "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("qwen2", {**LLAMA, "layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
    ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {**GPT2, "scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {**GPT2, "add_cross_attention": True}, "add_cross_attention"),
    ("opt", {**OPT, "word_embed_proj_dim": 12}, "word_embed_proj_dim"),
    ("opt", {**OPT, "layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
]


@pytest.mark.parametrize(("family", "fields", "named"), REFUSED, ids=[f"{f}-{n}" for f, _, n in REFUSED])
def test_a_field_that_changes_the_maths_is_refused_by_name(
    family: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """A model that loads and is silently another one."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **fields}))
    with pytest.raises(ValueError, match=named):
        resolve_model(ModelConfig(family="hf", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"model_type": "bloom"}', "bloom"),
        ('{"model_type": "gpt2", "n_embd": "21", "vocab_size": 61}', "n_embd='21'; its type should be int"),
        ('{"model_type": "gpt2", "n_embd": 21, "vocab_size": 61, "n_layer": 1, "n_head": 4}', "num_heads"),
    ],
)
def test_a_folder_that_is_no_model_is_one_clear_error(content: str | None, message: str, tmp_path: Path) -> None:
    """A traceback from the depths for a wrong path."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        resolve_model(ModelConfig(family="hf", path=str(tmp_path)))


def test_a_family_chosen_by_name_must_be_that_of_the_folder(tmp_path: Path) -> None:
    """model=mistral_7b model.path=LLAMA_DIR running as something else than either."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    with pytest.raises(ValueError, match="model=hf"):
        resolve_model(ModelConfig(family="mistral", path=str(tmp_path)))
