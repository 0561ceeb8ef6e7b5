"""What a family is to the rest: how its Hugging Face config.json and tensor names map to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from models.config import ModelConfig

T = TypeVar("T")

# Fields of config.json that do not change what the model computes at inference from given tokens.
HARMLESS = frozenset(
    (
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "init_std",
        "initializer_range",
        "is_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "n_ctx",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    )
)


class HFConfig:
    """A config.json that notices which of its fields were read: what nobody read is refused, never ignored."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)
        self._unread = set(fields) - HARMLESS

    def take(self, name: str, default: T) -> T:
        """The field, or what transformers assumes where it is absent. null is kept (for a switch: off).

        Raises ValueError for a value of another type than the default's.
        """
        self._unread.discard(name)
        value = self.fields.get(name, default)
        if value is None:
            return cast(T, False if isinstance(default, bool) else None)
        if default is not None and not _same_type(value, default):
            raise ValueError(f"config.json has {name}={value!r}; its type should be {type(default).__name__}")
        return value

    def require(self, name: str) -> int:
        """A size without which there is no model. Raises ValueError."""
        if self.fields.get(name) is None:
            raise ValueError(f"config.json has no {name}; the folder is damaged or of another family")
        return self.take(name, 0)

    def expect(self, name: str, supported: Any, reason: str) -> None:
        """Raise ValueError, with the reason, unless the field has the one supported value or is absent."""
        value = self.take(name, supported)
        if value != supported:
            raise ValueError(f"config.json has {name}={value!r}: {reason}; only {supported!r} is supported")

    def translate(self, name: str, default: str, table: Mapping[str, str]) -> str:
        """The field through a table of supported values. Raises ValueError for a value outside it."""
        value = self.take(name, default)
        if value not in table:
            raise ValueError(f"config.json has {name}={value!r}, which is not supported; use {', '.join(table)}")
        return table[value]

    def finish(self) -> None:
        """Raise ValueError when a field that is set was not read: it may change the model in a way unknown here."""
        unknown = sorted(name for name in self._unread if self.fields[name] not in (None, False, [], {}, ""))
        if unknown:
            listing = ", ".join(f"{name}={self.fields[name]!r}" for name in unknown)
            raise ValueError(
                f"config.json has fields this family does not know, and they may change the model: {listing}; "
                "remove them if they do not"
            )


def _same_type(value: Any, default: Any) -> bool:
    """Whether JSON's value can stand for the default: an int may be a float, and a bool is not an int."""
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


@dataclass(frozen=True)
class HFWeight:
    """Where one of our parameters lies in a Hugging Face file: rows of a tensor, after transposing it where so stored.

    ours == (theirs.T if transpose else theirs)[rows[0]:rows[1]]; rows None: all of it. With stack, ours[stack] is what
    lies there. Rows that belong to no parameter are never read, and are exported as zeros.
    """

    ours: str
    theirs: str
    transpose: bool = False
    rows: tuple[int, int] | None = None
    stack: int | None = None  # number of the expert, of the first dim of ours
    copy: bool = False  # ours has its own place already: written for readers that look for it here too, never read


@dataclass(frozen=True)
class Family:
    """One architecture. `config` below is resolved."""

    name: str  # model_type of config.json, and ModelConfig.family
    architecture: str  # class of transformers
    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    weights: Callable[[ModelConfig], Sequence[HFWeight]]  # every parameter once (but for copies), in file order
    optional_prefix: str = ""  # some folders name tensors without it
    ignored: str = r"(?!)"  # regular expression of tensors in old files that are no parameters
