"""From settings to a drafter."""

from __future__ import annotations

from inference.speculation.config import SpeculationConfig, speculation_problems
from inference.speculation.draft_model import DraftModel, draft_model_problems
from inference.speculation.drafter import Drafter
from inference.speculation.hidden import BlockDrafter, MedusaDrafter, mtp_drafter
from inference.speculation.ngram import NGramDrafter
from inference.speculation.runner import Speculation
from models.decoder import Decoder
from models.speculator import KINDS, Speculator


def build_speculation(
    config: SpeculationConfig, model: Decoder, *, draft_model: Decoder | None = None, heads: Speculator | None = None
) -> Speculation | None:
    """Who drafts for `model`, to be given to Engine; None for method=none.

    draft_model: for method=draft, on the model's device; heads: for medusa and eagle. Raises ValueError for what cannot
    draft for this model.
    """
    found = speculation_problems(config)
    if config.method == "draft":
        found += [] if draft_model is None else draft_model_problems(model, draft_model, config.draft_path)
    if config.method == "mtp" and not model.config.mtp.depth:
        found.append(
            "speculation.method=mtp needs a model with blocks of multi-token prediction, and this one has none"
        )
    if config.method in KINDS and (heads is None or heads.config.kind != config.method):
        what = "there are none" if heads is None else f"these are {heads.config.kind} heads"
        found.append(
            f"speculation.method={config.method} needs heads of that kind, and {what}; set model.speculator_path"
        )
    if found:
        raise ValueError("; ".join(found))
    if config.method == "none":
        return None
    return Speculation(config, _drafter(config, model, draft_model, heads))


def _drafter(
    config: SpeculationConfig, model: Decoder, draft_model: Decoder | None, heads: Speculator | None
) -> Drafter:
    if config.method == "ngram":
        return NGramDrafter(config, next(model.parameters()).device)
    if config.method == "mtp":
        return mtp_drafter(config, model)
    if config.method == "draft":
        assert draft_model is not None
        return DraftModel(config, draft_model)
    assert heads is not None
    if config.method == "medusa":
        return MedusaDrafter(config, model, heads)
    return BlockDrafter(config, model, heads.continue_states, "EAGLE-style head")
