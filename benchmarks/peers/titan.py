"""TorchTitan's Llama 3, trained for a few steps by TorchTitan's own trainer.

    torchrun --nproc-per-node 4 benchmarks/peers/titan.py llama3_8b --micro-batch-size 2 --checkpoint selective-op
    torchrun --nproc-per-node 4 benchmarks/peers/titan.py llama3_8b --fp8 rowwise

Prints the JSON object of benchmarks/train.py. Model, parallelisation, compilation, loss, optimizer and step are those
of TorchTitan; from here come the shape, random tokens, and what it has no setting for: tied embeddings (Llama 3.2),
and FSDP2 on a single GPU (--precision autocast is what it does there by itself). fp8 leaves the output layer out, as
its documentation says, and with tensorwise scales gathers weights in fp8. Written for TorchTitan 0.2.2, the last that
runs on torch 2.11, and torchao 0.17.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as TorchTitan's own launch script

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone, installed or not

from benchmarks.peers.measure import check_size, measured_steps, parse, parser, random_batches, report, summary
from models.config import ModelConfig

SCALES = ("none", "tensorwise", "rowwise", "rowwise_with_gw_hp")
SPEC = "lattice_peer"
"""The name under which TorchTitan knows model and tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument(
        "--checkpoint", default="none", help="none, full, selective-op, selective-N or budget-FRACTION"
    )
    options.add_argument("--fp8", default="none", choices=SCALES, help="scales of linear layers")
    args, config = parse(options, argv)
    try:
        checkpointing(args.checkpoint)
        ffn_sizes(config)
    except ValueError as error:
        options.error(str(error))
    report(run(args, config), args.out)
    dist.destroy_process_group()
    return 0


def checkpointing(name: str) -> dict[str, Any]:
    """Fields of TorchTitan's ActivationCheckpoint. Raises ValueError for a name that says none."""
    mode, _, option = name.partition("-")
    if mode in ("none", "full") and not option:
        return {"mode": mode}
    if mode == "selective" and (option == "op" or option.isdigit()):
        return {"mode": mode, "selective_ac_option": option}
    if mode == "budget" and option.replace(".", "", 1).isdigit():
        return {"mode": "memory_budget", "memory_budget": float(option)}
    raise ValueError(f"--checkpoint {name} is unknown; use none, full, selective-op, selective-2 or budget-0.5")


def ffn_sizes(config: ModelConfig) -> dict[str, Any]:
    """Fields that make TorchTitan's feed-forward layers as wide as ours: it rounds 8/3 D up to a multiple."""
    start = int(2 * (4 * config.hidden_size) / 3)
    if not start <= config.intermediate_size:
        raise ValueError(
            f"model.intermediate_size={config.intermediate_size} is below 8/3 of model.hidden_size="
            f"{config.hidden_size}, where TorchTitan starts; use llama3_1b or llama3_8b"
        )
    return {"multiple_of": config.intermediate_size, "ffn_dim_multiplier": None}


def job_settings(args: argparse.Namespace, *, world_size: int, folder: str) -> dict[str, Any]:
    """Settings of TorchTitan's JobConfig that are not its defaults, by dotted name."""
    settings: dict[str, Any] = {
        "job.dump_folder": folder,
        "model.name": SPEC,
        "model.flavor": "shape",
        "training.local_batch_size": args.micro_batch_size,
        "training.seq_len": args.seq_len,
        "training.steps": args.steps,
        "optimizer.lr": 3e-4,
        "lr_scheduler.warmup_steps": 2,
        "metrics.log_freq": 10**9,  # logging waits for the GPU
        "comm.trace_buf_size": 0,
        "parallelism.fsdp_reshard_after_forward": "default" if args.zero_stage == 3 else "never",
        "compile.enable": args.compile,
    }
    settings |= {f"activation_checkpoint.{name}": value for name, value in checkpointing(args.checkpoint).items()}
    if args.fp8 != "none":
        settings |= {"model.converters": ["quantize.linear.float8"], "quantize.linear.float8.filter_fqns": ["output"]}
    if args.fp8 == "tensorwise":
        gathered = world_size > 1
        settings["quantize.linear.float8.enable_fsdp_float8_all_gather"] = gathered
        settings["quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"] = gathered
    elif args.fp8 != "none":
        settings["quantize.linear.float8.recipe_name"] = args.fp8
    return settings


def apply_settings(job: Any, settings: dict[str, Any]) -> Any:
    """Set nested fields by dotted name. Raises AttributeError for one that this version does not have."""
    for name, value in settings.items():
        *groups, field = name.split(".")
        target = job
        for group in groups:
            target = getattr(target, group)
        getattr(target, field)
        setattr(target, field, value)
    return job


def run(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    """Build, train, measure. Collective."""
    from torchtitan.config import JobConfig

    register(args, config)
    with tempfile.TemporaryDirectory() as folder:
        settings = job_settings(args, world_size=int(os.environ["WORLD_SIZE"]), folder=folder)
        trainer, step = build(args, apply_settings(JobConfig(), settings))
        check_size(config, sum(parameter.numel() for parameter in trainer.model_parts[0].parameters()))
        steps = measured_steps(step, args, config, trainer.device)
        trainer.close()
    return summary(
        "torchtitan",
        steps,
        args,
        config,
        trainer.device,
        kernels={
            "attention": "sdpa, cuDNN first",
            "loss": "cross_entropy" + (", compiled" if args.compile else ""),
            "blocks": "torch.compile(inductor)" if args.compile else "eager",
            "activation_checkpoint": args.checkpoint,
            "optimizer": "adamw, fused",
            "data_parallel": f"fsdp2, zero{args.zero_stage}" if args.precision == "fsdp" else "none",
        },
        precision={
            "compute": "bf16" if args.fp8 == "none" else f"fp8 ({args.fp8})", "master": "fp32", "reduce": "fp32",
        },
        versions={name: version(name) for name in ("torchtitan", *(["torchao"] if args.fp8 != "none" else []))},
    )  # fmt: skip


def build(args: argparse.Namespace, job: Any) -> tuple[Any, Callable[[], Tensor]]:
    """TorchTitan's trainer, and one step of it that returns this rank's summand of the loss."""
    from torchtitan.distributed import ParallelDims
    from torchtitan.train import Trainer

    class AlwaysSharded(ParallelDims):
        """Uses FSDP2, and so its mixed precision, also over one rank."""

        fsdp_enabled = property(lambda self: True)

        def _mesh_exist(self, name: str, degree: int) -> bool:
            return name == "fsdp" or super()._mesh_exist(name, degree)

    class MeasuredTrainer(Trainer):
        last_loss: Tensor

        def init_distributed(self) -> ParallelDims:
            dims = super().init_distributed()
            if args.precision == "autocast":
                return dims
            return AlwaysSharded(
                **{field.name: getattr(dims, field.name) for field in fields(dims) if not field.name.startswith("_")}
            )

        def forward_backward_step(self, **batch: Any) -> Tensor:
            self.last_loss = super().forward_backward_step(**batch)
            return self.last_loss

    trainer = MeasuredTrainer(job)
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> Tensor:
        trainer.step += 1
        # Its first step would be logged, which waits for the GPU; that is in the warm-up.
        trainer.train_step(batches)
        return trainer.last_loss

    return trainer, step


def register(args: argparse.Namespace, config: ModelConfig) -> None:
    """Tell TorchTitan the shape, and where tokens come from."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.components.lr_scheduler import build_lr_schedulers
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
    from torchtitan.models.llama3.model.args import RoPEScalingArgs
    from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

    class Tied(Transformer):
        """The output layer's weight is also the embedding, and belongs to the root group of FSDP2."""

        def __init__(self, model_args: TransformerModelArgs) -> None:
            super().__init__(model_args)
            self.tok_embeddings = None

        def forward(self, tokens: Tensor, **options: Any) -> Tensor:
            return super().forward(F.embedding(tokens, self.output.weight), **options)

    class RandomTokens(BaseDataLoader):
        def __init__(self, rank: int) -> None:
            self.batches = random_batches(args, config, rank)

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            while True:
                yield from (({"input": tokens[:, :-1]}, tokens[:, 1:].contiguous()) for tokens in self.batches)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    shape = TransformerModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_layers,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        norm_eps=config.norm_eps,
        rope_theta=config.rope.theta,
        rope_scaling_args=RoPEScalingArgs(
            scaling_factor=config.rope.factor,
            low_freq_factor=config.rope.low_freq_factor,
            high_freq_factor=config.rope.high_freq_factor,
            original_max_position_embeddings=config.rope.original_max_seq_len,
        ),
        **ffn_sizes(config),
    )
    register_train_spec(
        SPEC,
        TrainSpec(
            model_cls=Tied if config.tie_embeddings else Transformer,
            model_args={"shape": shape},
            parallelize_fn=parallelize_tied if config.tie_embeddings else parallelize_llama,
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=lambda dp_rank, **_: RandomTokens(dp_rank),
            build_tokenizer_fn=None,
            build_loss_fn=build_cross_entropy_loss,
        ),
    )


def parallelize_tied(model: nn.Module, dims: Any, job: Any) -> nn.Module:
    """What parallelize_llama does for data parallelism, in its order, with the tied weight in the root group."""
    from torchtitan.distributed.activation_checkpoint import apply_ac
    from torchtitan.models.llama3.infra import parallelize

    if job.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job.activation_checkpoint,
            model_compile_enabled=job.compile.enable,
            op_sac_save_list=parallelize._op_sac_save_list,
            base_folder=job.job.dump_folder,
        )
    if job.compile.enable:
        parallelize.apply_compile(model, job.compile)
    if dims.fsdp_enabled:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        reshard = job.parallelism.fsdp_reshard_after_forward != "never"
        for block in model.layers.values():
            fully_shard(block, mesh=dims.get_mesh("fsdp"), mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(model, mesh=dims.get_mesh("fsdp"), mp_policy=policy, reshard_after_forward=False)
        parallelize.disable_fsdp_gradient_division(model)
    return model


if __name__ == "__main__":
    sys.exit(main())
