"""docs/COMPOSES.md, from what was measured (tests/parity/compose.py) and what validation refuses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.moe_config import MoEConfig
from parallel.pipeline.schedules import SPLIT_BACKWARD
from tests.parity.compare import GRADIENT, LOSS, WEIGHTS
from tests.parity.cross_product import CROSSED
from tests.parity.harness import changed
from tests.parity.lattice import (
    FEATURES,
    LAYOUT_FEATURES,
    NEEDED,
    STEPS,
    WORLD_SIZE,
    Layout,
    Legality,
    Pair,
    default,
    name_of,
    read_layouts,
)
from tests.parity.measurements import ROOT, Record
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize

PAGE = ROOT / "docs" / "COMPOSES.md"
EXPERTS = MoEConfig(num_experts=4, intermediate_size=24)
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
    {"model__moe": EXPERTS, "model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
    {"model__attention": "flex", "model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
    {"parallel__cp": 2, "model__attention": "flex"},
    {"parallel__cp": 2, "model__attention": "sdpa"},
    {"parallel__cp": 2, "train__compile": True, "model__activation_checkpoint": "selective"},
    {"model__attention": "sdpa", "model__attention_sinks": True},
    {"model__attention": "sdpa", "model__attention_dropout": 0.1},
    {"parallel__sequence_parallel": True},
    {"parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__sp_chunks": 3},
    {"parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__sp_chunks": 2, "precision__compute": "fp8"},
    {"parallel__ep_buffer": 2.0},
    {"model__moe": EXPERTS, "parallel__ep": 2, "parallel__ep_buffer": 3.0},
    {"model__moe": EXPERTS, "parallel__ep": 2, "parallel__ep_buffer": 0.5},
    {"model__moe": EXPERTS, "parallel__ep": 2, "parallel__ep_buffer": 0.0, "train__compile": True},
]  # fmt: skip
"""Settings beside FEATURES that do not go together."""
AXES, DATA = "tests/parity/test_expert_axes.py", "tests/parity/test_experts.py"
ELSEWHERE: dict[str, list[str]] = {
    "latent attention with experts (DeepSeek), every router, capacity": [AXES, DATA],
    "Muon on every axis": [f"{AXES} (gshard, deepseek_v3)"],
    "fp8": ["tests/parity/test_fp8.py"],
    "offload, HSDP, AdamW on the host": ["tests/parity/test_data_parallel.py"],
    "activation memory budget": ["tests/parity/test_activation_budget.py"],
    "resuming on another layout": [
        "tests/parity/test_resume.py",
        "tests/trainer/test_tensor_parallel.py::test_a_run_moves_from_one_process_to_tensor_parallelism_and_back",
        "tests/parity/test_context_parallel.py::test_a_checkpoint_moves_between_splits_and_a_sample_is_the_same",
        "tests/parity/test_pipeline.py::test_a_checkpoint_moves_between_layouts",
        f"{AXES}::test_a_checkpoint_moves_between_expert_layouts",
        f"{DATA}::test_a_run_goes_on_with_its_biases_on_another_layout",
    ],
    "moments in 8 bits": ["tests/trainer/test_adamw_kernel.py"],
    "validation, sampling, routers' metrics": [f"{AXES} (sigmoid)"],
}
ONLY_HERE: list[Pair] = [(("model", "latent"), ("expert", "ep2")), (("model", "latent"), ("rows", "buffers"))]
"""Refused because the model of this table has no experts, though one with latent attention may."""
LATENT_WITH_EXPERTS = (
    "\\* Latent attention lies between dense layers here. With experts, as in DeepSeek-V2 and V3, it composes with ep "
    f"and its buffers: `{AXES}` (deepseek_v2, deepseek_v3) trains it over ep together with tp, pp and cp, `{DATA}` "
    "(deepseek) over data parallelism."
)


def page(
    records: list[Record],
    made_with: list[dict[str, str]],
    num_legal: int,
    num_refused: int,
    refused: Mapping[Pair, str],
    legality: Legality,
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
        f"Of the {len(records)}, {_how_many(records)}.",
        "",
        "Measured with " + "; ".join(f"torch {m['torch']} at commit {m['commit']}" for m in made_with) + ".",
        "",
        f"{len(read_layouts())} layouts that show every pair below are tests in CI (the last table names each): "
        "`pytest tests/parity/test_lattice.py`.",
        "",
        "## Pairs of features",
        "",
        "Each row is a value of a feature, each column another feature: `all` of its values compose, or all but those "
        "named, which are refused for the reason of that number (\\*: in this table).",
        "",
    ]
    reasons: list[str] = []
    lines += [*_matrix(refused, reasons), "", LATENT_WITH_EXPERTS]
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
    lines += [f"- {what}: {', '.join(f'`{test}`' for test in tests)}" for what, tests in ELSEWHERE.items()]
    return "\n".join(lines) + "\n"


def refused_triples(legality: Legality, refused: Mapping[Pair, str]) -> list[tuple[tuple[str, ...], str]]:
    """Values of three of LAYOUT_FEATURES that do not go together, though any two of them do, with the reason.

    Those whose degrees do not divide the ranks, which are many and alike, are left out.
    """
    either = set(refused) | {(second, first) for first, second in refused}
    found = []
    for names in itertools.combinations([name for name in LAYOUT_FEATURES if name != "microbatch"], 3):
        for chosen in itertools.product(*(list(FEATURES[name])[1:] for name in names)):
            fixed = dict(zip(names, chosen, strict=True))
            if not either.intersection(itertools.combinations(fixed.items(), 2)):
                found += [(chosen, reason) for reason in _reasons({"model": "experts"} | fixed, legality)]
    return found


def _reasons(fixed: Layout, legality: Legality) -> list[str]:
    """Why no layout has these values: none if one has, or would have on more ranks."""
    layouts = [default() | needed | fixed for needed in NEEDED]
    if any(all(map(_is_of_degrees, legality.problems(layout))) for layout in layouts):
        return []
    # What it lacks is not the reason: of all that a layout may need beside these values, the one with least to say.
    layout = min(layouts, key=lambda layout: len(legality.problems(layout)))
    return [legality.with_advice(layout, reason) for reason in legality.problems(layout) if not _is_of_degrees(reason)]


def _is_of_degrees(problem: str) -> bool:
    return "processes" in problem or "does not divide parallel.dp_shard" in problem


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


def _how_many(records: list[Record]) -> str:
    """Of some pairs that cost most to get right."""
    layouts = [record["layout"] for record in records]
    compiled = [layout for layout in layouts if layout["compile"] != "none"]
    split = sum(layout["pipeline"] in SPLIT_BACKWARD for layout in compiled)
    experts = sum(layout["expert"] != "none" for layout in compiled)
    shared = sum(layout["heads"] == "one_kv" and layout["tensor"] != "none" for layout in layouts)
    chunks = sum(layout["chunks"] != "whole" for layout in layouts)
    return (
        f"{len(compiled)} compile their blocks ({experts} with experts over ep, {split} with split backward), {chunks} "
        f"cut what sequence parallelism sends, and in {shared} ranks of tp share the one key/value head"
    )


def _largest(records: list[Record]) -> str:
    loss, gradient, weights = (max(r[name] for r in records) for name in ("loss", "gradient", "weights"))
    return f"loss {loss:.1e}, gradient {gradient:.1e}, weights {weights:.2f} times"


def _matrix(refused: Mapping[Pair, str], reasons: list[str]) -> list[str]:
    either = {**refused} | {(second, first): why for (first, second), why in refused.items()}
    only_here = {*ONLY_HERE} | {(second, first) for first, second in ONLY_HERE}
    lines = ["| | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for feature, values in FEATURES.items():
        for value in values:
            cells = []
            for other, others in FEATURES.items():
                without = []
                for second in others:
                    pair = (feature, value), (other, second)
                    if pair in only_here:
                        without.append(f"{second} (\\*)")
                    elif (why := either.get(pair)) is not None:
                        if why not in reasons:
                            reasons.append(why)
                        without.append(f"{second} ({reasons.index(why) + 1})")
                cells.append("" if other == feature else "all but " + ", ".join(without) if without else "all")
            lines.append(f"| **{feature}** {value} | " + " | ".join(cells) + " |")
    return lines
