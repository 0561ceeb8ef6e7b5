"""mode=compare: two settings, or two models, side by side: tokens, log-probabilities, speed.

Both continue the same prompts by compare.max_tokens tokens. Then both score the same sequences, those of side a, as
prompts. One JSON object goes to `out` or standard output, a table to stderr. Probabilities are compared in nats.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inference.config import longest, sampling_problems
from inference.engine import Engine, RequestError
from inference.load import random_tokens
from inference.scoring import score
from inference.sequence import Completion
from launch.explain import explain, known_keys, no_such_key
from launch.lab_config import LabConfig, device_of, make_engine, sampling_of, say_what_computes
from launch.modes.files import length_problems, out_problems, prompt_problems, token_prompts, write_json
from launch.open_model import OpenedModel, model_problems, open_model
from launch.open_speculation import drafting_problems
from trainer.config import ConfigError, configuration_errors

_MAY_DIFFER = ("model", "engine", "sampling", "speculation")
_LEAST_REST = 2.0**-24
"""Least probability of all tokens beyond the top ones: what log-probabilities in fp32 can tell from nothing."""


@dataclass
class Outcome:
    """What one side makes of the prompts. Filled by `_outcome`."""

    completions: list[Completion]
    scored: list[list[float]]  # log-probabilities of side a's sequences but for their first tokens, as prompts
    seconds: list[float]  # of each timed run
    attention: str
    dtype: str
    tokenizer: str | None  # its fingerprint

    @property
    def tokens_per_second(self) -> float:
        """Of continuations, in the median run."""
        tokens = sum(len(completion.token_ids) for completion in self.completions)
        return tokens / statistics.median(self.seconds)


def problems(config: LabConfig) -> list[str]:
    """Every reason why these settings cannot be used that no model is needed to see; one line each."""
    settings = config.compare
    found = [
        f"compare.{name}={getattr(settings, name)} must be at least {least}"
        for name, least in (("num_prompts", 1), ("max_tokens", 1), ("top_logprobs", 2), ("repeats", 1), ("seed", 0))
        if getattr(settings, name) < least
    ]
    found += length_problems("compare.prompt_tokens", settings.prompt_tokens)
    if not settings.a and not settings.b:
        found.append("compare.a and compare.b are empty; list what differs, as compare.b=['engine.block_size=64']")
    common = _side_problems(config)  # said once, by others
    for name in ("a", "b"):
        overrides = getattr(settings, name)
        if wrong := _override_problems(overrides):
            found += [f"compare.{name}: {line}" for line in wrong]
            continue
        side = side_of(config, overrides)
        of_side = _side_problems(side)
        found += [f"compare.{name}: {line}" for line in of_side if line not in common or side.model.path is None]
    if config.sampling.max_tokens is not None:
        found.append(
            f"sampling.max_tokens={config.sampling.max_tokens} is compare.max_tokens in mode=compare; set that"
        )
    return found + prompt_problems(config, needed=False) + out_problems(config)


def _side_problems(side: LabConfig) -> list[str]:
    drafts = drafting_problems(side.speculation, side.model)
    return model_problems(side.model) + sampling_problems(side.sampling) + drafts


def _override_problems(overrides: Sequence[str]) -> list[str]:
    """What is wrong with each of a side's overrides; one line each."""
    found, known = [], known_keys(OmegaConf.structured(LabConfig))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or key.split(".")[0] not in _MAY_DIFFER or "." not in key:
            found.append(f"{override} is not of the form {', '.join(f'{name}.KEY=VALUE' for name in _MAY_DIFFER)}")
            continue
        if key not in known:
            found.append(no_such_key(key, LabConfig))
            continue
        try:
            side_of(LabConfig(), [override])
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            found.append(explain(error, override, schema=LabConfig))
    return found


def side_of(config: LabConfig, overrides: Sequence[str]) -> LabConfig:
    """The whole configuration of a side."""
    merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(list(overrides)))
    side = OmegaConf.to_object(merged)
    assert isinstance(side, LabConfig)
    return side


def compare(config: LabConfig) -> None:
    """Compare. Raises ConfigError for a side that cannot be served, or that means other tokens by the same numbers."""
    settings = config.compare
    a, prompts = _outcome("a", side_of(config, settings.a), None, None)
    sequences = [prompt + completion.token_ids for prompt, completion in zip(prompts, a.completions, strict=True)]
    b, _ = _outcome("b", side_of(config, settings.b), prompts, sequences, tokenizer=a.tokenizer)
    report: dict[str, Any] = {
        "a": {"overrides": settings.a} | _said(a),
        "b": {"overrides": settings.b} | _said(b),
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        **differences(a, b),
        "speed_ratio": b.tokens_per_second / a.tokens_per_second,
    }
    _print_table(report)
    write_json(config, report)


def _outcome(
    name: str,
    side: LabConfig,
    prompts: list[list[int]] | None,
    sequences: list[list[int]] | None,
    *,
    tokenizer: str | None = None,
) -> tuple[Outcome, list[list[int]]]:
    """One side's outcome, and the prompts. Nothing of its model and cache stays.

    prompts, sequences: None: this side's own. tokenizer: fingerprint of the other side's.
    """
    try:
        opened = open_model(side.model, device_of(side.device))
        own = None if opened.tokenizer is None else opened.tokenizer.fingerprint()
        if None not in (tokenizer, own) and tokenizer != own:
            raise ConfigError(["its tokenizer is another one than that of compare.a: tokens cannot be compared"])
        prompts = _prompts(side, opened) if prompts is None else prompts
        engine = make_engine(opened, _with_room(side, opened, prompts), side.speculation)
        say_what_computes(engine)
        found = _measured(engine, side, prompts, sequences, own)
    except ConfigError as error:
        raise ConfigError([f"compare.{name}: {problem}" for problem in error.problems]) from None
    del engine, opened
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found, prompts


def _measured(
    engine: Engine, side: LabConfig, prompts: list[list[int]], sequences: list[list[int]] | None, tokenizer: str | None
) -> Outcome:
    settings = side.compare
    plain = replace(sampling_of(side), max_tokens=settings.max_tokens, ignore_eos=True)
    top = replace(plain, top_logprobs=min(settings.top_logprobs, engine.vocab_size))
    with configuration_errors(RequestError):
        completions = engine.generate(prompts, top)
        given = sequences or [p + c.token_ids for p, c in zip(prompts, completions, strict=True)]
        scored = score(engine, given, [len(sequence) - 1 for sequence in given])
    seconds = []
    for number in range(settings.repeats + 1):
        engine.weights_changed()  # forgets the prefixes
        began = time.perf_counter()
        engine.generate(prompts, plain)
        if number > 0:  # the first compiles, and captures graphs
            seconds.append(time.perf_counter() - began)
    dtype = str(next(engine.runner.model.parameters()).dtype).removeprefix("torch.")
    return Outcome(completions, scored, seconds, engine.runner.attention, dtype, tokenizer)


def _prompts(side: LabConfig, opened: OpenedModel) -> list[list[int]]:
    given = token_prompts(side, opened)
    if given is not None:
        return given
    settings, chance = side.compare, random.Random(side.compare.seed)
    lengths = [
        chance.randint(settings.prompt_tokens[0], settings.prompt_tokens[-1]) for _ in range(settings.num_prompts)
    ]
    return [random_tokens(length, opened.model.config.vocab_size, chance) for length in lengths]


def _with_room(side: LabConfig, opened: OpenedModel, prompts: list[list[int]]) -> Any:
    """Engine settings that hold the longest sequence and the place that scoring needs behind it."""
    most = max(map(len, prompts))
    needed, room = most + side.compare.max_tokens + 1, longest(side.engine, opened.model.config)
    if needed > room:
        raise ConfigError([
            f"a sequence needs {needed} tokens (a prompt of {most}, compare.max_tokens={side.compare.max_tokens} and "
            f"one more), and there is room for {room}; use shorter prompts or fewer tokens"
        ])  # fmt: skip
    return side.engine


# ---- one against the other


def differences(a: Outcome, b: Outcome) -> dict[str, Any]:
    """Tokens up to where they part, and log-probabilities where both sides see the same ones before."""
    places: list[int | None] = []
    deltas, divergences, margins = [], [], []
    for one, other in zip(a.completions, b.completions, strict=True):
        both = list(zip(one.token_ids, other.token_ids, strict=False))
        same = next((place for place, (x, y) in enumerate(both) if x != y), len(both))
        parted = same < len(both)
        places.append(same if parted or len(one.token_ids) != len(other.token_ids) else None)
        deltas += [y - x for x, y in zip(one.logprobs[:same], other.logprobs[:same], strict=True)]
        seen = slice(same + 1)  # what precedes the first tokens that differ is the same
        tops = list(zip(one.top_logprobs[seen], other.top_logprobs[seen], strict=False))  # one may end earlier
        divergences += [top_kl(p, q) for p, q in tops]
        if parted:
            margins += [_margin(top) for top in tops[same]]
    scored = [y - x for p, q in zip(a.scored, b.scored, strict=True) for x, y in zip(p, q, strict=True)]
    return {
        "tokens": {
            "generated": sum(len(one.token_ids) for one in a.completions),
            "equal": len(deltas),  # before the first difference of each prompt
            "prompts_equal": places.count(None),
            "first_difference": places,  # by prompt; None: there is none
            "largest_margin": max(margins, default=None),  # between the two most probable tokens where sides part
        },
        "decode": _summary(deltas),
        "scored": _summary(scored),
        "top_kl": {
            "places": len(divergences),
            "max": max(divergences, default=None),
            "mean": statistics.fmean(divergences) if divergences else None,
        },
    }


def top_kl(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """KL(p || q) in nats of distributions of which the most probable tokens are known, by their log-probabilities.

    Tokens that only one of both knows, and all the others, are one outcome: the divergence of what is so made coarser
    is never above that of the distributions themselves, and equal to it where all tokens are known.
    """
    shared = p.keys() & q.keys()
    rest_p, rest_q = (max(1 - math.fsum(math.exp(x[t]) for t in shared), _LEAST_REST) for x in (p, q))
    known = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in shared if p[token] > -math.inf)
    return max(known + rest_p * math.log(rest_p / rest_q), 0.0)


def _margin(top: Mapping[int, float]) -> float:
    first, second, *_ = sorted(top.values(), reverse=True)
    return first - second


def _summary(deltas: Sequence[float]) -> dict[str, Any]:
    """Of log p by b minus log p by a."""
    sizes = [abs(delta) for delta in deltas]
    return {
        "tokens": len(deltas),
        "max_abs_delta": max(sizes, default=None),
        "mean_abs_delta": statistics.fmean(sizes) if sizes else None,
        "mean_delta": statistics.fmean(deltas) if deltas else None,
    }


def _said(side: Outcome) -> dict[str, Any]:
    return {
        "dtype": side.dtype,
        "attention": side.attention,
        "seconds": side.seconds,
        "tokens_per_second": side.tokens_per_second,
    }


def _print_table(report: dict[str, Any]) -> None:
    """For people."""
    tokens, kl = report["tokens"], report["top_kl"]
    lines = []
    for name in ("a", "b"):
        side = report[name]
        lines.append(
            f"{name}: {side['tokens_per_second']:.1f} tokens/s, {side['dtype']}; {' '.join(side['overrides'])}"
        )
    lines.append(f"b is {report['speed_ratio']:.3f} times as fast as a")
    parted = [place for place in tokens["first_difference"] if place is not None]
    lines.append(
        f"tokens: {tokens['prompts_equal']} of {report['prompts']} continuations equal, {tokens['equal']} of "
        f"{tokens['generated']} tokens before the first difference"
        + (f"; the earliest at {min(parted)}, margin at most {tokens['largest_margin']:.3g}" if parted else "")
    )
    lines.append(f"{'log p by b - by a':28}{'tokens':>8}{'max |.|':>12}{'mean |.|':>12}{'mean':>12}")
    for name, what in (("decode", "of equal tokens, generated"), ("scored", "of a's sequences, scored")):
        values = report[name]
        shown = [values[key] for key in ("max_abs_delta", "mean_abs_delta", "mean_delta")]
        numbers = "".join(f"{'-':>12}" if value is None else f"{value:>12.3g}" for value in shown)
        lines.append(f"{what:28}{values['tokens']:>8}{numbers}")
    lines.append(
        f"KL(a || b) of the top tokens: mean {kl['mean']:.3g}, at most {kl['max']:.3g} ({kl['places']} places)"
    )
    print("\n".join(lines), file=sys.stderr)
