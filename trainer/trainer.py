"""Trainer: from a validated TrainConfig to a finished run directory."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data.loader import Loader, build_loader
from data.tokenizer import Tokenizer
from models.flops import flops_per_token
from models.hf import load_hf_weights
from models.registry import build_model

from models.init import initialize
from models.layers.attention import choose_attention
from parallel.activation_checkpoint import ActivationCheckpoint
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh, data_mesh, init_distributed, pick_device
from parallel.parallelize import BlockOptions, parallelize
from trainer.checkpoint import CheckpointManager, read_extra, resolve_resume
from trainer.config import ConfigError, TrainConfig
from trainer.loss_scale import LossScale
from trainer.metrics import MetricLogger
from trainer.optim import build_optimizer
from trainer.resilience import PreemptionGuard
from trainer.run_dir import prepare_run_dir
from trainer.run_info import RunInfo, write_config, write_run_info
from trainer.sample import sample_text
from trainer.schedule import learning_rate
from trainer.throughput import peak_flops
from trainer.step import StepMetrics, TrainState, evaluate, train_step

log = logging.getLogger(__name__)

GC_INTERVAL = 50
"""Steps between garbage collections. They are switched off otherwise: one that falls on a different step on each rank
makes all ranks wait for each in turn."""


class Preempted(Exception):
    """The run saved and stopped because it was told to; the launcher should start it again."""


class TrainingDiverged(Exception):
    """Loss or gradients were not finite and the configuration says to stop."""


@dataclass
class _Pending:
    """A step whose numbers are still on their way to the host."""

    step: int
    lr: float
    data_wait: float
    values: torch.Tensor  # [5] fp64 on the host: loss, grad_norm, skipped, valid_tokens, loss_scale
    ready: torch.cuda.Event | None


class Trainer:
    """One run. Build it on every rank with the same configuration, call `run`, then `close`."""

    def __init__(self, config: TrainConfig) -> None:
        """config: validated, with the model resolved (trainer.validate.finalize)."""
        self.config = config
        self.device = pick_device(config.train.device)
        init_distributed(self.device, config.train.timeout_seconds)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.dims = ParallelDims.resolve(config.parallel, self.world_size)
        self.mesh = build_mesh(self.dims, self.device.type)
        self.dp_mesh = data_mesh(self.mesh)
        self.run_dir = Path(config.run.dir)
        self.checkpoints = CheckpointManager(self.run_dir / "checkpoints", config.checkpoint, device=self.device)
        self.resume_from = resolve_resume(config.checkpoint.resume, self.run_dir / "checkpoints")
        prepare_run_dir(config, resuming=self.resume_from is not None)

        self.train_data, self.validation_data = self._build_data()
        self.state = self._build_state()
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_len
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._load()
        self.metrics = MetricLogger(
            self.run_dir,
            config.logging,
            is_main=self.is_main,
            total_steps=config.train.steps,
            run_name=config.run.name,
            config_dict=asdict(config),
            resume_step=self.state.step,
        )
        self.guard = PreemptionGuard()
        self._pending: deque[_Pending] = deque()
        self._step_started = time.perf_counter()
        self._validation: dict[int, float] = {}
        self._describe()

    # ---- setting up

    def _build_data(self) -> tuple[Loader, Loader | None]:
        config, train = self.config, self.config.train

        def build(split: str) -> Loader:
            return build_loader(
                config.data,
                seq_len=train.seq_len,
                global_batch_size=train.global_batch_size,
                micro_batch_size=train.micro_batch_size,
                rank=self.dp_mesh.get_local_rank(),
                world_size=self.dims.dp,
                seed=train.seed,
                split=split,
                vocab_size=config.model.vocab_size,
                device_type=self.device.type,
            )

        return build("train"), build("validation") if train.eval_interval > 0 else None

    def _build_state(self) -> TrainState:
        config = self.config
        with torch.device("meta"):
            model = build_model(config.model, seed=config.train.seed)
        checkpointing = ActivationCheckpoint(
            mode=config.model.activation_checkpoint, save=config.model.activation_checkpoint_save
        )
        data_parallel = parallelize(
            model,
            self.mesh,
            config.parallel,
            precision=config.precision,
            blocks=BlockOptions(checkpointing, config.train.compile_backend if config.train.compile else None),
            device=self.device,
        )
        model.train()
        self.initializers = model.initializers()
        return TrainState(
            model=model,
            data_parallel=data_parallel,
            optimizer=build_optimizer(data_parallel.masters, config.optim),
            loss_scale=LossScale(config.precision, self.device),
            dp_group=self.dp_mesh.get_group(),
            device=self.device,
            grad_clip=config.train.grad_clip,
            compile_loss=config.train.compile,
        )

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor a checkpoint holds, by name. Loaded in place."""
        state = self.state
        tensors = {f"model/{name}": p for name, p in state.data_parallel.masters.items()}
        tensors |= {f"optim/{name}": t for name, t in state.optimizer.state_tensors().items()}
        tensors |= {f"loss_scale/{name}": t for name, t in state.loss_scale.state_tensors().items()}
        return tensors

    def _load(self) -> None:
        """Weights from a checkpoint, from a Hugging Face folder, or drawn; then into the model."""
        masters = self.state.data_parallel.masters
        if self.resume_from is not None:
            self._check_same_model(self.resume_from)
            extra = self.checkpoints.load(self.resume_from, self._state_tensors())
            self.state.step = extra["step"]
            self.skipped_steps = extra["skipped_steps"]
            self.train_data.load_state_dict(extra["data"])
        elif self.config.model.path is not None:
            load_hf_weights(self.config.model.path, masters, self.config.model)
        else:
            initialize(masters, self.initializers, self.config.train.seed)
        self.state.data_parallel.publish()

    def _check_same_model(self, path: Path) -> None:
        """Raise ConfigError if the checkpoint is of a model of another shape, naming each field that differs."""
        theirs, ours = read_extra(path)["model"], self._identity()
        different = [
            f"model.{k}={ours.get(k)} (checkpoint: {theirs.get(k)})"
            for k in sorted(ours.keys() | theirs.keys())
            if ours.get(k) != theirs.get(k)
        ]
        if different:
            raise ConfigError(
                [f"checkpoint {path} is of another model: {', '.join(different)}; use its model, or another run.dir"]
            )

    def _identity(self) -> dict[str, Any]:
        """The fields of the model that say what its weights mean; others may change between runs."""
        runtime = {"path", "attention", "activation_checkpoint", "activation_checkpoint_save", "init_std"}
        runtime |= {"dropout", "attention_dropout"}
        return {k: v for k, v in asdict(self.config.model).items() if k not in runtime}

    def _describe(self) -> None:
        """config.yaml, run.json and one line on the console: what really runs."""
        device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        peak_tflops = self.config.logging.peak_tflops
        self.peak_flops = peak_tflops * 1e12 if peak_tflops else peak_flops(device_name, self.config.precision.compute)
        self.flops_per_token = flops_per_token(self.config.model, self.config.train.seq_len)
        num_parameters = sum(p.numel() for p in self.state.data_parallel.masters.values())
        train, precision = self.config.train, self.config.precision
        info = RunInfo(
            device=self.device,
            world_size=self.world_size,
            mesh=dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True)),
            kernels={
                "attention": choose_attention(
                    self.config.model, self.device, documents=self.config.data.mask_documents
                ),
                "loss": "linear_cross_entropy" + (", compiled" if train.compile else ""),
                "blocks": f"torch.compile({train.compile_backend})" if train.compile else "eager",
                "activation_checkpoint": self.config.model.activation_checkpoint,
                "optimizer": self.config.optim.name,
                "data_parallel": f"zero{self.config.parallel.zero_stage}",
            },
            precision={"compute": precision.compute, "master": precision.master, "reduce": precision.reduce},
            flops_per_token=self.flops_per_token,
            peak_flops=self.peak_flops,
            resume_step=self.state.step,
        )
        if self.is_main:
            write_config(self.run_dir, self.config)
            write_run_info(self.run_dir, info)
        self.metrics.event(
            "resume" if self.resume_from else "start",
            f"{self.config.model.family}, {num_parameters / 1e6:,.1f}M parameters, {self.world_size} x {device_name}, "
            f"ZeRO-{self.config.parallel.zero_stage}, {self.config.precision.compute}"
            + (f"; resumed from {self.resume_from} at step {self.state.step}" if self.resume_from else ""),
            step=self.state.step,
        )

    # ---- training

    def run(self) -> dict[str, Any]:
        """Train to train.steps. Returns {"step", "loss", "validation_loss", "sample"}.

        Raises Preempted after saving when a signal asked for it, TrainingDiverged as train.nonfinite says.
        """
        gc.collect()
        gc.disable()
        try:
            return self._run()
        finally:
            gc.enable()

    def _run(self) -> dict[str, Any]:
        config, state = self.config, self.state
        last: dict[str, Any] = {"step": state.step, "loss": None}
        self._step_started = time.perf_counter()
        while state.step < config.train.steps:
            started = time.perf_counter()
            microbatches = [batch.to(self.device) for batch in self.train_data.next_step()]
            data_wait = time.perf_counter() - started
            lr = learning_rate(
                config.schedule, base_lr=config.optim.lr, step=state.step + 1, total_steps=config.train.steps
            )
            self._push(train_step(state, microbatches, lr=lr), lr=lr, data_wait=data_wait)
            finished = state.step == config.train.steps
            if config.train.eval_interval > 0 and (finished or state.step % config.train.eval_interval == 0):
                self._evaluate()
            preempted = self.guard.requested(state.step)
            due = config.checkpoint.interval > 0 and state.step % config.checkpoint.interval == 0
            boundary = finished or preempted or due
            # With the GPU one step ahead of the host, logging a step never waits for the one just launched.
            last = self._drain(keep=0 if boundary or self.device.type == "cpu" else 1) or last
            if due or preempted or (finished and config.checkpoint.at_end):
                self._save(blocking=preempted)
            if preempted and not finished:
                self.checkpoints.wait()
                self.metrics.event("preempted", f"saved at step {state.step}; start again to continue", step=state.step)
                raise Preempted(f"preempted at step {state.step}; the state is saved in {self.run_dir}/checkpoints")
            if state.step % GC_INTERVAL == 0:
                gc.collect(1)
        self.checkpoints.wait()
        result = last | {"step": state.step, "validation_loss": self._last_validation(), "sample": self._sample()}
        return result

    def _push(self, metrics: StepMetrics, *, lr: float, data_wait: float) -> None:
        """Start copying a step's numbers to the host."""
        on_device = torch.stack(
            [
                t.double()
                for t in (metrics.loss, metrics.grad_norm, metrics.skipped, metrics.valid_tokens, metrics.loss_scale)
            ]
        )
        ready = None
        values = on_device
        if self.device.type == "cuda":
            values = torch.empty_like(on_device, device="cpu", pin_memory=True)
            values.copy_(on_device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Pending(self.state.step, lr, data_wait, values, ready))

    def _drain(self, *, keep: int) -> dict[str, Any] | None:
        """Log all pending steps but the newest `keep`; the last record logged."""
        record = None
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()
            record = self._record(pending)
            self.metrics.log(record)
            self._judge(pending.step, skipped=bool(pending.values[2]), record=record)
        return record

    def _record(self, pending: _Pending) -> dict[str, Any]:
        """The metrics.jsonl object of a step; see docs/METRICS.md."""
        now = time.perf_counter()
        seconds, self._step_started = now - self._step_started, now
        loss, grad_norm, skipped, valid_tokens, loss_scale = pending.values.tolist()
        self.skipped_steps += int(skipped)
        rate = self.tokens_per_step / seconds / self.world_size
        record: dict[str, Any] = {
            "step": pending.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": pending.lr,
            "tokens": pending.step * self.tokens_per_step,
            "valid_tokens": int(valid_tokens),
            "tokens_per_second_per_gpu": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "peak_memory_gib": self._peak_memory_gib(),
            "step_seconds": seconds,
            "data_wait_seconds": pending.data_wait,
            "skipped_steps": self.skipped_steps,
        }
        if self.state.loss_scale.dynamic:
            record["loss_scale"] = loss_scale
        if pending.step in self._validation:
            record["validation_loss"] = self._validation[pending.step]
            record["validation_perplexity"] = float(torch.tensor(self._validation[pending.step]).double().exp())
        return record

    def _peak_memory_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

    def _judge(self, step: int, *, skipped: bool, record: dict[str, Any]) -> None:
        """React to a step that was skipped because loss or gradients were not finite."""
        if not skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        what = f"step {step}: loss {record['loss']}, grad_norm {record['grad_norm']}; the update was skipped"
        self.metrics.event("nonfinite", what, step=step)
        train = self.config.train
        # Under fp16 a skipped step is how the loss scale finds its size, not a fault.
        if train.nonfinite == "stop" and not self.state.loss_scale.dynamic:
            raise TrainingDiverged(f"{what}; the run stops because train.nonfinite=stop")
        if self._skipped_in_a_row >= train.max_skipped_steps:
            raise TrainingDiverged(
                f"{what}; {self._skipped_in_a_row} in a row (train.max_skipped_steps={train.max_skipped_steps}): "
                "lower optim.lr or look at the data"
            )

    # ---- now and then

    def _evaluate(self) -> None:
        """Validation of the current weights; its time is not the step's."""
        assert self.validation_data is not None
        self._settle()
        started = time.perf_counter()
        microbatches = (b for step in self.validation_data.batches(self.config.train.eval_batches) for b in step)
        self._validation = {self.state.step: evaluate(self.state, microbatches)}
        self._step_started += time.perf_counter() - started

    def _settle(self) -> None:
        """Wait for the device, so that what follows is not counted into the running step's time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _last_validation(self) -> float | None:
        return next(iter(self._validation.values()), None)

    def _save(self, *, blocking: bool) -> None:
        state = self.state
        extra = {
            "step": state.step,
            "skipped_steps": self.skipped_steps,
            "data": self.train_data.state_dict(self._all_gather),
            "model": self._identity(),
            "seed": self.config.train.seed,
            "config": asdict(self.config),
        }
        started = time.perf_counter()
        self.checkpoints.save(state.step, self._state_tensors(), extra, blocking=blocking)
        self._step_started += time.perf_counter() - started
        self.metrics.event("checkpoint", f"step {state.step}: checkpoint started", step=state.step)

    def _all_gather(self, value: Any) -> list[Any]:
        """One object of every data-parallel rank, in rank order."""
        values: list[Any] = [None] * self.dims.dp
        dist.all_gather_object(values, value, group=self.state.dp_group)
        return values

    def _sample(self) -> str | None:
        train = self.config.train
        tokenizer: Tokenizer | None = self.train_data.tokenizer
        if train.sample_tokens == 0 or tokenizer is None:
            return None
        return sample_text(
            self.state,
            tokenizer,
            prompt=train.sample_prompt,
            num_tokens=train.sample_tokens,
            max_seq_len=train.seq_len,
            seed=train.seed,
        )

    def close(self) -> None:
        """Stop background work and flush every sink. Safe to call after a failure."""
        self.guard.close()
        self.train_data.close()
        if self.validation_data is not None:
            self.validation_data.close()
        self.metrics.close()
        self.checkpoints.close()
