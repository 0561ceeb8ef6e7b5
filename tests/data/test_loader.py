"""The loader: whose samples are whose, where a run goes on, what happens when something breaks."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.batch import IGNORE_INDEX
from data.config import BlendPart, DataError, TokenizerConfig
from data.reader import Slice
from tests.data.helpers import make_config, make_loader, rows, run, states, texts, tokenizer, write_jsonl
from tests.pool import RankPool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 30 documents: text files and a jsonl file."""
    data = tmp_path / "data"
    data.mkdir()
    documents = texts(30)
    for i, text in enumerate(documents[:10]):
        (data / f"{i:02}.txt").write_text(text)
    write_jsonl(data / "rest.jsonl", documents[10:])
    return data


def configs(tmp_path: Path, folder: Path) -> dict:
    """One configuration for each kind of random access."""
    array = tmp_path / "tokens.npy"
    np.save(array, np.random.default_rng(0).integers(0, 300, 900).astype(np.uint16))
    blend = [BlendPart(weight=0.3, path=str(folder)), BlendPart(weight=0.7, source="tokens", path=str(array))]
    return {
        "text": make_config(tmp_path, source="text", path=str(folder), mask_documents=True),
        "tokens": make_config(tmp_path, source="tokens", path=str(array)),
        "blend": make_config(tmp_path, source="blend", blend=blend),
    }


@pytest.mark.parametrize("source", ["text", "tokens", "blend"])
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_on_any_layout(source, tmp_path, folder):
    """A sample repeated or skipped when a run resumes on other ranks or micro-batches; epochs pass on the way."""
    config = configs(tmp_path, folder)[source]
    whole, end = run(config, 24)
    assert [number for number, _, _ in whole] == list(range(24 * 8))
    for (before, after), stop in zip(
        itertools.permutations([(1, 3), (2, 1), (2, 4), (4, 2)], 2),
        [0, 1, 2, 3, 5, 8, 13, 21, 22, 23, 24, 11],
        strict=True,
    ):
        first, state = run(config, stop, world_size=before[0], micro_batch_size=before[1])
        rest, last = run(config, 24 - stop, world_size=after[0], micro_batch_size=after[1], state=state)
        assert first + rest == whole
        assert last == end


def test_a_run_goes_on_with_another_batch_size(tmp_path, folder):
    """A cursor that counts steps would jump when the batch grows."""
    config = configs(tmp_path, folder)["text"]
    whole, _ = run(config, 12)
    first, state = run(config, 4)
    rest, _ = run(config, 2, world_size=2, global_batch_size=32, micro_batch_size=8, state=state)
    assert first + rest == whole


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_deliver_what_the_process_itself_would_and_only_what_was_taken_counts(num_workers, tmp_path, folder):
    """Micro-batches out of order between workers; a state that counts what was only prefetched."""
    expected, _ = run(make_config(tmp_path, source="text", path=str(folder)), 9)
    config = make_config(tmp_path, source="text", path=str(folder), num_workers=num_workers, prefetch=3)
    loader = make_loader(config)
    read = [row for _ in range(5) for row in rows(loader.next_step())]
    assert loader.state_dict()["samples_consumed"] == 40
    again = make_loader(config)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    read += [row for _ in range(4) for row in rows(again.next_step())]
    assert read == expected
    # Going back on a loader that is already running must not deliver what its workers had prepared.
    loader.load_state_dict({**loader.state_dict(), "samples_consumed": 8})
    assert rows(loader.next_step()) == expected[8:16]
    loader.close()
    again.close()


def test_tokens_in_order_follow_the_contract(tmp_path):
    """Step s trains on samples (s-1) G .. s G - 1; sample i is tokens[i T : (i+1) T + 1]. Other programs rely on it."""
    tokens = np.random.default_rng(1).integers(0, 300, 16 * 40 + 5).astype(np.int32)
    np.save(tmp_path / "t.npy", tokens)
    config = make_config(
        tmp_path, source="tokens", path=str(tmp_path / "t.npy"), shuffle=False, tokenizer=TokenizerConfig()
    )
    read, _ = run(config, 5, world_size=2)
    for i, (number, row, labels) in enumerate(read):
        assert number == i
        assert row == tokens[i * 16 : i * 16 + 16].tolist()
        assert labels == tokens[i * 16 + 1 : i * 16 + 17].tolist()


def test_every_sequence_of_a_batch_has_one_rank_and_micro_batch():
    """A rank's slice that is not contiguous, overlaps, or leaves a sequence out."""
    for world_size, micro in [(1, 1), (2, 3), (4, 1), (3, 4)]:
        slices = [Slice(24 if micro != 1 else 8 * world_size, micro, rank, world_size) for rank in range(world_size)]
        numbers = [n for one in slices for batch in one.numbers(100) for n in batch]
        assert numbers == list(range(100, 100 + slices[0].global_batch_size))
        assert all(len(batch) == micro for one in slices for batch in one.numbers(0))
    with pytest.raises(DataError, match=r"train.global_batch_size=9 is not a multiple of 2 .*; use a multiple of 2"):
        Slice(9, 2, 0, 2)


def test_the_last_micro_batch_of_a_rank_holds_what_is_left():
    """Sequences dropped, read by two ranks, or pushed into the next step because they fill no micro-batch."""
    slices = [Slice(14, 3, rank, 2) for rank in range(2)]
    assert slices[0].numbers(28) == [[28, 29, 30], [31, 32, 33], [34]]
    assert slices[1].numbers(28) == [[35, 36, 37], [38, 39, 40], [41]]
    assert [one.num_micro_batches for one in slices] == [3, 3]
    assert Slice(4, 9, 1, 2).numbers(0) == [[2, 3]]


def test_validation_is_the_same_at_every_call_on_every_layout_and_disjoint_from_training(tmp_path, folder):
    """A validation loss that depends on when it is measured, on how many ranks, or on text that was trained on."""
    config = make_config(tmp_path, source="text", path=str(folder), validation_fraction=0.2)
    one = make_loader(config, split="validation", global_batch_size=4)
    first = [row for step in one.batches(100) for row in rows(step)]
    assert first == [row for step in one.batches(100) for row in rows(step)]
    assert [row for step in one.batches(1) for row in rows(step)] == first[:4]
    ranks = [make_loader(config, split="validation", global_batch_size=4, rank=r, world_size=2) for r in range(2)]
    together = zip(*(loader.batches(100) for loader in ranks), strict=True)
    assert [row for steps in together for step in steps for row in rows(step)] == first

    # The first word of each document is its number: those seen in validation never appear in an epoch of training.
    def numbers_seen(read: list) -> set[str]:
        text = tokenizer().decode([token for _, row, _ in read for token in row])
        return {piece.split()[0] for piece in text.split("<|endoftext|>")[1:] if piece.split()}

    trained, _ = run(config, 8)
    assert len(numbers_seen(first)) >= 3
    assert not numbers_seen(first) & numbers_seen(trained)
    assert numbers_seen(first) & numbers_seen(run(make_config(tmp_path, source="text", path=str(folder)), 8)[0])


def test_the_last_validation_batch_is_filled_with_rows_that_do_not_count(tmp_path):
    """Samples dropped or counted twice because the validation set is no multiple of the batch."""
    np.save(tmp_path / "t.npy", np.arange(16 * 100 + 1) % 300)
    config = make_config(tmp_path, source="tokens", path=str(tmp_path / "t.npy"), validation_fraction=0.06)
    steps = list(make_loader(config, split="validation", global_batch_size=4, micro_batch_size=1).batches(9))
    read = [row for step in steps for row in rows(step)]
    assert len(read) == 8
    assert [row[1][0] for row in read[:6]] == [(16 * i) % 300 for i in range(94, 100)]
    assert all(IGNORE_INDEX not in labels for _, _, labels in read[:6])
    assert all(set(labels) == {IGNORE_INDEX} for _, _, labels in read[6:])


def test_loading_leaves_the_random_stream_of_the_run_alone(tmp_path, folder):
    """Starting workers draws a seed: a resumed run would then initialise or drop out differently."""
    config = make_config(tmp_path, source="text", path=str(folder), num_workers=1)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    loader = make_loader(config)
    loader.next_step()
    loader.close()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_for_a_gpu_are_pinned_and_the_same(num_workers, tmp_path, folder):
    """Copies that block the step, or a background thread that pins what a worker has already overwritten."""
    torch.zeros(1, device="cuda")  # workers are forked from a process that uses CUDA
    expected, _ = run(make_config(tmp_path, source="text", path=str(folder)), 20)
    config = make_config(tmp_path, source="text", path=str(folder), num_workers=num_workers, validation_fraction=0.2)
    validation = make_loader(config, split="validation", device_type="cuda")
    assert all(
        batch.tokens.is_pinned() and batch.labels.is_pinned() for step in validation.batches(2) for batch in step
    )
    config.validation_fraction = 0.0
    loader = make_loader(config, device_type="cuda")
    steps = [loader.next_step() for _ in range(20)]
    assert all(batch.tokens.is_pinned() and batch.samples.is_pinned() for step in steps for batch in step)
    assert [row for step in steps for row in rows([batch.to(torch.device("cuda")) for batch in step])] == expected
    loader.close()


def test_a_position_in_other_data_is_refused(tmp_path, folder):
    """A resume with another seed, length or corpus that goes on with samples the run has seen."""
    config = make_config(tmp_path, source="text", path=str(folder))
    _, state = run(config, 2)
    with pytest.raises(DataError, match="seed was 3 and is 4"):
        make_loader(config, seed=4).load_state_dict(state)
    with pytest.raises(DataError, match="seq_len was 16 and is 8"):
        make_loader(config, seq_len=8).load_state_dict(state)
    (folder / "00.txt").write_text("something else")
    with pytest.raises(DataError, match="content was"):
        make_loader(config).load_state_dict(state)


def test_the_same_text_elsewhere_is_the_same_data(tmp_path, folder):
    """A run moved to another machine, where paths and times differ, must go on."""
    _, state = run(make_config(tmp_path, source="text", path=str(folder)), 2)
    moved = folder.rename(tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    make_loader(make_config(tmp_path, source="text", path=str(moved))).load_state_dict(state)


def test_token_ids_beyond_the_model_are_refused_with_both_numbers(tmp_path, folder):
    """An index error deep in an embedding, or on a GPU an assertion without a number."""
    text = make_config(tmp_path, source="text", path=str(folder))
    with pytest.raises(
        DataError, match=rf"model.vocab_size=100 is smaller than the tokenizer's {tokenizer().vocab_size}"
    ):
        make_loader(text, vocab_size=100)
    tokens = np.zeros(200, np.int32)
    tokens[150] = 777
    np.save(tmp_path / "t.npy", tokens)
    config = make_config(tmp_path, source="tokens", path=str(tmp_path / "t.npy"), shuffle=False, num_workers=1)
    loader = make_loader(config)
    loader.next_step()
    with pytest.raises(DataError, match=r"^sample 9 holds the token id 777, outside model.vocab_size=320; set .* 778"):
        loader.next_step()
    tokens[0] = -1
    np.save(tmp_path / "t.npy", tokens)
    with pytest.raises(DataError, match="sample 0 holds the token id -1"):
        make_loader(config).next_step()


def _worker_pids() -> list[int]:
    """Children of this process, from /proc: also those that multiprocessing does not know to be its own."""
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def _lose_a_worker(config, number: int) -> str:
    before = set(_worker_pids())
    loader = make_loader(config)
    loader.next_step()
    (worker,) = set(_worker_pids()) - before
    os.kill(worker, number)
    try:
        for _ in range(40):
            loader.next_step()
    except (DataError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loader.close()
    return "no error"


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path, folder, ranks: RankPool):
    """A job that waits for ever because the kernel killed a loader for memory; also in a forked rank."""
    config = make_config(tmp_path, source="text", path=str(folder), num_workers=1, prefetch=1)
    assert "orker" in _lose_a_worker(config, signal.SIGKILL)
    assert "orker" in ranks.run(1, _lose_a_worker, config, signal.SIGKILL, timeout=30)[0]


def test_preemption_signals_do_not_end_a_worker(tmp_path, folder):
    """A launcher signals the whole job; losing the loader would break the very step that ends with the checkpoint."""
    config = make_config(tmp_path, source="text", path=str(folder), num_workers=1, prefetch=1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        assert _lose_a_worker(config, number) == "no error"


def test_closing_and_leaving_ends_the_workers_at_once(tmp_path, folder):
    """Workers left behind, or seconds lost at exit waiting for ones that ignore signals."""
    config = make_config(tmp_path, source="text", path=str(folder), num_workers=2)
    before = set(_worker_pids())
    loader = make_loader(config)
    loader.next_step()
    assert len(set(_worker_pids()) - before) == 2
    start = time.monotonic()
    loader.close()
    assert set(_worker_pids()) == before
    assert time.monotonic() - start < 3
    code = (
        "import time, sys; from tests.data.helpers import *; from pathlib import Path\n"
        f"l = make_loader(make_config(Path({str(tmp_path)!r}), source='text', path={str(folder)!r}, num_workers=2))\n"
        "l.next_step(); print(time.time())"
    )
    taken = []
    while len(taken) < 3 and not any(seconds < 3 for seconds in taken):  # a busy machine loses seconds too, not always
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
        taken.append(time.time() - float(out.stdout))
        assert out.stderr == ""
    assert min(taken) < 3


def _step_on_a_rank(config) -> list:
    loader = make_loader(config, rank=dist.get_rank(), world_size=dist.get_world_size())
    read = [row for _ in range(3) for row in rows(loader.next_step())]
    loader.close()
    return read


def test_ranks_of_a_process_group_read_with_workers_of_their_own(tmp_path, folder, ranks: RankPool):
    """Workers forked from a rank with gloo threads that hang, or ranks that read each other's samples. All ranks start
    on an empty cache."""
    config = make_config(tmp_path, source="text", path=str(folder), num_workers=1)
    read = ranks.run(2, _step_on_a_rank, config, timeout=60)
    expected, _ = run(make_config(tmp_path, source="text", path=str(folder)), 3)
    merged = sorted(read[0] + read[1])
    assert merged == expected
    assert states([make_loader(config)])["samples_consumed"] == 0
