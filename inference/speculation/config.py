"""Settings of speculative decoding, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field

METHODS = ("none", "ngram", "draft", "medusa", "eagle", "mtp")
DRAFTS = ("greedy", "sampled")


@dataclass
class SpeculationConfig:
    """`speculation`: who drafts, how much, and when it stops paying."""

    # none; ngram: what followed the same tokens earlier; draft: a smaller model; medusa, eagle: heads trained for this
    # model (model.speculator_path); mtp: the model's own block of multi-token prediction
    method: str = "none"
    num_tokens: int = 4  # drafted behind a sequence in a step, at most
    # greedy: the most probable ones; a request's tokens are those it would have without speculation, whatever its
    # temperature. sampled: drawn from the drafter's distribution; accepted more often where temperature > 0, of the
    # same distribution, but with tokens that depend on which places had drafts
    drafts: str = "greedy"
    ngram_max: int = 3  # ngram: tokens that have to occur again, tried from the most
    ngram_min: int = 1  # to the least
    draft_path: str | None = None  # draft: a Hugging Face folder, a checkpoint or a run
    switch_off: bool = True  # stop drafting where the cost model says that it does not pay, and begin again
    max_batch: int | None = None  # more sequences than this are continued without drafts; None: the cost model says
    hysteresis: float = 0.1  # to begin again it must pay by so much
    probe_interval: int = 200  # steps after which the other way is tried, to measure it anew
    step_ms: dict[int, float] = field(default_factory=dict)  # of a step by its tokens; empty: measured
    draft_ms: float = 0.0  # with step_ms: of drafting in a step


def speculation_problems(config: SpeculationConfig) -> list[str]:
    """What is wrong with `speculation` before any model is seen; one line each."""
    found = []

    def hold(good: bool, name: str, rule: str) -> None:
        if not good:
            found.append(f"speculation.{name}={getattr(config, name)} {rule}")

    hold(config.method in METHODS, "method", f"is unknown; use {', '.join(METHODS)}")
    hold(config.drafts in DRAFTS, "drafts", f"is unknown; use {' or '.join(DRAFTS)}")
    hold(1 <= config.num_tokens <= 64, "num_tokens", "must be 1 to 64; 2 to 8 are usual")
    hold(config.ngram_min >= 1, "ngram_min", "must be at least 1")
    least = max(config.ngram_min, 1)
    hold(config.ngram_max >= least, "ngram_max", f"is below speculation.ngram_min; use at least {least}")
    hold(config.max_batch is None or config.max_batch >= 1, "max_batch", "must be at least 1, or null")
    hold(0 <= config.hysteresis < 1, "hysteresis", "must be 0 to below 1")
    hold(config.probe_interval >= 1, "probe_interval", "must be at least 1")
    hold(config.draft_ms >= 0, "draft_ms", "must be at least 0")
    times = [config.step_ms[tokens] for tokens in sorted(config.step_ms)]
    hold(
        all(tokens >= 1 for tokens in config.step_ms) and all(ms > 0 for ms in times) and times == sorted(times),
        "step_ms",
        "must map numbers of tokens to milliseconds above 0 that do not fall",
    )
    if config.method == "draft" and config.draft_path is None:
        found.append(
            "speculation.method=draft needs speculation.draft_path=DIR, a smaller model of the same vocabulary"
        )
    if config.method not in ("draft", "none") and config.draft_path is not None:
        found.append(
            f"speculation.draft_path={config.draft_path} has no effect with speculation.method={config.method}; use "
            "method=draft, or leave it out"
        )
    if config.draft_ms > 0 and not config.step_ms:
        found.append(f"speculation.draft_ms={config.draft_ms} has no effect without speculation.step_ms; set both")
    return found


def problems_over_ranks(config: SpeculationConfig) -> list[str]:
    """Why this cannot be where the model is cut over tp: ranks have to decide alike; one line each."""
    found = []
    if config.method not in ("none", "ngram", "draft"):
        found.append(
            f"speculation.method={config.method} goes on from hidden states by layers that are whole on one rank; over "
            "tp use method=ngram or draft, or parallel.tp=1"
        )
    if config.method != "none" and config.switch_off and not config.step_ms:
        found.append(
            "speculation.switch_off=true measures steps by a clock, and every rank has its own; over tp use "
            "switch_off=false (max_batch still counts), or set speculation.step_ms"
        )
    return found
