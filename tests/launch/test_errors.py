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
