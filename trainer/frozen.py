"""Models beside the one that is trained: references and teachers, which never change and keep nothing for backward.

They are cut as the trained one is over tp, cp and pp, run over the same pipeline ranks, and are sharded over all ranks
that hold the same layers whatever parallel.zero_stage is: in the compute dtype, gathered a block at a time
(fully_shard), or kept in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from data.batch import Batch
from data.progress import Progress
from models.config import ModelConfig
from models.decoder import Decoder, Head
from models.hf import load_hf_weights
from models.init import initialize
from models.invariant import make_batch_invariant
from models.registry import build_model, resolve_model
from parallel.dims import ParallelConfig, ParallelDims
from parallel.fused import fused_parameters, separate
from parallel.mesh import Meshes, groups_in_layers
from parallel.parallelize import BlockOptions, parallelize
from parallel.pipeline.layout import problems as pipeline_problems
from parallel.precision import DTYPES, PrecisionConfig
from parallel.problem import without_advice
from trainer.config import TrainConfig
from trainer.heads import logprobs_head
from trainer.passes import PlainPasses
from trainer.pipelined import PipelinedPasses, pipeline_layout
from trainer.sequence import problems as sequence_problems
from trainer.step import Passes
from trainer.validate_tensor import problems_of_model


class Beside(NamedTuple):
    """A model to be made by `load_frozen`."""

    model: ModelConfig  # resolved
    offload: bool


@dataclass(frozen=True)
class FrozenModel:
    """A model and how it is run; `passes` take it as their `model`."""

    model: Decoder
    passes: Passes

    def token_logprobs(self, microbatches: list[Batch], *, temperature: float = 1.0) -> list[torch.Tensor]:
        """As `Passes.token_logprobs`."""
        return self.per_token(microbatches, logprobs_head(self.model, temperature))

    def per_token(
        self, microbatches: list[Batch], head: Callable[[Batch], Head], *, everywhere: bool = True
    ) -> list[torch.Tensor]:
        """As `Passes.per_token`. Nothing of the model stays gathered."""
        found = self.passes.per_token(self.model, microbatches, head, everywhere=everywhere)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return found


def problems_beside(field: str, path: str | None, config: TrainConfig, *, score: bool = False) -> list[str]:
    """Why the model in a Hugging Face folder cannot run beside the trained one, one line each; None: it is that one.

    config: not resolved. What is wrong with its own model has been named. score: as of `resolve_beside`.
    """
    if path is None:
        return []
    try:
        beside, model = resolve_beside(path, config, score=score), resolve_model(config.model)
    except ValueError as error:
        return [str(error).replace("model.path=", f"{field}=")] if config.model.path != path or score else []
    found: list[str] = []
    if score and config.train.seq_len > beside.max_seq_len:
        longer = f"train.seq_len={config.train.seq_len} is above the {beside.max_seq_len} tokens"
        found.append(f"{field}={path}: {longer} that its model was made for; use fewer, or another model")
    # Who scores a text says no words, and may know more.
    if beside.vocab_size < model.vocab_size or (beside.vocab_size > model.vocab_size and not score):
        found.append(f"{field}={path} has {beside.vocab_size} words and the trained model {model.vocab_size}")
    for problem in (
        *problems_of_model(beside, config.parallel.tp, candidates=[1]),
        *pipeline_problems(config.parallel, beside.num_layers),
        *(sequence_problems(config, beside) if config.parallel.cp > 1 else ()),
    ):
        found.append(f"{field}={path}: {without_advice(problem)}; give another model, or layout")
    return found


def resolve_beside(path: str | None, config: TrainConfig, *, score: bool = False) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, run as the trained one is; None: its own. Raises ValueError.

    score: with the head of a reward model.
    """
    if path is None:
        return replace(config.model, activation_checkpoint="none", dropout=0.0, attention_dropout=0.0)
    model = config.model
    beside = ModelConfig(
        family="hf",
        path=path,
        attention=model.attention,
        routing=model.routing,
        fused_projections=model.fused_projections,
        score=score,
    )
    return resolve_model(beside)


def layout_beside(config: TrainConfig, *, offload: bool) -> tuple[ParallelConfig, PrecisionConfig]:
    """How a model beside the trained one is cut, and in what dtypes it is."""
    compute = next(name for name, dtype in DTYPES.items() if dtype == config.precision.compute_dtype)
    precision = replace(config.precision, compute=compute, master=compute, reduce=compute)
    return replace(config.parallel, zero_stage=3, cpu_offload=offload), precision


def load_frozen(
    model_config: ModelConfig, config: TrainConfig, mesh: Meshes, device: torch.device, *, offload: bool
) -> FrozenModel:
    """The model with the weights in model_config.path, or those that a new run would begin with. Collective.

    model_config: resolved. offload: its weights stay in host memory and are copied block by block. Raises ValueError
    for a folder that does not hold it.
    """
    parallel, precision = layout_beside(config, offload=offload)
    dims = ParallelDims.resolve(config.parallel, mesh.batch.size())
    pipeline = pipeline_layout(parallel, model_config, seq_len=config.train.seq_len)
    stages = None if pipeline is None else pipeline.of_rank(mesh.batch["pp"].get_local_rank())
    with torch.device("meta"):
        model = build_model(
            model_config, seed=config.train.seed, groups=groups_in_layers(mesh, parallel), stages=stages
        )
    model.requires_grad_(False)
    if config.train.batch_invariant:
        make_batch_invariant(model)
    backend = config.train.compile_backend if config.train.compile else None
    blocks = BlockOptions(compile_backend=backend)
    data_parallel = parallelize(model, mesh, parallel, precision=precision, blocks=blocks, device=device)
    model.eval()
    passes: Passes = PlainPasses()
    if pipeline is not None:
        passes = PipelinedPasses(
            pipeline,
            mesh=mesh,
            data_parallel=data_parallel,
            weight_gradients=None,
            model=model_config,
            dtype=precision.compute_dtype,
            device=device,
            sequence_slices=dims.tp if parallel.sequence_parallel else 1,
            trace=False,
        )
    weights = separate(dict(model.named_parameters()) | dict(model.named_buffers()), fused_parameters(model))
    if model_config.path is not None:
        progress = Progress(f"reading {model_config.path}", silent=dist.get_rank() > 0)
        whole = pipeline is None
        load_hf_weights(model_config.path, weights, model_config, whole_model=whole, on_read=progress.tensors)
        progress.finish()
    else:
        initialize(weights, model.initializers(), config.train.seed)
    data_parallel.publish()
    return FrozenModel(model, passes)
