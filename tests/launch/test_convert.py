"""Checkpoints to Hugging Face folders and back: what transformers sees, what a run starts from, what is refused."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from data.config import DataConfig
from data.tokenizer import load_tokenizer
from launch.compose import compose_one
from launch.convert import convert
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.mtp_config import MTPConfig
from models.registry import build_model, resolve_model
from tests.launch.on_ranks import export_and_watch, export_here, import_and_watch, import_here
from tests.models.oracle import theirs
from tests.parity.harness import Outcome, changed, run_on, text_corpus, tiny_config
from tests.pool import RankError, RankPool
from trainer.agreement import CheckpointError
from trainer.config import CheckpointConfig, TrainConfig
from trainer.convert import model_of_checkpoint

ROOT = Path(__file__).resolve().parents[2]
GPT2: dict[str, Any] = {
    "family": "gpt2",
    "vocab_size": 300,
    "hidden_size": 33,
    "intermediate_size": 50,
    "num_layers": 2,
    "num_heads": 3,
    "max_seq_len": 24,
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "positions": "learned",
    "qkv_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}


@dataclass
class Run:
    """A short run on two ranks with its last checkpoint. Filled by `runs`."""

    config: TrainConfig
    outcome: Outcome
    directory: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(ranks: RankPool, data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A llama (untied, grouped queries) under ZeRO-3 and a GPT-2 (fused and transposed in their files) under ZeRO-1."""
    made = {}
    for name, stage, model in (("llama", 3, None), ("gpt2", 1, ModelConfig(**GPT2))):
        directory = tmp_path_factory.mktemp(name) / "run"
        config = tiny_config(directory, data, train__steps=3, parallel__zero_stage=stage)
        config.checkpoint = CheckpointConfig(at_end=True, asynchronous=False)
        config.model = model or config.model
        made[name] = Run(config, run_on(ranks, 2, config), directory)
    return made


@pytest.fixture(scope="module")
def exported(ranks: RankPool, runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each run's newest checkpoint as a Hugging Face folder, through the command."""
    folders = {}
    for name, run in runs.items():
        folders[name] = tmp_path_factory.mktemp("exported") / name
        ranks.run(2, convert, ["export", str(run.directory), str(folders[name])])
    return folders


def tokens_of(config: TrainConfig) -> Tensor:
    """[3, seq_len] token numbers."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(config.model.vocab_size, (3, config.train.seq_len), generator=generator)


def loaded(folder: Path) -> Any:
    """The transformers model of a folder, which must fit exactly."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def _with_tokenizer(config: TrainConfig, folder: Path) -> TrainConfig:
    """The config with the tokenizer of a folder, which imported weights ask for."""
    config.data.tokenizer.path = str(folder)
    return config


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same names with the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_computes_the_logits_of_the_trained_model(
    family: str, runs: dict[str, Run], exported: dict[str, Path]
) -> None:
    """A tensor under the wrong name, transposed, from another step, or the weights before the last update."""
    run = runs[family]
    tokens = tokens_of(run.config)
    model = build_model(resolve_model(run.config.model)).eval()
    model.load_state_dict(run.outcome.weights)  # gathered from the trainer: no checkpoint in between
    with torch.no_grad():
        ours, reference = model(tokens), loaded(exported[family])(tokens).logits
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()
    name = "blocks.1.attention.v.weight"  # negative control: one small matrix, one part in a hundred off
    model.load_state_dict({**run.outcome.weights, name: 1.01 * run.outcome.weights[name]})
    with torch.no_grad():
        assert (model(tokens) - reference).abs().max() > 1e-5 * reference.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_number_of_ranks_does_not_change_a_byte(
    family: str, ranks: RankPool, runs: dict[str, Run], exported: dict[str, Path], tmp_path: Path
) -> None:
    """Files that depend on who wrote them; also: a checkpoint, its run and the folder between all name it."""
    directory = runs[family].directory
    for i, source in enumerate((directory / "checkpoints" / "step_3", directory / "checkpoints", directory)):
        ranks.run(1, convert, ["export", str(source), str(tmp_path / f"{i}")])
        assert same_files(exported[family], tmp_path / f"{i}")


def test_ranks_share_the_files_of_a_large_model_and_hold_one_tensor_at_a_time(
    ranks: RankPool, runs: dict[str, Run], exported: dict[str, Path], tmp_path: Path
) -> None:
    """A rank that gathers the model first, or every rank reading everything."""
    run = runs["llama"]
    watched = ranks.run(2, export_and_watch, run.directory, tmp_path / "many", max_shard_bytes=20_000)
    (first, most_first), (second, most_second) = watched
    assert sorted(first + second) == sorted(f"model/{name}" for name in run.outcome.weights)
    assert first
    assert second
    assert most_first <= 1
    assert most_second <= 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = loaded(exported["llama"]).state_dict(), loaded(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one.keys() | many.keys())


def test_dtype_is_that_of_the_files(ranks: RankPool, runs: dict[str, Run], tmp_path: Path) -> None:
    """An option without effect, or weights rounded twice."""
    ranks.run(2, convert, ["export", str(runs["llama"].directory), str(tmp_path / "half"), "--dtype", "bf16"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    weights = runs["llama"].outcome.weights
    assert torch.equal(model.lm_head.weight, weights["head.weight"].bfloat16())
    assert torch.equal(model.model.norm.weight, weights["final_norm.weight"].bfloat16())


@pytest.mark.parametrize(("family", "world_size"), [("llama", 1), ("llama", 2), ("gpt2", 2)])
def test_there_and_back_again_is_bitwise_the_same(
    family: str, world_size: int, ranks: RankPool, exported: dict[str, Path], tmp_path: Path
) -> None:
    """Anything lost on the way: a bit of a weight, a field of the model, the tokenizer."""
    out, again = tmp_path / "checkpoint", tmp_path / "again"
    out.mkdir()  # an empty folder is no obstacle, in either direction
    again.mkdir()
    ranks.run(world_size, convert, ["import", str(exported[family]), str(out)])
    assert [path.name for path in out.iterdir()] == ["step_0"]
    ranks.run(3 - world_size, convert, ["export", str(out), str(again)])
    assert same_files(exported[family], again)
    assert (again / "tokenizer.json").is_file()


@pytest.mark.parametrize("case", ["llama_bias", "qwen3", "gpt2", "opt_untied"])
def test_a_folder_made_by_transformers_comes_back_with_its_weights(case: str, ranks: RankPool, tmp_path: Path) -> None:
    """A family whose checkpoint cannot be exported, or a config that is not kept with the weights."""
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "in")
    ranks.run(2, import_here, tmp_path / "in", tmp_path / "checkpoint")
    note = ranks.run(1, export_here, tmp_path / "checkpoint", tmp_path / "out")[0].no_tokenizer
    assert note == "the folder that was imported had none"
    back = loaded(tmp_path / "out").state_dict()
    for name, tensor in reference.state_dict().items():
        unused = 2 if "embed_positions" in name else 0  # OPT: rows that nothing reads come out as zeros
        assert torch.equal(back[name][unused:], tensor[unused:]), name


def test_ranks_share_the_weights_of_an_import(ranks: RankPool, exported: dict[str, Path], tmp_path: Path) -> None:
    """Every rank holding the whole model."""
    (whole,) = ranks.run(1, import_and_watch, exported["llama"], tmp_path / "one")
    parts = ranks.run(2, import_and_watch, exported["llama"], tmp_path / "two")
    assert sum(parts) == whole
    assert max(parts) < 0.51 * whole


def test_an_import_that_fails_on_one_rank_ends_on_all_and_leaves_nothing(
    ranks: RankPool, exported: dict[str, Path], tmp_path: Path
) -> None:
    """The others waiting for ever in the first collective of the save."""
    replies = ranks.run(2, import_and_watch, exported["llama"], tmp_path / "out", fails_on=1, timeout=60)
    assert replies == ["the disk is gone"] * 2
    assert not (tmp_path / "out").exists()


def test_a_run_starts_from_an_imported_checkpoint_as_from_its_folder(
    ranks: RankPool, runs: dict[str, Run], exported: dict[str, Path], tmp_path: Path
) -> None:
    """Weights that are not loaded, a step or an optimizer that goes on from somewhere, on another layout."""
    config = runs["llama"].config
    ranks.run(2, convert, ["import", str(exported["llama"]), str(tmp_path / "checkpoint")])
    common = {"train__steps": 3, "parallel__zero_stage": 2}
    start = changed(config, tmp_path / "a", **common, checkpoint__resume=str(tmp_path / "checkpoint"))
    imported = run_on(ranks, 2, _with_tokenizer(start, exported["llama"]))
    from_folder = changed(config, tmp_path / "b", **common)
    from_folder.model = ModelConfig(family="hf", path=str(exported["llama"]))
    expected = run_on(ranks, 2, from_folder)
    assert imported.losses == expected.losses
    assert imported.grad_norms == expected.grad_norms
    assert [line["step"] for line in imported.metrics] == [1, 2, 3]
    assert imported.losses[0] != runs["llama"].outcome.losses[0], "negative control: fresh weights have another loss"


def test_an_import_is_strict_about_the_run_that_starts_from_it(
    ranks: RankPool, runs: dict[str, Run], exported: dict[str, Path], tmp_path: Path
) -> None:
    """Weights of another model or dtype, cast or broadcast into place."""
    ranks.run(1, import_here, exported["llama"], tmp_path / "half", torch.bfloat16)
    resume = {"checkpoint__resume": str(tmp_path / "half")}
    with pytest.raises(RankError, match=r"21 of another dtype: model/blocks\.0.* torch\.bfloat16, here torch\.float32"):
        run_on(ranks, 1, _with_tokenizer(changed(runs["llama"].config, tmp_path / "a", **resume), exported["llama"]))
    with pytest.raises(RankError, match=r"is of another model: .*model\.hidden_size=33 \(checkpoint: 36\)"):
        run_on(ranks, 1, _with_tokenizer(changed(runs["gpt2"].config, tmp_path / "b", **resume), exported["llama"]))
    half = {"precision__compute": "bf16", "precision__master": "bf16", "precision__reduce": "bf16"}
    config = changed(runs["llama"].config, tmp_path / "c", **resume, **half, parallel__zero_stage=1)
    run_on(ranks, 1, _with_tokenizer(config, exported["llama"]))


def test_a_folder_made_by_transformers_trains_from_its_own_loss(ranks: RankPool, tmp_path: Path) -> None:
    """model=hf on the command line giving fresh weights or another shape, or an export that needs the folder still."""
    reference = theirs("llama_bias")
    reference.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(1).integers(61, size=500).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    overrides = ["model=hf", f"model.path={tmp_path / 'hf'}", "data=tokens", f"data.path={tmp_path / 'tokens.npy'}"]
    overrides += ["data.shuffle=false", "train.steps=1", "train.seq_len=19", "train.global_batch_size=4"]
    overrides += [f"run.dir={tmp_path / 'run'}", "logging.console=false", "train.device=cpu", "optim.lr=0"]
    outcome = run_on(ranks, 2, compose_one(overrides))
    rows = torch.tensor(np.stack([tokens[i * 19 : (i + 1) * 19 + 1] for i in range(4)]).astype(np.int64))
    with torch.no_grad():
        logits = reference(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert outcome.losses[0] == pytest.approx(expected, rel=1e-6)
    shutil.rmtree(tmp_path / "hf")
    ranks.run(1, export_here, tmp_path / "run", tmp_path / "back")
    back = loaded(tmp_path / "back").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in reference.state_dict().items()), "lr=0 moves nothing"


def test_the_tokenizer_of_the_run_goes_along(exported: dict[str, Path], data: DataConfig) -> None:
    """A tokenizer that transformers rebuilds differently, or a config with another end of text."""
    mine = load_tokenizer(data)
    folder = exported["llama"]
    again = transformers.AutoTokenizer.from_pretrained(folder)
    text = "tensor rank  shard\n\tdéjà vu 字 <|endoftext|> .,!?"
    assert again.encode(text, add_special_tokens=False) == mine.encode(text)
    assert again.decode(mine.encode(text), clean_up_tokenization_spaces=False) == mine.decode(mine.encode(text)) == text
    assert again.eos_token_id == mine.eos_id
    assert transformers.AutoConfig.from_pretrained(folder).eos_token_id == mine.eos_id


def test_a_tokenizer_that_is_gone_or_another_one_is_left_out_and_said(
    ranks: RankPool, runs: dict[str, Run], data: DataConfig, tmp_path: Path
) -> None:
    """Another tokenizer trained or taken in its place, silently: its ids mean other text."""
    mine = load_tokenizer(data)
    mine.save(tmp_path / "tokenizer")
    copied = changed(runs["llama"].config, tmp_path / "run", train__steps=1, schedule__warmup_steps=0)
    copied.data.cache_dir = str(tmp_path / "cache")
    run_on(ranks, 1, copied)
    named = changed(copied, tmp_path / "named")
    named.data.tokenizer.path = str(tmp_path / "tokenizer")
    run_on(ranks, 1, named)
    np.save(tmp_path / "tokens.npy", np.arange(300, dtype=np.uint16))
    bare = changed(copied, tmp_path / "bare", data__source="tokens", data__path=str(tmp_path / "tokens.npy"))
    run_on(ranks, 1, bare)
    shutil.rmtree(tmp_path / "cache")
    vocabulary = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["model"]["merges"].pop()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    reasons = {
        "run": f"data.cache_dir={tmp_path / 'cache'} holds no tokenizer",
        "named": f"data.tokenizer.path={tmp_path / 'tokenizer'} is not the tokenizer the run had any more",
        "bare": "the run trained on token arrays and had none",
    }
    for run, reason in reasons.items():
        told = ranks.run(2, export_here, tmp_path / run, tmp_path / f"{run}-out")
        assert all(one.no_tokenizer.startswith(reason) for one in told), told
        assert not list((tmp_path / f"{run}-out").glob("tokenizer*"))
    assert not (tmp_path / "cache").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    ranks: RankPool, runs: dict[str, Run], exported: dict[str, Path], tmp_path: Path
) -> None:
    """A flipped bit becoming a weight."""
    checkpoints = tmp_path / "checkpoints"
    for name in ("step_3", "step_4"):
        shutil.copytree(runs["llama"].directory / "checkpoints" / "step_3", checkpoints / name)
    path = next(path for path in (checkpoints / "step_4").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RankError, match=rf"CHECKPOINT_DIR=.*step_4 is damaged: {path.name}: checksum mismatch"):
        ranks.run(2, export_here, checkpoints / "step_4", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told = ranks.run(2, export_here, tmp_path, tmp_path / "out")
    assert told[0].checkpoint == checkpoints / "step_3"
    assert same_files(exported["llama"], tmp_path / "out")


def test_a_checkpoint_from_elsewhere_does_not_read_the_environment(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpolation in its configuration, resolved here, and a token in what is written or said of it."""
    monkeypatch.setenv("HF_TOKEN", "a1b2c3d4e5")
    folder = shutil.copytree(runs["llama"].directory / "checkpoints" / "step_3", tmp_path / "step_3")
    assert model_of_checkpoint(folder, name="CHECKPOINT_DIR").family == "llama"
    extra = json.loads((folder / "extra.json").read_text())
    extra["config"]["model"]["path"] = "${oc.env:HF_TOKEN}"
    (folder / "extra.json").write_text(json.dumps(extra))
    with pytest.raises(CheckpointError, match="holds an interpolation") as raised:
        model_of_checkpoint(folder, name="CHECKPOINT_DIR")
    assert "a1b2c3d4e5" not in str(raised.value)


PROGRAM = """
import json, sys
from launch.convert import convert
from launch.errors import exit_code_of
for arguments in json.loads(sys.argv[1]):
    print(exit_code_of(convert, arguments), file=sys.stderr)
"""


def test_every_wrong_input_is_one_readable_line(
    runs: dict[str, Run], exported: dict[str, Path], tmp_path: Path
) -> None:
    """A traceback, the wrong exit code, or something overwritten."""
    run, hf = str(runs["llama"].directory), str(exported["llama"])
    new, empty, cut = str(tmp_path / "new"), tmp_path / "empty", tmp_path / "cut"
    empty.mkdir()
    shutil.copytree(hf, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    cases: list[tuple[list[str], int, str]] = [
        ([], 2, "configuration error: the following arguments are required: export|import"),
        (["move", run, new], 2, "configuration error: argument export|import: invalid choice: 'move'"),
        (["export", run], 2, "configuration error: the following arguments are required: OUT_DIR; usage:"),
        (["export", run, new, "--dtype", "fp8"], 2, "configuration error: argument --dtype: invalid choice: 'fp8'"),
        (["import", hf, new, "--dtype", "fp16"], 2, "configuration error: argument --dtype: invalid choice: 'fp16'"),
        (["export", run, hf], 2, f"configuration error: OUT_DIR={hf} exists already and is not overwritten"),
        (["import", hf, run], 2, f"configuration error: OUT_DIR={run} exists already and is not overwritten"),
        (["export", f"{run}x", new], 1, f"error: CHECKPOINT_DIR={run}x does not exist"),
        (["export", str(empty), new], 1, f"error: CHECKPOINT_DIR={empty} holds no checkpoint"),
        (["export", hf, new], 1, f"error: CHECKPOINT_DIR={hf} holds no checkpoint"),
        (["import", f"{hf}x", new], 2, f"configuration error: HF_DIR={hf}x does not exist"),
        (["import", run, new], 2, f"configuration error: HF_DIR={run} has no config.json"),
        (["import", str(other), new], 2, f"configuration error: {other}/config.json has model_type='bert'"),
        (["import", str(cut), new], 1, f"error: {cut}/model.safetensors is damaged or cut short"),
        (["export", run, new], 0, ""),
    ]
    before = sorted((path, path.stat().st_mtime_ns) for path in [*Path(hf).rglob("*"), *Path(run).rglob("*")])
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([arguments for arguments, _, _ in cases])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = iter(finished.stderr.splitlines())
    for arguments, code, message in cases:
        if message:
            assert next(lines).startswith(message), arguments
        assert next(lines) == str(code), arguments
    assert list(lines) == []
    assert "exported" in finished.stdout
    after = sorted((path, path.stat().st_mtime_ns) for path in [*Path(hf).rglob("*"), *Path(run).rglob("*")])
    assert before == after


@pytest.mark.thorough
def test_the_command_runs_under_torchrun(runs: dict[str, Run], exported: dict[str, Path], tmp_path: Path) -> None:
    """A script that works only where the tests put it: its own process group, started from another folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*launcher, str(ROOT / "launch" / "convert.py"), "export", str(runs["gpt2"].directory), "out"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"exported {runs['gpt2'].directory}/checkpoints/step_3 to out\n"
    assert same_files(exported["gpt2"], tmp_path / "out")


def test_blocks_of_multi_token_prediction_go_out_and_come_back(
    ranks: RankPool, data: DataConfig, tmp_path: Path
) -> None:
    """Blocks that are lost on the way, or start again from noise; a folder's own words for them misread."""
    deepseek = ModelConfig(
        family="deepseek_v3",
        vocab_size=300,
        hidden_size=36,
        intermediate_size=50,
        num_layers=2,
        num_heads=4,
        max_seq_len=64,
        mla=MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
        mtp=MTPConfig(depth=1),
    )
    config = tiny_config(tmp_path / "run", data, train__steps=3)
    config.model, config.checkpoint = deepseek, CheckpointConfig(at_end=True, asynchronous=False)
    run_on(ranks, 2, config)
    ranks.run(2, convert, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    ranks.run(1, convert, ["import", str(tmp_path / "out"), str(tmp_path / "in"), "--mtp-depth", "1"])
    again = changed(config, tmp_path / "again", checkpoint__resume=str(tmp_path / "in"))
    again = _with_tokenizer(again, tmp_path / "out")
    folder = changed(config, tmp_path / "folder")
    folder.model = ModelConfig(family="hf", path=str(tmp_path / "out"), mtp=MTPConfig(depth=1))
    new = run_on(ranks, 1, changed(config, tmp_path / "new"))
    for start in (run_on(ranks, 1, again), run_on(ranks, 1, folder)):
        assert start.losses[0] < new.losses[0]
        assert start.metrics[0]["mtp_loss_1"] < new.metrics[0]["mtp_loss_1"]
    with pytest.raises(RankError, match=r"model\.mtp\.depth=2, .* use at most 1"):
        ranks.run(1, convert, ["import", str(tmp_path / "out"), str(tmp_path / "in2"), "--mtp-depth", "2"])
