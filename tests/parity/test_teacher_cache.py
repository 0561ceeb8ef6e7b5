"""recipe.teacher_cache: words kept on disk teach as the teacher does, whatever layout writes and reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from data.config import DataConfig
from data.teacher import TeacherCache
from data.tokenizer import load_tokenizer
from tests.data.conversing import chat_config, chat_folder
from tests.parity.harness import Outcome, changed, gradient_deviation, loss_deviation, run_on, text_corpus, tiny_config
from tests.parity.test_preferences import LAYOUTS, tiny_llama
from tests.pool import RankPool
from trainer.config import ConfigError, RecipeConfig, TrainConfig
from trainer.recipes import distill
from trainer.teach import Written, write_teacher_cache
from trainer.validate import finalize, find_problems

VOCABULARY = 300
WORDS = ["one", "two", "three", "user", "assistant"]


def said(number: int) -> list[dict[str, str]]:
    turns = [" ".join(WORDS[(number * k) % 5 :] * (1 + number % 3)) for k in (1, 2, 3, 4)]
    roles = ("user", "assistant") * 2
    return [{"role": role, "content": text} for role, text in zip(roles, turns[: 2 + 2 * (number % 2)], strict=False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taught")
    tiny_llama(path / "student", 0)
    tiny_llama(path / "teacher", 1)
    return path


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, DataConfig]:
    """Of each kind of data one; a text that shuffles is refused."""
    text = text_corpus(folder)
    text.tokenizer.path = str(chat_folder(folder / "tokenizer"))
    text.shuffle, text.mask_documents = False, True
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, 24 * 11 + 6).astype(np.uint16)
    np.save(folder / "tokens.npy", tokens)
    flat = DataConfig(source="tokens", path=str(folder / "tokens.npy"), num_workers=0, validation_fraction=0.1)
    chats = chat_config(folder / "chats", [{"messages": said(n)} for n in range(17)])
    chats.num_workers, chats.validation_fraction, chats.mask_documents = 0, 0.1, True
    return {"text": text, "tokens": flat, "conversations": chats}


def teaching(folder: Path, data: DataConfig, name: str, **changes: Any) -> TrainConfig:
    """Two epochs and more; the cache is folder / name."""
    sizes = {"train__global_batch_size": 4, "train__micro_batch_size": 4, "train__steps": 6, "train__eval_interval": 6}
    sizes |= {"train__seq_len": 48 if data.source == "conversations" else 24}
    config = tiny_config(folder / f"{name}-run", data, **(sizes | changes))
    config.model.family, config.model.path = "hf", str(folder / "student")
    config.recipe = RecipeConfig(
        name="distill", teacher_path=str(folder / "teacher"), divergence=0.3, temperature=2.0, nll_weight=0.5
    )
    return config


def cached(config: TrainConfig, folder: Path) -> TrainConfig:
    config = changed(config, Path(f"{config.run.dir}-cached"))
    config.recipe.teacher_cache = str(folder)
    return config


def write(config: TrainConfig, k: int, stop_after: int | None = None) -> Written:
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        if len(lines) == stop_after:
            raise KeyboardInterrupt

    import torch.distributed as dist

    resolved = finalize(config, world_size=dist.get_world_size())
    return write_teacher_cache(resolved, k=k, block_tokens=100, say=say)


def _interrupted(config: TrainConfig, k: int) -> bool:
    try:
        write(config, k, stop_after=2)
    except KeyboardInterrupt:
        return True
    return False


def same(found: Outcome, wanted: Outcome) -> None:
    assert loss_deviation(found, wanted) < 1e-6
    assert gradient_deviation(found, wanted) < 1e-5
    for name in ("nll", "validation_loss"):
        ours, theirs = ([line[name] for line in outcome.metrics if name in line] for outcome in (found, wanted))
        assert ours
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("source", ["text", "tokens", "conversations"])
def test_all_words_kept_teach_as_the_teacher_beside_the_student_does(
    ranks: RankPool, folder: Path, sources: dict[str, DataConfig], source: str
) -> None:
    """Rows of another token, of the token itself in place of the one before it, or seen in another document.

    Read in another order than they were written in, over more than an epoch, with the held-out split.
    """
    seeds = {"train__seed": 11} if source != "text" else {}
    config = teaching(folder, sources[source], source)
    written = ranks.run(1, write, cached(config, folder / "all" / source), VOCABULARY)[0]
    assert written.blocks == written.new > 2
    other = changed(config, folder / f"{source}-other", **seeds | {"train__micro_batch_size": 1})
    if source == "conversations":
        other.data.conversations.packing = False
    wanted = run_on(ranks, 1, other)
    same(run_on(ranks, 1, cached(other, folder / "all" / source)), wanted)


@pytest.fixture(scope="module")
def few(ranks: RankPool, folder: Path, sources: dict[str, DataConfig]) -> Outcome:
    """A run by 7 words of each row, written by one process."""
    config = cached(teaching(folder, sources["conversations"], "few"), folder / "few")
    ranks.run(1, write, config, 7)
    return run_on(ranks, 1, config)


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", ["ddp", "zero3", "tp", "ring", "pp"])
def test_every_layout_writes_and_reads_the_same(
    ranks: RankPool, folder: Path, sources: dict[str, DataConfig], few: Outcome, layout: str
) -> None:
    """Words of half of the vocabulary; rows of tokens that are on another rank."""
    changes = {"train__micro_batch_size": 1} | LAYOUTS[layout]
    config = teaching(folder, sources["conversations"], layout, **changes)
    ranks.run(2, write, cached(config, folder / layout), 7)
    one, two = (_rows(folder / name) for name in ("few", layout))
    assert one.keys() == two.keys()
    assert all(np.allclose(one[place], two[place], atol=1e-5) for place in one)
    same(run_on(ranks, 2, cached(config, folder / "few")), few)


def _rows(folder: Path) -> dict[int, np.ndarray]:
    """Words and log-probabilities by place, from the files alone."""
    found: dict[int, np.ndarray] = {}
    for path in folder.glob("*-*-*.safetensors"):
        tensors = load_file(path)
        rows = np.concatenate([tensors["words"].numpy(), tensors["logprobs"].numpy()], 1)
        found |= dict(zip(tensors["places"].tolist(), rows, strict=True))
    return found


def test_fewer_words_are_another_divergence(ranks: RankPool, folder: Path, few: Outcome, sources: Any) -> None:
    """Control: k that is never used; what is lost makes the divergence smaller."""
    online = run_on(ranks, 1, teaching(folder, sources["conversations"], "whole"))
    assert few.losses[0] < 0.99 * online.losses[0]


def test_writing_goes_on_where_it_stopped(ranks: RankPool, folder: Path, sources: dict[str, DataConfig]) -> None:
    """A block that is written twice, or never; a folder that looks complete before it is."""
    config = cached(teaching(folder, sources["tokens"], "killed"), folder / "killed")
    assert ranks.run(1, _interrupted, config, 5)[0]
    (line,) = _refused(config)
    assert "is not complete" in line
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "killed").glob("*-*.safetensors")}
    assert len(before) == 2
    # On other ranks: what is there stays, and the rest is shared out anew.
    config.train.micro_batch_size = 1
    again = ranks.run(2, write, config, 5)[0]
    assert again.new == again.blocks - 2 > 0
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "killed").glob("*-*.safetensors")}
    assert before.items() <= after.items()
    whole = cached(config, folder / "whole")
    written = ranks.run(1, write, whole, 5)[0]
    assert written.rows == again.rows
    one, two = _rows(folder / "killed"), _rows(folder / "whole")
    assert one.keys() == two.keys()
    assert all(np.allclose(one[place], two[place], atol=1e-5) for place in one)
    assert ranks.run(1, write, whole, 5)[0] == Written(written.rows, written.blocks, 0)


def _refused(config: TrainConfig) -> list[str]:
    """What the trainer says of a configuration, or of its data, in one process without ranks."""
    problems = find_problems(config, world_size=1)
    if problems:
        return problems
    from trainer.recipes.distill import Distillation
    from trainer.trainer import DataError, configuration_errors

    splits = ["train"] + ["validation"] * (config.train.eval_interval > 0)
    try:
        with configuration_errors(DataError):
            recipe, resolved = Distillation(), finalize(config, world_size=1)
            for split in splits:
                data = recipe.open_data(resolved, split=split, rank=0, world_size=1, device_type="cpu")
                for _ in data.batches(None):  # all that it holds
                    pass
    except ConfigError as error:
        return error.problems
    return []


REFUSALS: dict[str, tuple[Callable[[TrainConfig, Path], Any], str]] = {
    "temperature": (
        lambda config, _: setattr(config.recipe, "temperature", 1.0),
        "recipe.temperature was 2.0 and is 1.0",
    ),
    "teacher": (
        lambda config, folder: setattr(config.recipe, "teacher_path", str(folder / "student")),
        "student has other weights",
    ),
    "sequences": (lambda config, _: setattr(config.train, "seq_len", 64), "train.seq_len was 48 and is 64"),
    "data": (
        lambda config, folder: setattr(
            config.data, "path", chat_config(folder / "others", [{"messages": said(n)} for n in range(3)]).path
        ),
        "the data was",
    ),
    "no cache": (
        lambda config, folder: setattr(config.recipe, "teacher_cache", str(folder / "student")),
        "is no teacher's cache: cache.json is missing",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_rows_of_something_else_are_refused(
    folder: Path, few: Outcome, sources: dict[str, DataConfig], what: str
) -> None:
    """A student that learns from rows of other words without a word about it."""
    config = cached(teaching(folder, sources["conversations"], f"refused-{what}"), folder / "few")
    assert _refused(config) == []
    change, message = REFUSALS[what]
    change(config, folder)
    (line,) = _refused(config)
    assert message in line


LENGTHS = [{"messages": [*said(n), *said(n + 1)[: 2 * (n % 3 == 0)]]} for n in range(17)]
WRITTEN: dict[str, dict[str, Any]] = {
    "training alone": {"train__eval_interval": 0},
    "skipping": {"too_long": "skip"},
    "all": {},
    "nothing held out": {"train__eval_interval": 0, "validation_fraction": 0.0},
}
READ: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
    ("training alone", "validated"): ({}, "train.eval_interval was 0, so that held-out rows were left out"),
    ("training alone", "more"): (
        {"train__eval_interval": 0, "validation_fraction": 0.1},
        "data.validation_fraction was 0.3, of which no rows were written, and is 0.1",
    ),
    ("training alone", "less"): ({"train__eval_interval": 0, "validation_fraction": 0.5}, ""),
    ("skipping", "cut"): ({}, "data.conversations.too_long was skip, which left out 11 examples, and is truncate"),
    ("skipping", "skipped"): ({"too_long": "skip", "validation_fraction": 0.1}, ""),
    ("all", "skipped"): ({"too_long": "skip"}, ""),
    ("all", "shorter"): ({"train__seq_len": 40, "validation_fraction": 0.5}, ""),
    ("nothing held out", "validated"): ({}, ""),
}


def reading(folder: Path, data: DataConfig, name: str, written: str, changes: dict[str, Any]) -> TrainConfig:
    changes = {"train__seq_len": 44, "train__eval_interval": 6} | changes
    config = teaching(folder, data, name, **{key: value for key, value in changes.items() if "__" in key})
    config.data.validation_fraction = changes.get("validation_fraction", 0.3)
    config.data.conversations.too_long = changes.get("too_long", "truncate")
    return cached(config, folder / f"of {written}")


@pytest.fixture(scope="module")
def conversations(ranks: RankPool, folder: Path) -> DataConfig:
    """Of which some are too long, with a folder for each of WRITTEN."""
    data = chat_config(folder / "lengths", LENGTHS)
    data.num_workers, data.mask_documents = 0, True
    for written, changes in WRITTEN.items():
        ranks.run(1, write, reading(folder, data, written, written, changes), 3)
    texts = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"]) for row in LENGTHS
    ]
    assert sum(len(ids) > 44 for ids in load_tokenizer(data).encode_batch(texts)) == 11
    return data


@pytest.mark.parametrize("case", READ, ids=" ".join)
def test_a_run_that_would_meet_a_token_without_a_row_is_refused_before_it(
    folder: Path, conversations: DataConfig, case: tuple[str, str]
) -> None:
    """A run that ends at such a token after hours; control: without the check it does, and only then."""
    changes, message = READ[case]
    config = reading(folder, conversations, "-".join(case), case[0], changes)
    with mock.patch.object(distill, "check_cache"):
        unchecked = _refused(config)
    checked = _refused(config)
    assert [message in line for line in checked] == [True] * bool(message), checked
    assert [("has no rows for" in line) for line in unchecked] == [True] * bool(message)


def test_a_teacher_that_is_not_loaded_is_not_kept_anywhere(folder: Path, few: Outcome, sources: Any) -> None:
    config = cached(teaching(folder, sources["conversations"], "offloaded"), folder / "few")
    config.recipe.teacher_offload = True
    (line,) = _refused(config)
    assert line.startswith("recipe.teacher_offload=true has no effect with recipe.teacher_cache=")
    config.recipe.teacher_cache = None
    assert find_problems(config, world_size=1) == []


def test_data_without_places_and_damaged_files_are_refused(
    folder: Path, few: Outcome, sources: dict[str, DataConfig]
) -> None:
    """Text that is cut elsewhere each epoch; a file that is cut short, or lies outside of the folder."""
    config = cached(teaching(folder, sources["text"], "shuffled"), folder / "few")
    config.data.shuffle = True
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("data.shuffle=true with recipe.teacher_cache=")
    assert "data.shuffle=false" in line
    copy = folder / "damaged"
    shutil.copytree(folder / "few", copy)
    name = next(copy.glob("train-*.safetensors"))
    tensors = load_file(name)
    save_file({key: tensor[1:].contiguous() for key, tensor in tensors.items()}, name)
    with pytest.raises(ValueError, match="does not hold"):
        TeacherCache(copy)
    name.write_bytes(name.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged or missing"):
        TeacherCache(copy)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**index, "files": [["../few/rows.safetensors", 3]]}))
    with pytest.raises(ValueError, match="no safetensors file in the same folder"):
        TeacherCache(copy)
