"""TrainConfig: everything a run is made of. Composed by Hydra, checked at once (trainer/validate.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from data.config import DataConfig
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from parallel.dims import ParallelConfig
from parallel.precision import PrecisionConfig
from trainer.rl.answers_config import AnswersConfig
from trainer.rl.config import RLConfig
from trainer.rl.ppo_config import PPOConfig

NONFINITE = ("skip", "stop")
OPTIMIZERS = ("adamw", "muon")
OPTIMIZER_KERNELS = ("auto", "torch", "triton")
LOSS_KERNELS = ("auto", "torch", "triton")
STATE_DTYPES = ("fp32", "bf16", "int8")
SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclass
class ProfileConfig:
    """`train.profile`: what is traced into run.dir/profile."""

    steps: list[int] = field(default_factory=list)  # numbers of steps, such as [6,7,8]; empty: none
    ranks: list[int] = field(default_factory=lambda: [0])  # that write a trace; empty: all
    memory: bool = False  # with every allocation; on CUDA also as a snapshot for pytorch.org/memory_viz
    nvtx: bool = False  # CUDA: operations as NVTX ranges for `nsys profile`, instead of a trace


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
    # Of next-token losses, between the matrix products. torch: its operations, compiled with compile; triton:
    # kernels/cross_entropy, CUDA alone; auto: see trainer/loss.py, choose_loss_kernel.
    loss_kernel: str = "auto"  # one of LOSS_KERNELS
    cuda_graphs: bool = False  # CUDA, stages 0 and 1: a micro-batch is one launch (trainer/graphed.py)
    device: str = "auto"  # auto (cuda where there is one), cuda, cpu
    nonfinite: str = "skip"  # loss or gradient not finite: skip the step, or stop the run
    max_skipped_steps: int = 100  # this many non-finite steps in a row end the run
    eval_interval: int = 0  # validation every so many steps; 0: never
    eval_batches: int = 8  # global batches of a validation
    sample_tokens: int = 0  # length of the text sampled when the run ends; 0: none
    sample_prompt: str = "def "
    deterministic: bool = False  # on CUDA, two runs give the same bits, more slowly; on the CPU they always do
    # A token's forward has the same bits whatever is computed beside it, those of engine.deterministic=true; slower.
    batch_invariant: bool = False
    timeout_seconds: float = 600.0  # a collective that waits longer ends the run
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def compiles_loss(self) -> bool:
        """Other backends than inductor show how blocks are captured; they would make the loss no faster."""
        return self.compile and self.compile_backend == "inductor"


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
class ResilienceConfig:
    """`resilience`: what is watched while training, and how soon (docs/FAULTS.md)."""

    # train.timeout_seconds is what a step, a validation's batch or waiting for data may take; these may take longer.
    first_step_seconds: float = 3600.0  # of a start: blocks are compiled, workers started
    loading_seconds: float = 3600.0  # at a start: looking for a checkpoint or copies that are whole, reading weights
    checkpoint_seconds: float = 3600.0  # waiting for a checkpoint that is being written
    # Steps between comparisons of the state's bits, over replicas and with before; also at each checkpoint; 0: never
    check_interval: int = 100
    rerun_interval: int = 0  # steps between steps computed twice; 0: never. On CUDA with train.deterministic=true
    straggler_interval: int = 50  # steps between comparisons of how long ranks keep each other waiting; 0: never
    straggler_share: float = 0.1  # of a step's time that a rank may be later than the others before it is named
    peer_interval: int = 0  # steps between copies of the state in the memory of this host and another; 0: none
    peer_dir: str = "/dev/shm"  # for them: memory that outlives the process


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
    hardware: str | None = None  # rates to compare the run with at its end: as plan.hardware; None: the device's own


@dataclass
class RecipeConfig:
    """`recipe`: what is trained for; a file of trainer/recipes."""

    name: str = "pretrain"  # one of trainer.recipes.RECIPES
    rl: RLConfig = field(default_factory=RLConfig)  # of recipe=grpo and its family, and of ppo
    ppo: PPOConfig = field(default_factory=PPOConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)  # sft and distill: what validation generates
    neftune_alpha: float = 0.0  # sft: of noise on embeddings (TRL's neftune_noise_alpha); 5 to 15 are usual, 0: none
    # dpo, of which the family and its numbers are defined in trainer/preference_losses.py
    loss: str = "sigmoid"  # sigmoid, robust, ipo, hinge, simpo, orpo
    beta: float = 0.1  # how far the policy may go from the reference; of orpo the weight of the loss beside nll
    label_smoothing: float = 0.0  # sigmoid, robust: share of pairs whose answers are taken to be the wrong way round
    gamma: float = 0.0  # simpo: by how much the chosen answer is to be ahead
    nll_weight: float = 0.0  # of the negative log-likelihood per token of the chosen answers; of orpo it is 1
    desirable_weight: float = 1.0  # kto: of the losses of good answers
    undesirable_weight: float = 1.0  # kto: of those of bad ones
    centering: float = 0.0  # reward: weight of the square of the sum of both rewards of a pair, which have no zero else
    # model: one beside the policy; precomputed: numbers in the rows; adapter: the policy without its adapters
    reference: str = "model"
    reference_path: str | None = None  # its Hugging Face folder; None: what the run begins with
    reference_offload: bool = False  # its weights stay in host memory
    # distill, as defined in kernels/linear_cross_entropy/divergence.py; nll_weight of the labels beside it
    teacher_path: str | None = None  # its Hugging Face folder
    # What launch/teach.py wrote of it, in place of the model; beside teacher_path it has to be of that model
    teacher_cache: str | None = None
    teacher_offload: bool = False  # its weights stay in host memory
    on_policy: float = 0.0  # share of prompts that the student answers itself (GKD), with rl's engine; the rest: rows'
    divergence: float = 0.0  # 0: KL(teacher || student); 1: KL(student || teacher); between: Jensen-Shannon
    temperature: float = 1.0  # that logits of both are divided by


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
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
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
