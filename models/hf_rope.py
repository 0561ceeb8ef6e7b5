"""RopeConfig to and from config.json: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older)."""

from __future__ import annotations

from typing import Any

from models.config import ROPE_SCALINGS, RopeConfig
from models.family import HFConfig

TYPES = {"default": "none", "linear": "linear", "dynamic": "ntk", "yarn": "yarn", "llama3": "llama3"}
NAMES = {"original_max_seq_len": "original_max_position_embeddings"}  # theirs, where it is not ours


def _fields(scaling: str) -> dict[str, str]:
    """Fields that config.json has for a scaling besides rope_theta: ours to theirs."""
    # Theirs stretches "dynamic" beyond the length of the model and has no field for another length.
    read = [name for name in ROPE_SCALINGS[scaling] if not (scaling == "ntk" and name == "original_max_seq_len")]
    return {name: NAMES.get(name, name) for name in read}


def rope_from_hf(source: HFConfig, max_seq_len: int) -> RopeConfig:
    """Read the rope of a config.json. Raises ValueError for a type or field that is not supported."""
    theta = source.take("rope_theta", 10000.0)
    older = source.take("rope_scaling", None)
    parameters: dict[str, Any] = dict(older or source.take("rope_parameters", None) or {})
    source.take("rope_parameters", None)
    source.expect("partial_rotary_factor", 1.0, "turning only some of the dimensions of a head is not supported")
    legacy_type = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", legacy_type)
    if kind not in TYPES:
        raise ValueError(f"config.json has rope type {kind!r}, which is not supported; use {', '.join(TYPES)}")
    scaling = TYPES[kind]
    values: dict[str, Any] = {"theta": float(parameters.pop("rope_theta", theta)), "scaling": scaling}
    # transformers falls back to the length of the model where the trained length is not given; the others ignore it.
    values["original_max_seq_len"] = max_seq_len
    partial = parameters.pop("partial_rotary_factor", None)
    if partial not in (None, 1.0):
        raise ValueError(f"config.json has partial_rotary_factor={partial}: turning part of a head is not supported")
    for ours, theirs in _fields(scaling).items():
        value = parameters.pop(theirs, None)
        if value is not None:
            values[ours] = value
    if scaling == "yarn" and "factor" not in values:
        values["factor"] = max_seq_len / values["original_max_seq_len"]
    if "factor" in ROPE_SCALINGS[scaling] and "factor" not in values:
        raise ValueError(f"config.json has rope type {kind!r} without factor; add it to rope_parameters")
    if scaling in ("none", "linear", "ntk"):
        # Written by some exporters beside types that do not read it; harmless where it says what is assumed anyway.
        original = parameters.pop("original_max_position_embeddings", None)
        if scaling == "ntk" and original not in (None, max_seq_len):
            raise ValueError(
                f"config.json has rope type 'dynamic' with original_max_position_embeddings={original}; transformers "
                f"stretches beyond max_position_embeddings={max_seq_len}, so make them equal"
            )
    unknown = {name: value for name, value in parameters.items() if value is not None}
    if unknown:
        raise ValueError(f"config.json has rope fields that type {kind!r} does not know: {unknown}; remove them")
    return RopeConfig(**values)


def rope_to_hf(rope: RopeConfig, max_seq_len: int) -> dict[str, Any]:
    """The fields of config.json for a rope. Raises ValueError where they cannot say the same."""
    if rope.scaling == "ntk" and rope.original_max_seq_len != max_seq_len:
        raise ValueError(
            f"model.rope.original_max_seq_len={rope.original_max_seq_len} with scaling=ntk cannot be exported: Hugging "
            f"Face takes model.max_seq_len={max_seq_len} for it; make them equal"
        )
    kind = next(theirs for theirs, ours in TYPES.items() if ours == rope.scaling)
    values = {theirs: getattr(rope, ours) for ours, theirs in _fields(rope.scaling).items()}
    values = {name: value for name, value in values.items() if value is not None}
    # Said in the words of transformers 4 as well, which would take its default theta where it finds only the new ones.
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": rope.theta, **values},
        "rope_theta": rope.theta,
        "rope_scaling": {"rope_type": kind, **values} if values else None,
    }
