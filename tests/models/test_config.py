"""ModelConfig: every mistake is found and named, and the YAML files are the models they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from models.config import ModelConfig, RopeConfig, problems
from models.flops import causal_flops_per_token, flops_per_token, multiplications_of_layers, num_parameters
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from models.registry import FAMILIES, build_model, hf_config, resolve_model
from parallel.dims import ParallelConfig
from tests.models.oracle import CASES, CLASSES, theirs
from tests.models.small import tiny
from trainer.pipelined import pipeline_layout


def moe(**changes: Any) -> MoEConfig:
    """Six small experts."""
    return replace(MoEConfig(num_experts=6, top_k=2, intermediate_size=5), **changes)


YAML_FILES = sorted(Path("configs/model").glob("*.yaml"))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"family": "lama"}, "model.family=lama is unknown"),
    ({"num_kv_heads": 4}, "does not divide model.num_heads=6; use model.num_kv_heads=1, 2, 3 or 6"),
    ({"num_heads": 5}, "model.num_heads=5 does not divide model.hidden_size=24"),
    ({"head_dim": 5}, "model.head_dim=5 is odd"),
    ({"head_dim": 2, "rope": RopeConfig(scaling="ntk", factor=2.0)}, "model.head_dim=2"),
    ({"vocab_size": 0}, "model.vocab_size=0 must be at least 1"),
    ({"num_layers": 0, "sliding_window": -1}, "model.sliding_window=-1 must be at least 1"),
    ({"norm_eps": 0.0}, "model.norm_eps=0.0 must be positive"),
    ({"norm": "batchnorm"}, "use model.norm=rmsnorm or layernorm"),
    ({"activation": "swish"}, "use model.activation=silu, gelu"),
    ({"positions": "sinusoidal"}, "use model.positions=rope, learned, alibi or none"),
    ({"attention": "flash"}, "use model.attention=auto, reference, sdpa, flex or triton"),
    ({"activation_checkpoint": "some"}, "use model.activation_checkpoint=none, full, selective, offload or budget"),
    ({"activation_checkpoint": "budget"}, "model.activation_memory_gib=null must be positive"),
    ({"activation_checkpoint": "budget", "activation_memory_gib": 0.0}, "model.activation_memory_gib=0.0 must be"),
    ({"activation_memory_gib": 3.0}, "has no effect with model.activation_checkpoint=none"),
    ({"dropout": 1.0}, "model.dropout=1.0"),
    ({"attention_dropout": -0.1}, "model.attention_dropout=-0.1"),
    ({"attention_dropout": 0.1}, "model.attention=auto"),
    ({"attention_sinks": True, "attention": "sdpa"}, "model.attention=sdpa, which does not return the log-sum-exp"),
    ({"sliding_window_layers": [0]}, "without model.sliding_window"),
    ({"sliding_window": 3, "sliding_window_layers": [1, 2]}, "names [2]; layers are 0 to 1"),
    ({"rope": RopeConfig(scaling="longrope")}, "model.rope.scaling=longrope is unknown"),
    ({"rope": RopeConfig(factor=2.0)}, "model.rope.factor=2.0 has no effect"),
    ({"rope": RopeConfig(scaling="linear", factor=0.5)}, "model.rope.factor=0.5 must be at least 1"),
    ({"rope": RopeConfig(theta=0.0)}, "model.rope.theta=0.0"),
    ({"rope": RopeConfig(scaling="llama3", low_freq_factor=4.0)}, "model.rope.high_freq_factor=4.0 must be above"),
    ({"rope": RopeConfig(scaling="yarn", beta_fast=0.5)}, "model.rope.beta_fast=0.5"),
    ({"rope": RopeConfig(scaling="yarn", original_max_seq_len=0)}, "model.rope.original_max_seq_len=0"),
    ({"positions": "learned"}, "train.seq_len=50 is above model.max_seq_len=32"),
    ({"dropout": 0.1}, "which numbers the dropout draws"),
    ({"family": "hf"}, "model.path is missing"),
    ({"routing": RoutingConfig(aux_weight=0.1)}, "model.routing.aux_weight=0.1 without experts"),
    (
        {"moe": MoEConfig(num_experts=4)},
        "model.moe.intermediate_size=0 must be at least 1; use",
    ),
    ({"moe": MoEConfig(num_experts=-4, intermediate_size=5)}, "model.moe.num_experts=-4 must be at least 0"),
    ({"moe": moe(router="top"), "norm_first": True}, "use model.moe.router=softmax, switch, gshard or sigmoid"),
    ({"moe": moe(top_k=7)}, "model.moe.top_k=7 is above the 6 experts"),
    ({"moe": moe(num_groups=4)}, "does not divide model.moe.num_experts=6; use model.moe.num_groups=1, 2, 3 or 6"),
    ({"moe": moe(num_groups=3, top_groups=4)}, "model.moe.top_groups=4 is above model.moe.num_groups=3"),
    ({"moe": moe(num_groups=6, top_groups=3, router="sigmoid")}, "use model.moe.num_groups=1, 2 or 3"),
    (
        {"moe": moe(router="switch", normalize=False)},
        "model.moe.top_k=2 does not fit model.moe.router=switch; use",
    ),
    ({"moe": moe(router="switch", top_k=1)}, "so that the router cannot learn"),
    ({"moe": moe(router="gshard", normalize=False)}, "model.moe.normalize=false does not fit"),
    ({"moe": moe(dense_layers=[0, 2])}, "model.moe.dense_layers=[0, 2] names [2]; layers are 0 to 1"),
    ({"moe": moe(first_dense=2)}, "model.moe.first_dense=2 and model.moe.every=1 leave none of the 2 layers"),
    ({"moe": moe(), "gated_mlp": False}, "model.gated_mlp=false"),
    ({"moe": moe(), "norm_first": False}, "model.norm_first=false"),
    ({"moe": moe(), "routing": RoutingConfig(bias_update_rate=0.1)}, "model.routing.bias_update_rate=0.1"),
    ({"mla": MLAConfig(kv_rank=8, rope_dim=3), "num_kv_heads": 6}, "model.mla.rope_dim=3 is odd"),
    ({"mla": MLAConfig(kv_rank=8), "num_kv_heads": 2}, "model.num_kv_heads=2 has no meaning with model.mla"),
    ({"mla": MLAConfig(kv_rank=8), "num_kv_heads": 6, "head_dim": 8}, "use null or 192"),
    ({"mla": MLAConfig(kv_rank=8), "num_kv_heads": 6, "qk_norm": True}, "model.qk_norm=true do not work"),
    ({"mla": MLAConfig(kv_rank=8), "num_kv_heads": 6, "positions": "none"}, "model.positions=none does not work"),
    ({"moe": moe(), "routing": RoutingConfig(capacity_factor=-1.0)}, "must be finite and not negative"),
    ({"moe": moe(), "routing": RoutingConfig(aux_weight=math.nan)}, "model.routing.aux_weight=nan must be finite"),
    ({"moe": moe(), "routing": RoutingConfig(z_weight=math.inf)}, "model.routing.z_weight=inf must be finite"),
    ({"moe": moe(router="gshard")}, "which numbers the draws of model.moe.router=gshard; use train.seq_len=32"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_value_is_one_line_with_field_value_and_fix(changes: dict[str, Any], message: str) -> None:
    """A mistake that surfaces as a shape error on the device, or not at all."""
    found = problems(replace(tiny(), head_dim=changes.pop("head_dim", None), **changes), seq_len=50)
    assert any(message in line for line in found), found
    assert len(found) <= 2, "one mistake, one or two lines"


def test_all_mistakes_are_found_at_once_and_a_good_config_has_none() -> None:
    """Mistakes that come one per run, and false alarms."""
    bad = replace(tiny(), num_kv_heads=4, norm="x", dropout=2.0)
    assert len(problems(bad)) == 3
    with pytest.raises(ValueError, match=r"norm=x.*num_kv_heads=4"):
        resolve_model(bad)
    assert problems(tiny(), seq_len=5000) == [], "rope has no longest sequence"
    assert problems(ModelConfig(family="hf", path="somewhere")) == [], "the shape is in the folder"


def test_resolving_fills_derived_sizes_and_forgets_what_has_no_effect() -> None:
    """Two configs of one model that compare as different, and an export that fails for it."""
    config = tiny(num_kv_heads=None, sliding_window=4, sliding_window_layers=[1, 0])
    assert (config.num_kv_heads, config.head_dim, config.sliding_window_layers) == (6, 4, None)
    assert tiny(sliding_window=4, sliding_window_layers=[]).sliding_window is None
    assert tiny(rope=RopeConfig(original_max_seq_len=77)).rope == RopeConfig()
    assert tiny(positions="alibi", rope=RopeConfig(theta=5.0)).rope == RopeConfig()
    assert config.resolve() == config


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.stem)
def test_every_yaml_file_is_a_model_transformers_counts_alike(path: Path) -> None:
    """A typo in a key or a size. Oracle: the parameters transformers makes of the exported config.json."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    if config.family == "hf":
        assert problems(config) == ["model.path is missing; model=hf needs model.path=DIR, a Hugging Face folder"]
        return
    assert problems(config, seq_len=1024) == []
    config = resolve_model(config)
    config_class, model_class = CLASSES[config.family]
    with torch.device("meta"):
        model = model_class._from_config(config_class(**hf_config(config)))
    model.tie_weights()
    unused = 2 * config.hidden_size if config.family == "opt" else 0
    assert num_parameters(config) == sum(p.numel() for p in model.parameters()) - unused


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("mistral_7b", 7_241_732_096),
        ("qwen2_7b", 7_615_616_512),
        ("qwen3_8b", 8_190_735_360),
        ("mixtral_8x7b", 46_702_792_704),
        ("qwen3_30b_a3b", 30_532_122_624),
        ("deepseek_v2_lite", 15_706_484_224),
        ("deepseek_v3", 671_026_404_352),
        ("gpt2", 124_439_808),
        ("opt_125m", 125_239_296 - 2 * 768),
    ],
)
def test_the_yaml_files_have_the_published_numbers_of_parameters(name: str, count: int) -> None:
    """A wrong size of a well-known model. Numbers from the models' cards; OPT's two unused positions are left out."""
    content = OmegaConf.load(f"configs/model/{name}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), content))
    assert isinstance(config, ModelConfig)
    assert num_parameters(resolve_model(config)) == count


PUBLISHED = json.loads(Path("tests/models/published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_json_is_read_as_the_yaml_file(name: str) -> None:
    """Harmless fields of old versions that are refused, or a YAML file whose model is not the one it is named for."""
    content = yaml.safe_load(Path(f"configs/model/{name}.yaml").read_text())
    rope = RopeConfig(**content.pop("rope", {}))
    read = FAMILIES[content["family"]].from_hf(PUBLISHED[name])
    assert read.resolve() == ModelConfig(**content, rope=rope).resolve()


def test_flops_count_every_multiplication_of_forward_and_backward() -> None:
    """MFU off by the head, by attention, by a table or by idle experts. Oracle: torch's own count of the products."""
    cases: list[dict[str, Any]] = [{"tie_embeddings": True}, {}, {"positions": "learned"}]
    cases += [{"moe": moe(num_shared=1, first_dense=1)}, {"mla": MLAConfig(8, None, 6, 4, 7), "num_kv_heads": None}]
    for case in cases:
        config = tiny(**case, attention="reference")
        model = build_model(config)
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(tokens).sum().backward()
        norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
        assert flops_per_token(config, 16) * 16 == counter.get_total_flops() + 6 * norms * 16


def test_multiplications_of_layers_add_up_to_those_of_the_model() -> None:
    """Pipeline stages balanced by experts that stand idle, or as if all layers were alike."""
    cases: list[dict[str, Any]] = [{}, {"moe": moe(num_shared=1, first_dense=1)}, {"sliding_window": 5}]
    cases += [{"mla": MLAConfig(8, None, 6, 4, 7), "num_kv_heads": None}]
    cases += [{"sliding_window": 5, "sliding_window_layers": [1]}]
    for case in cases:
        config = tiny(**case)
        head_and_norm = config.vocab_size * config.hidden_size + config.hidden_size
        layers = multiplications_of_layers(config, 16)
        assert sum(layers) + head_and_norm == pytest.approx(causal_flops_per_token(config, 16) / 6)
        assert (layers[0] == layers[1]) == ("moe" not in case and "sliding_window_layers" not in case)


def test_idle_experts_do_not_move_layers_between_stages() -> None:
    """256 experts, of which a token meets 8, that outweigh the head: 4+4+4+4, with the last stage the slowest."""

    def stages(**changes: Any) -> str:
        model = tiny(vocab_size=32000, hidden_size=252, num_layers=16, **changes)
        layout = pipeline_layout(ParallelConfig(pp=4, pp_schedule="1f1b"), model, seq_len=64)
        assert layout is not None
        return layout.summary

    experts = MoEConfig(num_experts=256, top_k=8, intermediate_size=64, first_dense=4)
    assert stages().endswith("+1)")
    assert stages(moe=experts).endswith("+1)")


def test_flops_of_a_window_are_those_of_the_tokens_it_shows() -> None:
    """Mistral at 32k tokens with a window of 4k, credited with eight times the attention it computes."""

    def flops(seq_len: int, **changes: Any) -> int:
        return flops_per_token(tiny(attention="reference", **changes), seq_len)

    whole, short = flops(64), flops(8)
    assert flops(64, sliding_window=8) == short
    assert flops(64, sliding_window=100) == whole
    assert flops(64, sliding_window=8, sliding_window_layers=[1]) == (whole + short) / 2, (
        "two layers, one of them windowed"
    )


@pytest.mark.parametrize("case", CASES)
def test_a_config_survives_the_way_to_hugging_face_and_back(case: str) -> None:
    """A field one direction forgets; or one transformers reads from the export as another value than it wrote."""
    family = FAMILIES[CASES[case][0]]
    original = theirs(case).config.to_dict()
    config = family.from_hf(original).resolve()
    written = hf_config(config)
    assert family.from_hf(written).resolve() == config
    reread = CLASSES[family.name][0](**written).to_dict()
    silent = {"attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "architectures", "dtype"}
    differing = {
        key for key in written.keys() & original.keys() - silent if reread[key] != original[key] and original[key]
    }
    # In other words: rope and windows; which layers have experts, as mlp_only_layers. Left out: multi-token prediction.
    reworded = {"rope_parameters", "max_window_layers", "decoder_sparse_step", "num_nextn_predict_layers"}
    assert differing <= reworded, differing


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"norm": "layernorm"}, "model.norm=layernorm"),
        ({"positions": "alibi"}, "model.positions=alibi"),
        ({"sliding_window": 4}, "model.sliding_window=4"),
        ({"qkv_bias": True}, "model.qkv_bias=True"),
        ({"family": "gpt2"}, "model.norm=rmsnorm"),
        ({"rope": RopeConfig(scaling="ntk", factor=2.0, original_max_seq_len=9)}, "model.rope.original_max_seq_len=9"),
    ],
)
def test_what_a_family_cannot_express_is_not_exported(changes: dict[str, Any], lost: str) -> None:
    """A folder that transformers loads without complaint as another model."""
    with pytest.raises(ValueError, match=lost):
        hf_config(tiny(**changes))
