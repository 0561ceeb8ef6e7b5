"""Layouts that cover every pair of features, dense and with experts, each against one process."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from parallel.pipeline.schedules import SPLIT_BACKWARD
from tests.parity import measurements
from tests.parity.compare import Comparison
from tests.parity.compose import PATIENCE, part_of
from tests.parity.cross_product import CROSSED, cross_product
from tests.parity.harness import text_corpus
from tests.parity.lattice import (
    FEATURES,
    MIN_LAYOUTS,
    Layout,
    Legality,
    all_pairs,
    default,
    name_of,
    pairs_of,
    read_layouts,
    refused_pairs,
    some_legality,
)
from tests.parity.measurements import PartFile, Record, load, load_made_with, merge
from tests.parity.page import ELSEWHERE, PAGE, page, refused_triples
from tests.pool import RankPool

LAYOUTS = read_layouts()


@pytest.fixture(scope="module")
def legality() -> Legality:
    return some_legality()


@pytest.fixture(scope="module")
def comparison(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("lattice")
    return Comparison(ranks, text_corpus(folder), folder, timeout=PATIENCE)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_layout_trains_the_same_model(comparison: Comparison, layout: Layout) -> None:
    """Two features that each are right alone."""
    assert not comparison.deviation(layout).problems()


def test_the_layouts_show_every_pair_that_is_not_refused(legality: Legality) -> None:
    """A feature or a refusal that came after the layouts were chosen: choose them anew (tests/parity/lattice.py)."""
    shown = set().union(*(pairs_of(layout) for layout in LAYOUTS))
    assert len(LAYOUTS) >= MIN_LAYOUTS
    assert not [layout for layout in LAYOUTS if legality.problems(layout)]
    assert set(all_pairs()) - shown == set(refused_pairs(legality))


def test_the_page_of_what_composes_is_what_the_measurements_say(legality: Legality) -> None:
    """docs/COMPOSES.md edited by hand, or older than a feature or a refusal.

    `make parity ARGS=--write-only` writes it, `make parity ARGS=--resume` trains what is new.
    """
    records = load()
    assert [name_of(record["layout"]) for record in records if legality.problems(record["layout"])] == []
    trained = {tuple(record["layout"][name] for name in CROSSED) for record in records}
    others = set(itertools.product(*(FEATURES[name] for name in CROSSED))) - trained
    plainest = default() | {"model": "experts"}  # the only model that all of the axes divide
    rest = [plainest | dict(zip(CROSSED, values, strict=True)) for values in others]
    assert [name_of(layout) for layout in rest if not legality.problems(layout)] == []
    written = page(records, load_made_with(), len(trained), len(others), refused_pairs(legality), legality)
    assert PAGE.read_text() == written


def test_three_features_are_refused_for_what_they_are(legality: Legality) -> None:
    """Degrees that need more ranks, explained by the experts or the sequence parallelism of a layout without either."""
    triples = refused_triples(legality, refused_pairs(legality))
    assert (("zbv", "selective", "aot_eager"), "model.activation_checkpoint=selective") in [
        (values, reason.partition(" ")[0]) for values, reason in triples
    ]
    for values, reason in triples:
        assert "ep2" in values or "parallel.ep, which is 1" not in reason, (values, reason)
        assert "tp2+sp" in values or "parallel.sequence_parallel=false" not in reason, (values, reason)


def test_every_test_that_the_page_points_to_is_there() -> None:
    """A page that goes on claiming what a test, renamed or deleted, has shown."""
    for pointer in itertools.chain(*ELSEWHERE.values()):
        path, _, name = pointer.partition(" ")[0].partition("::")
        text = (PAGE.parents[1] / path).read_text()
        assert f"def {name}" in text, pointer
        variants = pointer.partition("(")[2].strip(")")
        assert all(f'"{variant}": ' in text for variant in variants.split(", ") if variant), pointer


def test_the_cross_product_spreads_every_feature_over_the_axes(legality: Legality) -> None:
    """Features that take turns and never meet: compiled blocks with experts over ep, or with split backward."""
    layouts, _ = cross_product(legality)
    assert not [layout for layout in layouts if legality.problems(layout)]
    shown = Counter(pair for layout in layouts for pair in pairs_of(layout))
    refused = refused_pairs(legality)
    numbers = {pair: shown[pair] for pair in all_pairs() if pair not in refused}
    # The fewest are of axes that leave room for little else: four stages, or four ranks of tp, beside two replicas.
    assert min(numbers.values()) >= 2
    few = {pair for pair, number in numbers.items() if number < 10}
    assert all({"tp4+sp", "1f1b(4)", "ring(2)xulysses(2)"} & {value for _, value in pair} for pair in few)
    compiled = [layout for layout in layouts if layout["compile"] != "none"]
    assert 150 <= len(compiled) <= 250
    assert sum(layout["expert"] != "none" for layout in compiled) >= 50
    assert all(sum(layout["pipeline"] == name for layout in compiled) >= 20 for name in SPLIT_BACKWARD)
    parts = [part_of(layouts, number, 6) for number in range(1, 7)]
    assert sorted(map(name_of, itertools.chain(*parts))) == sorted(map(name_of, layouts))


def test_a_part_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record lost, doubled or half written; parts of other sources put together with these."""
    path, layout = tmp_path / "parts" / "1.jsonl", default()
    done: list[Record] = [
        {"layout": layout | {"zero": zero}, "loss": 0.0, "problems": []} for zero in ("zero1", "zero2")
    ]
    file = PartFile(path)
    for record in done:
        file.add(record)
    assert PartFile(path).records == done
    path.write_text(path.read_text()[:-9])  # killed while it wrote
    again = PartFile(path)
    assert again.records == done[:1]
    again.add(done[1])
    assert merge([path])[0] == done
    monkeypatch.setattr(measurements, "digest_of_sources", lambda: "others")
    for use in (lambda: merge([path]), lambda: PartFile(path)):
        with pytest.raises(ValueError, match="sources"):
            use()
