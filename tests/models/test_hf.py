"""Weights from and to Hugging Face folders: whole and sharded, and every way a folder can be broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from models.config import ModelConfig
from models.hf import export_hf_weights, load_hf_weights
from models.registry import build_model, resolve_model
from tests.models.on_ranks import elements_read, export_on_ranks, partial_is_refused, shards_equal_the_whole
from tests.models.oracle import CASES, eager, ours, pair, theirs
from tests.models.small import random_decoder, sample_tokens, tiny
from tests.pool import RankPool


@pytest.mark.parametrize("case", CASES)
def test_export_gives_transformers_back_its_own_weights(case: str, tmp_path: Path) -> None:
    """A name, transpose, split or config field that one direction gets wrong; bitwise."""
    reference, model = pair(case, tmp_path / "in")
    export_hf_weights(model.state_dict().__getitem__, model.config, tmp_path / "out", dtype=torch.float32)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, **eager(model.config.family)
    )
    assert not any(info.values()), info
    assert type(again) is type(reference)
    expected = reference.state_dict()
    for name, tensor in again.state_dict().items():
        unused = 2 if "embed_positions" in name else 0  # OPT: rows that nothing reads come out as zeros
        assert torch.equal(tensor[unused:], expected[name][unused:]), name
    tokens = sample_tokens()
    assert torch.equal(again.eval()(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("case", ["llama_bias", "qwen2_windows", "gpt2", "opt"])
def test_folders_of_many_files_load_and_are_written_like_one(case: str, tmp_path: Path) -> None:
    """An index that is read or written wrongly. Theirs is sharded on the way in, ours on the way out."""
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "in", max_shard_size="5KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    model = ours(tmp_path / "in")
    parameters = model.state_dict()
    export_hf_weights(parameters.__getitem__, model.config, tmp_path / "out", dtype=torch.float32, max_shard_bytes=5000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 5000
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = sample_tokens()
    assert torch.equal(again.eval()(tokens).logits, reference(tokens).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"], "no temporary folder is left"


def test_bf16_goes_out_and_comes_in(tmp_path: Path) -> None:
    """A cast through another dtype, or a header that says the wrong one."""
    model = random_decoder(tiny())
    parameters = model.state_dict()
    export_hf_weights(parameters.__getitem__, model.config, tmp_path / "out", dtype=torch.bfloat16)
    theirs_again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs_again.dtype == torch.bfloat16
    loaded = ours(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16().float()), name


@pytest.mark.parametrize("case", ["llama_bias", "gpt2", "opt_untied"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_each_rank_reads_exactly_its_shard(case: str, dim: int | None, tmp_path: Path, ranks: RankPool) -> None:
    """A shard at the wrong offset, uneven or transposed; sizes are odd, so the last shard is smaller."""
    theirs(case).save_pretrained(tmp_path)
    placements: list[Placement] = [Replicate()] if dim is None else [Shard(dim), Shard(0)]
    assert ranks.run(2, shards_equal_the_whole, str(tmp_path), placements) == [[], []]


def test_no_rank_reads_more_than_it_holds(tmp_path: Path, ranks: RankPool) -> None:
    """Every rank reading the whole model, or whole tensors, and throwing most of it away."""
    theirs("gpt2").save_pretrained(tmp_path)
    for read, held in ranks.run(2, elements_read, str(tmp_path)):
        assert read == held


def test_ranks_write_their_files_and_one_folder_appears(tmp_path: Path, ranks: RankPool) -> None:
    """Files written twice or by nobody, or a folder that is there before it is complete."""
    first, second = ranks.run(2, export_on_ranks, str(tmp_path / "out"))
    model = random_decoder(tiny())
    assert sorted(first + second) == sorted(model.state_dict())
    assert first
    assert second
    loaded = ours(tmp_path / "out")
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in model.named_parameters())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_export_that_fails_on_one_rank_ends_on_all_and_leaves_nothing(
    rank: int, tmp_path: Path, ranks: RankPool
) -> None:
    """The others wait for ever, or half a model stands under the final name."""
    replies = ranks.run(2, export_on_ranks, str(tmp_path / "out"), fails_on=rank, timeout=60)
    assert replies == [["the disk is gone"]] * 2
    assert not (tmp_path / "out").exists()
    assert ranks.run(2, export_on_ranks, str(tmp_path / "out"))[0], "what was left behind does not stop the next one"


def test_an_export_overwrites_nothing(tmp_path: Path, ranks: RankPool) -> None:
    """A model lost to a repeated command."""
    (tmp_path / "out").mkdir()
    assert (
        ranks.run(2, export_on_ranks, str(tmp_path / "out"))
        == [[f"{tmp_path / 'out'} exists already and is not overwritten; give another folder or remove it"]] * 2
    )


def test_values_beyond_fp16_are_not_exported_as_infinity(tmp_path: Path) -> None:
    """A model that loads and says nan."""
    model = random_decoder(tiny())
    with torch.no_grad():
        model.final_norm.weight[3] = 1e5
    parameters = model.state_dict()
    with pytest.raises(ValueError, match=r"final_norm\.weight has values that fp16 cannot hold"):
        export_hf_weights(parameters.__getitem__, model.config, tmp_path / "out", dtype=torch.float16)


def test_the_tokenizer_and_its_special_tokens_go_along(tmp_path: Path) -> None:
    """A folder AutoTokenizer cannot read, or a config with another family's end of text."""
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.save(str(tmp_path / "mine.json"))
    model = random_decoder(tiny())
    parameters = model.state_dict()
    export_hf_weights(
        parameters.__getitem__,
        model.config,
        tmp_path / "out",
        dtype=torch.float32,
        tokenizer=tmp_path / "mine.json",
        token_ids={"eos_token_id": 7},
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode([1, 0]) == "b a"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (None, 7)
    parameters = model.state_dict()
    export_hf_weights(
        parameters.__getitem__, model.config, tmp_path / "two", dtype=torch.float32, tokenizer=tmp_path / "out"
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "two").decode([1, 0]) == "b a"
    with pytest.raises(ValueError, match="holds no tokenizer"):
        export_hf_weights(
            parameters.__getitem__, model.config, tmp_path / "x", dtype=torch.float32, tokenizer=tmp_path / "no"
        )


def single(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A fault in the tensors of model.safetensors."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scrambled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(weight_map: Any) -> Callable[[Path], None]:
    """A fault in the index."""

    def apply(folder: Path) -> None:
        content = {"weight_map": weight_map} if weight_map is not None else []
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return apply


Q = "model.layers.0.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (single(lambda t: t.pop(Q)), f"has no tensor {Q}"),
    "left over": (
        single(lambda t: t.update({"x.lora": torch.ones(1)})),
        "no place for.*model.safetensors: tensor x.lora",
    ),
    "shape": (single(lambda t: t.update({Q: torch.ones(3, 24)})), f"{Q} has shape \\[3, 24\\].* \\[24, 24\\]"),
    "dtype": (single(lambda t: t.update({Q: t[Q].to(torch.int8)})), f"{Q} has dtype I8"),
    "truncated": (truncated, "model.safetensors is damaged or cut short"),
    "scrambled": (scrambled, "model.safetensors is damaged or cut short"),
    "pickle": (pickled, "neither model.safetensors nor.*pickles"),
    "index: no map": (index(None), "not an index of tensors"),
    "index: escapes": (index({Q: "../model.safetensors"}), "not a safetensors file in the same folder"),
    "index: absolute": (index({Q: "/tmp/model.safetensors"}), "not a safetensors file in the same folder"),
    "index: not safetensors": (index({Q: "config.json"}), "not a safetensors file in the same folder"),
    "index: file missing": (index({Q: "model-2.safetensors"}), "model-2.safetensors, which is missing"),
    "index: lies": (index({"nonsense": "model.safetensors"}), "does not hold the tensors.*missing nonsense"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_one_error_naming_file_and_tensor(fault: str, tmp_path: Path) -> None:
    """A traceback, or a model partly random."""
    theirs("llama").save_pretrained(tmp_path)
    breaks, message = FAULTS[fault]
    breaks(tmp_path)
    with pytest.raises(ValueError, match=message):
        ours(tmp_path)


def test_nothing_is_written_before_all_tensors_are_known_to_fit(tmp_path: Path) -> None:
    """A model half overwritten by a folder that is then refused."""
    theirs("llama").save_pretrained(tmp_path)
    single(lambda t: t.update({"model.norm.weight": torch.ones(5)}))(tmp_path)
    model = random_decoder(resolve_model(ModelConfig(family="hf", path=str(tmp_path))))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_hf_weights(tmp_path, model.state_dict(), model.config)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_names_without_their_prefix_and_masks_of_old_files_are_understood(tmp_path: Path) -> None:
    """The files of GPT-2 as first published: no transformer. in names, and masks among the weights."""
    reference, _ = pair("gpt2", tmp_path)

    def age(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)

    single(age)(tmp_path)
    torch.testing.assert_close(ours(tmp_path)(sample_tokens()), reference(sample_tokens()).logits)


def test_the_head_of_a_tied_model_may_be_there_but_must_be_the_table(tmp_path: Path) -> None:
    """A head trained on its own, dropped because config.json says tied."""
    theirs("llama_mha").save_pretrained(tmp_path)
    copy = single(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    copy(tmp_path)
    ours(tmp_path)
    single(lambda t: t["lm_head.weight"].add_(1.0))(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embeddings"):
        ours(tmp_path)


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    """A parameter the files have no word for, left as it was."""
    theirs("llama").save_pretrained(tmp_path)
    model = build_model(resolve_model(ModelConfig(family="hf", path=str(tmp_path))))
    parameters = model.state_dict()
    parameters["extra"] = parameters.pop("final_norm.weight")
    with pytest.raises(ValueError, match=r"extra, final_norm\.weight"):
        load_hf_weights(tmp_path, parameters, model.config)


def test_a_partial_parameter_is_refused(tmp_path: Path, ranks: RankPool) -> None:
    """Every rank loading the whole value into what is summed over ranks."""
    theirs("llama").save_pretrained(tmp_path)
    assert all("final_norm.weight has placements" in reply for reply in ranks.run(2, partial_is_refused, str(tmp_path)))
