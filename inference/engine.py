"""Engine: prompts in, continuations out, all of them at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from inference.blocks import BlockManager
from inference.config import EngineConfig, SamplingConfig, constraint_of, engine_problems, sampling_problems
from inference.constraints import Constraint, ConstraintError, Grammars
from inference.device import on_device
from inference.ranks import Channel, Orders, RankError, checksum, lost_ranks_named
from inference.runner import Launched, ModelRunner, Result
from inference.scheduler import Chunk, Counts, Scheduler, Step
from inference.sequence import PENDING, Completion, Sequence, Status
from inference.speculation.config import problems_over_ranks
from inference.speculation.runner import Speculation, SpeculativeRunner
from inference.text import TextStream, Tokenizer
from inference.weights import load_in_place
from models.decoder import Decoder
from models.lora import reads_weights
from models.peft import LowRank
from models.served_adapters import ServedAdapters
from parallel.regions import local_tensor

Prompt = str | Seq[int]


class RequestError(ValueError):
    """A request that cannot be served; the message says which, why, and what can."""


class TooLongError(RequestError):
    """A prompt, or what is to follow it, is longer than what is served."""


@dataclass
class Delta:
    """What a step added to a request. Filled by `Engine.step`."""

    request: int
    token_ids: list[int]
    logprobs: list[float]
    text: str  # that will not change any more; it may lag behind the tokens
    completion: Completion | None = None  # all of it, when it has ended


class WarmUp(NamedTuple):
    """What `engine.warmup` has done. Filled by Engine."""

    graphs: int  # captured
    seconds: float


class Engine:
    """Serves a Decoder as it is: the same module that was trained, its weights where they are.

    `generate` for a list of prompts; `add`, `step` and `abort` for requests that come and go. A model that is cut over
    ranks of tp has an engine on each: rank 0's tells the others what it is asked, and these `follow`
    (inference/ranks.py).
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Collection[int] = (),
        speculation: Speculation | None = None,
        adapters: Mapping[str, Mapping[str, LowRank]] | None = None,
        channel: Channel | None = None,
        number: int = 0,
    ) -> None:
        """eos_ids: tokens that end a document. Raises ValueError for a model or settings that cannot be served.

        speculation: who drafts tokens (None: nobody); over ranks of tp the same on all of them.
        adapters: that requests may name, by name; each by the layers that it is for (models.peft.load_peft).
        channel: over which rank 0 leads the others, all of which make this engine with the same arguments; number: the
        engine's, where the channel leads several. None: nobody is led; ranks of tp are all asked the same.
        """
        self.config = EngineConfig() if config is None else config
        problems = _model_problems(model) + engine_problems(self.config, model.config)
        if self.config.deterministic and not model.batch_invariant:
            problems.append(
                "engine.deterministic=true needs a batch-invariant model: train with train.batch_invariant=true, or "
                "call models.invariant.make_batch_invariant on the model before it is used"
            )
        if speculation is not None and model.groups.tp is not None:
            problems += problems_over_ranks(speculation.config)
        if problems:
            raise ValueError("; ".join(problems))
        self.adapters = [] if adapters is None else list(adapters)
        if adapters:
            ServedAdapters(model, adapters)
        self.tokenizer, self.eos_ids = tokenizer, frozenset(eos_ids)
        self.vocab_size = model.config.vocab_size
        self.device = local_tensor(next(model.parameters())).device
        with on_device(self.device):
            if speculation is None:
                self.runner = ModelRunner(model, self.config)
            else:
                self.runner = SpeculativeRunner(model, self.config, speculation)
            self.warmed_up = _warm_up(self.runner) if self.config.warmup else None
        self.blocks = BlockManager(
            self.runner.num_blocks,
            self.config.block_size,
            host_blocks=self.config.host_blocks,
            prefix_cache=self.config.prefix_cache,
        )
        self.scheduler = Scheduler(self.config, self.blocks)
        if isinstance(self.runner, SpeculativeRunner):
            self.scheduler.plan_drafts = self.runner.plan_drafts
            self.scheduler.counts.speculation = self.runner.policy.counts
        self.overlap = self.runner.device.type == "cuda" if self.config.overlap is None else self.config.overlap
        self.last_step = Step()  # the one that was launched last, for whoever measures
        self._launched: Launched | None = None  # the step whose results are not known yet
        self._settled: list[Delta] = []  # what is known and was not returned yet
        self._sequences: dict[int, Sequence] = {}
        self._num_requests = 0
        self._grammars: Grammars | None = None  # made for the first request that is constrained
        self.channel, self.number = channel, number
        self._asked: list[tuple[str, tuple[Any, ...]]] = []  # of rank 0 since its last step
        self._checksum = 0  # of all steps

    @property
    def counts(self) -> Counts:
        """Preemptions, hits of the prefix cache and what became of drafts, so far."""
        return self.scheduler.counts

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    def generate(
        self,
        prompts: Seq[Prompt],
        sampling: SamplingConfig | Seq[SamplingConfig] | None = None,
        adapters: Seq[str | None] | None = None,
    ) -> list[Completion]:
        """Continue prompts (text or token ids), each by `sampling` or by its own, and by its adapter; in their order.

        Raises RequestError, before anything is computed, for the first prompt that cannot be continued, naming it, and
        ValueError while requests that were added are unfinished: their deltas would be lost. Raises FloatingPointError
        where the model gives no probabilities (NaN).
        """
        if self._sequences:
            raise ValueError(f"{len(self._sequences)} requests are unfinished; step until they end, or abort them")
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, SamplingConfig) else sampling
        by = [None] * len(prompts) if adapters is None else adapters
        completions: dict[int, Completion] = {}
        try:
            requests = []
            for number, (prompt, one, adapter) in enumerate(zip(prompts, each, by, strict=True)):
                try:
                    requests.append(self.add(prompt, one, adapter))
                except RequestError as error:
                    raise RequestError(f"prompts[{number}]: {error}") from None
            while self._sequences:
                ended = {d.request: d.completion for d in self.step() if d.completion is not None}
                if failed := [completion for completion in ended.values() if completion.finish_reason == "nan"]:
                    raise FloatingPointError(failed[0].error)
                completions |= ended
        finally:
            for request in list(self._sequences):
                self.abort(request)
        return [completions[request] for request in requests]

    def add(self, prompt: Prompt, sampling: SamplingConfig | None = None, adapter: str | None = None) -> int:
        """Queue a request; its number. Raises RequestError for a prompt or settings that cannot be served."""
        return self.enqueue(self.prepare(prompt, sampling, adapter))

    def prepare(self, prompt: Prompt, sampling: SamplingConfig | None = None, adapter: str | None = None) -> Sequence:
        """A request, checked and tokenized, for `enqueue`. Any thread may call it while others step.

        adapter: one of `adapters`; None: the model alone. Raises RequestError for a prompt or settings that cannot be
        served.
        """
        if adapter is not None and adapter not in self.adapters:
            there = f"there are {', '.join(self.adapters)}" if self.adapters else "there are none"
            raise RequestError(f"the adapter {adapter!r} is not served: {there}")
        sampling = SamplingConfig() if sampling is None else sampling
        if problems := sampling_problems(sampling):
            raise RequestError("; ".join(problems))
        tokens = self._tokens(prompt, add_special_tokens=sampling.add_special_tokens)
        room = self.runner.max_seq_len - len(tokens)
        if room < 1:
            raise TooLongError(
                f"the prompt has {len(tokens)} tokens; engine.max_seq_len={self.runner.max_seq_len} leaves room for "
                f"at most {self.runner.max_seq_len - 1} before the first new one"
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise TooLongError(
                f"sampling.max_tokens={sampling.max_tokens} behind a prompt of {len(tokens)} tokens is more than "
                f"engine.max_seq_len={self.runner.max_seq_len} holds; use at most {room}, or null"
            )
        if sampling.stop and self.tokenizer is None:
            raise RequestError(f"sampling.stop={sampling.stop} needs a tokenizer, and there is none")
        sampling = self._with_special_stops(sampling)
        sequence = Sequence(
            number=-1,
            tokens=tokens,
            num_prompt=len(tokens),
            sampling=sampling,
            seed=sampling.seed or 0,
            max_tokens=sampling.max_tokens or room,
            text=None if self.tokenizer is None else TextStream(self.tokenizer, stop=sampling.stop),
            constraint=self._constraint(sampling),
            adapter=0 if adapter is None else 1 + self.adapters.index(adapter),
        )
        if sampling.prompt_logprobs:
            sequence.completion.prompt_logprobs = [None] * len(tokens)
        return sequence

    def enqueue(self, sequence: Sequence) -> int:
        """Queue what `prepare` made, once; its number. One without a seed gets one of the engine's here."""
        number, self._num_requests = self._num_requests, self._num_requests + 1
        sequence.number = number
        if sequence.sampling.seed is None:
            sequence.seed = _seed(self.config.seed, number)
        self._sequences[number] = sequence
        self.scheduler.add(sequence)
        adapter = self.adapters[sequence.adapter - 1] if sequence.adapter else None
        self._note("add", list(sequence.tokens), sequence.sampling, adapter)
        return number

    def step(self) -> list[Delta]:
        """Compute one batch: what it added to requests. Empty when it only brought prompts further, or none is left.

        With engine.overlap a batch is given to the device before the results of the one before are looked at, and
        these are what is returned: the device does not wait for the host. A sequence that turns out to have ended is
        then computed by one token too many, which nobody sees. Raises RankError where another rank is gone.
        """
        if self.channel is not None and self.channel.leads:
            self.channel.tell(Orders(self.number, self._asked, self._state()))
            self._asked = []
        with lost_ranks_named("another rank has ended, or has not come to this step in time"), on_device(self.device):
            return self._step()

    def _step(self) -> list[Delta]:
        if self._launched is not None and (self._has_drafts() or self.scheduler.must_know_tokens()):
            self._settle()
        step = self.scheduler.schedule()
        launched = self.runner.launch(step)
        for chunk in step.chunks:
            chunk.sequence.num_computed = chunk.end
            if chunk.samples:
                chunk.sequence.tokens.append(PENDING)
        if self._launched is not None:
            self._settle()
        self._launched, self.last_step = launched if step.chunks else None, step
        if not self.overlap and self._launched is not None:
            self._settle()
        deltas, self._settled = self._settled, []
        return deltas

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks away; it goes on later, to the same end. For tests, and for policies."""
        self._preempt(sequence.number)
        self._note("_preempt", sequence.number)

    def _preempt(self, request: int) -> None:
        with on_device(self.device):
            if self._launched is not None:
                self._settle()
        sequence = self._sequences.get(request)
        if sequence in self.scheduler.running:  # it may have ended
            self.scheduler.preempt(sequence)

    def follow(self, orders: Orders) -> None:
        """Do what rank 0 was asked since its last step, and the step. Raises RankError where it went another way."""
        for name, arguments in orders.calls:
            getattr(self, name)(*arguments)
        if orders.checksum != self._state():
            raise RankError(
                "this rank has not computed what rank 0 has; were they started with the same files, settings and "
                "versions?"
            )
        self.step()

    def abort(self, request: int) -> Completion:
        """Drop a request; what there is of it. Raises KeyError for one that is not there (any more)."""
        sequence = self._sequences[request]
        self._finish(sequence, "abort")
        self._settled = [delta for delta in self._settled if delta.request != request]
        self._note("abort", request)
        return sequence.completion

    def weights_changed(self) -> None:
        """To be called after the model's weights were changed in place: the cache was made by others.

        Prompts and continuations so far are computed anew when their requests go on.
        """
        with on_device(self.device):
            if self._launched is not None:
                self._settle()
            self.runner.receive_weights()
        self.scheduler.restart()
        self.blocks.forget()
        self._note("weights_changed")

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights, such as a checkpoint's, into the storage of those that are served, and serve these.

        state: whole tensors by the names of `model.state_dict()`, anywhere; a rank of tp takes its part of each.
        Nothing that a captured CUDA graph points to moves. Where rank 0 leads others, on these before its next step.
        Raises ValueError, before anything is written, unless names, shapes and dtypes are exactly the model's.
        """
        with on_device(self.device):
            load_in_place(self.runner.model, state)
        self.weights_changed()

    def _note(self, name: str, *arguments: Any) -> None:
        """Remember what the ranks that follow will have to do as well."""
        if self.channel is not None and self.channel.leads:
            self._asked.append((name, arguments))

    def _state(self) -> int:
        """Of all ranks the same number, between steps."""
        return checksum((self.scheduler.num_unfinished, self.blocks.num_free), before=self._checksum)

    def _with_special_stops(self, sampling: SamplingConfig) -> SamplingConfig:
        """With the special tokens among its stop strings, which are no part of the text, as stop tokens."""
        if self.tokenizer is None or not sampling.stop:
            return sampling
        spelled = (self.tokenizer.special_id(text) for text in sampling.stop)
        found = [token for token in spelled if token is not None and token not in sampling.stop_token_ids]
        return replace(sampling, stop_token_ids=[*sampling.stop_token_ids, *found]) if found else sampling

    def _tokens(self, prompt: Prompt, *, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("the prompt is text, and there is no tokenizer; give token ids")
            beginning = self.tokenizer.beginning if add_special_tokens else ()
            tokens = [*beginning, *self.tokenizer.encode(prompt)]
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise RequestError("the prompt has no tokens; begin with the token that begins a document")
        outside = [token for token in tokens if not 0 <= token < self.vocab_size]
        if outside:
            raise RequestError(
                f"the prompt has the token id {outside[0]}, outside of the model's vocabulary of {self.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        return tokens

    def _constraint(self, sampling: SamplingConfig) -> Constraint | None:
        found = constraint_of(sampling)
        if found is None:
            return None
        if self.tokenizer is None:
            raise RequestError(f"sampling.{found.kind} needs a tokenizer, and there is none")
        try:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, vocab_size=self.vocab_size, eos_ids=self.eos_ids)
            return self._grammars.start(sampling)
        except ConstraintError as error:
            raise RequestError(str(error)) from None

    def _settle(self) -> None:
        """Wait for the step that was launched last, and write down what it found out."""
        assert self._launched is not None
        launched, self._launched = self._launched, None
        results = self.runner.results(launched)
        if self.channel is not None:
            found = zip(launched.chunks, results, strict=True)
            told = ((c.sequence.number, c.end, -1 if r.token is None else r.token) for c, r in found)
            self._checksum = checksum(chain.from_iterable(told), before=self._checksum)
        for chunk, result in zip(launched.chunks, results, strict=True):
            if chunk.sequence.status is not Status.FINISHED:
                self._settled += self._advance(chunk, result)

    def _has_drafts(self) -> bool:
        """Whether the step that was launched has drafts, or the next one may have."""
        assert self._launched is not None
        return self._launched.drafts is not None or (
            isinstance(self.runner, SpeculativeRunner) and self.runner.must_know_tokens()
        )

    def _advance(self, chunk: Chunk, result: Result) -> list[Delta]:
        """Write down what a step found out about a sequence."""
        sequence, completion = chunk.sequence, chunk.sequence.completion
        if not all(one.finite for one in (result, *result.then)):
            completion.error = (
                f"request {sequence.number}: the model gives NaN for its next token; its weights, or what they make in "
                "this dtype, are not finite"
            )
            return [Delta(sequence.number, [], [], self._finish(sequence, "nan"), completion)]
        if result.prompt_logprobs is not None and completion.prompt_logprobs is not None:
            first = chunk.first + 1
            completion.prompt_logprobs[first : first + len(result.prompt_logprobs)] = result.prompt_logprobs
        new = [] if result.token is None else [result, *result.then]
        tokens: list[int] = []
        reason = None
        for one in new:
            assert one.token is not None
            if tokens:  # the one before it was a draft that stood: its keys and values are there
                sequence.tokens.append(one.token)
                sequence.num_computed += 1
            else:
                sequence.tokens[chunk.end] = one.token
            tokens.append(one.token)
            completion.token_ids.append(one.token)
            completion.logprobs.append(one.logprob)
            if one.top_logprobs is not None:
                completion.top_logprobs.append(one.top_logprobs)
            reason = self._reason_to_end(sequence, one.token)
            if reason is not None:
                break
        self.blocks.keep(sequence)
        if not tokens:
            return []
        if reason is not None:
            text = self._finish(sequence, reason)
        else:
            text = "" if sequence.text is None else sequence.text.take()
        ended = completion if reason is not None else None
        return [Delta(sequence.number, tokens, completion.logprobs[-len(tokens) :], text, ended)]

    def _reason_to_end(self, sequence: Sequence, token: int) -> str | None:
        sampling, constraint = sequence.sampling, sequence.constraint
        if constraint is not None:
            constraint.push(token)
            sequence.completion.error = constraint.error
            if constraint.error is not None:
                return "constraint"
            if constraint.ended_by_token:
                return "stop"
        if token in sampling.stop_token_ids or (token in self.eos_ids and not sampling.ignore_eos):
            return "stop"
        if sequence.text is not None:
            sequence.text.push(token)
            if sequence.text.stopped:
                return "stop"
        if constraint is not None and constraint.ended:
            return "stop"
        return "length" if len(sequence.completion.token_ids) == sequence.max_tokens else None

    def _finish(self, sequence: Sequence, reason: str) -> str:
        """Take a sequence out. Returns what was held back of its text."""
        self.scheduler.finish(sequence)
        del self._sequences[sequence.number]
        text = ""
        if sequence.text is not None:
            text = sequence.text.finish()
            sequence.completion.text = sequence.text.text
            if reason == "length" and sequence.text.stopped:
                reason = "stop"  # a stop string ended in what was held back
        sequence.completion.finish_reason = reason
        return text


def _warm_up(runner: ModelRunner) -> WarmUp:
    start = time.perf_counter()
    return WarmUp(runner.warm_up(), time.perf_counter() - start)


def _seed(seed: int, request: int) -> int:
    """32 bits of the engine's seed and a request's number."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request}".encode()).digest()[:4], "little")


def _model_problems(model: Decoder) -> list[str]:
    """Why a model as it was built cannot be served."""
    found = []
    if model.embedding is None or model.head is None or len(model.blocks) < model.config.num_layers:
        found.append("the model is a stage of a pipeline; serve a whole one")
    groups = model.groups
    if problem := reads_weights(model):
        found.append(problem)
    if groups.sequence_parallel:
        found.append("the model's layers split tokens over tp (sequence_parallel), and a step has any number of them")
    if groups.experts is not None and not groups.tokens_alike:
        found.append("the model's experts are shared out over ranks with other tokens (ep); serve a model without")
    axes = (groups.tp, groups.experts)
    if not found and any(isinstance(p, DTensor) and p.device_mesh not in axes for p in model.parameters()):
        found.append("the model's parameters are shards over data-parallel ranks (zero_stage=3); serve a whole one")
    return found
