"""Sources, the cache of their tokens, and the configuration's problems."""

from __future__ import annotations

import multiprocessing as mp
import os
import sysconfig
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from data import corpus, sources
from data.cache import cached
from data.config import SOURCES, BlendPart, DataConfig, DataError, TokenizerConfig, problems
from data.corpus import open_tokens, tokenise
from data.sources import open_text, sample_of, stdlib
from tests.data.helpers import VOCAB, make_config, make_loader, texts, tokenizer, write_jsonl


def text_part(path: Path, **fields) -> BlendPart:
    return BlendPart(source="text", path=str(path), **fields)


def test_a_folder_holds_one_document_per_text_file_and_per_row(tmp_path):
    """Files read in the order the file system lists them, which differs between machines; a kind of file left out."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "sub" / "a.py").write_text("five")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / "a.txt").write_text("one")
    write_jsonl(tmp_path / "c.jsonl", ["three", "four"])
    datasets.Dataset.from_dict({"text": ["six", "seven"], "n": [1, 2]}).to_parquet(str(tmp_path / "sub" / "b.parquet"))
    expected = ["one", "two", "three", "four", "five", "six", "seven"]
    assert list(open_text(text_part(tmp_path)).documents()) == expected
    assert list(open_text(text_part(tmp_path / "**" / "*.py")).documents()) == ["five"]
    assert list(open_text(text_part(tmp_path / "a.txt")).documents()) == ["one"]
    hub = BlendPart(source="hub", path=str(write_jsonl(tmp_path / "hub.jsonl", ["x", "y"]).parent / "hubset"))
    Path(str(hub.path)).mkdir()
    write_jsonl(Path(str(hub.path)) / "train.jsonl", ["x", "y"])
    assert list(open_text(hub).documents()) == ["x", "y"]


def test_the_standard_library_is_there_without_its_tests():
    """Tests or installed packages in the corpus, which differ from machine to machine."""
    source = stdlib()
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in source.files]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert source.fingerprint() == stdlib().fingerprint()
    assert "import" in next(source.documents()) or len(names) > 100


def test_undecodable_files_are_skipped_in_the_standard_library_and_refused_in_a_users_text(tmp_path):
    """Text silently left out, or replaced by question marks."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 text"):
        list(open_text(text_part(tmp_path)).documents())


def test_a_wrong_field_names_the_fields_there_are(tmp_path):
    """A KeyError, or an empty corpus, for a column called otherwise; a row that is no text."""
    write_jsonl(tmp_path / "a.jsonl", ["x"], field="content")
    with pytest.raises(DataError, match=r"data.text_field=text; its fields: content \(str\)"):
        list(open_text(text_part(tmp_path)).documents())
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"row 1 has no text .* text \(NoneType\)"):
        list(open_text(text_part(tmp_path)).documents())
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl cannot be read as json"):
        list(open_text(text_part(tmp_path)).documents())


def test_tokens_on_disk_are_the_documents_each_ended_by_eos(tmp_path, monkeypatch):
    """Boundaries off by one; a long document that loses text where it is cut into pieces; an empty one that counts."""
    monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(corpus, "_BATCH_CHARACTERS", 200)
    documents = [*texts(40), "", "no line end " * 30, "one\nline\n" * 40]
    write_jsonl(tmp_path / "a.jsonl", documents)
    made = tokenise(open_text(text_part(tmp_path)), tokenizer(), str(tmp_path / "cache"))
    assert made.tokens.dtype == np.uint16
    found = [made.tokens[a:b].tolist() for a, b in zip(made.starts, made.ends, strict=True)]
    assert [tokenizer().decode(ids[:-1]) for ids in found] == [text for text in documents if text]
    assert all(ids[-1] == tokenizer().eos_id for ids in found)
    short = [(ids, text) for ids, text in zip(found, filter(None, documents), strict=True) if len(text) <= 50]
    assert len(short) > 3
    assert all(ids[:-1] == tokenizer().encode(text) for ids, text in short)


def _tokenise_in_process(path: str, cache: str, log: str) -> None:
    source = open_text(text_part(Path(path)))
    inner = source.documents

    def counted():
        with open(log, "a") as out:
            out.write("built\n")
        time.sleep(0.3)
        yield from inner()

    source.documents = counted  # type: ignore[method-assign]
    made = tokenise(source, tokenizer(), cache)
    with open(log, "a") as out:
        out.write(f"{made.content} {made.num_tokens}\n")


def test_of_four_processes_that_start_at_once_one_builds(tmp_path):
    """Ranks that write the same file at once, or read one half written."""
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    log = tmp_path / "log"
    context = mp.get_context("fork")
    arguments = (str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), str(log))
    processes = [context.Process(target=_tokenise_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    lines = log.read_text().split("\n")[:-1]
    assert [process.exitcode for process in processes] == [0] * 4
    assert lines.count("built") == 1
    assert len(lines) == 5
    assert len(set(lines)) == 2


def _die_while_building(folder: str) -> None:
    def build(scratch: Path) -> None:
        (scratch / "half").write_text("x")
        os._exit(9)

    cached(Path(folder), build)


def test_a_killed_builder_leaves_nothing_that_is_taken_for_whole(tmp_path):
    """A half-written cache used by the next run, a lock that nobody releases, or scratch files for ever."""
    process = mp.get_context("fork").Process(target=_die_while_building, args=(str(tmp_path / "key"),))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    assert not (tmp_path / "key").exists()
    assert len(list(tmp_path.glob(".key.*"))) == 2  # the lock file and what was left

    def build(scratch: Path) -> None:
        (scratch / "whole").write_text("y")

    assert [path.name for path in cached(tmp_path / "key", build).iterdir()] == ["whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.lock", "key"]


def test_a_file_system_without_locks_is_one_error_that_names_the_folder(tmp_path, monkeypatch):
    """A parallel file system mounted without flock: "Function not implemented", of what and where is not said."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("data.cache.fcntl.flock", refuse)
    with pytest.raises(DataError, match=r"data\.cache_dir: .* without locks \(Function not implemented\); choose"):
        cached(tmp_path / "key", lambda scratch: None)
    assert not (tmp_path / "key").exists()


def test_a_failed_build_passes_its_error_on_and_can_be_tried_again(tmp_path):
    """An error that leaves an empty folder, which the next start takes for a result."""

    def fail(scratch: Path) -> None:
        raise DataError("no text")

    with pytest.raises(DataError, match="no text"):
        cached(tmp_path / "key", fail)
    assert cached(tmp_path / "key", lambda scratch: None).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir: cannot write"):
        cached(tmp_path / "file" / "key", fail)


def test_damaged_tokens_on_disk_are_noticed(tmp_path):
    """A disk that filled up: zeros, or the end of another array, trained on."""
    write_jsonl(tmp_path / "a.jsonl", texts(40))
    source = open_text(text_part(tmp_path / "a.jsonl"))
    tokenise(source, tokenizer(), str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache").rglob("tokens.bin")
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(DataError, match=r"data.cache_dir: .* is damaged .*; delete that folder"):
        tokenise(source, tokenizer(), str(tmp_path / "cache"))


def test_an_empty_dataset_is_an_error(tmp_path):
    """A run on nothing."""
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="the dataset is empty"):
        tokenise(open_text(text_part(tmp_path)), tokenizer(), str(tmp_path / "cache"))
    write_jsonl(tmp_path / "a.jsonl", ["a b"])
    with pytest.raises(DataError, match=r"the train split of data.path=.* in 1 documents, fewer than one sample"):
        make_loader(make_config(tmp_path, source="text", path=str(tmp_path / "a.jsonl")))


def test_arrays_that_are_no_tokens_are_refused_by_what_they_are(tmp_path):
    """Floats cast to ids, a matrix flattened in an order nobody chose, a pickle executed."""
    path = tmp_path / "t.npy"
    for array, message in [
        (np.zeros(100), "1-D array of float64"),
        (np.zeros((4, 4), np.int32), "2-D array of int32"),
        (np.zeros(4, bool), "1-D array of bool"),
    ]:
        np.save(path, array)
        with pytest.raises(DataError, match=message):
            open_tokens(str(path))
    np.save(path, np.zeros(1000, np.int32))
    os.truncate(path, 600)
    with pytest.raises(DataError, match=r"t.npy is not a readable .npy file"):
        open_tokens(str(path))
    for content in (b"", b"not an array at all", b"\x93NUMPY\x01\x00v\x00{'descr': "):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is not a readable .npy file"):
            open_tokens(str(path))
    np.savez(tmp_path / "t.npz", a=np.zeros(3))
    (tmp_path / "t.npz").rename(path)
    with pytest.raises(DataError, match="several arrays"):
        open_tokens(str(path))


def test_a_changed_array_has_another_hash(tmp_path):
    """A resumed run that goes on in a file that was regenerated."""
    path = tmp_path / "t.npy"
    np.save(path, np.zeros(100, np.int32))
    first = open_tokens(str(path))[1]
    np.save(path, np.eye(1, 100, 50, dtype=np.int32)[0])
    assert open_tokens(str(path))[1] != first


def test_a_tokenizer_for_a_large_corpus_sees_a_sample_of_all_of_it(tmp_path):
    """Training on the first files only: one language or topic of a sorted corpus."""
    write_jsonl(tmp_path / "a.jsonl", documents := texts(400, longest=30))
    source = open_text(text_part(tmp_path))
    size = (tmp_path / "a.jsonl").stat().st_size
    taken = list(sample_of(source, size // 4))
    assert taken == list(sample_of(source, size // 4))
    assert 50 < len(taken) < 150
    assert int(taken[-1].split()[0]) > 300
    assert list(sample_of(source, 10 * size)) == documents


def test_a_single_large_file_is_sampled_and_encoded_in_pieces(tmp_path, monkeypatch):
    """Taken or left as a whole: "the source is empty" for most files above 128 MiB, and encoding one takes 100 bytes a
    token at once."""
    lines = [f"line {i} of one large file\n" for i in range(3000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    source = open_text(text_part(tmp_path))
    monkeypatch.setattr(sources, "_SAMPLE_CHARACTERS", 300)
    taken = "".join(sample_of(source, len("".join(lines)) // 4)).splitlines(keepends=True)
    assert 500 < len(taken) < 1000
    assert set(taken) <= set(lines)
    assert lines.index(taken[-1]) > 2000
    monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(corpus, "_BATCH_CHARACTERS", 500)
    known = tokenizer()
    at_once = []
    encode = known.encode_batch
    monkeypatch.setattr(known, "encode_batch", lambda texts: at_once.append(sum(map(len, texts))) or encode(texts))
    made = tokenise(source, known, str(tmp_path / "cache"))
    assert max(at_once) <= 600
    assert len(made.starts) == 1
    assert known.decode(made.tokens[:-1].tolist()) == "".join(lines)
    assert made.tokens[-1] == known.eos_id


def test_all_problems_of_a_configuration_are_named_at_once(tmp_path):
    """A user who fixes one thing, waits, and gets the next error."""
    config = DataConfig(
        source="blend",
        blend=[
            BlendPart(weight=-1, path=str(tmp_path / "none")),
            BlendPart(source="blend"),
            BlendPart(source="tokens"),
        ],
        validation_fraction=1.5,
        num_workers=-1,
        prefetch=0,
        stream_shards=0,
        tokenizer=TokenizerConfig(path=str(tmp_path / "nowhere")),
    )
    found = problems(config)
    for field in (
        "data.blend[0].weight=-1",
        "data.blend[0].path=",
        "data.blend[1].source=blend",
        "data.blend[2].path is missing",
        "data.validation_fraction=1.5",
        "data.num_workers=-1",
        "data.prefetch=0",
        "data.stream_shards=0",
        "data.tokenizer.path=",
    ):
        assert sum(line.startswith(field) for line in found) == 1, field
    assert len(found) == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "texts"}, "data.source=texts is unknown; use one of stdlib"),
        ({"source": "text"}, "data.path is missing"),
        ({"source": "text", "path": "empty"}, "no file with one of the endings"),
        ({"source": "text", "path": "blank.txt"}, "is empty"),
        ({"source": "text", "path": "a.bin"}, "cannot read .bin files"),
        ({"source": "tokens", "path": "none.npy"}, "no such file"),
        ({"source": "tokens", "path": "a.bin"}, "is not a .npy file"),
        ({"source": "tokens", "path": "t.npy", "mask_documents": True}, "set data.eos_id"),
        ({"source": "blend"}, "data.blend is empty"),
        ({"source": "hub"}, "data.path is missing"),
        ({"source": "hub", "path": "x", "num_workers": 2}, "data.num_workers=2"),
        ({"tokenizer": TokenizerConfig(vocab_size=100)}, "data.tokenizer.vocab_size=100 is too small"),
        ({"tokenizer": TokenizerConfig(path="a.bin")}, "is not readable as JSON"),
        (
            {"source": "blend", "blend": [BlendPart(source="tokens", path="t.npy"), BlendPart(source="stdlib")]},
            "data.tokenizer.path is missing: a blend",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(fields, message, tmp_path, monkeypatch):
    """A traceback, or an error hours later, for a mistake that can be seen at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "a.bin").write_bytes(b"\xff\x00")
    np.save(tmp_path / "t.npy", np.zeros(9, np.int32))
    (problem,) = problems(DataConfig(**fields))
    assert message in problem
    with pytest.raises(DataError, match=r"data\."):
        make_loader(DataConfig(**fields))


def test_nothing_is_wrong_with_what_works(tmp_path):
    """A check that refuses a good configuration."""
    np.save(tmp_path / "t.npy", np.zeros(9, np.int32))
    (tmp_path / "a.txt").write_text("x")
    assert problems(DataConfig()) == []
    for fields in (
        {"source": "text", "path": str(tmp_path / "*.txt")},
        {"source": "tokens", "path": str(tmp_path / "t.npy")},
        {"source": "tokens", "path": str(tmp_path / "t.npy"), "mask_documents": True, "eos_id": 0},
        {"source": "hub", "path": "any/name"},
        {"source": "blend", "blend": [BlendPart(source="stdlib"), BlendPart(path=str(tmp_path))]},
    ):
        assert problems(DataConfig(**fields)) == []


def test_every_shipped_configuration_has_only_fields_that_exist():
    """A YAML file that drifts from the dataclass fails for the first user who picks it."""
    files = sorted(Path("configs/data").glob("*.yaml"))
    assert [file.stem for file in files] == sorted(SOURCES)
    for file in files:
        merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.create(yaml.safe_load(file.read_text())))
        config = OmegaConf.to_object(merged)
        assert config.source == file.stem
        needs_path = file.stem not in ("stdlib",)
        assert [("path is missing" in problem) for problem in problems(config)] == [True] * needs_path


def test_a_tiny_text_file_trains_and_validates(tmp_path):
    """One file, the commonest first try, has one document: there must be something to train and to validate on."""
    (tmp_path / "a.txt").write_text("\n".join(texts(200)))
    config = make_config(tmp_path, source="text", path=str(tmp_path / "a.txt"), validation_fraction=0.1)
    assert make_loader(config).next_step()
    assert list(make_loader(config, split="validation").batches(2))
    config.validation_fraction = 0.0
    with pytest.raises(DataError, match=r"data.validation_fraction=0 leaves nothing"):
        make_loader(config, split="validation")
    assert tokenizer().vocab_size <= VOCAB
