"""The arithmetic of one step and of a validation, against plain autograd on the whole batch in one process."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.batch import IGNORE_INDEX, Batch
from data.config import DataConfig, parts
from data.corpus import tokenise
from data.sources import open_text
from data.tokenizer import load_tokenizer
from models.decoder import Decoder
from models.registry import build_model
from tests.parity.harness import changed, run_on, text_corpus, tiny_config, whole
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.step import evaluate, train_step
from trainer.trainer import Trainer
from trainer.validate import finalize

SEQ_LEN, ROWS = 24, 8
# Valid tokens of each of the eight rows. With two ranks the second one has none at all.
UNEVEN = (24, 1, 13, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("step"))


def whole_batch(valid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """tokens, labels [8, 24]; row r has labels at its first valid[r] positions."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(300, (ROWS, SEQ_LEN), generator=generator)
    labels = torch.randint(300, (ROWS, SEQ_LEN), generator=generator)
    for row, count in enumerate(valid):
        labels[row, count:] = IGNORE_INDEX
    return tokens, labels


def micro_batches(valid: tuple[int, ...], *, rank: int, world_size: int, size: int) -> list[Batch]:
    """This rank's rows of the whole batch, `size` at a time."""
    tokens, labels = whole_batch(valid)
    first, last = rank * ROWS // world_size, (rank + 1) * ROWS // world_size
    positions = torch.arange(SEQ_LEN).repeat(size, 1)
    return [
        Batch(tokens[r : r + size], labels[r : r + size], positions, None, torch.arange(r, r + size))
        for r in range(first, last, size)
    ]


Stepped = tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]


def steps_on_ranks(config: TrainConfig, valids: list[tuple[int, ...]], lr: float, size: int) -> Stepped:
    """train_step on each batch: numbers of the last one, weights before the first and after the last."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    masters = trainer.state.weights()
    before = {name: whole(m) for name, m in masters.items()}
    try:
        for valid in valids:
            batches = micro_batches(valid, rank=dist.get_rank(), world_size=dist.get_world_size(), size=size)
            metrics = train_step(trainer.state, batches, lr=lr)
        after = {name: whole(m) for name, m in masters.items()}
    finally:
        trainer.close()
    numbers = {name: getattr(metrics, name).item() for name in ("loss", "grad_norm", "skipped", "valid_tokens")}
    return numbers, before, after


def plain_model(config: TrainConfig, weights: dict[str, Tensor]) -> Decoder:
    """The model in one process, without any trainer."""
    model = build_model(config.model)
    model.load_state_dict(weights)
    return model


def plain_steps(config: TrainConfig, weights: dict[str, Tensor], valids: list[tuple[int, ...]], lr: float) -> Stepped:
    """The same with cross_entropy, clip_grad_norm_ and torch.optim.AdamW."""
    model = plain_model(config, weights).train()
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.ndim == 2 and not n.startswith("embedding")]
    others = [p for n, p in named.items() if p.ndim != 2 or n.startswith("embedding")]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    for valid in valids:
        tokens, labels = whole_batch(valid)
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
        loss.backward()
        limit = config.train.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
    numbers = {"loss": loss.item(), "grad_norm": norm.item(), "skipped": 0.0, "valid_tokens": float(sum(valid))}
    return numbers, weights, model.state_dict()


def assert_same_step(ours: Stepped, theirs: Stepped) -> None:
    for name, value in theirs[0].items():
        assert ours[0][name] == pytest.approx(value, rel=2e-6), name
    for name, weight in theirs[2].items():
        change = (weight - theirs[1][name]).abs().max()
        torch.testing.assert_close(ours[2][name], weight, rtol=0, atol=2e-3 * change.item(), msg=name)


@pytest.mark.some(6)
@pytest.mark.parametrize(
    ("world_size", "stage", "size"), [(1, 0, 8), (2, 0, 1), (2, 1, 2), (2, 2, 4), (2, 3, 1), (4, 3, 2), (4, 1, 1)]
)
@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_a_step_on_uneven_valid_tokens_is_that_of_the_whole_batch(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, world_size: int, stage: int, size: int, grad_clip: float
) -> None:
    """A mean over ranks or micro-batches that weights a token by its neighbours; a rank without a single label that
    divides by zero or leaves the others waiting; clipping by a local norm, or by that of a scaled gradient."""
    config = tiny_config(
        tmp_path / "run",
        corpus,
        parallel__zero_stage=stage,
        train__micro_batch_size=size,
        train__grad_clip=grad_clip,
        optim__eps=1e-3,  # large: an update then depends on the size of its gradient, not on its sign alone
    )
    valids: list[tuple[int, ...]] = [UNEVEN, tuple(reversed(UNEVEN)), (24,) * 8]
    ours = ranks.run(world_size, steps_on_ranks, config, valids, 1e-2, size)[0]
    assert_same_step(ours, plain_steps(finalize(config, world_size=1), ours[1], valids, 1e-2))


def test_the_comparison_notices_a_mean_of_means(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Negative control: one valid token moved from one rank to the other, and a clipping limit that is 1 % off."""
    config = tiny_config(tmp_path / "run", corpus, train__grad_clip=0.05, optim__eps=1e-3)
    ours = ranks.run(2, steps_on_ranks, config, [UNEVEN], 1e-2, 1)[0]
    moved = (23, 1, 13, 0, 1, 0, 0, 0)
    clipped = changed(config, tmp_path / "run", train__grad_clip=0.0505)
    for reference, valid in ((config, moved), (clipped, UNEVEN)):
        with pytest.raises(AssertionError):
            assert_same_step(ours, plain_steps(finalize(reference, world_size=1), ours[1], [valid], 1e-2))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_global_batch_without_a_label_gives_loss_zero_and_no_nan(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, stage: int
) -> None:
    """0 / 0: the step counts as diverged, or the weights become NaN."""
    config = tiny_config(tmp_path / "run", corpus, parallel__zero_stage=stage, optim__weight_decay=0.0)
    numbers, before, after = ranks.run(2, steps_on_ranks, config, [(0,) * 8], 1e-2, 2)[0]
    assert numbers == {"loss": 0.0, "grad_norm": 0.0, "skipped": 0.0, "valid_tokens": 0.0}
    assert all(torch.equal(after[name], before[name]) for name in before)


def learning_rates_used(config: TrainConfig) -> list[float]:
    """The lr that reaches the optimizer in each step."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    update, used = trainer.state.optimizer.step, []

    def spy(**kwargs: Any) -> None:
        used.append(kwargs["lr"])
        update(**kwargs)

    trainer.state.optimizer.step = spy  # type: ignore[method-assign]
    try:
        trainer.run()
    finally:
        trainer.close()
    return used


def test_each_step_uses_the_learning_rate_of_its_number_also_after_a_resume(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """A schedule that is one step late, starts at zero, or starts again after a restart."""
    config = tiny_config(
        tmp_path / "run", corpus, train__steps=6, optim__lr=0.01, schedule__name="linear", schedule__warmup_steps=2,
        schedule__final_fraction=0.2, checkpoint__interval=4, checkpoint__at_end=False,
    )  # fmt: skip
    by_hand = [0.005, 0.01, 0.008, 0.006, 0.004, 0.002]
    assert ranks.run(1, learning_rates_used, config)[0] == pytest.approx(by_hand)
    assert ranks.run(2, learning_rates_used, config)[0] == pytest.approx(by_hand[4:])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx(by_hand)


# ---- validation


def held_out_loss(config: TrainConfig, weights: dict[str, Tensor]) -> float:
    """Validation loss as its definition says: each held-out document by itself, in the pieces that rows cut it into."""
    data, seq_len = config.data, config.train.seq_len
    corpus = tokenise(open_text(parts(data)[0]), load_tokenizer(data), data.cache_dir)
    held_out = corpus.split(data.validation_fraction)[1]
    spans = zip(held_out.starts, held_out.ends, strict=True)
    documents = [torch.tensor(held_out.tokens[first:last].astype("int64")) for first, last in spans]
    num_samples = (sum(map(len, documents)) - 1) // seq_len
    used = min(num_samples, config.train.eval_batches * config.train.global_batch_size) * seq_len
    model = plain_model(config, weights).eval()
    total, count, begin = 0.0, 0, 0
    for document in documents:
        rows = [cut - begin for cut in range(0, used + 1, seq_len) if begin < cut < begin + len(document)]
        for low, high in pairwise([0, *rows, len(document)]):
            # A piece predicts its own tokens but the first, and the next piece's first token if its row ends there.
            piece = document[low : high + 1][: max(0, used + 1 - begin - low)]
            if len(piece) < 2:
                continue
            with torch.no_grad():
                logits = model(piece[None, :-1])
            total += cross_entropy(logits[0].double(), piece[1:], reduction="sum").item()
            count += len(piece) - 1
        begin += len(document)
    return total / count


@pytest.mark.some(1)
@pytest.mark.parametrize(("eval_batches", "held_out"), [(1, 0.3), (20, 0.3), (3, 0.5)])
def test_validation_loss_is_the_mean_over_the_held_out_tokens(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, eval_batches: int, held_out: float
) -> None:
    """A mean of means over batches, rows counted twice to fill the last batch, dropout left on, training documents in
    it, attention that sees the document before."""
    config = tiny_config(
        tmp_path / "run",
        corpus,
        train__steps=3,
        train__eval_interval=3,
        train__eval_batches=eval_batches,
        data__validation_fraction=held_out,
        data__mask_documents=True,
        model__dropout=0.1,
    )
    seen = []
    for name, world_size, changes in (
        ("one", 1, {"train__micro_batch_size": 8}),
        ("four", 4, {"parallel__zero_stage": 3, "train__micro_batch_size": 1}),
        ("two", 2, {"parallel__zero_stage": 1, "train__micro_batch_size": 2}),
    ):
        run = run_on(ranks, world_size, changed(config, tmp_path / name, **changes))
        loss = run.metrics[-1]["validation_loss"]
        assert loss == pytest.approx(held_out_loss(finalize(config, world_size=1), run.weights), rel=2e-6)
        assert run.metrics[-1]["validation_perplexity"] == pytest.approx(math.exp(loss))
        seen.append(loss)
    assert seen == pytest.approx([seen[0]] * 3, rel=1e-5)


def evaluate_batches(config: TrainConfig, valids: list[tuple[int, ...]]) -> float:
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        batches = [b for v in valids for b in micro_batches(v, rank=rank, world_size=world_size, size=2)]
        return evaluate(trainer.state, [batches])["loss"]
    finally:
        trainer.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_validation_weights_tokens_not_batches_on_every_stage(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, stage: int
) -> None:
    """Batches with few labels that count as much as full ones."""
    valids = [UNEVEN, (24,) * 8]
    losses = [
        loss
        for world_size in (1, 2)
        for loss in ranks.run(
            world_size,
            evaluate_batches,
            tiny_config(tmp_path / f"{world_size}", corpus, parallel__zero_stage=stage, train__micro_batch_size=2),
            valids,
        )
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
