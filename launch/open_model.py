"""A model for the inference lab: from a Hugging Face folder, or from a checkpoint of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.config import DataError
from data.progress import Progress
from data.tokenizer import Tokenizer, eos_ids_of
from launch.compose import CONFIG_DIR, compose_one
from models.config import ModelConfig
from models.decoder import Decoder
from models.hf import load_hf_weights
from models.init import initialize
from models.initializers import Constant, Normal
from models.mtp_config import MTPConfig
from models.peft import CONFIG, LowRank, load_peft
from models.registry import build_model, resolve_model
from models.speculator import Speculator, load_speculator
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.mesh import rank_from_env
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, configuration_errors
from trainer.convert import load_checkpoint, model_of_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass
class LabModelConfig:
    """`model`: what is served."""

    path: str | None = None  # a Hugging Face folder, a checkpoint, or a run: its newest good one
    dtype: str = "auto"  # of weights, activations and cache: auto (bf16 on CUDA, else fp32), or one of DTYPES
    tokenizer: str | None = None  # a tokenizer.json or its folder; None: the model's own
    chat_template: str | None = None  # a Jinja file; None: the tokenizer's own
    mtp_depth: int = 0  # blocks of multi-token prediction to read from a Hugging Face folder; a checkpoint has its own
    adapters: dict[str, str] = field(default_factory=dict)  # PEFT folders by the names that requests call them
    speculator_path: str | None = None  # folder of Medusa or EAGLE-style heads that were trained for this model


@dataclass
class OpenedModel:
    """Filled by `open_model`."""

    model: Decoder
    tokenizer: Tokenizer | None
    no_tokenizer: str | None  # why there is none
    eos_ids: list[int]  # tokens that end a document
    heads: Speculator | None = None  # that draft for it
    adapters: dict[str, dict[str, LowRank]] = field(default_factory=dict)  # by name and layer


def model_problems(config: LabModelConfig, *, needed: bool = True) -> list[str]:
    """What is wrong with `model` before any file is read; one line each. needed: there must be one."""
    found = []
    if config.path is None:
        if needed:
            found.append("model.path is missing; set model.path=DIR, a Hugging Face folder or a checkpoint")
    elif not Path(config.path).expanduser().exists():
        found.append(f"model.path={config.path} does not exist; give a Hugging Face folder or a checkpoint")
    for name, folder in config.adapters.items():
        if not (Path(folder).expanduser() / CONFIG).is_file():
            found.append(f"model.adapters.{name}={folder} has no {CONFIG}; give a folder that PEFT loads")
        if not name.strip():
            found.append(f"model.adapters has an empty name for {folder}; give it one that requests can use")
    if config.chat_template is not None and not Path(config.chat_template).expanduser().is_file():
        found.append(f"model.chat_template={config.chat_template} is no file; give one with a Jinja template")
    if config.dtype not in ("auto", *DTYPES):
        found.append(f"model.dtype={config.dtype} is unknown; use auto, {', '.join(DTYPES)}")
    return found


def model_config_of(config: LabModelConfig) -> ModelConfig:
    """What `open_model` would build, resolved, from its description alone. Raises ConfigError for a path of none."""
    assert config.path is not None
    path = Path(config.path).expanduser()
    with _configuration_errors():
        if (path / "config.json").is_file():
            return resolve_model(ModelConfig(family="hf", path=str(path)))
        return model_of_checkpoint(path, name="model.path")


def open_model(config: LabModelConfig, device: torch.device, groups: ModelParallel = NO_GROUPS) -> OpenedModel:
    """The model with its weights on `device`, in eval mode. Raises ConfigError for a folder that holds none.

    groups: the ranks its layers are cut over; each reads its own part.
    """
    assert config.path is not None
    path = Path(config.path).expanduser()
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(config.dtype, auto)
    with _configuration_errors():
        if (path / "config.json").is_file():
            opened = _open_folder(path, dtype, device, groups, mtp_depth=config.mtp_depth)
        else:
            if model_of_checkpoint(path, name="model.path").score:
                raise ValueError(
                    f"model.path={config.path} is a reward model, which says no words; give a language model"
                )
            loaded = load_checkpoint(path, name="model.path", dtype=dtype, device=device, groups=groups)
            opened = OpenedModel(loaded.model, loaded.tokenizer, loaded.no_tokenizer, [])
        if config.tokenizer is not None:
            opened.tokenizer, opened.no_tokenizer = Tokenizer.from_path(config.tokenizer), None
        if config.speculator_path is not None:
            folder = Path(config.speculator_path).expanduser()
            opened.heads = load_speculator(folder, opened.model.config, dtype=dtype, device=device)
        for name, its_folder in config.adapters.items():
            opened.adapters[name] = load_peft(Path(its_folder).expanduser(), opened.model.config)
    _check_vocabulary(opened)
    return opened


def shape_problems(shape: str, *, name: str) -> list[str]:
    """What is wrong with the name of a shape (`open_random_model`) before it is read; one line each."""
    path = Path(shape).expanduser()
    if path.exists():
        file = path / "config.json" if path.is_dir() else path
        good = file.is_file() and file.name == "config.json"
        return [] if good else [f"{name}={shape} is no config.json, and no folder with one"]
    shapes = sorted(file.stem for file in (Path(CONFIG_DIR) / "model").glob("*.yaml") if file.stem != "hf")
    if shape in shapes:
        return []
    return [f"{name}={shape} is neither a folder or config.json of Hugging Face nor one of {', '.join(shapes)}"]


def shape_config(shape: str) -> ModelConfig:
    """The model of a shape, resolved: a file of configs/model by its name, a config.json of Hugging Face, or a folder
    with one. Raises ConfigError."""
    path = Path(shape).expanduser()
    if not path.exists():
        return resolve_model(compose_one([f"model={shape}"]).model)
    folder = path.parent if path.is_file() else path
    with configuration_errors():
        return resolve_model(ModelConfig(family="hf", path=str(folder)))


def open_random_model(shape: str, dtype: str, device: torch.device, groups: ModelParallel = NO_GROUPS) -> OpenedModel:
    """A model of that shape (`shape_config`) with random weights, and no tokenizer. dtype: as LabModelConfig.dtype.

    groups: the ranks its layers are cut over; each draws its own part. Raises ConfigError.
    """
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(shape_config(shape), DTYPES.get(dtype, auto), device, groups)
    return OpenedModel(model, None, "weights are random", [])


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, groups: ModelParallel = NO_GROUPS
) -> Decoder:
    """Weights drawn on the device, to measure speed with: norms are 1, all else is of standard deviation 0.02.

    Cut over ranks they are the same for every number of these, as a trainer's are, and others than those of a whole
    model, which torch's own generator draws faster.
    """
    with torch.device("meta"):
        model = build_model(config, groups=groups).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        if groups.tp is not None:
            buffers = {name for name, _ in model.named_buffers()}
            weights = {name: weight for name, weight in model.state_dict().items() if name not in buffers}
            ones, drawn = Constant(1.0), Normal(0.02)
            initialize(weights, {n: ones if n.endswith("norm.weight") else drawn for n in weights}, seed=0)
            return model.eval()
        generator = torch.Generator(device).manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model.eval()


@contextmanager
def _configuration_errors() -> Iterator[None]:
    """What is wrong with a folder or checkpoint is the fault of the configuration that names it."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError([f"{error}; the folder of a Hugging Face model would have a config.json"]) from None
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def _open_folder(
    folder: Path, dtype: torch.dtype, device: torch.device, groups: ModelParallel, *, mtp_depth: int
) -> OpenedModel:
    config = resolve_model(ModelConfig(family="hf", path=str(folder), mtp=MTPConfig(depth=mtp_depth)))
    with torch.device("meta"):
        model = build_model(config, groups=groups).to(dtype)
    model.to_empty(device=device)
    progress = Progress(f"reading {folder}", silent=rank_from_env() > 0)
    load_hf_weights(folder, model.state_dict(), config, on_read=progress.tensors)
    progress.finish()
    try:
        tokenizer, missing = Tokenizer.from_path(folder), None
    except DataError as error:
        tokenizer, missing = None, str(error)
    return OpenedModel(model.eval(), tokenizer, missing, eos_ids_of(folder))


def _check_vocabulary(opened: OpenedModel) -> None:
    """The end of a document is the tokenizer's where the model's files do not say it; it must be one of its tokens."""
    vocab_size, tokenizer = opened.model.config.vocab_size, opened.tokenizer
    if tokenizer is not None and tokenizer.eos_id >= vocab_size:
        raise ConfigError([
            f"the tokenizer ends documents with token {tokenizer.eos_id} ({tokenizer.eos_token}), outside of the "
            f"model's vocabulary of {vocab_size}: they do not belong together; set model.tokenizer to the model's own"
        ])  # fmt: skip
    if not opened.eos_ids and tokenizer is not None:
        opened.eos_ids = [tokenizer.eos_id]
