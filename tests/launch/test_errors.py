"""What an entry point says when something goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.errors import exit_code_of
from parallel.cut import zigzag_indices
from trainer.run_info import write_atomically


def test_an_error_of_this_project_is_one_line_and_one_of_a_library_shows_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """At two in the morning: a dimension out of range, and nothing that says where."""

    def in_a_library(_: list[str]) -> None:
        torch.distributed.init_process_group("gloo", init_method="nonsense://")

    def in_a_file(_: list[str]) -> None:
        write_atomically(tmp_path / ("x" * 300), "too long a name")

    def here(_: list[str]) -> None:
        zigzag_indices(7, rank=0, size=2)

    assert exit_code_of(here, []) == exit_code_of(in_a_file, []) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: a sequence of 7 tokens")
    assert second.startswith("error: [Errno 36]")
    assert exit_code_of(in_a_library, []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_message_does_not_quote_a_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's error that quotes the token it was given, in a log that is shared."""
    monkeypatch.setenv("HF_TOKEN", "a1b2c3d4e5")

    def program(_: list[str]) -> None:
        raise RuntimeError("401 for https://me:hunter2@host/x with a1b2c3d4e5")

    assert exit_code_of(program, []) == 1
    said = capsys.readouterr().err
    assert "401 for https://***@host/x with ***" in said
    assert "a1b2c3d4e5" not in said
