"""run.json and config.yaml: what a run was made of, without secrets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from trainer import run_info
from trainer.config import TrainConfig
from trainer.masking import MASK, is_secret, mask_argv, mask_secrets, mask_text
from trainer.run_info import RunInfo, write_config, write_run_info

ROOT = Path(__file__).resolve().parents[2]


def make_info(**changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "device": torch.device("cpu"),
        "world_size": 4,
        "mesh": {"dp_replicate": 2, "dp_shard": 2},
        "kernels": {"attention": "sdpa"},
        "precision": {"compute": "fp32"},
        "flops_per_token": 6e9,
        "flops_per_token_causal": 5e9,
        "peak_flops": None,
        "argv": ["launch/train.py", "train.steps=3"],
    }
    return RunInfo(**{**values, **changes})


def test_run_json_says_what_was_really_used(tmp_path: Path) -> None:
    """Catches a field that is missing or misnamed: benchmarks/train.py and people read them."""
    returned = write_run_info(tmp_path, make_info())
    content = json.loads((tmp_path / "run.json").read_text())
    assert content == returned
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(content["versions"]) >= {"cuda", "cudnn", "nccl", "triton", "lattice", "git_commit"}
    assert content["device"]["name"] == "cpu"
    assert 0.1 < content["device"]["memory_gib"] < 1e5
    assert content["device"]["count"] >= 1
    assert (content["world_size"], content["mesh"]) == (4, {"dp_replicate": 2, "dp_shard": 2})
    assert (content["kernels"], content["precision"]) == ({"attention": "sdpa"}, {"compute": "fp32"})
    assert content["command"] == ["launch/train.py", "train.steps=3"]


def test_every_start_of_a_run_is_listed(tmp_path: Path) -> None:
    """Catches a restart that hides the earlier ones, on whatever layout they ran."""
    write_run_info(tmp_path, make_info())
    write_run_info(tmp_path, make_info(resume_step=2, world_size=2, mesh={"dp_shard": 2}))
    content = json.loads((tmp_path / "run.json").read_text())
    assert [(start["resume_step"], start["world_size"]) for start in content["starts"]] == [(0, 4), (2, 2)]
    assert content["world_size"] == 2
    assert all(start["time"].endswith("+00:00") for start in content["starts"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts": 3}'])
def test_a_damaged_run_json_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    """Catches losing the list of starts without a word."""
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        write_run_info(tmp_path, make_info())
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_this_checkout(tmp_path: Path) -> None:
    """Catches the commit of whatever repository the user happens to stand in."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode != 0:
        pytest.skip("the tests do not run from a checkout")
    commit = write_run_info(tmp_path, make_info())["versions"]["git_commit"]
    assert commit.removesuffix("-dirty") == asked.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_an_installed_package_inside_another_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches naming the commit of a project that merely has our package in its virtual environment."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    package = tmp_path / "site-packages" / "trainer"
    package.mkdir(parents=True)
    monkeypatch.setattr(run_info, "__file__", str(package / "run_info.py"))
    assert run_info._git_state() == (None, False)
    monkeypatch.setattr(run_info, "__file__", str(tmp_path / "trainer" / "run_info.py"))
    commit, dirty = run_info._git_state()  # negative control: at the top of the checkout there is one
    assert commit is not None
    assert not dirty


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hub.token",
        "data.hub_token",
        "api_key",
        "apiKey",
        "HF_TOKEN",
        "--wandb-api-key",
        "secret",
        "secretName",
        "client_secret",
        "hub.eos_token_secret",
        "WANDB_API_KEY",
        "PGPASSWORD",
        "ssh_passphrase",
        "db_pwd",
        "password",
        "db_password",
        "PASSWD",
        "credentials",
        "credentials.user",
        "+data.token",
        "DB_PASS",
        "SMTP_PASS",
        "--pass",
        "SLURM_JWT",
        "GH_PAT",
        "HF_TOKENS",
        "hub.api_keys",
        "sort_keys.password",
    ],
)
def test_keys_of_secrets_are_recognised(key: str) -> None:
    """Catches a token in run.json, which people share."""
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "train.sample_tokens",
        "data.tokenizer.path",
        "tokens",
        "checkpoint.keep_last",
        "num_key_value_heads",
        "eos_token_id",
        "PWD",
        "OLDPWD",
        "eos_token",
        "data.tokenizer.eos_token",
        "+data.tokenizer.eos_token",
        "max_tokens",
        "recipe.rl.max_tokens",
        "max_new_tokens",
        "engine.max_batch_tokens",
        "num_tokens",
        "completion_tokens",
        "valid_tokens",
        "added_special_tokens",
        "sort_keys",
        "bypass",
        "pass_at_k",
        "data.path",
        "pattern",
    ],
)
def test_keys_of_ordinary_settings_are_left_alone(key: str) -> None:
    """Catches a mask so wide that the record no longer says what ran."""
    assert not is_secret(key)


def test_a_count_of_tokens_is_no_secret_whatever_it_is_called() -> None:
    """Catches a record without its numbers, for a name that no list of such names has."""
    assert mask_secrets({"window_tokens": 12, "hub_tokens": "abc123"}) == {"window_tokens": 12, "hub_tokens": MASK}
    argv = ["a.window_tokens=1e6", "+b={window_tokens: 64, hub_tokens: abc123}", "hub_tokens=[abc123,abc456]"]
    assert mask_argv(argv) == [argv[0], f"+b={{window_tokens: 64, hub_tokens: {MASK}}}", f"hub_tokens={MASK}"]


def test_a_command_line_is_masked_in_every_form() -> None:
    """Catches a secret that is passed as key=value, as an option, in a dict, or in a URL."""
    argv = [
        "launch/train.py",
        "data.hub_token=abc123",
        "--api-key=abc123",
        "--token",
        "abc123",
        "run.name=x=token=abc123",
        "data=tokens",
        "train.sample_tokens=64",
        "+hub={token: abc123, name: openwebtext}",
        '+hub={"password":"abc123"}',
        "data.path=https://user:abc123@host/corpus",
        "data.secret=abc123,abc123",
        "--multirun",
        "optim.lr=1e-3,3e-4",
    ]
    assert mask_argv(argv) == [
        "launch/train.py",
        f"data.hub_token={MASK}",
        f"--api-key={MASK}",
        "--token",
        MASK,
        f"run.name=x=token={MASK}",
        "data=tokens",
        "train.sample_tokens=64",
        f"+hub={{token: {MASK}, name: openwebtext}}",
        f'+hub={{"password":{MASK}}}',
        f"data.path=https://{MASK}@host/corpus",
        f"data.secret={MASK}",
        "--multirun",
        "optim.lr=1e-3,3e-4",
    ]


def test_the_command_line_in_run_json_is_masked(tmp_path: Path) -> None:
    """Catches a raw sys.argv beside the masked one."""
    write_run_info(tmp_path, make_info(argv=["launch/train.py", "data.hub_token=abc123"]))
    assert "abc123" not in (tmp_path / "run.json").read_text()


def test_secrets_in_a_configuration_are_masked_and_nothing_else() -> None:
    """Catches a secret in a nested dict or a list, and an unset one that is shown as if it were set."""
    config = {
        "hub": {"token": "a", "parts": [{"api_key": 1, "weight": 0.5}]},
        "token": None,
        "url": "s3://k:v@b/c",
        "n": 3,
    }
    assert mask_secrets(config) == {
        "hub": {"token": MASK, "parts": [{"api_key": MASK, "weight": 0.5}]},
        "token": None,
        "url": f"s3://{MASK}@b/c",
        "n": 3,
    }
    assert mask_secrets({"credentials": {"user": "a"}}) == {"credentials": MASK}


SECRET = "a1b2c3d4e5f6a7b8"
HF = "hf_" + "Ab1" * 12


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"https://me:{SECRET}@host/x", f"https://{MASK}@host/x"),
        (f"git+https://me:p@{SECRET}@host:80/x@y", f"git+https://{MASK}@host:80/x@y"),  # a password with an @ in it
        (f"https://host/x?a=1&X-Amz-Signature={SECRET}&b=2", f"https://host/x?a=1&X-Amz-Signature={MASK}&b=2"),
        (f"https://host/x?access_token={SECRET}#y", f"https://host/x?access_token={MASK}#y"),
        (f"401 for Bearer {SECRET}{SECRET}", f"401 for Bearer {MASK}"),
        (f"invalid header Authorization: Basic {SECRET}==", f"invalid header Authorization: Basic {MASK}"),
        (f"the token {HF} is not valid", f"the token {MASK} is not valid"),
        ("key=7 has no token: 3 of max_tokens=4, Basic tokenizers; user@host", None),
        ("s3://bucket/x and me@host, https://host/x@y, a?b=c", None),
    ],
)
def test_what_is_surely_a_secret_is_masked_in_texts(text: str, masked: str | None) -> None:
    """Catches a password in an error that quotes a URL, and a mask over words that only look like one."""
    assert mask_text(text) == (masked or text)


def test_values_of_secret_variables_are_masked_wherever_they_turn_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches WANDB_API_KEY or HF_TOKEN in run.json, a configuration or an error, under no name that says so; and the
    working directory, or where a key is, masked in every path."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}-longer")
    monkeypatch.setenv("SHORT_KEY", "gpt2")
    monkeypatch.setenv("SSL_KEY", str(tmp_path))
    monkeypatch.setenv("PWD", "/some/folder")
    assert mask_text(f"wandb says {SECRET}-longer or {SECRET} of gpt2") == f"wandb says {MASK} or {MASK} of gpt2"
    assert mask_argv(["x", f"run.name={SECRET}", "run.dir=gpt2"]) == ["x", f"run.name={MASK}", "run.dir=gpt2"]
    assert mask_secrets({"run": {"name": f"a{SECRET}"}, "n": 1}) == {"run": {"name": f"a{MASK}"}, "n": 1}
    assert mask_text(f"{tmp_path}/run /some/folder/run") == f"{tmp_path}/run /some/folder/run"
    monkeypatch.delenv("WANDB_API_KEY")
    assert mask_text(SECRET) == SECRET  # by nothing else


def test_a_command_line_keeps_the_tokenizer_settings() -> None:
    """Catches run.json that hides which token ends a document."""
    argv = ["x", "data.tokenizer.eos_token=<|end|>", "+data={tokenizer: {eos_token: </s>, token: a}}"]
    assert mask_argv(argv) == [*argv[:2], f"+data={{tokenizer: {{eos_token: </s>, token: {MASK}}}}}"]


def test_config_yaml_gives_back_the_same_configuration(tmp_path: Path) -> None:
    """Catches a field that is lost or changed: 1e-8 must not come back as a string."""
    config = TrainConfig()
    config.optim.eps = 1e-8
    config.optim.lr = 1 / 3
    config.train.sample_prompt = "class: 'x'\n#"
    write_config(tmp_path, config)
    loaded = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(tmp_path / "config.yaml"))
    assert OmegaConf.to_object(loaded) == config


def test_a_changed_configuration_keeps_the_earlier_ones(tmp_path: Path) -> None:
    """Catches a restart with other settings after which nobody knows how the run began."""
    for lr in (0.1, 0.1, 0.2, 0.3):
        config = TrainConfig()
        config.optim.lr = lr
        write_config(tmp_path, config)
    rates = {path.name: OmegaConf.load(path).optim.lr for path in tmp_path.iterdir()}
    assert rates == {"config.1.yaml": 0.1, "config.2.yaml": 0.2, "config.yaml": 0.3}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches writing in place: a crash would leave half a file."""
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        run_info.write_atomically(path, "new \udc80")
    assert path.read_text() == "old"
    run_info.write_atomically(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "new"
