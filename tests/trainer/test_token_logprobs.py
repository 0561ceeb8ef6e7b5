"""Log-probabilities of tokens as a run's passes give them, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data.batch import IGNORE_INDEX
from data.config import DataConfig
from data.packing import Sample, make_batch
from tests.parity.harness import text_corpus, tiny_config
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("logprobs"))


def _logprobs(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the whole sequences of the first step's samples, by number: from the passes, and on one rank from logits."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    try:
        whole = trainer.train_data.next_step()
        parts = [trainer._parts.of(batch.with_columns(reference=batch.labels.float())) for batch in whole]
        state = trainer.state
        per_batch = state.passes.token_logprobs(state.model, parts, temperature=TEMPERATURE)
        assert state.model.training
        found = torch.zeros(config.train.global_batch_size, config.train.seq_len)
        for batch, values in zip(parts, per_batch, strict=True):
            assert torch.equal(batch.columns["reference"], batch.labels.float())
            here = slice(None) if batch.indices is None else batch.indices
            for row, sample in enumerate(batch.samples.tolist()):
                found[sample, here] = values[row]
        dist.all_reduce(found, group=state.token_group)
        wanted = torch.zeros_like(found)
        if dist.get_world_size() == 1:
            state.model.eval()
            for batch in whole:
                logits = state.model(batch.tokens, positions=batch.positions, documents=batch.documents)
                losses = F.cross_entropy(logits.transpose(1, 2) / TEMPERATURE, batch.labels, reduction="none")
                wanted[batch.samples] = -losses.detach()
        return found, wanted
    finally:
        trainer.close()


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {"parallel__zero_stage": 3},
    "tp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "cp": {"parallel__cp": 2},
    "pp": {"parallel__pp": 2},
}


def test_every_rank_of_every_layout_finds_those_of_one_process(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """Numbers that stay on the last stage, of some words, or with dropout."""
    changes = {"data__mask_documents": True, "train__micro_batch_size": 3, "model__dropout": 0.3}
    ((found, wanted),) = ranks.run(1, _logprobs, tiny_config(tmp_path / "one", corpus, **changes))
    assert (wanted < 0).sum() > 100
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, layout in LAYOUTS.items():
        for values, _ in ranks.run(2, _logprobs, tiny_config(tmp_path / name, corpus, **changes, **layout)):
            torch.testing.assert_close(values, found, rtol=1e-5, atol=1e-5, msg=name)


def test_columns_of_samples_stand_at_their_labels() -> None:
    """A number one token off, or of another row."""
    columns = {"reference": np.arange(5, dtype=np.float32), "pair": np.array([0, 0, 1, 1, 2])}
    sample = Sample(np.arange(5), np.asarray([0]), None, columns)
    batch = make_batch([sample, sample._replace(columns={"reference": -columns["reference"], "pair": columns["pair"]})],
                       [0, 1], mask_documents=False)  # fmt: skip
    assert batch.columns["reference"].tolist() == [[1, 2, 3, 4], [-1, -2, -3, -4]]
    assert batch.columns["pair"].dtype == torch.int64
    part = batch.take(torch.tensor([0, 3])).to(torch.device("cpu"))
    assert part.columns["reference"].tolist() == [[1, 4], [-1, -4]]
    assert part.columns["pair"].tolist() == [[0, 2], [0, 2]]
    assert (part.labels != IGNORE_INDEX).all()
