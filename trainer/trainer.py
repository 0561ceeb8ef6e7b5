"""Trainer: from a validated TrainConfig to a finished run directory."""

from __future__ import annotations

import gc
import logging
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data.batch import Batch
from data.config import DataError
from data.loader import Loader
from data.progress import Progress
from models.flops import causal_flops_per_token, flops_per_token
from models.hf import load_hf_weights
from models.init import initialize, start_score
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh, init_distributed, pick_device
from trainer.adapters import adapter_identity, check_same_adapter, load_base, start_adapters
from trainer.agreement import check_same_on_all_ranks
from trainer.announce import Announcer
from trainer.build import build_state, check_fp8_runs, check_graphs_run, check_loss_runs
from trainer.checkpoint import CheckpointError, CheckpointManager, read_extra
from trainer.config import ConfigError, TrainConfig, configuration_errors
from trainer.corruption import StateCorrupted
from trainer.determinism import make_deterministic
from trainer.faults import tell_end, tell_start
from trainer.goodput import Goodput
from trainer.graphed import leave_default_stream
from trainer.health import Health, watchdog_of
from trainer.identity import (
    changed_settings,
    check_same_model,
    check_same_moments,
    check_same_scaling,
    check_tokenizer_is_known,
    model_identity,
    run_identity,
)
from trainer.implementations import attention_used, implementations
from trainer.injection import planned_faults
from trainer.metrics import MetricLogger
from trainer.peers import PeerCheckpoints
from trainer.pipelined import PipelinedPasses, PlanOfStep
from trainer.profiling import StepProfiler
from trainer.recipes import RECIPES
from trainer.records import StepRecords, TrainingDiverged
from trainer.resilience import PreemptionGuard
from trainer.run_dir import check_run_dir, enter_run_dir, find_start
from trainer.run_info import RunInfo
from trainer.run_lock import RunLock
from trainer.sample import check_prompt
from trainer.schedule import learning_rate
from trainer.sequence import SequenceParts
from trainer.speculator import load_model, start_heads, targets
from trainer.step import TrainState, train_step
from trainer.throughput import Throughput, mfu_peak
from trainer.watchdog import record_collectives

logger = logging.getLogger(__name__)

GC_INTERVAL = 50
"""Steps between garbage collections. They are switched off otherwise: one that falls on a different step on each rank
makes all ranks wait for each in turn."""


class Preempted(Exception):
    """The run saved and stopped because it was told to; the launcher should start it again."""


class Due(NamedTuple):
    """What follows a step. Filled by `Trainer._due`, the same on every rank."""

    finished: bool  # it was the last
    preempted: bool  # save and stop: a signal asked for it
    validation: bool
    save: bool  # a checkpoint


class Trainer:
    """One run. Build it on every rank with the same configuration, call `run`, then `close`."""

    def __init__(self, config: TrainConfig) -> None:
        """Everything up to the first step: ranks, data, model, weights, then the run directory.

        config: validated, with the model resolved (trainer.validate.finalize). Raises ConfigError for what only this
        machine or these files show to be wrong, CheckpointError for a checkpoint that cannot be read. Until weights are
        loaded nothing is written: a start that is refused leaves run.dir as it was.
        """
        self.config = config
        self.recipe = RECIPES[config.recipe.name]()
        self._join_ranks()
        self.run_dir = Path(config.run.dir)
        self.lock = RunLock(self.run_dir)
        check_run_dir(config, self.lock)
        self.checkpoints = CheckpointManager(self.run_dir / "checkpoints", config.checkpoint, device=self.device)
        with configuration_errors():
            self.beside = self.recipe.trained_beside(config, self.device)
        self.adapter = adapter_identity(
            config, {one.path_field: str(one.config.model.path) for one in self.beside.values()}
        )
        self.watchdog = watchdog_of(config)
        loading = partial(self.watchdog.watching, "loading", step=0, seconds=config.resilience.loading_seconds)
        with loading():
            self.resume_from = find_start(config, self.checkpoints.group)
        self._check_start()
        self.train_data, self.validation_data = self._build_data()
        objective = self.recipe.objective(config, self.mesh, self.device)
        self.state = build_state(config, self.dims, self.mesh, self.device, objective)
        self._parts = SequenceParts(config, self.mesh)
        self.state.beside = self._build_beside()
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_len
        self.tokens = 0  # trained on since step 1
        self.throughput = self._throughput()
        self.records = StepRecords(config, self.throughput, self.device, dynamic_scale=self.state.loss_scale.dynamic)
        self._changed: list[str] = []  # settings, since the checkpoint
        with loading():
            self._load()
            self.peers = self._load_from_peers()
            self.recipe.start(config, self.state, self.mesh)
        self._enter_run_dir()
        self.goodput = Goodput(self.run_dir, resume_step=self.state.step, is_main=self.is_main)
        self.guard = PreemptionGuard()
        self.health = Health(config, self.state, device=self.device, group=self.guard.group, watchdog=self.watchdog)
        self.faults = planned_faults()  # none, unless this is a drill
        self._alone = False  # other ranks may have ended, or be waiting elsewhere
        self._loss: float | None = None  # of the newest step that was logged
        self._validation_loss: float | None = None  # of the newest validation
        if self.is_main:
            tell_start(self.metrics, self.run_dir, step=self.state.step)
        self._describe()

    # ---- setting up

    def _join_ranks(self) -> None:
        """This rank's device, the process group and its mesh, when all ranks were given the same configuration."""
        config = self.config
        with configuration_errors():
            self.device = pick_device(config.train.device)
            attention_used(config, self.device)
            check_fp8_runs(config, self.device)
            check_graphs_run(config, self.device)
            check_loss_runs(config, self.device)
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        if config.train.cuda_graphs:
            leave_default_stream(self.device)
        make_deterministic(config.train.deterministic, self.device)
        record_collectives()
        init_distributed(self.device, config.train.timeout_seconds)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        check_same_on_all_ranks(run_identity(config))
        self.dims = ParallelDims.resolve(config.parallel, self.world_size)
        self.mesh = build_mesh(self.dims, self.device.type)

    def _check_start(self) -> None:
        """Whether the checkpoint to go on from, if there is one, is of this model."""
        config, found = self.config, self.resume_from
        if found is not None:
            check_same_model(found, config.model)
            check_same_adapter(found, self.adapter)
            check_same_moments(found, config)
            check_same_scaling(found, config.precision, fused_projections=config.model.fused_projections)
            check_tokenizer_is_known(found, config.data)

    def _build_data(self) -> tuple[Loader, Loader | None]:
        config, train = self.config, self.config.train

        def build(split: str) -> Loader:
            return self.recipe.open_data(
                config,
                split=split,
                rank=self.mesh.samples.get_local_rank(),
                world_size=self.dims.dp,
                device_type=self.device.type,
            )

        with configuration_errors(DataError):
            train_data, validation_data = build("train"), build("validation") if train.eval_interval > 0 else None
        if train.sample_tokens > 0 and train_data.tokenizer is not None:
            check_prompt(train_data.tokenizer, train.sample_prompt, vocab_size=config.model.vocab_size)
        fingerprint = train_data.tokenizer.fingerprint() if train_data.tokenizer else None
        check_same_on_all_ranks({"data": train_data.identity, "tokenizer": fingerprint})
        return train_data, validation_data

    def _throughput(self) -> Throughput:
        config = self.config
        flops = flops_per_token(config.model, config.train.seq_len, frozen=self.adapter is not None)
        peak = mfu_peak(self.device_name, config.logging.peak_tflops)
        return Throughput(world_size=self.world_size, flops_per_token=flops, peak=peak)

    def _build_beside(self) -> dict[str, TrainState]:
        """Models that are trained beside the run's, on the same layout."""
        states = {}
        for name, one in self.beside.items():
            states[name] = build_state(one.config, self.dims, self.mesh, self.device, one.objective)
            states[name].lr_factor = one.lr_factor
        return states

    def _load(self) -> None:
        """Weights from a checkpoint, from a Hugging Face folder, or drawn; then into the model."""
        weights = self.state.weights()
        heads = self.config.model.speculator.kind != "none"
        if heads:
            with configuration_errors():
                load_model(self.state, self.config.model)
        if self.adapter is not None:
            with configuration_errors():
                load_base(self.state, self.config, self.resume_from)
                for name, one in self.beside.items():
                    load_base(self.state.beside[name], one.config, self.resume_from, prefix=f"{name}/")
        new = True
        if self.resume_from is not None:
            if read_extra(self.resume_from).get("weights_only", False):
                # From launch/convert.py import: a new run, with nothing but its weights from elsewhere.
                self.checkpoints.load(self.resume_from, {f"model/{name}": tensor for name, tensor in weights.items()})
            else:
                new = False
                extra = self.checkpoints.load(self.resume_from, self.state.state_tensors())
                self._continue_from(extra)
        elif heads:
            start_heads(self.state, self.config.train.seed)
        elif self.adapter is not None:
            start_adapters(self.state, self.config)
        elif self.config.model.path is not None:
            if self.config.model.score:
                start_score(weights, self.state.model.initializers(), self.config.train.seed)
            path, whole = self.config.model.path, self.dims.pp == 1
            progress = Progress(f"reading {path}", silent=not self.is_main)
            load_hf_weights(path, weights, self.config.model, whole_model=whole, on_read=progress.tensors)
            progress.finish()
        else:
            initialize(weights, self.state.model.initializers(), self.config.train.seed)
        if new:
            with configuration_errors():
                self.recipe.start_beside(self.config, self.state, imported=self.resume_from is not None)
        self.state.publish()

    def _continue_from(self, extra: dict[str, Any]) -> None:
        """Everything of a checkpoint that is no tensor."""
        with configuration_errors(DataError):
            self.train_data.load_state_dict(extra["data"])
        self.recipe.load_state_dict(extra.get("recipe", {}))
        if extra["step"] > self.config.train.steps:
            raise ConfigError(
                [
                    f"train.steps={self.config.train.steps} is less than the {extra['step']} steps that "
                    f"{self.resume_from} has behind it; raise train.steps, or choose another run.dir"
                ]
            )
        if extra["config"]["precision"]["compute"] != self.config.precision.compute:
            for state in (self.state, *self.state.beside.values()):
                state.loss_scale.reset()
        self.state.set_step(extra["step"])
        self.tokens = extra["tokens"]
        self.records.load_state_dict(extra)
        self._changed = changed_settings(extra["config"], self.config)

    def _load_from_peers(self) -> PeerCheckpoints | None:
        """The state from copies in memory, where a crash left some that are newer than what was loaded."""
        config = self.config.resilience
        if config.peer_interval == 0:
            return None
        peers = PeerCheckpoints(
            self.run_dir,
            Path(config.peer_dir),
            device=self.device,
            ranks_per_host=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        step = peers.newest()
        if step is not None and step > self.state.step:
            try:
                self._continue_from(peers.load(step, self.state.state_tensors()))
            except CheckpointError as error:
                logger.warning("%s; the run goes on from step %d", error, self.state.step)
            else:
                self.state.publish()
                self.resume_from = self.run_dir / f"memory (step {step})"
        return peers

    def _enter_run_dir(self) -> None:
        """From here on the run writes."""
        config = self.config
        enter_run_dir(config, self.resume_from, self.lock)
        if self.peers is not None:
            self.peers.start()
        self.metrics = MetricLogger(
            self.run_dir,
            config.logging,
            is_main=self.is_main,
            total_steps=config.train.steps,
            run_name=config.run.name,
            config_dict=asdict(config),
            resume_step=self.state.step,
        )
        self.announce = Announcer(
            config, self.metrics, run_dir=self.run_dir, rank=self.rank, device_name=self.device_name
        )
        with configuration_errors():
            self.profiler = StepProfiler(
                config.train.profile, folder=self.run_dir / "profile", rank=self.rank, device=self.device
            )

    def _describe(self) -> None:
        """What really runs: config.yaml, run.json and events."""
        config, train, precision, pipeline = self.config, self.config.train, self.config.precision, None
        if isinstance(self.state.passes, PipelinedPasses):
            pipeline = PlanOfStep.of(
                self.state.passes.layout,
                num_sequences=train.global_batch_size // self.dims.dp,
                micro_batch_size=train.micro_batch_size,
            )
        info = RunInfo(
            device=self.device,
            world_size=self.world_size,
            mesh=self.mesh.sizes,
            kernels=implementations(config, self.dims, self.state, self.device),
            precision={"compute": precision.compute, "master": precision.master, "reduce": precision.reduce},
            flops_per_token=self.throughput.flops_per_token,
            flops_per_token_causal=causal_flops_per_token(config.model, train.seq_len, frozen=self.adapter is not None),
            peak_flops=self.throughput.peak,
            pipeline=None if pipeline is None else pipeline.fields,
            resume_step=self.state.step,
        )
        self.announce.start(info, self.state, pipeline=pipeline, resume_from=self.resume_from)
        self.announce.data(self.recipe.describe_data(self.train_data), self.train_data)
        self.announce.changed(self._changed, step=self.state.step)

    # ---- training

    def run(self) -> dict[str, Any]:
        """Train to train.steps. Returns step, loss (of the last step logged), validation_loss and sample.

        Raises Preempted after saving when a signal asked for it, TrainingDiverged as train.nonfinite says, and
        StateCorrupted for bits that changed on their own.
        """
        gc.collect()
        gc.disable()
        try:
            result = self._run()
            self._discard_peers()
            return result
        except Preempted:
            self._discard_peers()
            raise  # on all ranks at the same step
        except (TrainingDiverged, StateCorrupted) as error:
            self._discard_peers()
            tell_end(self.metrics, error, step=self.state.step)
            raise  # likewise
        except BaseException as error:
            self._alone = True
            tell_end(self.metrics, error, step=self.state.step)
            raise
        finally:
            self.health.stop()
            gc.enable()

    def _discard_peers(self) -> None:
        if self.peers is not None:
            self.peers.discard()

    def _run(self) -> dict[str, Any]:
        train, state = self.config.train, self.state
        self.records.clock.start()
        self.health.start()
        if train.compile and state.step < train.steps:
            self.metrics.say("compiling with the first step, which may take minutes")
        while state.step < train.steps:
            self.profiler.begin_step(state.step + 1)
            self._launch_step()
            self.announce.traces(self.profiler.end_step(state.step), step=state.step)
            due = self._due()
            self._watch_ranks()
            self._log(due)
            self._keep(due)
            if state.step % GC_INTERVAL == 0:
                gc.collect(1)
        return self._finish()

    def _due(self) -> Due:
        """What follows the step that was launched last: the same on every rank. Collective."""
        config, step = self.config, self.state.step
        finished = step == config.train.steps
        preempted = self.guard.requested(step) and not finished
        interval = config.checkpoint.interval
        return Due(
            finished=finished,
            preempted=preempted,
            validation=config.train.eval_interval > 0 and (finished or step % config.train.eval_interval == 0),
            save=(interval > 0 and step % interval == 0) or preempted or (finished and config.checkpoint.at_end),
        )

    def _watch_ranks(self) -> None:
        """Times of all ranks, and those that keep the others waiting. Collective."""
        step = self.state.step
        stragglers = self.health.end_step(step)
        if times := self.health.times_of_ranks(step):
            self.metrics.log_ranks(step, times)
        self.announce.stragglers(stragglers, step=step)

    def _log(self, due: Due) -> None:
        """Check the state if that is due, validate, and write down the steps whose numbers are there.

        On the GPU a step is logged after the next was launched, so that the device never waits for the host.
        """
        self.health.begin("results", self.state.step)
        checked = self.health.check(self.state.step, save=due.save)
        one_behind = self.device.type == "cuda" and not (due.finished or due.validation or due.save or checked)
        records = self.records.collect(keep=1 if one_behind else 0)
        for record in records:
            self.health.add_step(record["step_seconds"])
            record["goodput"] = self.goodput.after(record["step_seconds"])
        if checked:
            self.records.clock.start()
        if due.validation:
            records[-1] |= self._validate()
        for record in records:
            self.metrics.log(record)
            if (skipped := self.records.judge(record)) is not None:
                self.metrics.event("skipped_step", skipped, step=record["step"])
                self.records.check_skipped(skipped)
            self._loss = record["loss"]

    def _keep(self, due: Due) -> None:
        """A checkpoint, or copies for peers, if they are due. Raises Preempted behind the checkpoint that it saves."""
        step = self.state.step
        if due.save:
            self._save(blocking=due.preempted)
        if due.preempted:
            self.metrics.event("preempted", f"saved at step {step}; start again to continue", step=step)
            raise Preempted(f"preempted at step {step}; the state is in {self.run_dir}/checkpoints")
        if self.peers is not None and step % self.config.resilience.peer_interval == 0 and not due.finished:
            self.peers.save(step, self.state.state_tensors(), self._extra())
        self.announce.checkpoints(self.checkpoints.committed())

    def _finish(self) -> dict[str, Any]:
        """What is left when all steps are done: the last checkpoint, and what the run says of itself."""
        state = self.state
        self.health.begin("checkpoint", state.step)
        if self.checkpoints.saving:
            self.metrics.say("waiting for the last checkpoint to be written")
        self.checkpoints.wait()
        self.announce.checkpoints(self.checkpoints.committed())
        self.health.begin("sample", state.step)
        self.announce.prediction(self.records, world_size=self.world_size, device=self.device, step=state.step)
        if isinstance(state.passes, PipelinedPasses) and self.config.parallel.pp_trace:
            picture = state.passes.write_trace(self.run_dir)
            if picture is not None:
                self.metrics.picture("pipeline_timeline", picture, step=state.step)
        sample = self.announce.sample(state, self.train_data.tokenizer)
        return {"step": state.step, "loss": self._loss, "validation_loss": self._validation_loss, "sample": sample}

    def _launch_step(self) -> None:
        """Run one step; on the GPU, only enqueue it. Its numbers come with `StepRecords.collect`."""
        started = time.perf_counter()
        step = self.state.step + 1
        self.health.begin("data", step)
        if self.faults is not None:
            self.faults.before_step(self, step)
        batches = self.recipe.collect(self.train_data)
        report = self.recipe.report()
        microbatches = [self._parts.of(self._targets(batch, training=True)).to(self.device) for batch in batches]
        data_wait = time.perf_counter() - started
        microbatches = self.recipe.prepare(microbatches)
        lr = learning_rate(
            self.config.schedule, base_lr=self.config.optim.lr, step=step, total_steps=self.config.train.steps
        )
        self.health.begin("step", step)
        metrics = self.health.computed(lambda: train_step(self.state, microbatches, lr=lr))
        metrics.extra |= self.recipe.measured()
        positions = self.tokens_per_step if report.positions is None else report.positions
        self.tokens += positions
        record = {"step": step, "lr": lr, "tokens": self.tokens, "data_wait_seconds": data_wait} | report.metrics
        self.records.launched(record, metrics, positions=positions)
        for kind, text in report.events:
            self.metrics.event(kind, text, step=step)

    def _targets(self, batch: Batch, *, training: bool) -> Batch:
        """A batch of whole sequences with what is to be predicted beyond the next token."""
        model = self.config.model
        if model.speculator.kind != "none":
            return targets(batch, model)
        return batch.look_ahead(model.mtp.depth) if training else batch

    def _prepared(self, step: list[Batch]) -> list[Batch]:
        """Micro-batches of a validation as the objective wants them, or as they are read where they are prompts."""
        self.health.begin("validation", self.state.step)
        if self.recipe.validates_prompts:
            return step
        parts = [self._parts.of(self._targets(batch, training=False)).to(self.device) for batch in step]
        return self.recipe.prepare(parts)

    # ---- now and then

    def _validate(self) -> dict[str, float]:
        """Validation of the current weights: its fields of the step's record. Its time belongs to no step."""
        assert self.validation_data is not None
        batches = self.validation_data.batches(self.config.train.eval_batches)
        found = self.recipe.validate(self.state, map(self._prepared, batches))
        self._validation_loss = found.get("loss")
        for kind, text, fields in self.recipe.validation_events():
            self.metrics.event(kind, text, step=self.state.step, **fields)
        self.records.clock.start()
        return self.recipe.validation_metrics(found)

    def _save(self, *, blocking: bool) -> None:
        """Checkpoint the state after the current step. Not blocking: written while training goes on."""
        self.health.begin("checkpoint", self.state.step)
        if blocking or not self.config.checkpoint.asynchronous:
            self.metrics.say(f"saving step {self.state.step} to {self.run_dir}/checkpoints")
        self.checkpoints.save(self.state.step, self.state.state_tensors(), self._extra(), blocking=blocking)
        self.announce.checkpoints(self.checkpoints.committed())
        self.records.clock.start()

    def _extra(self) -> dict[str, Any]:
        """Everything of a checkpoint that is no tensor; the same on every rank. Collective."""
        return {
            "step": self.state.step,
            "tokens": self.tokens,
            **self.records.state_dict(),
            "recipe": self.recipe.state_dict(),  # before the data, of which it may draw more to be complete
            "data": self.train_data.state_dict(self._all_gather),
            "model": model_identity(self.config.model),
            "tokenizer": self.train_data.tokenizer.fingerprint() if self.train_data.tokenizer is not None else None,
            "seed": self.config.train.seed,
            "config": asdict(self.config),
        } | ({} if self.adapter is None else {"adapter": self.adapter})

    def _all_gather(self, value: Any) -> list[Any]:
        """One object of every data-parallel rank, in rank order."""
        values: list[Any] = [None] * self.dims.dp
        dist.all_gather_object(values, value, group=self.mesh.samples.get_group())
        return values

    def close(self) -> None:
        """Stop background work and flush every sink. Call it also after a failure.

        A checkpoint under way is finished, unless a rank has failed: writing takes all of them.
        """
        seconds = max(self.config.train.timeout_seconds, self.config.resilience.checkpoint_seconds)
        with self.watchdog.watching("closing", step=self.state.step, seconds=seconds):
            self._close()

    def _close(self) -> None:
        self.recipe.close()
        self.guard.close()
        self.train_data.close()
        if self.validation_data is not None:
            self.validation_data.close()
        self.metrics.close()
        if self.peers is not None and not self._alone:
            self.peers.close()
        if not self._alone:
            self.checkpoints.close()
            self.lock.release()  # else with the process: a checkpoint may still be being written
