"""Supervised fine-tuning: conversations, of which the answers alone are predicted.

Its loss is pretraining's, sum over the tokens with a label / their number in the global batch; prompts, padding and the
first token of every example have none (data/examples.py). So it does not depend on how examples are packed, on
micro-batches or on ranks, and long answers count for more than short ones, as in one large batch.
"""

from __future__ import annotations

from data.config import NO_TOKENIZER, parts
from data.loader import Loader
from trainer.config import TrainConfig
from trainer.recipes.pretrain import Pretrain


class SupervisedFineTuning(Pretrain):
    def problems(self, config: TrainConfig) -> list[str]:
        data = config.data
        if all(part.source != "conversations" for part in parts(data)):
            return [f"recipe.name=sft with data.source={data.source} has nothing to answer; use data=conversations"]
        if data.tokenizer.path is None and config.model.path is None:
            return [NO_TOKENIZER]
        return []

    def describe_data(self, data: Loader) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in data.counts.items() if count)
        left_out = "".join(f"; left out, for example, {why}" for why in data.left_out)
        return f"of the training split: {counts}{left_out}"
