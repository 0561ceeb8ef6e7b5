"""Where drafting stops paying: tokens a second with drafts in every step and in none, by how many requests there are.

Part of mode=bench (`bench.drafting_batches`). One engine does both, so that weights, cache and graphs are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from inference.config import SamplingConfig
from inference.engine import Engine
from inference.load import Request, replay
from inference.speculation.counts import SpeculationCounts
from inference.speculation.runner import SpeculativeRunner
from launch.lab_config import LabConfig


def problems(config: LabConfig) -> list[str]:
    """Every reason why `bench.drafting_batches` cannot be used; one line each."""
    sizes = config.bench.drafting_batches
    if not sizes:
        return []
    found = []
    if sizes != sorted(set(sizes)) or sizes[0] < 1:
        found.append(f"bench.drafting_batches={sizes} must be numbers of requests that grow, such as [1,4,16,64]")
    if config.speculation.method == "none":
        found.append(f"bench.drafting_batches={sizes} needs somebody who drafts; set speculation.method, such as ngram")
    if config.parallel.tp > 1:
        found.append("bench.drafting_batches switches drafts on one rank; use parallel.tp=1, or leave it out")
    if sizes[-1] > config.engine.max_sequences:
        found.append(
            f"bench.drafting_batches={sizes} has more requests than engine.max_sequences="
            f"{config.engine.max_sequences} run at a time; raise that"
        )
    return found


def too_few(sizes: Sequence[int], requests: Sequence[Request]) -> list[str]:
    """What is wrong with a load, once it is there; one line each."""
    if sizes and sizes[-1] > len(requests):
        return [
            f"bench.drafting_batches={list(sizes)} needs a load of {sizes[-1]} requests, and it has {len(requests)}; "
            "raise bench.num_requests, or give more prompts"
        ]
    return []


def break_even(
    engine: Engine, requests: Sequence[Request], sampling: SamplingConfig, sizes: Sequence[int]
) -> dict[str, Any]:
    """Speed-up and acceptance by the number of requests that begin at once, and the first number that gains nothing.

    Tokens a second are those of whole loads, prompts included: a batch is smaller once its shorter requests have ended.
    """
    assert isinstance(engine.runner, SpeculativeRunner)
    policy, rows = engine.runner.policy, []
    switched_on = policy.counts.speculating
    for size in sizes:
        load = [replace(request, arrival=0.0) for request in requests[:size]]
        speeds: dict[bool, float] = {}
        for drafting in (False, True):
            policy.forced = drafting
            for _ in range(2):  # the first run compiles, and captures graphs
                engine.weights_changed()  # forgets the prefixes
                before = copy.deepcopy(policy.counts)
                measured = replay(engine, load, sampling)
            speeds[drafting] = sum(len(timing.tokens) for timing in measured.timings) / measured.seconds
        rows.append(_row(size, speeds, policy.counts.since(before)))
    policy.forced, policy.counts.speculating = None, switched_on
    stops = next((row["requests"] for row in rows if row["speed_up"] < 1), None)
    return {"batches": rows, "stops_paying_at": stops}


def _row(size: int, speeds: dict[bool, float], drafts: SpeculationCounts) -> dict[str, Any]:
    return {
        "requests": size,
        "tokens_per_second": speeds[False],
        "drafting_tokens_per_second": speeds[True],
        "speed_up": speeds[True] / speeds[False],
        "acceptance": drafts.acceptance,
        "mean_length": drafts.mean_length,
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """For people."""
    stops = found["stops_paying_at"]
    lines = [
        f"{'requests':>8}{'tokens/s':>12}{'drafting':>12}{'speed-up':>10}{'tokens/step':>13}  accepted by position"
    ]
    for row in found["batches"]:
        shares = " ".join(f"{share:.2f}" for share in row["acceptance"])
        lines.append(
            f"{row['requests']:>8}{row['tokens_per_second']:>12.1f}{row['drafting_tokens_per_second']:>12.1f}"
            f"{row['speed_up']:>10.2f}{row['mean_length']:>13.2f}  {shares}"
        )
    paying = "pays at all of these" if stops is None else f"stops paying at {stops} requests"
    return [*lines, f"drafting {paying}"]
