"""What a run says of itself: on the console, in events.jsonl and in run.json. Nothing here changes what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.loader import Loader
from data.tokenizer import Tokenizer
from models.flops import num_parameters
from parallel.activation_budget import describe
from trainer.breakdown import profile_of, sentence, trace_path
from trainer.config import TrainConfig
from trainer.metrics import MetricLogger
from trainer.pipelined import PlanOfStep
from trainer.predicted import compare
from trainer.records import StepRecords
from trainer.run_info import RunInfo, add_to_run_info, write_config, write_run_info
from trainer.sample import sample_text
from trainer.step import TrainState
from trainer.stragglers import Straggler


class Announcer:
    """Writes down what is known of a run at its start, between steps and at its end. Called on every rank."""

    def __init__(
        self, config: TrainConfig, metrics: MetricLogger, *, run_dir: Path, rank: int, device_name: str
    ) -> None:
        self._config, self._metrics, self._run_dir = config, metrics, run_dir
        self._rank, self._device_name = rank, device_name

    def start(self, info: RunInfo, state: TrainState, *, pipeline: PlanOfStep | None, resume_from: Path | None) -> None:
        """config.yaml, run.json and one line on the console: what really runs."""
        config = self._config
        if self._rank == 0:
            write_config(self._run_dir, config)
            write_run_info(self._run_dir, info)
        self._metrics.event(
            "resume" if resume_from else "start",
            f"{config.model.family}, {num_parameters(config.model) / 1e6:,.1f}M parameters, "
            f"{info.world_size} x {self._device_name}, "
            f"ZeRO-{config.parallel.zero_stage}, {config.precision.compute}"
            + ("" if pipeline is None else f", pipeline {pipeline}")
            + (f"; resumed from {resume_from} at step {state.step}" if resume_from else ""),
            step=state.step,
            **({} if pipeline is None else {"pipeline": pipeline.fields}),
        )
        if plan := state.activation_plan:
            what = describe(list(plan.values()))
            self._metrics.event(
                "activations",
                f"activations of rank 0: {what}",
                gib=sum(choice.num_bytes for choice in plan.values()) / 2**30,
                recomputed_seconds=sum(choice.seconds for choice in plan.values()),
            )

    def data(self, text: str, data: Loader) -> None:
        """What the recipe says of the data it begins with; empty: nothing."""
        if text:
            self._metrics.event("data", text, **data.counts)

    def changed(self, settings: list[str], *, step: int) -> None:
        """Settings that differ from the checkpoint's."""
        if settings:
            self._metrics.event("changed", f"since the checkpoint: {', '.join(settings)}", step=step)

    def stragglers(self, found: Iterable[Straggler], *, step: int) -> None:
        """Ranks that keep the others waiting."""
        for straggler in found:
            self._metrics.event("straggler", f"step {step}: {straggler}", **asdict(straggler), step=step)

    def checkpoints(self, steps: Iterable[int]) -> None:
        """Checkpoints that have become complete: from then on a crash loses nothing before them."""
        for step in steps:
            self._metrics.event("checkpoint", f"checkpoint of step {step}", step=step)

    def traces(self, folder: Path | None, *, step: int) -> None:
        """Where the time of the traced steps went, on rank 0; None: no trace has ended."""
        if folder is None:
            return
        path = trace_path(self._run_dir, self._rank)
        if self._rank != 0 or path.parent != folder:  # traced on other ranks alone, or as NVTX ranges
            self._metrics.event("profile", f"traced into {folder}", step=step)
            return
        found = profile_of(self._run_dir, rank=self._rank)
        self._metrics.event("profile", f"{sentence(found)}; traced into {folder}", step=step, **found)

    def prediction(self, records: StepRecords, *, world_size: int, device: torch.device, step: int) -> None:
        """Memory and time beside what the planner says of this run; also a field of run.json."""
        if self._rank != 0:
            return
        fields: dict[str, Any] = {}
        try:
            text, fields = compare(
                self._config,
                world_size=world_size,
                device_name=self._device_name,
                seconds=list(records.seconds),
                peak_gib=records.peak_memory_gib() if device.type == "cuda" else None,
            )
        except Exception as error:  # the run is done, and what it did is not for a prediction to spoil
            text = f"no prediction: {error!r}"
        self._metrics.event("predicted", text, step=step, **fields)
        if fields:
            add_to_run_info(self._run_dir, predicted=fields)

    def sample(self, state: TrainState, tokenizer: Tokenizer | None) -> str | None:
        """What the model writes behind train.sample_prompt; None where that is not asked for. Collective."""
        train = self._config.train
        if train.sample_tokens == 0 or tokenizer is None:
            return None
        text = sample_text(
            state,
            tokenizer,
            prompt=train.sample_prompt,
            num_tokens=train.sample_tokens,
            max_seq_len=train.seq_len,
            seed=train.seed,
        )
        said = f"sampled {train.sample_tokens} tokens after {train.sample_prompt!r}"
        self._metrics.event("sample", said, step=state.step, sample=text)
        return text
