"""Layouts that cover every pair of features, dense and with experts, each against one process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from data.config import DataConfig
from tests.parity import compose
from tests.parity.compare import Comparison
from tests.parity.harness import text_corpus
from tests.parity.lattice import (
    FEATURES,
    MIN_LAYOUTS,
    Layout,
    Legality,
    all_pairs,
    base_config,
    default,
    name_of,
    pairs_of,
    read_layouts,
    refused_pairs,
)
from tests.pool import RankPool

LAYOUTS = read_layouts()


@pytest.fixture(scope="module")
def comparison(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("lattice")
    return Comparison(ranks, text_corpus(folder), folder)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_layout_trains_the_same_model(comparison: Comparison, layout: Layout) -> None:
    """Two features that each are right alone."""
    assert not comparison.deviation(layout).problems()


def test_the_layouts_show_every_pair_that_is_not_refused() -> None:
    """A feature or a refusal that came after the layouts were chosen: choose them anew (tests/parity/lattice.py)."""
    legality = Legality(base_config(Path("unused"), DataConfig(source="text", path=__file__)))
    shown = set().union(*(pairs_of(layout) for layout in LAYOUTS))
    assert len(LAYOUTS) >= MIN_LAYOUTS
    assert not [layout for layout in LAYOUTS if legality.problems(layout)]
    assert set(all_pairs()) - shown == set(refused_pairs(legality))


def test_the_page_of_what_composes_is_what_the_measurements_say() -> None:
    """docs/COMPOSES.md edited by hand, or older than a feature or a refusal.

    `make parity ARGS=--write-only` writes it, `make parity ARGS=--resume` trains what is new.
    """
    legality = Legality(base_config(Path("unused"), DataConfig(source="text", path=__file__)))
    records = compose.load()
    assert [name_of(record["layout"]) for record in records if legality.problems(record["layout"])] == []
    trained = {tuple(record["layout"][name] for name in compose.CROSSED) for record in records}
    others = set(itertools.product(*(FEATURES[name] for name in compose.CROSSED))) - trained
    plainest = default() | {"model": "experts"}  # the only model that all of the axes divide
    rest = [plainest | dict(zip(compose.CROSSED, values, strict=True)) for values in others]
    assert [name_of(layout) for layout in rest if not legality.problems(layout)] == []
    written = compose.page(records, len(trained), len(others), refused_pairs(legality), legality)
    assert compose.PAGE.read_text() == written
