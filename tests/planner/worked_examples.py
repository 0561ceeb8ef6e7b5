"""docs/WORKED_EXAMPLES.md, made of plans: `python -m tests.planner.worked_examples > docs/WORKED_EXAMPLES.md`."""

# ruff: noqa: E501 (prose, which is wrapped when it is complete)

from __future__ import annotations

import shlex
import textwrap
from typing import Any

from launch.compose import compose_for
from launch.plan import PLAN, plan_of, search_of
from models.config import ModelConfig
from models.registry import resolve_model
from planner.cache import cache_bytes
from planner.search import Layout

GIB = 2**30
COMMON = ["precision=bf16", "train.compile=true"]
OF_13B = ["+exp=zero3_13b", "plan.gpus=8"]
OF_70B = ["model=llama3_70b", *COMMON, "train.seq_len=8192", "train.global_batch_size=128", "plan.gpus=64",
          "parallel.zero_stage=2"]  # fmt: skip
SPLIT_70B = [*OF_70B, "parallel.tp=8", "parallel.sequence_parallel=true"]
OF_405B = ["model=llama3_405b", *COMMON, "train.seq_len=8192", "plan.gpus=1024", "parallel.tp=8",
           "parallel.sequence_parallel=true", "parallel.pp=16", "parallel.zero_stage=1"]  # fmt: skip
OF_EIGHT = [*COMMON, "train.seq_len=4096", "train.global_batch_size=16", "plan.gpus=8"]
SPARSE = ["model=mixtral_8x7b", *OF_EIGHT, "parallel.ep=8", "parallel.ep_buffer=1.5"]
DENSE = ["model=llama2_13b", *OF_EIGHT]


def page() -> str:
    """The whole page."""
    parts = "\n\n".join(part.strip("\n") for part in (HEAD, _13b(), _70b(), _405b(), _experts(), _cache()))
    return "\n\n".join(_filled(paragraph) for paragraph in parts.split("\n\n")) + "\n"


def _filled(paragraph: str) -> str:
    if paragraph.startswith(("    ", "|", "#")):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), 120, break_long_words=False, break_on_hyphens=False)


HEAD = """
# Worked examples

What the planner says of five cases, on H200, with its arithmetic. Every result here is computed anew by
`tests/planner/test_worked_examples.py`, which compares the page with what the code gives. Bytes of state, of traffic and
FLOPs follow from formulas; activations, peaks and times are a model ([PLANNER.md](PLANNER.md) says how near it is), and
between nodes its rates are assumed, not measured.
"""


def _13b() -> str:
    plan = _plan(OF_13B)
    rank, n = plan["ranks"][0], plan["num_parameters"]
    sent = sum(plan["traffic_bytes_per_step"]["shard"].values())
    found, _ = search_of(compose_for(PLAN, [*OF_13B, "plan.search=true"]), OF_13B)
    best, second = found.ranking.layouts[:2]
    return f"""
## 13B on 8 GPUs with ZeRO-3

{_command(OF_13B)}

{n:,} parameters. In ZeRO-3 a rank keeps, of each that it owns, the weight, its gradient and two moments in fp32: 16 bytes,
so {n:,} x 16 / 8 = {_state(rank):,} bytes with the optimizer's count of updates, {_state(rank) / GIB:.1f} GiB. Activations
({plan["layout"]["activation_checkpoint"]} checkpointing) add {rank["activations_bytes"] / GIB:.1f} GiB, gathered parameters
and gradients under way {rank["communication_bytes"] / GIB:.1f} GiB; the peak is {rank["peak_bytes"] / GIB:.1f} GiB.

A micro-batch gathers the weights twice in bf16 and scatters gradients once in fp32: 8 bytes a parameter (6 of those outside of blocks, which stay gathered from forward to backward), of which a rank
sends 7/8. In {plan["layout"]["micro_batches"]} micro-batches that is {sent / 1e9:.1f} GB,
{sent / plan["plain_ddp_bytes_per_step"]:.1f} times what plain DDP sends. {_time(plan)}

With `--search` the planner prefers {_split(best)}: {best.time.step:.3f} s against {plan["step_seconds"]:.3f} s, at a peak of
{best.peak / GIB:.1f} GiB. The best of another split is {_split(second)}, with {second.time.step:.3f} s.
"""


def _70b() -> str:
    split, alone = _plan(SPLIT_70B), _plan(OF_70B)
    rank, worst = split["ranks"][0], alone["ranks"][0]
    sent = split["traffic_bytes_per_step"]
    return f"""
## 70B on 64 GPUs

{_command(SPLIT_70B)}

{split["num_parameters"]:,} parameters. ZeRO-2 alone keeps all weights in bf16 on each GPU, {worst["parameters_bytes"] / GIB:.1f}
GiB, and with long sequences it needs {worst["peak_bytes"] / GIB:.1f} GiB of {alone["memory_bytes"] / GIB:.1f}: it does not
fit. tp=8 in each node leaves {rank["parameters_bytes"] / GIB:.1f} GiB of weights, and dp_shard={split["layout"]["dp_shard"]}
between nodes divides gradients, masters and moments: {_state(rank) / GIB:.1f} GiB of state, {rank["peak_bytes"] / GIB:.1f}
GiB at the peak.

Inside of layers a rank sends {sum(sent["tp"].values()) / 1e9:.0f} GB over NVLink in a step, between nodes
{sum(sent["shard"].values()) / 1e9:.0f} GB. {_time(split)}
"""


def _405b() -> str:
    few, many = (_plan([*OF_405B, f"train.global_batch_size={n}"]) for n in (128, 512))
    ranks = many["ranks"]
    peaks = [max(r["peak_bytes"] for r in ranks if r["pp"] == pp) / GIB for pp in range(16)]
    worst = max(range(16), key=lambda pp: peaks[pp])
    failure = many["failure"]
    return f"""
## 405B on 1,024 GPUs

{_command([*OF_405B, "train.global_batch_size=512"])}

{many["num_parameters"]:,} parameters in 16 stages of tp=8, {many["layout"]["pipeline"]}. Rank n
of the pipeline keeps activations of 16 - n micro-batches: the first peaks at {peaks[0]:.1f} GiB, the last at
{peaks[15]:.1f}, and rank {worst} needs most, {peaks[worst]:.1f} GiB.

With 128 sequences a step, {few["layout"]["micro_batches"]} micro-batches, ranks wait {few["bubble"]:.1%} of the pipeline's time
and MFU is {few["mfu"]:.1%}; with 512, {many["layout"]["micro_batches"]} micro-batches, {many["bubble"]:.1%}.
{_time(many)}

At one failure in 50,000 hours of a GPU the job has one every {failure["mtbf_seconds"] / 3600:.1f} h. Training waits
{failure["held_up_seconds"]:.2f} s for a checkpoint's copy to host memory; it is written beside training, in
{failure["checkpoint_seconds"]:.0f} s, and no sooner can the next one begin. One every
{failure["interval_seconds"] / 60:.1f} minutes loses least: {failure["lost_fraction"]:.2%} of the time.
"""


def _experts() -> str:
    sparse, dense = _plan(SPARSE), _plan(DENSE)
    rows = [
        ("parameters", *(f"{p['num_parameters'] / 1e9:.1f} B" for p in (sparse, dense))),
        ("GFLOP a token", *(f"{p['flops_per_token'] / 1e9:.1f}" for p in (sparse, dense))),
        ("state of a rank, GiB", *(f"{_state(p['ranks'][0]) / GIB:.1f}" for p in (sparse, dense))),
        ("peak, GiB", *(f"{p['ranks'][0]['peak_bytes'] / GIB:.1f}" for p in (sparse, dense))),
        ("GB sent in a step, of it between experts", *(_sent_with_experts(p) for p in (sparse, dense))),
        ("step, s", *(f"{p['step_seconds']:.3f}" for p in (sparse, dense))),
        ("MFU", *(f"{p['mfu']:.1%}" for p in (sparse, dense))),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""
## 47B of 8 experts, two for each token, against 13B dense, on 8 GPUs

{_command(SPARSE)}
{_command(DENSE)}

| | 8 experts, ep=8 | dense |
|---|---|---|
{table}

The arithmetic of a token is that of a model of a quarter of the size, the state is that of the whole one, and a token's rows
travel to its experts and back. Room for rows (ep_buffer=1.5) counts as sent, full or not; experts are taken to get equal
shares. With ep=8 an expert lies whole on its rank, so that ZeRO-3 gathers all else and no experts, and the sparse model
sends less.
"""


def _cache() -> str:
    model: ModelConfig = resolve_model(compose_for(PLAN, ["model=llama3_70b"]).model)
    one, all_tokens = cache_bytes(model, tokens=1), cache_bytes(model, tokens=32768)
    layers, heads, width = model.num_layers, model.num_kv_heads, model.head_dim
    assert heads is not None
    return f"""
## Keys and values of a 70B model at 32k

A key and a value of {heads} heads of {width} in each of {layers} layers, 2 bytes each: 2 x {layers} x {heads} x {width} x 2 =
{one:,} bytes a token, {all_tokens / GIB:.1f} GiB for 32,768 tokens. With as many heads of keys as of queries
({model.num_heads}) it would be {all_tokens * model.num_heads / heads / GIB:.0f} GiB; over tp=8 a GPU has
{all_tokens / 8 / GIB:.2f} GiB of it.
"""


def _plan(arguments: list[str]) -> dict[str, Any]:
    return plan_of(compose_for(PLAN, arguments))


def _command(arguments: list[str]) -> str:
    return f"    python launch/plan.py {shlex.join(arguments)}"


def _state(rank: dict[str, Any]) -> int:
    return sum(rank[f"{kind}_bytes"] for kind in ("parameters", "gradients", "master", "optimizer"))


def _time(plan: dict[str, Any]) -> str:
    rate, terms = plan["tokens_per_second_per_gpu"], plan["step_terms"]
    waits = {name: seconds for name, seconds in terms.items() if name not in ("compute", "recompute") and seconds > 0}
    worst = max(waits, key=lambda name: waits[name])
    return (
        f"A step is predicted to take {plan['step_seconds']:.2f} s, {rate:,.0f} tokens/s/GPU, MFU {plan['mfu']:.1%}; beside\n"
        f"computation most of it is {worst}, {waits[worst]:.2f} s."
    )


def _split(layout: Layout) -> str:
    dims = layout.job.dims
    degrees = [f"{axis}={getattr(dims, axis)}" for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")]
    shown = [degree for degree in degrees if not degree.endswith("=1")]
    mode = layout.job.model.activation_checkpoint
    return f"{' '.join(shown)}, ZeRO-{layout.job.parallel.zero_stage}, activations {mode}"


def _sent_with_experts(plan: dict[str, Any]) -> str:
    axes = {axis: sum(collectives.values()) for axis, collectives in plan["traffic_bytes_per_step"].items()}
    return f"{sum(axes.values()) / 1e9:.1f}, {axes.get('ep', 0.0) / 1e9:.1f}"


if __name__ == "__main__":
    print(page(), end="")
