"""`make parity`: train the cross product of the axes, compare each layout with one process, write docs/COMPOSES.md.

The product is of pipeline, tensor, context and expert parallelism and the ZeRO stages; the other features take turns.
A run takes most of an hour on two cores. Its measurements are in docs/composes.json from the first layout on: --resume
takes them as they are and trains what is missing, --write-only trains nothing. Exits 1 if a layout deviates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from models.moe_config import MoEConfig
from tests.parity.compare import GRADIENT, LOSS, WEIGHTS, Comparison
from tests.parity.harness import changed, text_corpus
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
    default,
    models,
    name_of,
    read_layouts,
    refused_pairs,
)
from tests.pool import RankError, RankPool
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "COMPOSES.md"
MEASURED = ROOT / "docs" / "composes.json"
CROSSED = ("pipeline", "tensor", "context", "expert", "zero")
SIDE_BY_SIDE = 2
"""Layouts in training at a time: the ranks of one spend half of their time waiting for each other."""
OTHERS: list[dict[str, Any]] = [
    {"parallel__cpu_offload": True, "parallel__zero_stage": 1},
    {"parallel__cpu_offload": True, "parallel__zero_stage": 3, "optim__state_dtype": "bf16"},
    {"precision__compute": "bf16", "precision__master": "bf16", "optim__name": "muon"},
    {"precision__compute": "bf16", "precision__master": "bf16", "parallel__zero_stage": 3},
    {"optim__state_dtype": "int8", "optim__name": "muon"},
    {"optim__state_dtype": "int8", "model__hidden_size": 256, "model__intermediate_size": 256, "parallel__tp": 2},
    {"precision__compute": "fp8", "parallel__pp": 2, "parallel__pp_schedule": "zero_bubble"},
    {"precision__compute": "fp8", "model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
    {"parallel__cp": 2, "model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
    {"model__moe": MoEConfig(num_experts=4, intermediate_size=24), "model__activation_checkpoint": "budget",
     "model__activation_memory_gib": 1.0},
    {"model__attention": "flex", "model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
    {"parallel__cp": 2, "model__attention": "flex"},
    {"parallel__cp": 2, "model__attention": "sdpa"},
    {"parallel__cp": 2, "train__compile": True, "model__activation_checkpoint": "selective"},
    {"model__attention": "sdpa", "model__attention_sinks": True},
    {"model__attention": "sdpa", "model__attention_dropout": 0.1},
    {"parallel__sequence_parallel": True},
]  # fmt: skip
"""Settings beside FEATURES that do not go together."""
ELSEWHERE = {
    "Muon on every axis": "tests/parity/test_tensor_parallel.py (qwen), tests/parity/test_expert_axes.py (deepseek)",
    "fp8": "tests/parity/test_fp8.py",
    "offload, HSDP, AdamW on the host": "tests/parity/test_data_parallel.py",
    "activation memory budget": "tests/parity/test_activation_budget.py",
    "resuming on another layout": "tests/parity/test_resume.py",
    "moments in 8 bits": "tests/trainer/test_adamw_kernel.py",
    "validation, sampling, routers' metrics": "tests/parity/test_expert_axes.py (sigmoid)",
}
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


def measure(layouts: list[Layout], records: list[dict[str, Any]], made_with: list[dict[str, str]]) -> None:
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
                save(records, made_with)
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


def save(records: list[dict[str, Any]], made_with: list[dict[str, str]]) -> None:
    """docs/composes.json, a line per layout."""
    compact = [json.dumps(record | {"layout": list(record["layout"].values())}) for record in records]
    head = f'{{"made_with": {json.dumps(made_with)},\n"layouts": [\n'
    MEASURED.write_text(head + ",\n".join(compact) + "\n]}\n")


def load() -> list[dict[str, Any]]:
    """The records that `save` wrote."""
    records = json.loads(MEASURED.read_text())["layouts"]
    return [record | {"layout": dict(zip(FEATURES, record["layout"], strict=True))} for record in records]


def load_made_with() -> list[dict[str, str]]:
    """With which torch, and from which commit, the records were measured: the newest last."""
    made_with: list[dict[str, str]] = json.loads(MEASURED.read_text())["made_with"]
    return made_with


def made_here() -> dict[str, str]:
    """What a measurement that is made now is made with."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changes = ", with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    commit = git("rev-parse", "HEAD") + changes
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}


def page(
    records: list[dict[str, Any]], num_legal: int, num_refused: int, refused: dict[Pair, str], legality: Legality
) -> str:
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
        "Measured with " + "; ".join(f"torch {m['torch']} at commit {m['commit']}" for m in load_made_with()) + ".",
        "",
        f"{len(read_layouts())} layouts that show every pair below are tests in CI (the last table names each): "
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
    lines += ["", "## Refused for three features or more", ""]
    lines += [
        f"Besides, of {WORLD_SIZE} ranks, everything whose degrees together do not divide them (such as pp2, tp2 and "
        "ring(2)xulysses(2)), and:",
        "",
    ]
    lines += [f"- {' with '.join(values)}: {reason}" for values, reason in refused_triples(legality, refused)]
    lines += ["", "## Refused beside these features", "", "What validation says to a run that asks for each.", ""]
    lines += [f"- {reason}" for reason in other_refusals(legality.base)]
    bad = [r for r in records if r["problems"]]
    if bad:
        lines += ["", "## Layouts that deviate", ""]
        lines += [f"- `{name_of(r['layout'])}`: {'; '.join(r['problems'])}" for r in bad]
    lines += ["", "## Layouts in CI", "", "Each row is a test: `pytest 'tests/parity/test_lattice.py::"
              "test_a_layout_trains_the_same_model[ID]'`.", ""]  # fmt: skip
    lines += ["| id | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    lines += [f"| {name_of(layout)} | " + " | ".join(layout.values()) + " |" for layout in read_layouts()]
    lines += ["", "## Tests of what the table does not cross", ""]
    lines += [f"- {what}: `{test}`" for what, test in ELSEWHERE.items()]
    return "\n".join(lines) + "\n"


def refused_triples(legality: Legality, refused: dict[Pair, str]) -> list[tuple[tuple[str, ...], str]]:
    """Values of three of LAYOUT_FEATURES that do not go together, though any two of them do, with the reason.

    Those whose degrees do not divide the ranks, which are many and alike, are left out.
    """
    either = set(refused) | {(second, first) for first, second in refused}
    found = []
    for names in itertools.combinations([name for name in LAYOUT_FEATURES if name != "microbatch"], 3):
        for chosen in itertools.product(*(list(FEATURES[name])[1:] for name in names)):
            fixed = dict(zip(names, chosen, strict=True))
            layout = default() | {"model": "experts"} | fixed
            problems = legality.problems(layout)
            if problems and not either.intersection(itertools.combinations(fixed.items(), 2)):
                reasons = [p for p in problems if "processes" not in p and "does not divide parallel.dp_shard" not in p]
                found += [(chosen, legality.with_advice(layout, reason)) for reason in reasons]
    return found


def other_refusals(base: TrainConfig) -> list[str]:
    """What validation says to each of OTHERS."""
    lines = []
    for changes in OTHERS:
        try:
            finalize(changed(base, Path("unused"), **changes), world_size=WORLD_SIZE)
        except ConfigError as error:
            lines.append(error.problems[0])
        else:
            raise AssertionError(f"{changes} is not refused")
    return lines


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
    made_with = load_made_with() if options.resume or options.write_only else []
    if not options.write_only:
        if made_here() not in made_with:
            made_with.append(made_here())
        known = [record["layout"] for record in records]
        measure([layout for layout in layouts if layout not in known], records, made_with)
    PAGE.write_text(page(records, len(layouts), num_refused, refused_pairs(legality), legality))
    bad = [name_of(r["layout"]) for r in records if r["problems"]]
    print(f"{len(records)} layouts, {len(bad)} deviate; {PAGE.relative_to(ROOT)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
