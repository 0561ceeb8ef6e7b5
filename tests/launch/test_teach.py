"""launch/teach.py: what a command line is made of, writes and is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.teacher import TeacherCache
from launch.compose import compose_for
from launch.teach import TEACH, TeachOptions, problems, teach
from tests.data.conversing import chat_folder
from tests.parity.harness import text_corpus
from tests.parity.test_preferences import tiny_llama
from tests.pool import RankPool
from trainer.config import ConfigError


def test_the_files_say_what_the_code_does() -> None:
    """A default that is one thing in configs/teach.yaml and another in the code; a teacher that nobody named."""
    config = compose_for(TEACH, [])
    assert config.teach == TeachOptions()
    lines = problems(config)
    assert [line.split(" ")[0] for line in lines] == ["recipe.teacher_path", "recipe.teacher_cache"]
    (line,) = problems(compose_for(TEACH, ["recipe.teacher_path=a", "recipe.teacher_cache=b", "teach.top_k=0"]))
    assert line == "teach.top_k=0 must be at least 1; 64 is usual"


def _teach(arguments: list[str]) -> list[str]:
    try:
        teach(arguments)
    except ConfigError as error:
        return error.problems
    return []


def test_a_command_line_writes_a_cache_and_refuses_to_write_into_another(ranks: RankPool, tmp_path: Path) -> None:
    """An option that does not arrive; rows of two teachers in one folder; a folder with somebody's files."""
    tiny_llama(tmp_path / "teacher", 1)
    corpus = text_corpus(tmp_path)
    arguments = [
        "data=text",
        f"data.path={corpus.path}",
        f"data.cache_dir={corpus.cache_dir}",
        f"data.tokenizer.path={chat_folder(tmp_path / 'tokenizer')}",
        "model=hf",
        f"model.path={tmp_path / 'teacher'}",
        f"recipe.teacher_path={tmp_path / 'teacher'}",
        f"recipe.teacher_cache={tmp_path / 'words'}",
        "train.seq_len=24",
        "train.global_batch_size=8",
        "train.device=cpu",
        "teach.top_k=3",
    ]
    (line,) = ranks.run(1, _teach, arguments)[0]
    assert line.startswith("data.shuffle=true with recipe.teacher_cache=")
    arguments += ["data.shuffle=false", "recipe.teacher_offload=true"]
    assert ranks.run(2, _teach, arguments) == [[], []]
    made = TeacherCache(tmp_path / "words").made
    assert (made.k, made.splits, made.too_long, made.left_out) == (3, ["train"], None, 0)
    (line,) = ranks.run(1, _teach, [*arguments, "teach.top_k=4"])[0]
    assert "k was 3 and is 4; give another folder" in line
    (line,) = ranks.run(1, _teach, [*arguments, f"recipe.teacher_cache={tmp_path}"])[0]
    assert "is not empty, and no teacher's cache" in line
    (line,) = ranks.run(1, _teach, [*arguments, "teach.top_k=301"])[0]
    assert line.startswith("teach.top_k=301 must be 1 to 300")


def test_sweeps_are_for_training() -> None:
    with pytest.raises(ConfigError, match="--multirun is for training"):
        TEACH.of_sweep(compose_for(TEACH, []), "point")
