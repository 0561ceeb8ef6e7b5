"""The lattice of layouts: features and their values, which pairs compose, and a set of layouts that covers all pairs.

`python -m tests.parity.lattice` chooses the set anew and writes it to layouts.json; do that when a feature or a refusal
changes (a test says so).
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.config import DataConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from models.mtp_config import MTPConfig
from tests.parity.harness import tiny_config
from trainer.config import RunConfig, TrainConfig
from trainer.validate import find_problems, with_legal_advice

WORLD_SIZE = 8
STEPS = 3
MIN_LAYOUTS = 80
LAYOUTS_FILE = Path(__file__).with_name("layouts.json")

Changes = dict[str, Any]
SHAPE: Changes = {  # four layers, so that every pipeline has stages of whole layers
    "train__steps": STEPS,
    "train__seq_len": 32,
    "train__global_batch_size": 8,
    "model__num_layers": 4,
    "model__hidden_size": 32,
    "model__num_heads": 8,
    "model__num_kv_heads": 4,
    "model__intermediate_size": 48,
}
Layout = dict[str, str]
"""Feature to value, all of them."""

# The first value of a feature is its absence. What belongs to the model decides which run of one process to compare to.
MODEL_FEATURES: dict[str, dict[str, Changes]] = {
    "model": {
        "dense": {},
        "experts": {
            "model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=24, num_shared=1),
            "model__routing": RoutingConfig(aux_weight=0.02, z_weight=0.001),
        },
        "latent": {
            "model__family": "deepseek_v3",
            "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
            "model__num_kv_heads": None,
        },
    },
    "option": {
        "none": {},
        "sinks": {"model__attention_sinks": True, "model__attention": "auto"},
        "mtp": {"model__mtp": MTPConfig(depth=1)},
    },
    "embeddings": {"untied": {}, "tied": {"model__tie_embeddings": True}},
    "mask": {
        "causal": {},
        "documents": {"data__mask_documents": True},
        "window": {"model__sliding_window": 7},
    },
    # Fewer key/value heads than ranks of tp, which then share them.
    "heads": {"grouped": {}, "one_kv": {"model__num_kv_heads": 1}},
}
LAYOUT_FEATURES: dict[str, dict[str, Changes]] = {
    "zero": {f"zero{stage}": {"parallel__zero_stage": stage} for stage in (0, 1, 2, 3)},
    "replicas": {"1": {}, "2": {"parallel__dp_replicate": 2}},
    "tensor": {
        "none": {},
        "tp2": {"parallel__tp": 2},
        "tp2+sp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
        "tp4+sp": {"parallel__tp": 4, "parallel__sequence_parallel": True},
    },
    "pipeline": {
        "none": {},
        **{
            name: {"parallel__pp": 2, "parallel__pp_schedule": name}
            for name in ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "dualpipev")
        },
        "1f1b(4)": {"parallel__pp": 4, "parallel__pp_schedule": "1f1b"},
    },
    "context": {
        "none": {},
        "ring": {"parallel__cp": 2},
        "ulysses": {"parallel__cp": 2, "parallel__cp_method": "ulysses"},
        "allgather": {"parallel__cp": 2, "parallel__cp_method": "allgather"},
        "ring(2)xulysses(2)": {"parallel__cp": 4, "parallel__cp_ulysses": 2},
    },
    "expert": {"none": {}, "ep2": {"parallel__ep": 2}},
    # 8 samples do not divide into micro-batches of 3; few large ones are the plain case because they cost least.
    "microbatch": {size: {"train__micro_batch_size": int(size)} for size in ("3", "2", "1")},
    "checkpointing": {
        "none": {},
        "full": {"model__activation_checkpoint": "full"},
        "selective": {"model__activation_checkpoint": "selective"},
    },
    "compile": {"none": {}, "aot_eager": {"train__compile": True, "train__compile_backend": "aot_eager"}},
    # Rows to experts of other ranks: in buffers of a constant size, here always enough; compiled blocks have no other
    # way, and others send as many as there are.
    "rows": {"auto": {}, "buffers": {"parallel__ep_buffer": 2.0}},
    "chunks": {"whole": {}, "chunks2": {"parallel__sp_chunks": 2}},
}
FEATURES = MODEL_FEATURES | LAYOUT_FEATURES
"""precision.reduce is none: beside compute in fp32 it has no other value."""
NEEDED: list[Layout] = [
    dict(itertools.chain.from_iterable(values))
    for n in range(4)
    for values in itertools.combinations(
        [[("model", "experts")], [("tensor", "tp2+sp")], [("expert", "ep2"), ("model", "experts")]], n
    )
]
"""Values that other features need, as experts' axis needs experts: none of them, and all combinations."""

Pair = tuple[tuple[str, str], tuple[str, str]]


def base_config(folder: Path, data: DataConfig) -> TrainConfig:
    """What every layout changes."""
    return tiny_config(folder / "base", data, **SHAPE)


def config_of(layout: Layout, base: TrainConfig, run_dir: Path) -> TrainConfig:
    """The configuration of a layout, or of some features of one. What it does not change, it shares with the base."""
    groups: dict[str, Any] = {"run": RunConfig(dir=str(run_dir))}
    for feature, value in layout.items():
        for key, setting in FEATURES[feature][value].items():
            group, name = key.split("__")
            assert hasattr(getattr(base, group), name), key
            setattr(groups.setdefault(group, copy.copy(getattr(base, group))), name, setting)
    return replace(base, **groups)


def model_of(layout: Layout) -> Layout:
    """The part of a layout that one process has as well."""
    return {feature: layout[feature] for feature in MODEL_FEATURES}


class Legality:
    """Whether layouts are accepted, and why not. Remembers what it was asked."""

    def __init__(self, base: TrainConfig) -> None:
        self.base = base
        self._problems: dict[tuple[str, ...], tuple[str, ...]] = {}

    def problems(self, layout: Layout) -> tuple[str, ...]:
        """What validation says about a layout; empty: it runs."""
        key = tuple(layout[feature] for feature in FEATURES)
        if key not in self._problems:
            config = config_of(layout, self.base, Path("unused"))
            self._problems[key] = tuple(find_problems(config, world_size=WORLD_SIZE))
        return self._problems[key]

    def with_advice(self, layout: Layout, problem: str) -> str:
        """One of these problems as a user of that layout reads it."""
        config = config_of(layout, self.base, Path("unused"))
        return with_legal_advice(problem, list(self.problems(layout)), config, WORLD_SIZE)


def some_legality() -> Legality:
    """For a base that is not there: nothing is trained."""
    return Legality(base_config(Path("unused"), DataConfig(source="text", path=__file__)))


def all_pairs() -> list[Pair]:
    """Every two values of two features."""
    return [
        ((one, value), (other, second))
        for one, other in itertools.combinations(FEATURES, 2)
        for value in FEATURES[one]
        for second in FEATURES[other]
    ]


def pairs_of(layout: Layout) -> set[Pair]:
    """The pairs that a layout shows."""
    return set(itertools.combinations(layout.items(), 2))


def default() -> Layout:
    """One feature absent after the other."""
    return {feature: next(iter(values)) for feature, values in FEATURES.items()}


@functools.cache
def models() -> tuple[Layout, ...]:
    """Few models that show every two values of MODEL_FEATURES that go together: each costs runs of one process to
    compare with."""
    legality = some_legality()
    every = [dict(zip(MODEL_FEATURES, values, strict=True)) for values in itertools.product(*MODEL_FEATURES.values())]
    every = [model for model in every if not legality.problems(default() | model)]
    return min((_covering(every, random.Random(seed)) for seed in range(40)), key=len)


def _covering(every: list[Layout], draw: random.Random) -> tuple[Layout, ...]:
    """Models that show every two values: always the one with most that are new, of several one drawn."""
    chosen: list[Layout] = []
    missing = set().union(*(pairs_of(model) for model in every))
    while missing:
        chosen.append(max(draw.sample(every, len(every)), key=lambda model: len(pairs_of(model) & missing)))
        missing -= pairs_of(chosen[-1])
    return tuple(chosen)


def _models_with(fixed: Layout) -> list[Layout]:
    return [model for model in models() if all(fixed.get(name, value) == value for name, value in model.items())]


def _random_layout(fixed: Layout, draw: random.Random) -> Layout:
    """With these values, a model of `models` that has them, and what they need half of the time or more."""
    fixed = draw.choice(_models_with(fixed) or [{}]) | fixed
    plain = default() | draw.choice(NEEDED)
    # Each feature is plain half of the time: eight ranks have room for three axes of two.
    return {
        feature: fixed.get(feature) or (plain[feature] if draw.random() < 0.5 else draw.choice(list(values)))
        for feature, values in FEATURES.items()
    }


def refused_pairs(legality: Legality) -> dict[Pair, str]:
    """Pairs that no layout has, with what validation says to the plainest one that would."""
    refused = {}
    draw = random.Random(1)
    for pair in all_pairs():
        fixed = dict(pair)
        candidates = itertools.chain([plainest(fixed, legality)], (_random_layout(fixed, draw) for _ in range(60)))
        if not any(not legality.problems(candidate) for candidate in candidates):
            refused[pair] = _reason(pair, legality)
    return refused


def _reason(pair: Pair, legality: Legality) -> str:
    """The problem that neither value has alone, of the plainest layout with both."""
    alone: set[str] = set()
    together = default()
    for name, value in pair:
        plain = plainest({name: value}, legality)
        alone |= set(legality.problems(plain))
        together |= {feature: v for feature, v in plain.items() if v != default()[feature]}
    layout = together | dict(pair)
    problems = legality.problems(layout)
    return legality.with_advice(layout, next((problem for problem in problems if problem not in alone), problems[0]))


def plainest(fixed: Layout, legality: Legality) -> Layout:
    """A layout with these values that is legal, with few others; if there is none, an illegal one."""
    plain = [default() | needed | fixed for needed in NEEDED]
    return next((layout for layout in plain if not legality.problems(layout)), plain[0])


def cpu_seconds(layout: Layout) -> float:
    """Of training a layout, about, all ranks together; of thirty that were measured most lie within a third of it."""
    changes: Changes = {}
    for feature in LAYOUT_FEATURES:
        changes |= FEATURES[feature][layout[feature]]
    tp, pp, cp = (changes.get(f"parallel__{axis}", 1) for axis in ("tp", "pp", "cp"))
    # Ranks that share samples all work on all of these.
    samples = SHAPE["train__global_batch_size"] * tp * pp * cp / WORLD_SIZE
    micro_batches = samples / changes["train__micro_batch_size"] / pp
    sequence = 2 if changes.get("parallel__sequence_parallel") else 1
    recomputed = {"none": 1, "full": 1.5, "selective": 2}[layout["checkpointing"]]
    seconds = 5 + micro_batches * sequence * (2 if cp > 1 else 1) * recomputed / 2
    if layout["compile"] != "none":
        # Graphs of a rank: for each kind of block and each size of a micro-batch (3 leaves one of 2).
        graphs = (2 if layout["option"] == "mtp" else 1) * (2 if layout["microbatch"] == "3" else 1)
        seconds += 8 * graphs + (22 if layout["model"] == "experts" else 0)
    return seconds


def choose_layouts(legality: Legality) -> list[Layout]:
    """At least MIN_LAYOUTS legal layouts that show every pair which is not refused: greedily, the same every time."""
    refused = refused_pairs(legality)
    missing = set(all_pairs()) - set(refused)
    draw = random.Random(0)
    chosen: list[Layout] = []

    def worth(layout: Layout) -> float:
        """New pairs; the cheaper of two with as many."""
        return len(pairs_of(layout) & missing) - cpu_seconds(layout) / 5

    def add(fixed: Layout, *, candidates: int) -> None:
        random_ones = (_random_layout(fixed, draw) for _ in range(1200 if candidates > 100 else 400))
        fresh = (layout for layout in random_ones if not legality.problems(layout) and layout not in chosen)
        legal = list(itertools.islice(fresh, candidates)) or [plainest(fixed, legality)]
        if not legality.problems(legal[0]):
            chosen.append(max(legal, key=worth))
            missing.difference_update(pairs_of(chosen[-1]))

    # Compiling on eight ranks takes several times what training does: few layouts, chosen from many, show all of it.
    compiled = ("compile", "aot_eager")
    while pairs := [pair for pair in missing if compiled in pair]:
        add(dict(min(pairs)), candidates=300)
    rest = [pair for pair in all_pairs() if pair not in refused and compiled not in pair]
    while missing or len(chosen) < MIN_LAYOUTS:
        add(dict(min(missing or [draw.choice(rest)])) | {"compile": "none"}, candidates=40)
    return chosen


def name_of(layout: Layout) -> str:
    """The values that are not absent, as a test's id."""
    return "-".join(layout[f] for f, values in FEATURES.items() if layout[f] != next(iter(values))) or "plain"


def read_layouts() -> list[Layout]:
    """The chosen layouts, in order."""
    rows = json.loads(LAYOUTS_FILE.read_text())
    return [dict(zip(FEATURES, row, strict=True)) for row in rows]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    layouts = choose_layouts(some_legality())
    rows = [json.dumps([layout[feature] for feature in FEATURES]) for layout in layouts]
    LAYOUTS_FILE.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    print(f"{len(layouts)} layouts")


if __name__ == "__main__":
    main()
