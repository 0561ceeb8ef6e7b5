"""The layouts of `make parity`: every legal combination of the axes, in which all other features take turns."""

from __future__ import annotations

import itertools
from collections import Counter

from tests.parity.lattice import (
    FEATURES,
    LAYOUT_FEATURES,
    Layout,
    Legality,
    default,
    models,
)

CROSSED = ("pipeline", "tensor", "context", "expert", "zero")
OFTEN = {"aot_eager": 1 / 3}
"""How often a value is to be shown beside the others of its feature, where not as often: compiling on eight ranks takes
several times what training does."""


def cross_product(legality: Legality) -> tuple[list[Layout], int]:
    """Every legal combination of CROSSED, the same every time. Also how many combinations are refused.

    What else a layout has is, feature after feature, the legal value that was shown least beside what it already has:
    so every value comes about as often as every other, beside every value of an axis and beside one another.
    """
    # Models, which are few, then the features that others depend on (experts' rows, chunks of sequences) at last.
    others = [name for name in LAYOUT_FEATURES if name not in (*CROSSED, "compile")]
    turns = [list(models())] + [[{name: value} for value in FEATURES[name]] for name in ("compile", *others)]
    shown: Counter[tuple[tuple[str, str], tuple[str, str]]] = Counter()
    layouts, refused = [], 0
    for values in itertools.product(*(FEATURES[name] for name in CROSSED)):
        crossed = dict(zip(CROSSED, values, strict=True))
        layout = default() | {"model": "experts"} | crossed  # the only model that all of the axes divide
        if legality.problems(layout):
            refused += 1
            continue
        chosen = crossed
        for choices in turns:
            choice = _least_shown(choices, chosen, layout, shown, legality)
            shown.update(itertools.product(choice.items(), chosen.items()))
            chosen, layout = chosen | choice, layout | choice
        layouts.append(layout)
    return layouts, refused


def _least_shown(
    choices: list[Layout],
    chosen: Layout,
    layout: Layout,
    shown: Counter[tuple[tuple[str, str], tuple[str, str]]],
    legality: Legality,
) -> Layout:
    """Of the legal ones, that of which the pairs with what is chosen were shown least."""

    def worth(choice: Layout) -> float:
        pairs = itertools.product(choice.items(), chosen.items())
        return sum(OFTEN.get(pair[0][1], 1.0) / (1 + shown[pair]) for pair in pairs)

    in_order = sorted(choices, key=worth, reverse=True)
    return next(choice for choice in in_order if not legality.problems(layout | choice))
