"""What a teacher thinks of a data set, written down: its k likeliest words after every token that a student learns.

One epoch in order, by the teacher of recipe=distill on the layout of the configuration (trainer/frozen.py), into the
folder recipe.teacher_cache (data/teacher.py). Files are written block by block; a run that was killed goes on behind
the last block that all ranks have finished, on any layout with the same train.global_batch_size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from data.batch import IGNORE_INDEX, Batch
from data.config import DataError
from data.loader import Loader
from data.teacher import HEADER, PLACE, Made, data_identity, finish, write_json, write_rows
from kernels.linear_cross_entropy import VocabularyShard, linear_top_words
from models.config import ModelConfig
from models.decoder import Head
from parallel.dims import ParallelDims
from parallel.mesh import Meshes, build_mesh, groups_in_layers, init_distributed, pick_device
from trainer.adapters import fingerprint
from trainer.agreement import Ranks, check_same_on_all_ranks
from trainer.config import ConfigError, TrainConfig, configuration_errors
from trainer.frozen import FrozenModel, load_frozen, resolve_beside
from trainer.identity import run_identity
from trainer.loss import vocabulary_shard
from trainer.recipes.loaders import open_rows
from trainer.sequence import SequenceParts


@dataclass(frozen=True)
class Written:
    """What a folder has. Filled by `write_teacher_cache`, the same on all ranks."""

    rows: int
    blocks: int
    new: int  # blocks that this call has written


def write_teacher_cache(
    config: TrainConfig, *, k: int, block_tokens: int, say: Callable[[str], None] = lambda text: None
) -> Written:
    """Write, or complete, the folder recipe.teacher_cache. Collective over all processes of the launcher.

    config: validated (trainer.validate.finalize), of recipe=distill. k: words of a row. block_tokens: about how many
    are in a block. say: called with a line for each block. Raises ConfigError for a folder of something else and for
    data that cannot be read, CheckpointError where it cannot be written.
    """
    recipe = config.recipe
    assert recipe.teacher_cache is not None
    assert recipe.teacher_path is not None
    with configuration_errors():
        device = pick_device(config.train.device)
    init_distributed(device, config.train.timeout_seconds)
    check_same_on_all_ranks(run_identity(config))
    mesh = build_mesh(ParallelDims.resolve(config.parallel, Ranks().size), device.type)
    with configuration_errors():
        model = resolve_beside(recipe.teacher_path, config)
    if not 1 <= k <= model.vocab_size:
        raise ConfigError([f"teach.top_k={k} must be 1 to {model.vocab_size}, the number of the teacher's words"])
    loaders = _loaders(config, mesh, device)
    data = loaders["train"]
    batch_size, seq_len = config.train.global_batch_size, config.train.seq_len
    made = Made(
        k=k,
        temperature=recipe.temperature,
        vocab_size=model.vocab_size,
        teacher=fingerprint(Path(recipe.teacher_path).expanduser()),
        tokenizer=None if data.tokenizer is None else data.tokenizer.fingerprint(),
        data=data_identity(config.data, data.identity),
        splits=list(loaders),
        validation_fraction=config.data.validation_fraction,
        too_long=config.data.conversations.too_long if config.data.source == "conversations" else None,
        left_out=_left_out(config, loaders),
        seq_len=seq_len,
        block=[batch_size, max(1, block_tokens // (batch_size * seq_len))],
    )
    folder = Path(recipe.teacher_cache).expanduser()
    done = _begin(folder, made)
    with configuration_errors():
        teacher = load_frozen(model, config, mesh, device, offload=recipe.teacher_offload)
    return _Writer(folder, made, config, mesh, model, teacher, device, say).write(loaders, done)


class _Writer:
    def __init__(
        self,
        folder: Path,
        made: Made,
        config: TrainConfig,
        mesh: Meshes,
        model: ModelConfig,
        teacher: FrozenModel,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        groups = groups_in_layers(mesh, config.parallel)
        self._folder, self._made, self._teacher, self._device, self._say = folder, made, teacher, device, say
        self._ranks = Ranks()
        self._head = _top_words_head(made, vocabulary_shard(model.vocab_size, groups))
        self._writes = groups.tp is None or groups.tp.get_local_rank() == 0  # all ranks of tp find the same
        self._parts = SequenceParts(config, mesh, model)

    def write(self, loaders: Mapping[str, Loader], done: set[str]) -> Written:
        """The blocks that are not done, and the table of all."""
        blocks, new = set(done), 0
        for split, loader in loaders.items():
            for block in count():
                name = f"{split}-{block:06d}"
                if name in done:
                    continue
                if not self._write_block(loader, block, name):
                    break
                blocks.add(name)
                new += 1
        files = [self._folder / f"{name}.json" for name in sorted(blocks)]
        rows = self._ranks.on_first(lambda: finish(self._folder, files))
        return Written(rows, len(blocks), new)

    def _write_block(self, loader: Loader, block: int, name: str) -> bool:
        """Whether there is such a block. Collective."""
        begin, steps = time.perf_counter(), self._made.block[1]
        found: list[tuple[Tensor, Tensor]] = []
        some = False
        with configuration_errors(DataError):
            for step in loader.batches((block + 1) * steps, first=block * steps):
                found += self._rows(step)
                some = True
        if not some:
            return False
        file, k = f"{name}-{self._ranks.rank}.safetensors", self._made.k

        def write() -> tuple[str, int] | None:
            if not found:
                return None
            places, tops = (torch.cat(parts) for parts in zip(*found, strict=True))
            words = tops[:, :k].contiguous().view(torch.int32)
            return file, write_rows(self._folder, file, places, words, tops[:, k:])

        files = [written for written in self._ranks.everywhere(write) if written is not None]
        self._ranks.on_first(lambda: write_json(self._folder / f"{name}.json", {"files": files}))
        rows = sum(number for _, number in files)
        self._say(f"{name}: {rows:,} rows, {rows / (time.perf_counter() - begin):,.0f} a second")
        return True

    def _rows(self, step: list[Batch]) -> list[tuple[Tensor, Tensor]]:
        """(places [n], what `_top_words_head` finds [n, 2k + 1]) of each micro-batch, on the host."""
        parts = [self._parts.of(batch) for batch in step]
        tops = self._teacher.per_token([part.to(self._device) for part in parts], self._head, everywhere=False)
        if not self._writes:
            return []
        return [
            (part.columns[PLACE][part.labels != IGNORE_INDEX], top.cpu())
            for part, top in zip(parts, tops, strict=True)
            if top.numel()  # else it has no label, or this rank is not where the pipeline ends
        ]


def _top_words_head(made: Made, shard: VocabularyShard | None) -> Callable[[Batch], Head]:
    """Heads for `Passes.per_token`: of the n tokens with a label [n, 2k + 1] fp32: k words, as bits of int32, and the
    log-probabilities."""

    def of_batch(batch: Batch) -> Head:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            labelled = hidden[batch.labels != IGNORE_INDEX]
            words, logprobs = linear_top_words(labelled, weight, made.k, temperature=made.temperature, shard=shard)
            return torch.cat([words.int().view(torch.float32), logprobs], -1)

        return head

    return of_batch


def _loaders(config: TrainConfig, mesh: Meshes, device: torch.device) -> dict[str, Loader]:
    """Of the splits that a run reads, in order, with the places of labels."""
    splits = ["train"] + ["validation"] * (config.train.eval_interval > 0)
    with configuration_errors(DataError):
        return {
            split: open_rows(
                replace(config, data=replace(config.data, shuffle=False)),
                split=split,
                rank=mesh.samples.get_local_rank(),
                world_size=mesh.samples.size(),
                device_type=device.type,
                annotate=_as_it_is,
            )
            for split in splits
        }


def _left_out(config: TrainConfig, loaders: Mapping[str, Loader]) -> int:
    """Examples without rows, because they are too long."""
    if config.data.conversations.too_long != "skip":
        return 0
    return sum(loader.counts.get("too_long", 0) for loader in loaders.values())


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _begin(folder: Path, made: Made) -> set[str]:
    """Names of the blocks that are finished. Raises ConfigError where the folder holds something else. Collective."""

    def begin() -> tuple[list[str], set[str]]:
        if not (folder / HEADER).is_file():
            if folder.is_dir() and any(folder.iterdir()):
                return [
                    f"recipe.teacher_cache={folder} is not empty, and no teacher's cache; give another folder"
                ], set()
            made.write(folder)
        before = Made.read(folder)
        different = before.differs(made)
        if different:
            what = "; ".join(different)
            return [f"recipe.teacher_cache={folder} was made of something else: {what}; give another folder"], set()
        return [], {path.stem for path in folder.glob("*-*.json")}

    problems, done = Ranks().on_first(begin)
    if problems:
        raise ConfigError(problems)
    return done
