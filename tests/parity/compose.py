"""`make parity`: train the cross product of the axes, compare each layout with one process, write docs/COMPOSES.md.

About 14,000 CPU seconds, two hours on two cores. Its measurements are in docs/composes.json from the first layout on:
--resume takes them as they are and trains what is missing, --write-only trains nothing. On a machine with more cores,
parts run side by side, each with ranks of its own; a part that was killed is started again and goes on:

    python -m tests.parity.compose --part 1/6 --out parts/1.jsonl     (and 2/6 to 6/6)
    python -m tests.parity.compose --merge parts/*.jsonl

Exits 1 if a layout deviates or is missing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

# Imported before ranks are forked, or each would import it again: most of it is what the first torch.compile takes.
import torch
import torch._dynamo.testing
import torch._inductor.compile_fx
import torch.distributed.fsdp
import torch.distributed.tensor

from tests.parity.compare import Comparison
from tests.parity.cross_product import cross_product
from tests.parity.harness import text_corpus
from tests.parity.lattice import Layout, cpu_seconds, model_of, models, name_of, refused_pairs, some_legality
from tests.parity.measurements import ROOT, PartFile, Record, load, load_made_with, made_here, merge, save
from tests.parity.page import PAGE, page
from tests.pool import RankError, RankPool

SIDE_BY_SIDE = 2
"""Layouts in training at a time: the ranks of one spend half of their time waiting for each other."""
PATIENCE = 600.0
"""Seconds that a layout may take: with parts side by side, compiling on eight ranks takes a minute."""


def measure(layouts: list[Layout], keep: Callable[[Record], None], *, side_by_side: int) -> None:
    """Train each layout, compare it, and keep its record."""
    torch.set_num_threads(1)
    pools = [RankPool() for _ in range(side_by_side)]  # before there are threads, because they are forked
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
                keep(record)
                verdict = "; ".join(record["problems"]) or "ok"
                seconds = time.monotonic() - started
                print(f"{number}/{len(layouts)} {name_of(layout)}: {verdict} ({seconds:.1f} s)", flush=True)

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(side_by_side) as threads:
        corpus = text_corpus(Path(name))
        folders = [Path(name) / str(i) for i in range(side_by_side)]
        comparisons = [
            Comparison(ranks, corpus, folder, timeout=PATIENCE) for ranks, folder in zip(pools, folders, strict=True)
        ]
        for done in [threads.submit(work, comparison) for comparison in comparisons]:
            done.result()
    for ranks in pools:
        ranks.close()


def _measure_one(comparison: Comparison, layout: Layout) -> Record:
    try:
        deviation = comparison.deviation(layout)
    except RankError as error:
        print(error, flush=True)
        return {"layout": layout, "problems": [str(error).strip().splitlines()[-1]]}
    return {"layout": layout} | asdict(deviation) | {"problems": deviation.problems()}


def part_of(layouts: list[Layout], number: int, num_parts: int) -> list[Layout]:
    """The layouts of a part, 1 to num_parts, each of about the same CPU time.

    Those of a model are together, since each model is trained by one process first, in many orders.
    """
    ordered = sorted(layouts, key=lambda layout: models().index(model_of(layout)))
    share = sum(map(cpu_seconds, layouts)) / num_parts
    part, before = [], 0.0
    for layout in ordered:
        middle = before + cpu_seconds(layout) / 2
        if int(middle / share) + 1 == number:
            part.append(layout)
        before += cpu_seconds(layout)
    return part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on after the layouts in docs/composes.json")
    parser.add_argument("--write-only", action="store_true", help="write the page from docs/composes.json")
    parser.add_argument("--part", type=_part, metavar="I/N", help="train one of N parts; needs --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of a part; what it has already is not trained again")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="write json and page from these parts")
    options = parser.parse_args()
    if (options.part is None) != (options.out is None):
        parser.error("--part and --out go together")
    legality = some_legality()
    layouts, num_refused = cross_product(legality)
    random.Random(1).shuffle(layouts)  # stopped early, it has seen something of everything
    if options.part is not None:
        return _train_part(part_of(layouts, *options.part), options.out)
    if options.merge:
        records, made_with = merge(options.merge)
        records.sort(key=lambda record: layouts.index(record["layout"]))
        save(records, made_with)
    else:
        keep_all = options.resume or options.write_only
        records, made_with = (load(), load_made_with()) if keep_all else ([], [])
    missing = [layout for layout in layouts if layout not in [record["layout"] for record in records]]
    if not (options.merge or options.write_only):
        if made_here() not in made_with:
            made_with.append(made_here())

        def keep(record: Record) -> None:
            records.append(record)
            save(records, made_with)

        measure(missing, keep, side_by_side=SIDE_BY_SIDE)
        missing = []
    PAGE.write_text(page(records, made_with, len(layouts), num_refused, refused_pairs(legality), legality))
    bad = [name_of(record["layout"]) for record in records if record["problems"]]
    print(f"{len(records)} layouts, {len(bad)} deviate, {len(missing)} are missing; {PAGE.relative_to(ROOT)}")
    return 1 if bad or missing else 0


def _train_part(layouts: list[Layout], path: Path) -> int:
    file = PartFile(path)
    missing = [layout for layout in layouts if layout not in [record["layout"] for record in file.records]]
    seconds = sum(map(cpu_seconds, missing))
    print(f"{path}: {len(missing)} of {len(layouts)} layouts to train, about {seconds:.0f} CPU seconds", flush=True)
    measure(missing, file.add, side_by_side=1)
    bad = [name_of(record["layout"]) for record in file.records if record["problems"]]
    print(f"{path}: {len(file.records)} of {len(layouts)} layouts, {len(bad)} deviate", flush=True)
    return 1 if bad else 0


def _part(text: str) -> tuple[int, int]:
    number, _, num_parts = text.partition("/")
    if not (number.isdecimal() and num_parts.isdecimal() and 1 <= int(number) <= int(num_parts)):
        raise argparse.ArgumentTypeError(f"{text} is no part; 2/6 is the second of six")
    return int(number), int(num_parts)


if __name__ == "__main__":
    sys.exit(main())
