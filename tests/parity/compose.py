"""`make parity`: train the cross product of the axes, compare each layout with one process, write docs/COMPOSES.md.

The product is of pipeline, tensor, context and expert parallelism and the ZeRO stages; the other features take turns.
A run takes most of an hour on two cores. Its measurements are in docs/composes.json from the first layout on: --resume
takes them as they are and trains what is missing, --write-only trains nothing. Exits 1 if a layout deviates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.config import DataConfig
from tests.parity.compare import GRADIENT, LOSS, WEIGHTS, Comparison
from tests.parity.harness import text_corpus
from tests.parity.lattice import (
    FEATURES,
    LAYOUT_FEATURES,
    STEPS,
    WORLD_SIZE,
    Layout,
    Legality,
    Pair,
    base_config,
    cost,
    models,
    name_of,
    read_layouts,
    refused_pairs,
)
from tests.pool import RankError, RankPool

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "COMPOSES.md"
MEASURED = ROOT / "docs" / "composes.json"
CROSSED = ("pipeline", "tensor", "context", "expert", "zero")
SIDE_BY_SIDE = 2
"""Layouts in training at a time: the ranks of one spend half of their time waiting for each other."""
COMPILED_EVERY = 16
"""Compiling on eight ranks takes several times what training does."""


def cross_product(legality: Legality) -> tuple[list[Layout], int]:
    """Every legal combination of CROSSED; the others take turns. Also how many combinations are refused.

    Where a turn is refused, the next one is taken.
    """
    rest = [name for name in LAYOUT_FEATURES if name not in (*CROSSED, "compile")]
    settings = (dict(zip(rest, values, strict=True)) for values in itertools.product(*(FEATURES[n] for n in rest)))
    product = [model | setting for setting in settings for model in models()]
    random.Random(0).shuffle(product)
    eager, compiled = FEATURES["compile"]
    turns = (
        turn | {"compile": eager if number % COMPILED_EVERY else compiled}
        for number, turn in enumerate(itertools.cycle(product))
    )
    layouts, refused = [], 0
    for values in itertools.product(*(FEATURES[name] for name in CROSSED)):
        crossed = dict(zip(CROSSED, values, strict=True))
        candidates = (crossed | next(turns) for _ in range(40))
        complete = ({name: candidate[name] for name in FEATURES} for candidate in candidates)
        legal = list(itertools.islice((layout for layout in complete if not legality.problems(layout)), 3))
        if legal:
            layouts.append(min(legal, key=cost))
        else:
            refused += 1
    return layouts, refused


def measure(layouts: list[Layout], records: list[dict[str, Any]]) -> None:
    """Train and compare each layout; adds one record each, and saves all."""
    pools = [RankPool() for _ in range(SIDE_BY_SIDE)]  # before there are threads, because they are forked
    waiting = enumerate(layouts, 1)
    turn = threading.Lock()

    def work(comparison: Comparison) -> None:
        while True:
            with turn:
                number, layout = next(waiting, (0, None))
            if layout is None:
                return
            started = time.monotonic()
            record = _measure_one(comparison, layout)
            with turn:
                records.append(record)
                save(records)
                verdict = "; ".join(record["problems"]) or "ok"
                seconds = time.monotonic() - started
                print(f"{number}/{len(layouts)} {name_of(layout)}: {verdict} ({seconds:.1f} s)", flush=True)

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(SIDE_BY_SIDE) as threads:
        corpus = text_corpus(Path(name))
        folders = [Path(name) / str(i) for i in range(SIDE_BY_SIDE)]
        comparisons = [Comparison(ranks, corpus, folder) for ranks, folder in zip(pools, folders, strict=True)]
        for done in [threads.submit(work, comparison) for comparison in comparisons]:
            done.result()
    for ranks in pools:
        ranks.close()


def _measure_one(comparison: Comparison, layout: Layout) -> dict[str, Any]:
    record: dict[str, Any] = {"layout": layout}
    try:
        deviation = comparison.deviation(layout)
        return record | asdict(deviation) | {"problems": deviation.problems()}
    except RankError as error:
        return record | {"problems": [str(error).strip().splitlines()[-1]]}


def save(records: list[dict[str, Any]]) -> None:
    """docs/composes.json, a line per layout."""
    compact = [json.dumps(record | {"layout": list(record["layout"].values())}) for record in records]
    MEASURED.write_text("[\n" + ",\n".join(compact) + "\n]\n")


def load() -> list[dict[str, Any]]:
    """What `save` wrote."""
    records = json.loads(MEASURED.read_text())
    return [record | {"layout": dict(zip(FEATURES, record["layout"], strict=True))} for record in records]


def page(records: list[dict[str, Any]], num_legal: int, num_refused: int, refused: dict[Pair, str]) -> str:
    """docs/COMPOSES.md."""
    good = [r for r in records if not r["problems"]]
    lines = [
        "# What composes",
        "",
        "Written by `make parity` (tests/parity/compose.py). A layout composes if it trains the model that one process "
        f"trains: {STEPS} steps in fp32 on {WORLD_SIZE} ranks, losses to {LOSS:.0e} relative, first gradients to "
        f"{GRADIENT:.0e} of their tensor's maximum, final weights within {WEIGHTS:g} times what another order of "
        "sums does in one process.",
        "",
        f"The cross product of {', '.join(CROSSED[:-1])} and {CROSSED[-1]} has {num_legal} legal layouts on "
        f"{WORLD_SIZE} ranks ({num_refused} combinations are refused, most because their degrees do not fit); the "
        f"other features take turns in them. Of these {len(records)} were trained, and **{len(good)} of {len(records)} "
        "train the same model**" + (f"; largest deviations: {_largest(good)}." if good else "."),
        "",
        f"{len(read_layouts())} layouts that show every pair below are tests in CI: "
        "`pytest tests/parity/test_lattice.py`.",
        "",
        "## Pairs of features",
        "",
        "Each row is a value of a feature, each column another feature: `all` of its values compose, or all but those "
        "named, which are refused for the reason of that number.",
        "",
    ]
    reasons: list[str] = []
    lines += _matrix(refused, reasons)
    lines += ["", "## Refused, and why", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    bad = [r for r in records if r["problems"]]
    if bad:
        lines += ["", "## Layouts that deviate", ""]
        lines += [f"- `{name_of(r['layout'])}`: {'; '.join(r['problems'])}" for r in bad]
    lines += ["", "## Layouts in CI", "", "| " + " | ".join(FEATURES) + " |", "|---" * len(FEATURES) + "|"]
    lines += ["| " + " | ".join(layout.values()) + " |" for layout in read_layouts()]
    return "\n".join(lines) + "\n"


def _largest(records: list[dict[str, Any]]) -> str:
    loss, gradient, weights = (max(r[name] for r in records) for name in ("loss", "gradient", "weights"))
    return f"loss {loss:.1e}, gradient {gradient:.1e}, weights {weights:.2f} times"


def _matrix(refused: dict[Pair, str], reasons: list[str]) -> list[str]:
    either = refused | {(second, first): why for (first, second), why in refused.items()}
    lines = ["| | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for feature, values in FEATURES.items():
        for value in values:
            cells = []
            for other, others in FEATURES.items():
                without = []
                for second in others:
                    why = either.get(((feature, value), (other, second)))
                    if why is not None:
                        if why not in reasons:
                            reasons.append(why)
                        without.append(f"{second} ({reasons.index(why) + 1})")
                cells.append("" if other == feature else "all but " + ", ".join(without) if without else "all")
            lines.append(f"| **{feature}** {value} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on after the layouts in docs/composes.json")
    parser.add_argument("--write-only", action="store_true", help="write the page from docs/composes.json")
    options = parser.parse_args()
    legality = Legality(base_config(Path("unused"), DataConfig(source="text", path=__file__)))
    layouts, num_refused = cross_product(legality)
    random.Random(1).shuffle(layouts)  # stopped early, it has seen something of everything
    records = load() if options.resume or options.write_only else []
    if not options.write_only:
        known = [record["layout"] for record in records]
        measure([layout for layout in layouts if layout not in known], records)
    PAGE.write_text(page(records, len(layouts), num_refused, refused_pairs(legality)))
    bad = [name_of(r["layout"]) for r in records if r["problems"]]
    print(f"{len(records)} layouts, {len(bad)} deviate; {PAGE.relative_to(ROOT)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
