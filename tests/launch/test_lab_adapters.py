"""model.adapters of launch/lab.py: PEFT folders beside a model, each line of prompts by its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.errors import exit_code_of
from launch.lab import lab
from tests.inference.adapters import CHOICES, PROMPTS, by_peft, make_adapters


def test_each_line_is_continued_by_the_adapter_it_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that goes into the line of the answer and nowhere else."""
    adapters = make_adapters(folder, tmp_path)
    lines = [
        {"prompt_ids": p} | ({} if by is None else {"adapter": by}) for p, by in zip(PROMPTS, CHOICES, strict=True)
    ]
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = ",".join(f"{name}:{path}" for name, path in adapters.items())
    settings = [f"model.path={folder}", f"prompts={prompts}", f"out={out}", "sampling.temperature=0"]
    settings += ["sampling.max_tokens=9", "sampling.ignore_eos=true", "model.dtype=fp64"]
    assert exit_code_of(lab, ["mode=generate", f"model.adapters={{{named}}}", *settings]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["token_ids"] for line in found] == by_peft(folder, adapters, PROMPTS, CHOICES)
    assert [line.get("adapter") for line in found] == CHOICES
    capsys.readouterr()

    def refused(*changes: str) -> str:
        assert exit_code_of(lab, [*settings, *changes]) == 2
        return capsys.readouterr().err

    assert "prompts[0]: the adapter 'attention' is not served: there are none" in refused("mode=generate")
    one = f"model.adapters.one={adapters['all']}"
    assert "the adapter 'attention' is not served: there are one" in refused("mode=generate", one)
    assert f"model.adapters.two={folder} has no adapter_config.json" in refused(f"model.adapters.two={folder}")
    said = refused("mode=eval", one)
    assert "model.adapters is of mode=generate and serve, whose requests name one; mode=eval serves the model" in said
    said = refused("mode=serve", f"model.adapters.{folder.name}={adapters['all']}", "prompts=null", "out=null")
    assert f"model.adapters.{folder.name} has the name of the model" in said
    prompts.write_text('{"prompt_ids": [1], "adapter": 3}\n')
    assert "line 1: adapter must be a string" in refused("mode=generate", one)
