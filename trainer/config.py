"""TrainConfig: everything a run is made of. Composed by Hydra, checked at once (trainer/validate.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from data.config import DataConfig
from models.config import ModelConfig
from parallel.dims import ParallelConfig
from parallel.precision import PrecisionConfig

NONFINITE = ("skip", "stop")
OPTIMIZERS = ("adamw", "muon")
OPTIMIZER_KERNELS = ("auto", "torch", "triton")
STATE_DTYPES = ("fp32", "bf16", "int8")
SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclass
class LoopConfig:
    """`train`: how long, on how much, how often it looks."""

    steps: int = 100
    seq_len: int = 1024  # tokens of a sequence
    global_batch_size: int = 8  # sequences of a step, over all ranks
    micro_batch_size: int = 1  # sequences per rank per micro-batch; the last one of a step has what is left
    seed: int = 0
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    compile: bool = (
        False  # torch.compile each block, and with inductor what lies between the matrix products of the loss
    )
    compile_backend: str = "inductor"
    device: str = "auto"  # auto (cuda where there is one), cuda, cpu
    nonfinite: str = "skip"  # loss or gradient not finite: skip the step, or stop the run
    max_skipped_steps: int = 100  # this many non-finite steps in a row end the run
    eval_interval: int = 0  # validation every so many steps; 0: never
    eval_batches: int = 8  # global batches of a validation
    sample_tokens: int = 0  # length of the text sampled when the run ends; 0: none
    sample_prompt: str = "def "
    deterministic: bool = False  # on CUDA, two runs give the same bits, more slowly; on the CPU they always do
    timeout_seconds: float = 600.0  # a collective that waits longer ends the run


@dataclass
class OptimConfig:
    """`optim`."""

    name: str = "adamw"  # one of OPTIMIZERS
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; vectors (norms, biases) and embeddings are not decayed
    decay_embeddings: bool = False
    momentum: float = 0.95  # muon
    nesterov: bool = True  # muon
    newton_schulz_steps: int = 5  # muon
    # Of AdamW's update and the gradient norm. triton: kernels/adamw and kernels/global_norm, off CUDA their references;
    # auto: what was measured to be faster (trainer/optim.py, AUTO_KERNEL): triton on CUDA, else torch's where it can.
    kernel: str = "auto"  # one of OPTIMIZER_KERNELS
    # adamw: of both moments, one of STATE_DTYPES. int8: of matrices, a scale per 256 elements; vectors stay fp32
    state_dtype: str = "fp32"


@dataclass
class ScheduleConfig:
    """`schedule`: the learning rate as a multiple of optim.lr."""

    name: str = "cosine"  # one of SCHEDULES
    warmup_steps: int = 0
    decay_steps: int | None = None  # wsd: length of the final decay; None: a tenth of train.steps
    final_fraction: float = 0.1  # of optim.lr at the last step (linear, cosine, wsd)


@dataclass
class CheckpointConfig:
    """`checkpoint`."""

    interval: int = 0  # steps between checkpoints; 0: only at the end and on preemption
    resume: str = "auto"  # auto: newest good one in run.dir; never; or where a new run begins: a checkpoint or a run
    keep_last: int = 3  # newest ones kept; 0: all
    keep_every: int = 0  # steps divisible by this are kept for ever; 0: none
    asynchronous: bool = True  # write while training goes on
    at_end: bool = True  # save after the last step


@dataclass
class LoggingConfig:
    """`logging`."""

    interval: int = 1  # steps between lines on the console (at most one a second; a terminal shows one live line)
    wandb: bool = False
    wandb_project: str = "lattice"
    wandb_mode: str = "offline"  # online needs an account
    tensorboard: bool = False
    console: bool = True
    peak_tflops: float | None = None  # MFU is against this; None: looked up by device name
    profile_steps: int = 0  # trace so many steps into run.dir/profile; 0: none
    profile_after: int = 5  # steps of this start before the traced ones


@dataclass
class RunConfig:
    """`run`."""

    name: str = "train"
    dir: str = "runs/train"


@dataclass
class TrainConfig:
    train: LoopConfig = field(default_factory=LoopConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)


class ConfigError(ValueError):
    """The configuration cannot be run. `problems`: one line each, with field, value and fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@contextmanager
def configuration_errors(kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Inside, an error of this kind is the configuration's fault, though only data or devices could tell."""
    try:
        yield
    except kind as error:
        raise ConfigError([str(error)]) from error
