"""What a request asks for: the bodies of completions and chat completions, as calls of the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.chat import ChatTemplate, ChatTemplateError
from inference.config import MAX_SEED, SamplingConfig
from inference.engine import Engine, Prompt, RequestError, TooLongError
from inference.sequence import Sequence
from inference.server.errors import ApiError, wrong
from inference.server.fields import Fields, is_text, parse_object

MAX_TOP_LOGPROBS = 20
MAX_STOP = 16  # strings, and tokens
STOP_CHARACTERS = 256
CONSTRAINT_CHARACTERS = 2**16
MAX_CHOICES_OF_TEXT = 1024  # strings of the extension `choice`
MAX_MESSAGES = 4096
DEFAULT_MAX_TOKENS = 16
"""Of completions, as OpenAI has it; of chat completions there is none but the room there is."""
ABOUT_THE_REQUEST = ("user", "metadata", "safety_identifier", "prompt_cache_key")


@dataclass
class Call:
    """One request of a client, ready for the engine. Filled by `read_completion` and `read_chat`."""

    chat: bool
    model: str  # its name, or that of an adapter
    sequences: list[Sequence]  # the choices of the first prompt, of the second, ...
    prompts: list[str | list[int]]  # text, or token ids where these were given
    n: int  # choices of each prompt
    stream: bool
    include_usage: bool
    echo: bool
    score_only: bool  # max_tokens=0: the prompt is echoed, nothing follows
    logprobs: bool
    top_logprobs: int
    return_token_ids: bool


@dataclass
class Reader:
    """What a body is read with; all of it is constant."""

    engine: Engine
    name: str  # of the model
    defaults: SamplingConfig
    template: ChatTemplate | ChatTemplateError
    max_choices: int

    def completion(self, body: bytes) -> Call:
        """/v1/completions. Raises ApiError."""
        fields, model = self._fields(body)
        prompts = _prompts(fields.any("prompt"), self.max_choices)
        n = self._n(fields, len(prompts))
        logprobs = fields.integer("logprobs", None, least=0, most=MAX_TOP_LOGPROBS)
        echo = fields.flag("echo")
        if echo and logprobs:
            raise wrong("logprobs", "logprobs above 0 with echo is not supported: tokens of prompts have no others")
        max_tokens = fields.integer("max_tokens", self.defaults.max_tokens or DEFAULT_MAX_TOKENS, least=0, most=2**31)
        if max_tokens == 0 and not echo:
            raise wrong("max_tokens", "max_tokens=0 asks for nothing; it is for echo=true")
        sampling = replace(
            self._sampling(fields),
            max_tokens=max(1, max_tokens),
            top_logprobs=logprobs or 0,
            prompt_logprobs=echo and logprobs is not None,
            add_special_tokens=fields.flag("add_special_tokens", self.defaults.add_special_tokens),
        )
        fields.only("best_of", n)
        fields.only("suffix", "")
        return self._call(
            fields,
            prompts,
            sampling,
            n,
            model=model,
            chat=False,
            echo=echo,
            logprobs=logprobs,
            score_only=max_tokens == 0,
        )

    def chat(self, body: bytes) -> Call:
        """/v1/chat/completions. Raises ApiError."""
        fields, model = self._fields(body)
        if isinstance(self.template, ChatTemplateError):
            raise ApiError(400, f"this model has no chat completions: {self.template}", code="no_chat_template")
        messages = _messages(fields.any("messages"))
        n = self._n(fields, 1)
        variables = fields.object("chat_template_kwargs") or {}
        if reserved := {"messages", "tools", "documents", "add_generation_prompt", "self"} & variables.keys():
            raise wrong("chat_template_kwargs", f"chat_template_kwargs cannot set {min(reserved)}")
        generation_prompt = fields.flag("add_generation_prompt", True)
        try:
            prompt = self.template.render(messages, add_generation_prompt=generation_prompt, **variables)
        except ChatTemplateError as error:
            raise wrong("messages", str(error)) from None
        if not is_text(prompt):
            raise wrong("messages", "messages must be of characters, without halves of surrogate pairs")
        shown = fields.flag("logprobs")
        top_logprobs = fields.integer("top_logprobs", 0, least=0, most=MAX_TOP_LOGPROBS)
        if top_logprobs and not shown:
            raise wrong("top_logprobs", "top_logprobs needs logprobs=true")
        old = fields.integer("max_tokens", self.defaults.max_tokens, least=1, most=2**31)
        max_tokens = fields.integer("max_completion_tokens", old, least=1, most=2**31)
        sampling = replace(
            self._sampling(fields),
            max_tokens=max_tokens,
            top_logprobs=top_logprobs,
            add_special_tokens=False,  # the template writes them
        )
        for name, neutral in _NOT_OF_THIS_CHAT.items():
            fields.only(name, *neutral)
        return self._call(fields, [prompt], sampling, n, model=model, chat=True, logprobs=0 if shown else None)

    def _fields(self, body: bytes) -> tuple[Fields, str]:
        """A body, and the name that its field `model` says, or that of the model."""
        fields = Fields(parse_object(body))
        model = fields.text("model", longest=1000)
        if model is None:
            return fields, self.name
        self.check_name(model)
        return fields, model

    @property
    def names(self) -> list[str]:
        """Of the model, then of adapters: what the field `model` of a request may be."""
        return [self.name, *self.engine.adapters]

    def check_name(self, model: str) -> None:
        """Raises ApiError for a name of nothing that is served."""
        if model not in self.names:
            use = ", ".join(map(repr, self.names))
            raise ApiError(
                404, f"the model {model!r} is not served here; use {use}", param="model", code="model_not_found"
            )

    def _n(self, fields: Fields, num_prompts: int) -> int:
        n = fields.integer("n", 1, least=1, most=self.max_choices)
        if n * num_prompts > self.max_choices:
            raise wrong("n", f"{num_prompts} prompts with n={n} are {n * num_prompts} choices of {self.max_choices}")
        return n

    def _sampling(self, fields: Fields) -> SamplingConfig:
        default = self.defaults
        stop = fields.any("stop")
        stops = Fields({"stop": [stop] if isinstance(stop, str) and stop else stop})
        ids = fields.any("stop_token_ids")
        if ids is None:
            ids = default.stop_token_ids
        elif not isinstance(ids, list) or len(ids) > MAX_STOP or not all(type(token) is int for token in ids):
            raise wrong("stop_token_ids", f"stop_token_ids must be at most {MAX_STOP} whole numbers")
        return replace(
            default,
            temperature=fields.number("temperature", default.temperature),
            top_k=max(0, fields.integer("top_k", default.top_k, least=-1, most=2**31)),  # -1 is all, elsewhere
            top_p=fields.number("top_p", default.top_p),
            min_p=fields.number("min_p", default.min_p),
            repetition_penalty=fields.number("repetition_penalty", default.repetition_penalty),
            presence_penalty=fields.number("presence_penalty", default.presence_penalty),
            frequency_penalty=fields.number("frequency_penalty", default.frequency_penalty),
            seed=fields.integer("seed", default.seed, least=0, most=MAX_SEED),
            stop=stops.texts("stop", most=MAX_STOP, longest=STOP_CHARACTERS) if stop is not None else default.stop,
            stop_token_ids=ids,
            ignore_eos=fields.flag("ignore_eos", default.ignore_eos),
            **_constraint(fields, default),
        )

    def _call(
        self,
        fields: Fields,
        prompts: list[Prompt],
        sampling: SamplingConfig,
        n: int,
        *,
        model: str,
        chat: bool,
        logprobs: int | None,
        echo: bool = False,
        score_only: bool = False,
    ) -> Call:
        """Reads what both kinds have, then tokenizes."""
        stream = fields.flag("stream")
        options = Fields(fields.object("stream_options") or {}, inside="stream_options")
        include_usage = options.flag("include_usage")
        options.only("include_obfuscation", False)
        options.finish()
        if include_usage and not stream:
            raise wrong("stream_options", "stream_options is for stream=true")
        return_token_ids = fields.flag("return_token_ids")
        fields.only("logit_bias", {})
        fields.ignore(ABOUT_THE_REQUEST)
        fields.finish()
        adapter = None if model == self.name else model
        sequences = [one for prompt in prompts for one in self._sequences(prompt, sampling, n, adapter)]
        return Call(
            chat=chat,
            model=model,
            sequences=sequences,
            prompts=[prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts],
            n=n,
            stream=stream,
            include_usage=include_usage,
            echo=echo,
            score_only=score_only,
            logprobs=logprobs is not None,
            top_logprobs=sampling.top_logprobs,
            return_token_ids=return_token_ids,
        )

    def _sequences(self, prompt: Prompt, sampling: SamplingConfig, n: int, adapter: str | None) -> list[Sequence]:
        """One for each choice; with a seed, choice i has seed + i."""
        found: list[Sequence] = []
        for choice in range(n):
            seed = None if sampling.seed is None else (sampling.seed + choice) % (MAX_SEED + 1)
            try:
                found.append(self.engine.prepare(prompt, replace(sampling, seed=seed), adapter))
            except RequestError as error:
                raise _refused(error) from None
            prompt = found[0].tokens  # text is tokenized once
        return found


_NOT_OF_THIS_CHAT: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields that are not served, and the values of them that ask for nothing."""


def _refused(error: RequestError) -> ApiError:
    """What the engine refuses; the fields of SamplingConfig are those of requests."""
    named = re.match(r"sampling\.(\w+)", str(error))
    code = "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_value"
    return ApiError(400, str(error).replace("sampling.", ""), param=named and named.group(1), code=code)


def _prompts(value: Any, most: int) -> list[Prompt]:
    """A string, token ids, or a list of either."""
    if value is None:
        raise wrong("prompt", "prompt is missing")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", "prompt must be a string, a list of token ids, or a list of either")
    if len(value) > most:
        raise wrong("prompt", f"prompt has {len(value)} entries; at most {most} are served at a time")
    for each in value:
        tokens = isinstance(each, list) and all(type(token) is int and 0 <= token < 2**31 for token in each)
        if not tokens and not is_text(each):
            raise wrong("prompt", "prompt must be a string, a list of token ids, or a list of either")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    """A conversation; contents given in parts of text are put together, as most templates take strings."""
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise wrong("messages", f"messages must be 1 to {MAX_MESSAGES} objects")
    found = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong(f"messages[{number}]", f"messages[{number}] must be an object with a role")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                     for part in content]  # fmt: skip
            if not all(isinstance(part, str) for part in parts):
                raise wrong(f"messages[{number}].content", f"messages[{number}].content may have parts of text only")
            content = "\n".join(parts)  # type: ignore[arg-type]
        elif not isinstance(content, (str, type(None))):
            raise wrong(f"messages[{number}].content", f"messages[{number}].content must be a string or parts of text")
        found.append(message | {"content": content})
    return found


def _constraint(fields: Fields, default: SamplingConfig) -> dict[str, Any]:
    """The fields of SamplingConfig that constrain, of response_format and of the extensions named like them."""
    found: dict[str, Any] = {}
    form = fields.object("response_format")
    if form is not None:
        inside = Fields(form, inside="response_format")
        kind = inside.text("type", longest=100)
        if kind == "json_object":
            found["json_schema"] = '{"type": "object"}'
        elif kind == "json_schema":
            given = Fields(inside.object("json_schema") or {}, inside="response_format.json_schema")
            found["json_schema"] = _schema(given.any("schema"), "response_format.json_schema.schema")
            given.ignore(("name", "description", "strict"))
            given.finish()
        elif kind != "text":
            raise wrong("response_format", "response_format.type must be text, json_object or json_schema")
        inside.finish()
    if (schema := fields.any("json_schema")) is not None:
        if "json_schema" in found:
            raise wrong("json_schema", "json_schema and response_format exclude each other")
        found["json_schema"] = _schema(schema, "json_schema")
    for name in ("regex", "grammar"):
        if (text := fields.text(name, longest=CONSTRAINT_CHARACTERS)) is not None:
            found[name] = text
    if choice := fields.texts("choice", most=MAX_CHOICES_OF_TEXT, longest=CONSTRAINT_CHARACTERS):
        found["choice"] = choice
    if not found:
        return {name: getattr(default, name) for name in ("json_schema", "regex", "choice", "grammar")}
    return {"json_schema": None, "regex": None, "choice": [], "grammar": None} | found


def _schema(value: Any, name: str) -> str:
    """A schema as text; it is given as an object, or as text."""
    text = value if is_text(value) else json.dumps(value) if isinstance(value, dict) else None
    if text is None or len(text) > CONSTRAINT_CHARACTERS:
        raise wrong(name, f"{name} must be a JSON schema of at most {CONSTRAINT_CHARACTERS} characters")
    return text
