"""Job: what the planner needs to know of a run, with every degree resolved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from parallel.dims import ParallelConfig, ParallelDims
from parallel.pipeline.layout import PipelineLayout
from parallel.pipeline.stages import Stage, make_stages
from parallel.precision import PrecisionConfig
from planner.shapes import Parameter, parameters_of


@dataclass(frozen=True)
class Job:
    """A validated configuration (trainer/predicted.py makes it of the trainer's)."""

    model: ModelConfig  # resolved
    parallel: ParallelConfig
    dims: ParallelDims
    precision: PrecisionConfig
    pipeline: PipelineLayout | None  # None: no pipeline
    seq_len: int
    global_batch_size: int  # sequences
    micro_batch_size: int  # sequences per rank
    compiled: bool  # blocks
    loss_kernel: str  # what lies between the products of the loss: compiled, triton or torch
    optimizer: str  # adamw, muon
    state_dtype: str  # of AdamW's moments: fp32, bf16, int8
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # what is trained beside a model that is not
    beside: Job | None = None  # a model that is run and not trained, as a reference or teacher (trainer/frozen.py)
    beside_on_host: bool = False  # where its weights are
    trained: bool = True  # false: this is such a model

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """Of each micro-batch of a data-parallel rank; the last one has what is left."""
        total, size = self.global_batch_size // self.dims.dp, self.micro_batch_size
        return tuple(min(size, total - start) for start in range(0, total, size))

    @cached_property
    def tokens(self) -> int:
        """Of a whole micro-batch on one rank: context parallelism splits sequences."""
        return max(self.sequences) * self.seq_len // self.dims.cp

    @property
    def stream_tokens(self) -> int:
        """Of those, what the rank has of the residual stream: sequence parallelism splits it over tp."""
        return self.tokens // self.dims.tp if self.parallel.sequence_parallel else self.tokens

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return make_stages([self.model.num_layers]) if self.pipeline is None else self.pipeline.stages

    def parameters(self, pp_rank: int | None) -> Counter[Parameter]:
        """With their numbers, on a rank of the pipeline; None: of the whole model."""
        stages = None if pp_rank is None else self.stages_of(pp_rank)
        dtype = self.precision.compute_dtype
        return parameters_of(self.model, stages, tp=self.dims.tp, adapter=self.adapter, dtype=dtype)

    def stages_of(self, pp_rank: int) -> Sequence[Stage]:
        return self.stages if self.pipeline is None else self.pipeline.of_rank(pp_rank)
