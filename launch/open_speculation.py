"""Who drafts tokens for the lab's model: another model, or heads."""

from __future__ import annotations

import sys
from pathlib import Path

from inference.engine import Engine
from inference.speculation.build import build_speculation
from inference.speculation.config import SpeculationConfig, problems_over_ranks, speculation_problems
from inference.speculation.runner import Speculation, SpeculativeRunner
from launch.open_model import DTYPES, LabModelConfig, OpenedModel, open_model
from models.speculator_config import KINDS
from parallel.mesh import world_size_from_env
from trainer.config import ConfigError, configuration_errors


def drafting_problems(config: SpeculationConfig, model: LabModelConfig) -> list[str]:
    """What is wrong with `speculation`, and what of `model` belongs to it, before a file is read; one line each."""
    found = speculation_problems(config)
    if world_size_from_env() > 1:
        found += problems_over_ranks(config)
    if config.draft_path is not None and not Path(config.draft_path).expanduser().exists():
        found.append(
            f"speculation.draft_path={config.draft_path} does not exist; give a Hugging Face folder or a checkpoint"
        )
    if config.method in KINDS and model.speculator_path is None:
        found.append(
            f"speculation.method={config.method} needs model.speculator_path=DIR, where launch/convert.py put heads"
        )
    if config.method not in KINDS and model.speculator_path is not None:
        found.append(
            f"model.speculator_path={model.speculator_path} has no effect with speculation.method={config.method}; use "
            f"method={' or '.join(KINDS)}, as the heads are, or leave it out"
        )
    folder = model.path is not None and (Path(model.path).expanduser() / "config.json").is_file()
    if config.method == "mtp" and folder and model.mtp_depth == 0:
        found.append("speculation.method=mtp needs the folder's block of multi-token prediction; set model.mtp_depth=1")
    return found


def open_speculation(opened: OpenedModel, config: SpeculationConfig) -> Speculation | None:
    """Raises ConfigError for what cannot draft for this model."""
    draft = None
    if config.method == "draft":
        parameter = next(opened.model.parameters())
        dtype = next(name for name, dtype in DTYPES.items() if dtype == parameter.dtype)
        try:
            draft = open_model(LabModelConfig(path=config.draft_path, dtype=dtype), parameter.device)
        except ConfigError as error:
            raise ConfigError([p.replace("model.path=", "speculation.draft_path=") for p in error.problems]) from None
        both = (opened.tokenizer, draft.tokenizer)
        if all(both) and len({tokenizer.fingerprint() for tokenizer in both if tokenizer is not None}) > 1:
            raise ConfigError([
                f"speculation.draft_path={config.draft_path} has another tokenizer than the model: its token ids do "
                "not mean the same; use a draft model of the same tokenizer, or speculation.method=ngram"
            ])  # fmt: skip
    with configuration_errors():
        return build_speculation(
            config, opened.model, draft_model=None if draft is None else draft.model, heads=opened.heads
        )


def say_how_drafts_fared(engine: Engine) -> None:
    """On stderr: acceptance by place, tokens per step, whether it paid, and whether it is switched off."""
    runner = engine.runner
    if not isinstance(runner, SpeculativeRunner):
        return
    counts = runner.policy.counts
    if not counts.steps_with + counts.steps_without:
        print(f"speculation by {runner.drafter.describe()}", file=sys.stderr)
        return
    places = ", ".join(f"{share:.2f}" for share in counts.acceptance) or "none was tried"
    said = [
        f"{counts.mean_length:.2f} tokens a step, accepted by place: {places}",
        f"{counts.steps_with} steps with drafts, {counts.steps_without} without",
    ]
    said += [] if counts.speed_up is None else [f"about {counts.speed_up:.2f} times as fast as without"]
    said += [counts.why] if counts.why else []
    print(f"speculation by {runner.drafter.describe()}: {'; '.join(said)}", file=sys.stderr)
