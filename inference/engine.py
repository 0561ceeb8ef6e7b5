"""Engine: prompts in, continuations out, all of them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch.distributed.tensor import DTensor

from inference.blocks import BlockManager
from inference.config import EngineConfig, SamplingConfig, engine_problems, sampling_problems
from inference.runner import ModelRunner, Result
from inference.scheduler import Chunk, Counts, Scheduler
from inference.sequence import Completion, Sequence
from inference.text import TextStream, Tokenizer
from models.decoder import Decoder

Prompt = str | Seq[int]


class RequestError(ValueError):
    """A request that cannot be served; the message says which, why, and what can."""


@dataclass
class Delta:
    """What a step added to a request. Filled by `Engine.step`."""

    request: int
    token_ids: list[int]
    logprobs: list[float]
    text: str  # that will not change any more; it may lag behind the tokens
    completion: Completion | None = None  # all of it, when it has ended


class Engine:
    """Serves a Decoder as it is: the same module that was trained, its weights where they are.

    `generate` for a list of prompts; `add`, `step` and `abort` for requests that come and go.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Collection[int] = (),
    ) -> None:
        """eos_ids: tokens that end a document. Raises ValueError for a model or settings that cannot be served."""
        self.config = EngineConfig() if config is None else config
        problems = _model_problems(model) + engine_problems(self.config, model.config)
        if problems:
            raise ValueError("; ".join(problems))
        self.tokenizer, self.eos_ids = tokenizer, frozenset(eos_ids)
        self.vocab_size = model.config.vocab_size
        self.runner = ModelRunner(model, self.config)
        self.blocks = BlockManager(
            self.runner.num_blocks,
            self.config.block_size,
            host_blocks=self.config.host_blocks,
            prefix_cache=self.config.prefix_cache,
        )
        self.scheduler = Scheduler(self.config, self.blocks)
        self._sequences: dict[int, Sequence] = {}
        self._num_requests = 0

    @property
    def counts(self) -> Counts:
        """Preemptions and hits of the prefix cache so far."""
        return self.scheduler.counts

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    def generate(
        self, prompts: Seq[Prompt], sampling: SamplingConfig | Seq[SamplingConfig] | None = None
    ) -> list[Completion]:
        """Continue prompts (text or token ids), each by `sampling` or by its own; in their order.

        Raises RequestError, before anything is computed, for the first prompt that cannot be continued, naming it, and
        ValueError while requests that were added are unfinished: their deltas would be lost.
        """
        if self._sequences:
            raise ValueError(f"{len(self._sequences)} requests are unfinished; step until they end, or abort them")
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, SamplingConfig) else sampling
        completions: dict[int, Completion] = {}
        try:
            requests = []
            for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
                try:
                    requests.append(self.add(prompt, one))
                except RequestError as error:
                    raise RequestError(f"prompts[{number}]: {error}") from None
            while self._sequences:
                completions |= {d.request: d.completion for d in self.step() if d.completion is not None}
        finally:
            for request in list(self._sequences):
                self.abort(request)
        return [completions[request] for request in requests]

    def add(self, prompt: Prompt, sampling: SamplingConfig | None = None) -> int:
        """Queue a request; its number. Raises RequestError for a prompt or settings that cannot be served."""
        sampling = SamplingConfig() if sampling is None else sampling
        if problems := sampling_problems(sampling):
            raise RequestError("; ".join(problems))
        tokens = self._tokens(prompt)
        room = self.runner.max_seq_len - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; engine.max_seq_len={self.runner.max_seq_len} leaves room for "
                f"at most {self.runner.max_seq_len - 1} before the first new one"
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise RequestError(
                f"sampling.max_tokens={sampling.max_tokens} behind a prompt of {len(tokens)} tokens is more than "
                f"engine.max_seq_len={self.runner.max_seq_len} holds; use at most {room}, or null"
            )
        if sampling.stop and self.tokenizer is None:
            raise RequestError(f"sampling.stop={sampling.stop} needs a tokenizer, and there is none")
        number, self._num_requests = self._num_requests, self._num_requests + 1
        sequence = Sequence(
            number=number,
            tokens=tokens,
            num_prompt=len(tokens),
            sampling=sampling,
            seed=_seed(self.config.seed, number) if sampling.seed is None else sampling.seed,
            max_tokens=sampling.max_tokens or room,
            text=None if self.tokenizer is None else TextStream(self.tokenizer, stop=sampling.stop),
        )
        if sampling.prompt_logprobs:
            sequence.completion.prompt_logprobs = [None] * len(tokens)
        self._sequences[number] = sequence
        self.scheduler.add(sequence)
        return number

    def step(self) -> list[Delta]:
        """Compute one batch: what it added to requests. Empty when it only brought prompts further, or none is left."""
        step = self.scheduler.schedule()
        results = self.runner.run(step)
        advanced = [self._advance(chunk, result) for chunk, result in zip(step.chunks, results, strict=True)]
        return [delta for delta in advanced if delta is not None]

    def abort(self, request: int) -> Completion:
        """Drop a request; what there is of it. Raises KeyError for one that is not there (any more)."""
        sequence = self._sequences[request]
        self._finish(sequence, "abort")
        return sequence.completion

    def weights_changed(self) -> None:
        """To be called after the model's weights were changed in place: the cache was made by others.

        Prompts and continuations so far are computed anew when their requests go on.
        """
        self.scheduler.restart()
        self.blocks.forget()

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("the prompt is text, and there is no tokenizer; give token ids")
            tokens = self.tokenizer.encode(prompt)
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

    def _advance(self, chunk: Chunk, result: Result) -> Delta | None:
        """Write down what a step found out about a sequence."""
        sequence, completion = chunk.sequence, chunk.sequence.completion
        if result.prompt_logprobs is not None and completion.prompt_logprobs is not None:
            first = sequence.num_computed + 1
            completion.prompt_logprobs[first : first + len(result.prompt_logprobs)] = result.prompt_logprobs
        sequence.num_computed += chunk.num_tokens
        self.blocks.keep(sequence)
        if result.token is None:
            return None
        sequence.tokens.append(result.token)
        completion.token_ids.append(result.token)
        completion.logprobs.append(result.logprob)
        if result.top_logprobs is not None:
            completion.top_logprobs.append(result.top_logprobs)
        reason = self._reason_to_end(sequence, result.token)
        if reason is not None:
            text = self._finish(sequence, reason)
        else:
            text = "" if sequence.text is None else sequence.text.take()
        return Delta(
            sequence.number, [result.token], [result.logprob], text, completion if reason is not None else None
        )

    def _reason_to_end(self, sequence: Sequence, token: int) -> str | None:
        sampling = sequence.sampling
        if token in sampling.stop_token_ids or (token in self.eos_ids and not sampling.ignore_eos):
            return "stop"
        if sequence.text is not None:
            sequence.text.push(token)
            if sequence.text.stopped:
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


def _seed(seed: int, request: int) -> int:
    """32 bits of the engine's seed and a request's number."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request}".encode()).digest()[:4], "little")


def _model_problems(model: Decoder) -> list[str]:
    """Why a model as it was built cannot be served."""
    found = []
    if model.embedding is None or model.head is None or len(model.blocks) < model.config.num_layers:
        found.append("the model is a stage of a pipeline; serve a whole one")
    groups = model.groups
    cut = {"tp": groups.tp, "experts": groups.experts, "cp": groups.cp}
    found += [f"the model's layers are cut over {axis}; serve a whole one" for axis, mesh in cut.items() if mesh]
    if not found and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        found.append("the model's parameters are shards (DTensor); serve a whole one")
    return found
