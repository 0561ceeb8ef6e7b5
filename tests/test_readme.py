"""The README is checked against the program: every command in it composes, and names files and targets that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.compose import compose_one
from trainer.config import ConfigError
from trainer.validate import finalize

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_the_readme_has_the_commands_this_file_checks() -> None:
    """A changed fence would leave nothing to check."""
    assert len(COMMANDS) >= 9
    assert {c.split()[0] for c in COMMANDS} == {"make", "torchrun", "python"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command: str) -> None:
    """A target renamed in the Makefile only."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/train.py" in c])
def test_training_commands_are_valid_configurations(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key, group or experiment that was renamed; a degree that does not divide the processes shown."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "tokens.npy").write_bytes(b"")
    words = shlex.split(command)
    processes = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
    overrides = [w for w in words[words.index("launch/train.py") + 1 :] if not w.startswith("--")]
    overrides = [o.partition(",")[0] for o in overrides]  # the first point of a sweep
    config = compose_one(overrides)
    if config.model.path == "HF_DIR":
        with pytest.raises(ConfigError) as refused:
            finalize(config, world_size=processes)
        assert refused.value.problems == ["model.path=HF_DIR does not exist; give the folder of a Hugging Face model"]
        return
    finalize(config, world_size=processes)


def test_links_and_files_named_in_the_readme_exist() -> None:
    """A page or module that was moved."""
    named = re.findall(r"\]\(([^)#]+)\)", README)
    named += re.findall(r"`((?:launch|trainer|models|parallel)/[\w/]+\.py)`", README)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
