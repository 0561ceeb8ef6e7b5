"""README and docs/ are checked against the program: commands in them compose, files and numbers in them exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.tokenizer import train_bpe
from launch.compose import compose_for, compose_one
from launch.lab import LAB
from launch.lab import problems as lab_problems
from launch.plan import PLAN, plan_of
from launch.slurm.submit import parse
from launch.teach import TEACH
from launch.teach import problems as teach_problems
from trainer.config import ConfigError
from trainer.validate import finalize

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # the log tells what was, and keeps names that are gone
    path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.stem != "LOG"
}
README = PAGES[ROOT / "README.md"]
MEASURED = PAGES[ROOT / "docs" / "MEASURED.md"]


def _commands(page: str) -> list[str]:
    fenced = re.findall(r"```bash\n(.*?)```", page, re.S)
    return [line.partition("#")[0].strip() for block in fenced for line in block.splitlines() if line.strip()]


COMMANDS = list(dict.fromkeys(command for page in PAGES.values() for command in _commands(page)))


def test_the_pages_have_the_commands_this_file_checks() -> None:
    """A changed fence would leave nothing to check."""
    assert {c.split()[0] for c in _commands(README)} == {"make", "torchrun", "python", "sbatch"}
    with_commands = {path.stem for path, page in PAGES.items() if _commands(page)}
    assert with_commands >= {"README", "TRAINING", "POST_TRAINING", "SERVING", "PLANNER", "SLURM"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command: str) -> None:
    """A target renamed in the Makefile only."""
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TWO_GPUS = r"GPU 0: x (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (UUID: MIG-GPU-1)\nGPU 1: x (UUID: GPU-2)"


@pytest.mark.parametrize(
    ("listed", "visible", "processes", "experiment"),
    [
        (TWO_GPUS, None, 2, "stdlib_gpu"),
        (TWO_GPUS, "1", 1, "stdlib_gpu"),
        (TWO_GPUS, "GPU-1,GPU-2", 2, "stdlib_gpu"),
        (TWO_GPUS, "", 2, "stdlib"),
        (TWO_GPUS, "-1", 2, "stdlib"),
        ("No devices found.", None, 2, "stdlib"),  # a driver without a GPU: nvidia-smi is there and exits with 0
        ("No devices found.", "0", 2, "stdlib"),
    ],
)
def test_make_train_uses_the_gpus_that_torch_will_see(
    listed: str, visible: str | None, processes: int, experiment: str, tmp_path: Path
) -> None:
    """More processes than GPUs, or the large model on a CPU."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listed}\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NPROC", "EXP", "RUN")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run(
        ["make", "train", "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert f"--nproc-per-node {processes} launch/train.py +exp={experiment} " in done.stdout, done.stdout + done.stderr


def _word_problems(folder: Path) -> None:
    """What benchmarks/word_problems.py leaves, as far as a configuration can tell."""
    folder.mkdir(parents=True)
    for name in ("sft", "worked", "preferences", "prompts", "held_out"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    train_bpe(iter(["one two three two one"]), 270).save(folder / "tokenizer")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/train.py" in c])
def test_training_commands_are_valid_configurations(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key, group or experiment that was renamed; a degree that does not divide the processes shown."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "tokens.npy").write_bytes(b"")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    _word_problems(tmp_path / "runs" / "words")
    words = shlex.split(command)
    processes = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
    overrides = [w for w in words[words.index("launch/train.py") + 1 :] if not w.startswith("--")]
    overrides = [o if "[" in o else o.partition(",")[0] for o in overrides]  # the first point of a sweep
    config = compose_one(overrides)
    if config.model.path is not None:
        with pytest.raises(ConfigError) as refused:
            finalize(config, world_size=processes)
        path = config.model.path
        beside = ("LARGER_HF_DIR does not exist", "REWARD_DIR does not exist")
        own = [problem for problem in refused.value.problems if not any(other in problem for other in beside)]
        assert own == [f"model.path={path} does not exist; give the folder of a Hugging Face model"]
        return
    finalize(config, world_size=processes)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/teach.py" in c])
def test_commands_that_keep_a_teachers_words_are_complete(command: str) -> None:
    """A key that was renamed; a folder that nobody named."""
    words = shlex.split(command)
    assert teach_problems(compose_for(TEACH, words[words.index("launch/teach.py") + 1 :])) == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/slurm/" in c])
def test_commands_for_slurm_are_valid_configurations(command: str) -> None:
    """A degree that does not divide the ranks of the nodes shown; sbatch told of options that are the script's."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if "launch/slurm/" in word)
    assert (ROOT / words[script]).exists()
    submission, overrides, _ = parse([*words[1:script], *words[script + 1 :]])
    finalize(compose_one(overrides), world_size=submission.world_size)
    assert submission.spare_nodes == 0 or words[0] == "python"  # plain sbatch has no such option


LAB_COMMANDS = [c for c in COMMANDS if "launch/lab.py" in c]


@pytest.mark.parametrize("command", LAB_COMMANDS)
def test_commands_of_the_inference_lab_are_valid_configurations(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was renamed; a setting that is out of range. All that is missing is the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "TEXT.txt").write_text("x")
    _word_problems(tmp_path / "runs" / "words")
    (tmp_path / "PEFT_DIR").mkdir()
    (tmp_path / "PEFT_DIR" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("launch.modes.eval.harness_is_there", lambda: True)  # not part of every installation
    words = shlex.split(command)
    if "--nproc-per-node" in words:
        monkeypatch.setenv("WORLD_SIZE", words[words.index("--nproc-per-node") + 1])
    config = compose_for(LAB, words[words.index("launch/lab.py") + 1 :])
    missing = f"model.path={config.model.path} does not exist; give a Hugging Face folder or a checkpoint"
    assert lab_problems(config) == ([] if config.bench.random_weights is not None else [missing])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/plan.py" in c])
def test_commands_of_the_planner_plan_something_that_runs(command: str) -> None:
    """A key that was renamed; a layout that the trainer refuses."""
    words = shlex.split(command)
    assert plan_of(compose_for(PLAN, words[words.index("launch/plan.py") + 1 :]))["step_seconds"] > 0


RESULTS = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]


def test_measured_numbers_are_in_the_results() -> None:
    """A table that was not written anew when a measurement was, or a number that nobody measured."""

    def values(found: object, key: str) -> Iterator[float]:
        if isinstance(found, dict):
            yield from ([found[key]] if isinstance(found.get(key), float) else [])
        for value in found.values() if isinstance(found, dict) else found if isinstance(found, list) else []:
            yield from values(value, key)

    measured = README.partition("## Measured")[2].partition("## Read it")[0] + MEASURED
    rows = [line for line in measured.splitlines() if line.startswith("|")]
    speeds = {
        f"{x:,.0f}"
        for key in ("tokens_per_second_per_gpu", "tokens_per_second", "tokens_per_s")
        for x in values(RESULTS, key)
    }
    memory = {f"{x:.1f}" for x in values(RESULTS, "peak_memory_gib")}
    utilization = {f"{100 * x:.1f}" for x in values(RESULTS, "mfu")}
    ratios = {f"{x:.2f}" for x in values(RESULTS, "ratio")}
    for known, pattern in (
        (speeds, r"(?:\| |: )(\d+,\d{3})(?: \||,)"),
        (memory, r"([\d.]+) GiB \|"),
        (utilization, r"([\d.]+)% \|"),
        (ratios, r"(?:\| |to |\*)([0-3]\.\d\d)\b"),
    ):
        shown = {number for row in rows for number in re.findall(pattern, row)}
        assert shown
        assert sorted(shown - known) == []


H200, ADAMW, FP8 = "kernels_h200", "kernels_adamw_h200", "kernels_adamw_loss_fp8_h200"
GEGLU = "kernels_geglu_low_rank_h200"
KERNEL_ROWS: dict[str, tuple[str, str, str]] = {  # by the beginning of a row: file, op, and a pattern of its shapes
    "attention, documents": (H200, "attention", "documents"),
    "attention, window of 1024": (H200, "attention", "window"),
    "attention, plain causal": (H200, "attention", "causal"),
    "RMSNorm, also with residual, width 2048 and 4096": (H200, "rms_norm", r"^(add )?\d+x(2048|4096)$"),
    "RMSNorm, also with residual, width 16384": (H200, "rms_norm", r"^(add )?\d+x16384$"),
    "RMSNorm of heads of 128": (H200, "rms_norm", "x128$"),
    "RMSNorm to fp8": (H200, "rms_norm", "fp8"),
    "LayerNorm, width 1600 and 4096": (H200, "layer_norm", "x(1600|4096)$"),
    "LayerNorm, width 12288": (H200, "layer_norm", "x12288$"),
    "RoPE": (H200, "rope", ""),
    "SwiGLU": (H200, "swiglu", "^(?!fp8)"),
    "GeGLU, tanh, of two": (H200, "geglu", "tanh"),
    "GeGLU, tanh, of one": (GEGLU, "geglu", "tanh"),
    "GeGLU, erf, of two": (H200, "geglu", "none"),
    "GeGLU, erf, of one": (GEGLU, "geglu", "none"),
    "low-rank products": (GEGLU, "low_rank", ""),
    "softmax, width 128 and 4096": (H200, "softmax", "x(128|4096)$"),
    "softmax, width 16384 and 32768": (H200, "softmax", "x(16384|32768)$"),
    "softmax, width 131072": (H200, "softmax", "x131072$"),
    "cross entropy": (H200, "cross_entropy", ""),
    "linear + cross entropy": (H200, "linear_cross_entropy", ""),
    "gradient norm": (H200, "global_norm", ""),
    "grouped matrix product": (H200, "grouped_linear", ""),
    "input gradient of two grouped products": ("kernels_grouped_pair_h200", "grouped_linear", "two weights"),
    "sending rows to experts": (H200, "moe_permute", ""),
    "int8 weights, 1 to 16": (H200, "int8_linear", "^(1|16)x(8192|28672)"),
    "int8 weights, other": (H200, "int8_linear", "^(64|4096)x|x4096x4096"),
    "int4 weights, 1 to 16": (H200, "int4_linear", "^(1|16)x"),
    "int4 weights, 64": (H200, "int4_linear", "^(64|4096)x"),
    "NF4 to bf16": (H200, "nf4_dequantize", ""),
    "tiled matrix product": (H200, "matmul", ""),
    "linear + GELU": (H200, "linear_gelu", ""),
    "AdamW, fp32": (ADAMW, "adamw", r"fp32(, flat)?$"),
    "AdamW, bf16": (ADAMW, "adamw", "bf16 stochastic, bf16"),
    "quantization to fp8": (FP8, "fp8_quantize", "^(?!.*transposed)"),
    "the same with a transposed copy": (FP8, "fp8_quantize", "^(?!1x128).*transposed"),
    "the same, 1x128": (FP8, "fp8_quantize", "^1x128.*transposed"),
    "fp8 product, scales by tensor": (FP8, "fp8_matmul", "^(tensor|row)wise"),
    "fp8 product, scales of 1x128 and": (FP8, "fp8_matmul", "^1x128 and 128x128"),
    "fp8 product, scales of 1x128 blocks": (FP8, "fp8_matmul", "^1x128 and 1x128"),
    "fp8 linear layer": (FP8, "fp8_linear", ""),
}


@pytest.mark.parametrize(
    "line", re.findall(r"^\| .*\|$", MEASURED.partition("| op (bf16")[2].partition("Files:")[0], re.M)
)
def test_each_row_of_kernels_spans_what_was_measured(line: str) -> None:
    """A range of another op, or one that leaves out the shape that lost."""
    name, _, forward, backward = (cell.strip(" *") for cell in line.strip("|").split("|"))
    file, op, shapes = KERNEL_ROWS[max((begin for begin in KERNEL_ROWS if name.startswith(begin)), key=len)]
    problems = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())["problems"]
    measured = [p for p in problems if p["op"] == op and p["ratio"] and re.search(shapes, p["shape"])]
    first = [p["ratio"] for p in measured if p["direction"] == "forward"]
    second = [p["ratio"] for p in measured if p["direction"] not in ("forward", "sort")]
    if op == "linear_cross_entropy":
        first, second = second, []
    for shown, ratios in ((forward, first), (backward, second)):
        ends = list(dict.fromkeys(f"{end:.2f}" for end in (min(ratios), max(ratios)))) if ratios else []
        assert shown == " to ".join(ends), line


@pytest.mark.parametrize("processes", [4, 8])
def test_llama3_8b_runs_as_it_is_and_as_its_file_says_for_smaller_gpus(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that does not divide, or overrides in a comment that no longer exist."""
    monkeypatch.chdir(tmp_path)
    comment = (ROOT / "configs" / "exp" / "llama3_8b.yaml").read_text().partition("defaults:")[0]
    smaller = re.findall(r"[a-z_]+\.[a-z_]+=\w+", comment)
    assert " ".join(smaller) in MEASURED
    assert len(smaller) == 3
    for overrides in ([], smaller):
        finalize(compose_one(["+exp=llama3_8b", *overrides]), world_size=processes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_that_a_page_names_exist(page: Path) -> None:
    """A page, a heading or a module that was moved."""
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", PAGES[target], re.M) if heading else []
        slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
        assert not heading or heading in slugs, link
    folders = "launch|trainer|models|parallel|inference|kernels|planner|data|benchmarks|tests|configs|recipes"
    named = re.findall(rf"`((?:{folders})/[\w/]+\.(?:py|yaml|json))`", PAGES[page])
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_kind_of_event_is_defined() -> None:
    """An event that a reader of events.jsonl finds nowhere, or one that is no longer written."""
    page = PAGES[ROOT / "docs" / "METRICS.md"].partition("## events.jsonl")[2].partition("## run.json")[0]
    defined = {kind for row in re.findall(r"^\| (`.+?) \|", page, re.M) for kind in re.findall(r"`(\w+)`", row)}
    called = re.compile(r'\bevents?(?:\.append)?\(\(?\s*"(\w+)"(?:\s+if .*?\selse\s+"(\w+)")?')
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "trainer").rglob("*.py")))
    written = {kind for found in called.findall(sources) for kind in found if kind}
    assert defined - {"kind"} == written | {"answers"}  # its kind stands in the tuple that a recipe returns


def test_every_page_is_reached_from_the_readme() -> None:
    """A page that nobody finds."""
    assert [path.name for path in PAGES if path.stem != "README" and f"docs/{path.name}" not in README] == []
