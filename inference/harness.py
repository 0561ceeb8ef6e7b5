"""EleutherAI's lm-evaluation-harness on the engine: `lm_eval.simple_evaluate(model=EngineLM(engine), tasks=[...])`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from lm_eval.api.model import LM

from data.chat import ChatTemplate
from inference.config import SamplingConfig
from inference.engine import Engine
from inference.scoring import score
from inference.text import Tokenizer

_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED_ON = {"top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float, "seed": int}
_WITHOUT_EFFECT = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}  # what they may be


class EngineLM(LM):
    """Whatever a task asks is given to the engine as a whole; its batches are the engine's own."""

    def __init__(
        self, engine: Engine, *, prefix_id: int, template: ChatTemplate | None = None, max_gen_toks: int = 256
    ) -> None:
        """prefix_id: the token before a text that has no context: what begins a document, or else ends one.

        max_gen_toks: of continuations whose task does not say. Raises ValueError for an engine without a tokenizer.
        """
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("the harness gives text, and the engine has no tokenizer")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._prefix_id, self._template, self._max_gen_toks = prefix_id, template, max_gen_toks

    @property
    def max_length(self) -> int:
        """Tokens that may be before the one that is scored: the engine keeps a place behind the prompt."""
        return self._engine.runner.max_seq_len - 2

    def loglikelihood(self, requests: Seq[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether it is what greedy decoding gives) of each (context, continuation).

        What is too long loses the beginning of its context. Raises ValueError for a continuation longer than that.
        """
        pairs = [self._pair(*request.args) for request in requests]
        rows = score(self._engine, [a + b for a, b in pairs], [len(b) for _, b in pairs])
        found = list(zip(map(math.fsum, rows), self._are_greedy(pairs), strict=True))
        self._remember("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(self, requests: Seq[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text behind `prefix_id`; each token is scored once, in rolling_windows."""
        cuts = [
            (number, inputs, count)
            for number, request in enumerate(requests)
            for inputs, count in rolling_windows(self._encode(request.args[0]), self._prefix_id, self.max_length)
        ]
        rows = score(self._engine, [inputs for _, inputs, _ in cuts], [count for *_, count in cuts])
        of_text: list[list[float]] = [[] for _ in requests]
        for (number, *_), row in zip(cuts, rows, strict=True):
            of_text[number] += row
        found = [math.fsum(logprobs) for logprobs in of_text]
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: Seq[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each (context, settings), without the string that ended it.

        What is too long loses the beginning of its context. Raises ValueError for a setting that is not known.
        """
        settings = [self._sampling(request.args[1]) for request in requests]
        prompts = []
        for request, sampling in zip(requests, settings, strict=True):
            assert sampling.max_tokens is not None
            room = self._engine.runner.max_seq_len - sampling.max_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={sampling.max_tokens} leaves no room for a prompt in engine.max_seq_len="
                    f"{self._engine.runner.max_seq_len}"
                )
            prompts.append((self._encode(request.args[0]) or [self._prefix_id])[-room:])
        found = [completion.text or "" for completion in self._engine.generate(prompts, settings)]
        self._remember("generate_until", requests, found)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation. Raises ValueError for a model without a chat template."""
        if self._template is None:
            raise ValueError("there is no chat template; set model.chat_template to a Jinja file")
        return self._template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For the harness's record of what was run."""
        return "" if self._template is None or not chat_template else self._template.source

    @property
    def tokenizer_name(self) -> str:
        """Keys the harness's caches."""
        return f"lattice-{hashlib.sha256(self._tokenizer.to_json().encode()).hexdigest()[:16]}"

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness's own backends divide a pair: blanks at the end of the context belong to the continuation,
        both are encoded as one, and what the context does not have when it is encoded alone is the continuation."""
        if context == "":
            before, after = [self._prefix_id], self._encode(continuation)
            if after[:1] == before and len(after) > 1:
                after = after[1:]
        else:
            blanks = context[len(context.rstrip()) :]
            context = context.rstrip()
            whole = self._encode(context + blanks + continuation)
            before = self._encode(context) or [self._prefix_id]
            after = whole[len(self._encode(context)) :]
        if len(after) > self.max_length:
            raise ValueError(
                f"a continuation has {len(after)} tokens; engine.max_seq_len={self._engine.runner.max_seq_len} allows "
                f"{self.max_length}"
            )
        return before[-(self.max_length + 1 - len(after)) :], after

    def _are_greedy(self, pairs: Seq[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether each continuation is the greedy one. Choices that have one context are decided by one decoding."""
        longest: dict[tuple[int, ...], int] = {}
        for before, after in pairs:
            longest[tuple(before)] = max(longest.get(tuple(before), 1), len(after))
        sampling = [SamplingConfig(temperature=0.0, max_tokens=count, ignore_eos=True) for count in longest.values()]
        completions = self._engine.generate([list(context) for context in longest], sampling)
        greedy = dict(zip(longest, (completion.token_ids for completion in completions), strict=True))
        return [greedy[tuple(before)][: len(after)] == after for before, after in pairs]

    def _sampling(self, asked: Mapping[str, Any]) -> SamplingConfig:
        """A task's generation_kwargs. Raises ValueError for one that is not known."""
        rest = dict(asked)
        until = rest.pop("until", None) or []
        count = next((rest[name] for name in _MAX_TOKENS if rest.get(name) is not None), self._max_gen_toks)
        temperature = float(rest.pop("temperature", None) or 0.0)
        drawn = rest.pop("do_sample", None)
        if drawn is False:
            temperature = 0.0
        settings = {name: kind(rest.pop(name)) for name, kind in _PASSED_ON.items() if rest.get(name) is not None}
        for name in (*_MAX_TOKENS, *_PASSED_ON):
            rest.pop(name, None)
        unknown = [f"{k}={v}" for k, v in rest.items() if k not in _WITHOUT_EFFECT or v != _WITHOUT_EFFECT[k]]
        if unknown:
            raise ValueError(f"the task's generation_kwargs have {', '.join(unknown)}, which the engine does not know")
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        return SamplingConfig(temperature=temperature, max_tokens=int(count), stop=stop, **settings)

    def _remember(self, kind: str, requests: Seq[Any], results: Seq[Any]) -> None:
        """For the harness's cache of answers, if it has one."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)


def rolling_windows(tokens: Seq[int], prefix_id: int, max_length: int) -> list[tuple[list[int], int]]:
    """(sequence, how many of its last tokens are scored) so that every token is scored once, as the harness cuts.

    Behind the prefix come at most max_length tokens; later sequences score as many new ones behind the token before
    them, and the last one, which has fewer, begins earlier: it has as much context as there is room for.
    """
    found = [([prefix_id, *tokens[:max_length]], min(len(tokens), max_length))] if tokens else []
    for begin in range(max_length, len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        found.append((list(tokens[end - max_length - 1 : end]), end - begin))
    return found


def prefix_of(tokenizer: Tokenizer) -> int:
    """What a text without a context is behind: the token that begins a document, or else the one that ends it."""
    bos = getattr(tokenizer, "bos_id", None)
    return tokenizer.eos_id if bos is None else bos
