"""What is sent to a client: completions and chat completions, whole or as a stream of chunks."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from inference.engine import Delta
from inference.sequence import Completion
from inference.server.calls import Call
from inference.text import Tokenizer


class TokenText(NamedTuple):
    """One token as log-probabilities show it."""

    text: str
    bytes: bytes
    hidden: bool  # a special token, which is not in the text of a continuation


class Vocabulary:
    """Texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.beginning = () if tokenizer is None else tuple(tokenizer.beginning)
        self.text_of = lru_cache(maxsize=2**16)(self._text_of)

    def _text_of(self, token: int) -> TokenText:
        if self._tokenizer is None:
            return TokenText(f"token_id:{token}", b"", False)
        spelled = self._tokenizer.token_bytes(token)
        try:
            text = spelled.decode()
        except UnicodeDecodeError:  # a part of a character, as OpenAI writes it
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
        return TokenText(text, spelled, not self._tokenizer.decode([token], skip_special_tokens=True))

    def decode(self, tokens: list[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(tokens)


class Reply:
    """Puts one call's answer together as deltas arrive."""

    def __init__(self, call: Call, *, model: str, vocabulary: Vocabulary) -> None:
        self.call = call
        self._vocabulary = vocabulary
        kind = "chat.completion" if call.chat else "text_completion"
        self._base = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if call.chat and call.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._head = json.dumps(self._base, ensure_ascii=False)[:-1] + ', "choices": ['
        self._tail = ', "usage": null}' if call.include_usage else "}"
        self._places = [_Place(call, index, vocabulary) for index in range(len(call.sequences))]

    def opening(self) -> bytes:
        """The first chunks of a stream: roles, or prompts that are echoed."""
        if self.call.chat:
            first = {"role": "assistant", "content": ""}
            return self._events({"index": p.index, "delta": first, "finish_reason": None} for p in self._places)
        return b""

    def chunks(self, deltas: list[tuple[int, Delta]]) -> bytes:
        """The chunks of a stream for what deltas add; those of one choice are one chunk."""
        by_place: dict[int, list[Delta]] = {}
        for index, delta in deltas:
            by_place.setdefault(index, []).append(delta)
        made = (self._places[index].chunk(each) for index, each in by_place.items())
        return self._events(choice for choice in made if choice is not None)

    def closing(self) -> bytes:
        """The end of a stream."""
        usage = b""
        if self.call.include_usage:
            usage = _event(json.dumps(self._base | {"choices": [], "usage": self.usage()}, ensure_ascii=False))
        return usage + b"data: [DONE]\n\n"

    def add(self, deltas: list[tuple[int, Delta]]) -> None:
        """Remember what ended, for `whole`."""
        for index, delta in deltas:
            if delta.completion is not None:
                self._places[index].completion = delta.completion

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = [place.whole() for place in self._places]
        return self._base | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts, each counted once, and of all continuations."""
        call = self.call
        prompts = sum(sequence.num_prompt for sequence in call.sequences[:: call.n])
        new = 0 if call.score_only else sum(len(sequence.completion.token_ids) for sequence in call.sequences)
        cached = sum(sequence.completion.cached_tokens or 0 for sequence in call.sequences[:: call.n])
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _events(self, choices: Iterable[dict[str, Any]]) -> bytes:
        return b"".join(
            _event(f"{self._head}{json.dumps(choice, ensure_ascii=False)}]{self._tail}") for choice in choices
        )


class _Place:
    """One choice of an answer."""

    def __init__(self, call: Call, index: int, vocabulary: Vocabulary) -> None:
        self.call, self.index, self.vocabulary = call, index, vocabulary
        self.completion: Completion | None = None  # when it has ended
        self._sequence = call.sequences[index]
        self._begun = False
        self._given = 0  # tokens in chunks so far
        self._offsets = _Offsets()

    def chunk(self, deltas: list[Delta]) -> dict[str, Any] | None:
        """What a stream sends for deltas; None: nothing that can be shown yet."""
        end = deltas[-1].completion
        tokens = [token for delta in deltas for token in delta.token_ids]
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
        tops = self._sequence.completion.top_logprobs[self._given : self._given + len(tokens)]
        self._given += len(tokens)
        text = "".join(delta.text for delta in deltas)
        if self.call.score_only:
            tokens, logprobs, tops, text = [], [], [], ""
        first, self._begun = not self._begun, True
        prompt = self._prompt() if first and self.call.echo else ""
        shown = self.call.logprobs or self.call.return_token_ids
        if not (text or prompt or end is not None or (shown and tokens)):
            return None
        found: dict[str, Any] = {"index": self.index}
        if self.call.chat:
            found["delta"] = {"content": text} if text else {}
        else:
            found["text"] = prompt + text
        found["logprobs"] = self._logprobs(tokens, logprobs, tops, with_prompt=first) if self.call.logprobs else None
        found["finish_reason"] = None if end is None else self._reason(end)
        if self.call.return_token_ids:
            found["token_ids"] = tokens
        return found

    def whole(self) -> dict[str, Any]:
        end = self.completion
        assert end is not None
        found: dict[str, Any] = {"index": self.index}
        tokens, logprobs, tops, text = end.token_ids, end.logprobs, end.top_logprobs, end.text or ""
        if self.call.score_only:
            tokens, logprobs, tops, text = [], [], [], ""
        if self.call.chat:
            found["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            found["text"] = (self._prompt() if self.call.echo else "") + text
        found["logprobs"] = self._logprobs(tokens, logprobs, tops, with_prompt=True) if self.call.logprobs else None
        found["finish_reason"] = self._reason(end)
        if self.call.return_token_ids:
            found["token_ids"] = tokens
        return found

    def _reason(self, end: Completion) -> str | None:
        return "length" if self.call.score_only else end.finish_reason

    def _prompt(self) -> str:
        prompt = self.call.prompts[self.index // self.call.n]
        return prompt if isinstance(prompt, str) else self.vocabulary.decode(prompt)

    def _num_added(self) -> int:
        """Tokens of a prompt that was text which the tokenizer put before it, and which an echo does not show."""
        is_text = isinstance(self.call.prompts[self.index // self.call.n], str)
        return len(self.vocabulary.beginning) if is_text and self._sequence.sampling.add_special_tokens else 0

    def _logprobs(
        self, tokens: list[int], logprobs: list[float], tops: list[dict[int, float]], *, with_prompt: bool
    ) -> dict[str, Any]:
        if self.call.chat:
            return _of_chat(self.vocabulary, tokens, logprobs, tops)
        of_prompt: list[float | None] = []
        texts = [self.vocabulary.text_of(token) for token in tokens]
        in_text = [not text.hidden for text in texts]
        if with_prompt and self.call.echo:
            prompt = [self.vocabulary.text_of(token) for token in self._sequence.tokens[: self._sequence.num_prompt]]
            added = self._num_added()
            texts, in_text = prompt + texts, [place >= added for place in range(len(prompt))] + in_text
            of_prompt = self._sequence.completion.prompt_logprobs or []
        return {
            "tokens": [text.text for text in texts],
            "token_logprobs": [*of_prompt, *map(_finite, logprobs)],
            "top_logprobs": [
                {self.vocabulary.text_of(token).text: _finite(logprob) for token, logprob in top.items()}
                for top in tops
            ]
            if self.call.top_logprobs
            else None,
            "text_offset": [self._offsets.next(*each) for each in zip(texts, in_text, strict=True)],
        }


class _Offsets:
    """Where tokens begin in a text, in characters; a token within a character begins where the character does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._place = 0

    def next(self, token: TokenText, in_text: bool) -> int:
        """in_text: whether it is written out there, as special tokens are in a prompt and not in a continuation."""
        place = self._place
        if in_text:
            self._place += len(self._decoder.decode(token.bytes))
        return place


def _of_chat(
    vocabulary: Vocabulary, tokens: list[int], logprobs: list[float], tops: list[dict[int, float]]
) -> dict[str, Any]:
    """Log-probabilities as chat completions have them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = vocabulary.text_of(token)
        return {"token": text.text, "logprob": _finite(logprob), "bytes": list(text.bytes)}

    all_tops = tops or [{}] * len(tokens)
    content = [
        entry(token, logprob) | {"top_logprobs": [entry(*one) for one in top.items()]}
        for token, logprob, top in zip(tokens, logprobs, all_tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    """JSON has no infinities: a token of probability 0, as OpenAI writes it."""
    return max(logprob, -9999.0)


def _event(text: str) -> bytes:
    return f"data: {text}\n\n".encode(errors="replace")
