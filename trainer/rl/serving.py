"""An engine on the weights that are trained, and what samples by it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.prompts import PromptSamples
from data.tokenizer import Tokenizer, eos_ids_of
from inference.config import EngineConfig
from inference.engine import Engine
from inference.runner import is_fused
from models.decoder import Decoder
from parallel.mesh import Meshes, groups_in_layers
from trainer.config import TrainConfig
from trainer.pipelined import PipelinedPasses
from trainer.rl.config import weight_modes
from trainer.rl.environment import Environment
from trainer.rl.overlap import on_stream
from trainer.rl.rollouts import Sampler
from trainer.rl.same_prompts import SamePrompts
from trainer.rl.twin import Twin
from trainer.rl.weights import ServedWeights
from trainer.step import TrainState


@dataclass(frozen=True)
class Room:
    """What is sampled at a time. Filled by whoever starts a sampler."""

    num_sequences: int  # of this rank
    max_len: int  # tokens of a prompt and its completion
    max_tokens: int | None  # of a completion
    ends: Collection[int] = ()  # tokens that end it, besides the tokenizer's eos

    @classmethod
    def of_rollouts(cls, config: TrainConfig, mesh: Meshes, tokenizer: Tokenizer, samples: PromptSamples) -> Room:
        """For this rank's share of train.global_batch_size completions. They end as the chat template ends answers,
        and as the folders of the model and of the tokenizer say, which is how they end when the model is served."""
        share = -(-config.train.global_batch_size // (mesh.samples.size() * SamePrompts(mesh).size))
        folders = {Path(path).expanduser() for path in (config.model.path, tokenizer.folder) if path is not None}
        ends = samples.ends.union(*(eos_ids_of(folder) for folder in folders))
        return cls(share, config.train.seq_len, config.recipe.rl.max_tokens, sorted(ends))


def start_sampler(
    config: TrainConfig,
    state: TrainState,
    mesh: Meshes,
    tokenizer: Tokenizer,
    room: Room,
    *,
    environment: Callable[[], Environment] | None = None,
    model: Decoder | None = None,
    stream: Any = None,
) -> tuple[Sampler, ServedWeights]:
    """A sampler as recipe.rl says, and what has to be done around its use. Collective.

    model: by whose weights; None: those that are trained. stream: the CUDA stream that its engine works on; None: the
    current one.
    """
    rl, trained = config.recipe.rl, state.model if model is None else model
    assert isinstance(trained, Decoder)
    mode = weight_modes(config.parallel)[0] if rl.weights == "auto" else rl.weights
    stage = state.passes.first_stage if isinstance(state.passes, PipelinedPasses) else None
    twin = None
    if stage is not None or config.parallel.sequence_parallel or config.parallel.ep > 1:
        twin = Twin(trained, config, stages=state.stage_group, device=state.device)
    weights = ServedWeights(
        trained,
        mode=mode,
        group=mesh.tokens.get_group(),
        device=state.device,
        dtype=config.precision.compute_dtype,
        stream=stream,
        twin=twin,
        stage=stage,
    )
    with weights.whole(), on_stream(stream):
        # Without a tokenizer: nobody reads an answer before its end, and text of each token takes longer than its step.
        settings = engine_config(config, room, weights.served)
        engine = Engine(weights.served, settings, eos_ids=[tokenizer.eos_id, *room.ends])
    if mode == "stream":
        engine.runner.fused = False  # fused launches read a block's weights without its forward
    tp = groups_in_layers(mesh, config.parallel).tp
    sampler = Sampler(
        engine,
        tokenizer,
        seed=config.train.seed,
        max_len=room.max_len,
        max_tokens=room.max_tokens,
        lockstep=weights.lockstep,
        environment=environment,
        max_turns=rl.max_turns,
        tp_group=None if tp is None else tp.get_group(),
    )
    return sampler, weights


def engine_config(config: TrainConfig, room: Room, model: Decoder) -> EngineConfig:
    """recipe.rl.engine with what is left open: a cache for this rank's sequences, not for the whole device, which
    training needs as well, and graphs of a model that stays where it is and is served by fused launches."""
    engine = config.recipe.rl.engine
    sequences = min(engine.max_sequences, room.num_sequences)
    graphs = engine.cuda_graphs
    if graphs is None:  # gathered weights lie elsewhere each time, and a trainer's own layers may ask the device
        graphs = weight_modes(config.parallel)[0] == "in_place" and is_fused(model)
    blocks = sequences * -(-room.max_len // engine.block_size)
    return replace(
        engine,
        max_seq_len=room.max_len,
        max_sequences=sequences,
        max_batch_tokens=max(engine.max_batch_tokens, sequences),
        num_blocks=engine.num_blocks or blocks,
        deterministic=config.train.batch_invariant,
        cuda_graphs=graphs,
        # Not while an update is given to the device: capturing waits for all of it.
        warmup=engine.warmup or (config.recipe.rl.overlap and graphs),
    )
