"""launch/lab.py on several processes: the same completions, each rank its part, and one clear end for all."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import torch.distributed as dist
import transformers

from data.tokenizer import Tokenizer
from launch.convert import convert
from launch.errors import exit_code_of
from launch.lab import lab
from tests.launch.conftest import small_llama
from tests.launch.on_ranks import lab_and_watch
from tests.pool import RankPool

LAB = str(Path(__file__).parents[2] / "launch" / "lab.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
SETTINGS = ["sampling.temperature=0", "sampling.max_tokens=7", "engine.block_size=4", "parallel.tp=2"]
PROMPTS = ["one two", "three", "two one two"]
PATIENCE = 180.0


def folder_of(path: Path, *, max_length: int = 32) -> Path:
    """Two ranks divide its heads and features."""
    return small_llama(path, heads=4, inner=36, max_length=max_length)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = Tokenizer.from_path(folder)
    found = []
    for prompt in PROMPTS:
        inputs = torch.tensor([tokenizer.encode(prompt)])
        mask = torch.ones_like(inputs)
        outputs = model.generate(inputs, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0)
        found.append(outputs[0, inputs.shape[1] :].tolist())
    return found


def tokens_in(out: Path) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in out.read_text().splitlines()]


def test_two_ranks_serve_a_folder_and_a_checkpoint_each_of_them_half(
    ranks: RankPool, folder: Path, prompts: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """A rank that reads or holds the whole model; shards in the wrong place."""
    ranks.run(1, convert, ["import", str(folder), str(tmp_path / "imported")])
    whole = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(folder).parameters())
    for model in (folder, tmp_path / "imported"):
        out = tmp_path / "out.jsonl"
        arguments = ["mode=generate", f"model.path={model}", f"prompts={prompts}", f"out={out}", *SETTINGS]
        for refused, elements in ranks.run(2, lab_and_watch, arguments):
            assert refused == ""
            assert elements < 0.52 * whole
        assert tokens_in(out) == expected
        out.unlink()


def test_what_is_refused_when_all_ranks_are_there_is_refused_once_and_they_go_on(
    ranks: RankPool, folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """Ranks that wait for a step that never comes; or a process group that is of no use any more."""
    out = tmp_path / "out.jsonl"
    good = ["mode=generate", f"model.path={folder}", f"prompts={prompts}", f"out={out}", *SETTINGS]
    damaged = folder_of(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-100])
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt_ids": [1] * 40}) + "\n")
    for wrong, says in {
        f"model.path={damaged}": "is damaged or cut short",
        f"prompts={long}": "prompts[0]: the prompt has 40 tokens",
    }.items():
        (refused, _), (others, _) = ranks.run(2, lab_and_watch, [*good, wrong])
        assert says in refused
        assert others == ""  # one rank speaks
    assert ranks.run(2, lab_and_watch, good)[0][0] == ""


MISTAKES = {
    "parallel.tp=1": "parallel.tp=1 takes as many processes, and 4 were started; use parallel.tp=4, or start with",
    "parallel.tp=8": "parallel.tp=8 takes as many processes, and 4 were started; use parallel.tp=4, or start torchrun",
    "parallel.tp=0": "parallel.tp=0 must be at least 1; use parallel.tp=1",
    "parallel.ep=3": "parallel.ep=3 does not divide parallel.tp=4, whose ranks share out the experts; use parallel.ep",
    "parallel.ep=2": "parallel.ep=2 shares out experts, and model.moe.num_experts=0 has none; use parallel.ep=1",
    "model.path={six}": "parallel.tp=4 does not divide model.num_heads=6, and ranks share attention heads equally; use "
    "parallel.tp=1, 2 or 6",
    "engine.block_size=0": "engine.block_size=0 must be at least 1",
}


def test_layouts_that_cannot_be_are_refused_before_there_is_a_process_group(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks that meet only to find that there is nothing to do; a degree that is proposed and not legal either."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    six = tmp_path / "six"
    fields = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2}
    transformers.LlamaConfig(**fields, num_attention_heads=6, num_key_value_heads=2).save_pretrained(six)
    good = [f"model.path={folder}", f"prompts={prompts}", *SETTINGS, "parallel.tp=4"]
    for mistake, says in MISTAKES.items():
        assert exit_code_of(lab, [*good, mistake.format(six=six)]) == 2, mistake
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith(f"configuration error: {says}") for line in lines), lines
        assert not dist.is_initialized()


def test_under_torchrun_one_rank_writes_what_one_process_would(
    folder: Path, prompts: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """A launcher's environment that no test has; a second rank that writes as well."""
    command = [*TORCHRUN, LAB, "mode=generate", f"model.path={folder}", f"prompts={prompts}", *SETTINGS, "device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["token_ids"] for line in done.stdout.splitlines()] == expected
    assert done.stderr.count("attention over the cache") == 1


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="mode=serve needs uvicorn")
def test_a_server_over_ranks_that_is_told_to_end_lets_requests_end(tmp_path: Path) -> None:
    """A launcher sends SIGTERM to all ranks; one that died of it took every unfinished request with it."""
    folder = folder_of(tmp_path / "model", max_length=400)
    arguments = [*TORCHRUN, LAB, "mode=serve", f"model.path={folder}", "serve.port=0", "parallel.tp=2", "device=cpu"]
    launcher = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    try:
        address = urlsplit(next(line for line in launcher.stdout if line.startswith("serving")).split()[-1])
        connection = HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
        body = {"prompt": "one", "max_tokens": 100, "ignore_eos": True, "stream": True, "stop": []}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        answer.readline()
        launcher.send_signal(signal.SIGTERM)
        streamed = answer.read().decode()
        assert '"finish_reason": "length"' in streamed
        assert streamed.endswith("data: [DONE]\n\n")
        launcher.wait(timeout=PATIENCE)
    finally:
        launcher.kill()
        launcher.wait()


def _num_groups(pid: int) -> int:
    """Process groups of a process, each of which has a thread (parallel/gloo.py)."""
    return [path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")].count("pt_gloo_runloop")


@pytest.mark.thorough
def test_when_a_rank_is_killed_the_other_one_says_so_and_ends(tmp_path: Path) -> None:
    """A server that hangs for ever once a GPU of it is gone."""
    folder = folder_of(tmp_path / "model", max_length=30_000)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = [sys.executable, LAB, f"model.path={folder}", "prompt=one", *SETTINGS, "device=cpu"]
    arguments += ["sampling.max_tokens=29000", "sampling.ignore_eos=true"]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            arguments, env=ENVIRONMENT | world | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        deadline = time.monotonic() + PATIENCE
        while _num_groups(processes[1].pid) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.5)
        processes[1].kill()
        said = processes[0].communicate(timeout=PATIENCE)[1]
        assert processes[0].returncode == 1
        assert "Traceback" not in said
        assert "has ended" in said
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
