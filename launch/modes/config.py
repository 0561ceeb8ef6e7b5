"""Settings of the modes of launch/lab.py, each beside the file that reads them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ParityConfig:
    """`parity`: launch/modes/parity.py. Prompts are those of `prompts` or `prompt`, or else random."""

    num_prompts: int = 8  # random ones
    prompt_tokens: list[int] = field(default_factory=lambda: [1, 48])  # of a random prompt: least and most
    max_tokens: int = 16  # of each continuation
    page_sizes: list[int] = field(default_factory=lambda: [1, 16, 64])  # engine.block_size of the paged paths
    chunk_tokens: int = 7  # of a step of the chunked path
    bound: float | None = None  # on |delta log p|; None: that of the dtype (parity.BOUNDS), 0 with engine.deterministic
    seed: int = 0  # of prompts, and of who is preempted when


@dataclass
class BenchConfig:
    """`bench`: launch/modes/bench.py. Prompts are those of `prompts` or `prompt`, or else random."""

    random_weights: str | None = None  # in place of model.path: a name in configs/model, a config.json, or its folder
    num_requests: int = 64  # with random prompts
    prompt_tokens: list[int] = field(default_factory=lambda: [512])  # of all random ones; [least, most]: uniform
    output_tokens: list[int] = field(default_factory=lambda: [128])  # the same, of continuations
    lengths: str | None = None  # or a file of JSON lines {"prompt_tokens": N, "output_tokens": N, "arrival": SECONDS}
    arrivals: str = "at_once"  # one of bench.ARRIVALS; file: those of `lengths`
    rate: float | None = None  # requests a second of fixed and poisson arrivals
    slo_ttft_ms: float | None = None  # what a good request meets: milliseconds to its first token
    slo_tpot_ms: float | None = None  # and of each later one on average; None: any
    bandwidth: float | None = None  # bytes a second that the share of the roofline is of; None: those of a copy
    # numbers of requests at once, of each of which the load's first are run with drafts in every step and in none
    drafting_batches: list[int] = field(default_factory=list)
    warmup: bool = True  # the load once before with short continuations: compiles, captures graphs
    seed: int = 0  # of lengths, tokens and arrivals


@dataclass
class EvalConfig:
    """`eval`: launch/modes/eval.py. Either `text` or `tasks`."""

    text: str | None = None  # a file, of which the perplexity is measured: UTF-8, or tokens as .npy
    window: int | None = None  # tokens that the model sees at a time; None: what it was made for
    stride: int | None = None  # from window to window: 1 gives most context, window none; None: half of window
    bos: bool = True  # the text begins with the tokenizer's token for that, if it has one
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, by name
    tasks_path: str | None = None  # a folder with more tasks, in YAML
    num_fewshot: int | None = None  # examples before each question; None: the task's own number
    limit: int | None = None  # questions of each task, to try it out; None: all
    apply_chat_template: bool = False  # questions are what a user says
    max_gen_toks: int = 256  # tokens of an answer whose task does not say
    bootstrap_iters: int = 100000  # for standard errors; 0: none


@dataclass
class CompareConfig:
    """`compare`: launch/modes/compare.py. Prompts are those of `prompts` or `prompt`, or else random."""

    a: list[str] = field(
        default_factory=list
    )  # what side a has of its own: KEY=VALUE of model, engine, sampling, speculation
    b: list[str] = field(default_factory=list)  # the same, of side b
    num_prompts: int = 8  # random ones
    prompt_tokens: list[int] = field(default_factory=lambda: [64])  # of all random prompts; [least, most]: uniform
    max_tokens: int = 64  # of each continuation; nothing ends it earlier but stop strings and tokens
    top_logprobs: int = 20  # tokens of each place whose probabilities are compared
    repeats: int = 3  # timed runs, of which the median counts
    seed: int = 0  # of random prompts
