"""The loader: micro-batches of one rank, made in the background, at a position that is exact.

The run's samples are numbered 0, 1, 2, ... whatever the layout. With G samples in a global batch, step s (from 1) takes
samples (s-1) G .. s G - 1; of these rank r of R takes the contiguous slice r G/R .. (r+1) G/R - 1, in micro-batches of
consecutive samples, of which the last may be smaller. So the position of a run is one number, the samples consumed, and
any rank can go on from it.
"""

from __future__ import annotations

import atexit
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.batch import IGNORE_INDEX, Batch
from data.config import DataConfig, DataError, parts, problems
from data.opening import open_reader
from data.reader import Annotate, Cursors, Failure, Item, RandomAccessReader, Reader, Slice, StreamReader
from data.tokenizer import Tokenizer, load_tokenizer

AllGather = Callable[[object], list[Any]]
"""Collects one object from every data-parallel rank, in rank order; every rank calls it."""


class Loader:
    """Batches of one rank: `next_step` for training, `batches` for validation."""

    def __init__(
        self,
        reader: Reader,
        *,
        identity: dict[str, Any],
        num_workers: int,
        prefetch: int,
        pin: bool,
        tokenizer: Tokenizer | None,
    ) -> None:
        """identity: all that decides what sample n is; a saved position is good only for the same."""
        self.tokenizer = tokenizer
        self._reader = reader
        self._identity = identity
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._pin = pin
        self._samples_consumed = 0
        self._cursors: Cursors | None = None
        self._items: Iterator[Item | Failure] | None = None
        self._at_exit: Callable[[], None] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what sample n is, in JSON values; the same on every rank that reads the same data."""
        return dict(self._identity)

    @property
    def counts(self) -> dict[str, int]:
        """Of examples, by name: those there are, and those that were cut or left out. Empty for other data."""
        return dict(self._reader.counts)

    @property
    def left_out(self) -> list[str]:
        """The first row of each kind that no example was made of, and why."""
        return list(self._reader.left_out)

    def next_step(self) -> list[Batch]:
        """All micro-batches of this rank for the next step, in order; CPU tensors, pinned for a GPU.

        Raises DataError when the data is wrong or a worker process died.
        """
        if self._items is None:
            self._items = self._start()
        batches = []
        cursors = None
        for _ in range(self._reader.part.num_micro_batches):
            batch, cursors = self._next(self._items)
            batches.append(batch)
        self._samples_consumed += self._reader.part.global_batch_size
        self._cursors = cursors
        return batches

    def batches(self, num_batches: int | None, *, first: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the first num_batches global batches, the same at every call.

        num_batches: None: of an epoch. first: of the batches to begin with.

        Ends earlier when the data does: then the last global batch is filled up with rows whose labels are all
        IGNORE_INDEX, so that every sample counts once. Read in this process: a slice of a memory map costs less than
        handing it over. Raises DataError when there is not one sample.
        """
        if not isinstance(self._reader, RandomAccessReader):
            raise DataError("a training stream is read once; build the loader with split='validation'")
        part = self._reader.part
        wanted = sys.maxsize if num_batches is None else num_batches * part.global_batch_size
        count = self._reader.samples.available(wanted)
        if count < 1:
            raise DataError(
                "validation: the held-out documents are fewer than one sample; raise data.validation_fraction"
            )
        for begin in range(first * part.global_batch_size, count, part.global_batch_size):
            yield [self._padded(numbers, count) for numbers in part.numbers(begin)]

    def _padded(self, numbers: list[int], count: int) -> Batch:
        """The samples below count; in place of others, the first sample without labels."""
        assert isinstance(self._reader, RandomAccessReader)
        batch = self._reader.read([number if number < count else 0 for number in numbers])
        batch.samples = torch.tensor(numbers, dtype=torch.int64)
        batch.labels[batch.samples >= count] = IGNORE_INDEX
        for column in batch.columns.values():
            column[batch.samples >= count] = 0 if column.is_floating_point() else -1
        return batch.pin_memory() if self._pin else batch

    def state_dict(self, all_gather: AllGather | None = None) -> dict[str, Any]:
        """The position after the last step that `next_step` returned (not what was prefetched), as JSON values.

        Of streams each rank knows its own: with several ranks, all of them must call this with all_gather. The result
        is then the same on every rank.
        """
        state: dict[str, Any] = {"samples_consumed": self._samples_consumed, "data": dict(self._identity)}
        if isinstance(self._reader, StreamReader):
            cursors = dict(self._cursors or {})
            if self._reader.part.world_size > 1:
                if all_gather is None:
                    raise ValueError(
                        "Loader.state_dict: streams on several ranks need all_gather, called by every rank"
                    )
                for other in all_gather(cursors):
                    cursors.update(other)
            state["streams"] = dict(sorted(cursors.items(), key=lambda item: int(item[0])))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position saved on any number of ranks, with any batch size.

        Raises DataError when it belongs to other data, seed or sequence length: sample n would be another one there.
        """
        saved = state["data"]
        changed = [
            f"{name} was {saved.get(name)} and is {self._identity.get(name)}"
            for name in sorted(saved.keys() | self._identity.keys())
            if saved.get(name) != self._identity.get(name)
        ]
        if changed:
            raise DataError(
                f"the position of the checkpoint is one in other data: {'; '.join(changed)}. Restore these, or start a "
                "new run from the checkpoint's weights"
            )
        if isinstance(self._reader, StreamReader) and state["samples_consumed"]:
            missing = [index for index in self._reader.needed if str(index) not in state["streams"]]
            if missing:
                raise DataError(
                    f"the checkpoint has no position for the streams {missing}; it was saved by part of the ranks"
                )
        self.close()
        self._samples_consumed = int(state["samples_consumed"])
        self._cursors = state.get("streams")

    def close(self) -> None:
        """End the workers. The position stays: `next_step` would start them again there."""
        items, self._items = self._items, None
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None
        shutdown = getattr(items, "_shutdown_workers", None)  # torch has no public way to end them at a chosen time
        if shutdown is not None:
            shutdown()

    def _start(self) -> Iterator[Item | Failure]:
        dataset, sampler = self._reader.dataset(self._samples_consumed, self._cursors)
        background = self._num_workers > 0
        items = iter(
            DataLoader(
                dataset,
                batch_size=None,  # an item is a micro-batch already
                sampler=sampler,
                collate_fn=_as_it_is,
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch if background else None,
                pin_memory=self._pin,
                # fork: a worker starts in milliseconds and shares the memory maps. It never touches CUDA or torch's
                # thread pools, the two things that do not survive a fork.
                multiprocessing_context="fork" if background else None,
                worker_init_fn=_worker_init if background else None,
                generator=torch.Generator(),  # otherwise it draws a seed from the run's own random stream
            )
        )
        # Exit handlers run last-in first-out: workers end here, before torch's and multiprocessing's handlers, which
        # would signal them (in vain, see _worker_init) and wait.
        self._at_exit = _close_at_exit(weakref.ref(self))
        return items

    def _next(self, items: Iterator[Item | Failure]) -> Item:
        try:
            item = next(items)
        except (RuntimeError, OSError, EOFError) as error:
            # A worker died: torch noticed, or its socket closed in the middle of an item. Errors inside are Failures.
            self.close()
            raise DataError(
                f"loading data in the background failed: {error}. If a worker was killed for memory, lower "
                "data.num_workers or data.prefetch"
            ) from error
        if isinstance(item, Failure):
            self.close()
            if item.known:
                raise DataError(item.message)
            raise RuntimeError(f"reading data failed: {item.message}\n{item.trace}")
        return item


def _as_it_is(item: Any) -> Any:
    return item


def _worker_init(worker: int) -> None:
    """Leave signals to the training process. A launcher that preempts a job signals all its processes, but the step
    under way still needs its data; a worker ends when told to, or when its parent is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _close_at_exit(loader: weakref.ref[Loader]) -> Callable[[], None]:
    def close() -> None:
        alive = loader()
        if alive is not None:
            alive.close()

    return atexit.register(close)


def build_loader(
    config: DataConfig,
    *,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    split: str,
    vocab_size: int,
    device_type: str,
    annotate: Annotate | None = None,
) -> Loader:
    """The loader of data-parallel rank `rank` of `world_size`.

    The first call anywhere trains the tokenizer and tokenises the text, which may take minutes; other processes of the
    host wait for it. split: "train" or "validation". vocab_size: of the model. annotate: adds to every batch, where it
    is read, what lies beside the data; of streams it is not called. Raises DataError for everything that is wrong with
    the configuration or the data.
    """
    found = problems(config)
    if split not in ("train", "validation"):
        found.append(f"split={split} is neither train nor validation")
    if seed < 0:
        found.append(f"train.seed={seed} must not be negative")
    if seq_len < 1:
        found.append(f"train.seq_len={seq_len} must be at least 1")
    if split == "validation" and config.validation_fraction == 0.0:
        found.append("data.validation_fraction=0 leaves nothing to validate on; raise it, or set train.eval_interval=0")
    if found:
        raise DataError("; ".join(found))
    tokenizer = _tokenizer(config, vocab_size)
    reader, identity = open_reader(
        config,
        Slice(global_batch_size, micro_batch_size, rank, world_size),
        tokenizer,
        seq_len=seq_len,
        seed=seed,
        split=split,
        vocab_size=vocab_size,
        annotate=annotate,
    )
    return Loader(
        reader,
        identity=identity,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
        pin=device_type == "cuda",
        tokenizer=tokenizer,
    )


def _tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer | None:
    """The tokenizer, checked against the model; None for token arrays that come without one."""
    only_tokens = all(part.source == "tokens" for part in parts(config))
    if only_tokens and config.tokenizer.path is None:
        return None
    tokenizer = load_tokenizer(config)
    if tokenizer.vocab_size > vocab_size and not only_tokens:
        raise DataError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; set "
            f"model.vocab_size={tokenizer.vocab_size} or more, or use the tokenizer the model was made for"
        )
    return tokenizer
