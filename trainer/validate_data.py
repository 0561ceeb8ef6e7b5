"""What is wrong with `data`, with values that mend it: data/ knows of no advice, as it imports nothing of ours."""

from __future__ import annotations

from data.config import SOURCES, DataConfig
from data.config import problems as problems_of_data
from parallel.problem import Advice, Problem, values

DEFAULT = DataConfig()
INSTEAD: dict[str, list[Advice | None]] = {
    "data.source": [values("data.source", [name for name in SOURCES if name != "blend"])],
    "data.validation_fraction": [values("data.validation_fraction", [DEFAULT.validation_fraction, 0.0])],
    "data.num_workers": [values("data.num_workers", [1, 0]), values("data.streaming", [False])],
    "data.prefetch": [values("data.prefetch", [DEFAULT.prefetch])],
    "data.stream_shards": [values("data.stream_shards", [1, DEFAULT.stream_shards])],
    "data.stream_block": [values("data.stream_block", [DEFAULT.stream_block])],
    "data.mask_documents": [values("data.mask_documents", [False])],
    "data.tokenizer.vocab_size": [values("data.tokenizer.vocab_size", [DEFAULT.tokenizer.vocab_size, 257])],
}
"""By the field that a line names first. Validation keeps those that mend it."""


def data_problems(config: DataConfig) -> list[str]:
    """`data.config.problems`, one line each. Paths and parts of blends have no values to advise."""
    return [_with_values(line) for line in problems_of_data(config)]


def _with_values(line: str) -> str:
    field = line.partition("=")[0]
    if field not in INSTEAD:
        return line
    what, _, rest = line.partition("; ")
    return Problem(what, *INSTEAD[field], words="" if rest.startswith("use ") else rest)
