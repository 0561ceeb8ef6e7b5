"""Sinks of metrics beside metrics.jsonl: TensorBoard and Weights & Biases, imported only when asked for."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import yaml

from trainer.masking import mask_secrets
from trainer.run_info import write_atomically

Record = dict[str, float | int | None]
"""One training step by field name; None where a field has no value (mfu on a CPU)."""

Event = Mapping[str, Any]
"""A line of events.jsonl: time, kind, text, and fields of the kind."""
MAX_RANKS = 64
"""That have a curve each; of more, the smallest, the median and the largest number have."""

WANDB_MODES = ("offline", "online")


class Sink(Protocol):
    """Where the numbers of a step go."""

    name: str

    def log(self, record: Record) -> None: ...

    def event(self, line: Event, step: int) -> None:
        """line: of events.jsonl. step: it is about, or the last one before it."""
        ...

    def ranks(self, step: int, times: Mapping[str, Sequence[float]]) -> None:
        """times: of a line of ranks.jsonl."""
        ...

    def picture(self, name: str, path: Path, step: int) -> None:
        """path: a PNG of the run's folder, which shows what came with this step."""
        ...

    def close(self) -> None: ...


def text_of(line: Event) -> str:
    """An event for people; a sample with its text below, as it is."""
    sample = line.get("sample")
    return str(line["text"]) if sample is None else f"{line['text']}\n\n{_indented(str(sample))}"


def _indented(text: str) -> str:
    """In Markdown, which TensorBoard reads: as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _pixels(path: Path) -> np.ndarray:
    """[height, width, 3] uint8."""
    from PIL import Image  # comes with matplotlib, which has drawn the picture

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def curves_of_ranks(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Seconds by name: ranks/step_seconds/3."""
    found: dict[str, float] = {}
    for name, seconds in times.items():
        if len(seconds) <= MAX_RANKS:
            found |= {f"ranks/{name}/{rank}": value for rank, value in enumerate(seconds)}
        else:
            found |= {f"ranks/{name}/{of.__name__}": of(seconds) for of in (min, median, max)}
    return found


class TensorBoardSink:
    """Event files under run_dir/tensorboard: one scalar per field, in fp32, which is the format's; events, samples and
    the configuration (secrets masked) as texts; pictures."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, *, config: Mapping[str, Any], resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                f"logging.tensorboard=true needs the tensorboard package ({error}); "
                "`pip install tensorboard`, or set logging.tensorboard=false"
            ) from error
        # Steps after the checkpoint are redone: purge_step tells TensorBoard to drop the ones an earlier start wrote.
        purge_step = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=30)
        if config:
            text = yaml.safe_dump(json.loads(json.dumps(mask_secrets(config), default=str)), sort_keys=False)
            self._writer.add_text("config", _indented(text), resume_step)

    def log(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def event(self, line: Event, step: int) -> None:
        self._writer.add_text(f"events/{line['kind']}", text_of(line), step)

    def ranks(self, step: int, times: Mapping[str, Sequence[float]]) -> None:
        for name, value in curves_of_ranks(times).items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._writer.add_image(name, _pixels(path), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run that gets the step records, times of ranks, texts of events, samples, pictures and the
    configuration (secrets masked), and nothing else.

    The run's id lives in run_dir/wandb_id, so a restart continues the same run. Charts use the field `step` as x: steps
    redone after a restart appear twice there, with equal numbers.
    """

    name = "wandb"

    def __init__(self, run_dir: Path, *, project: str, mode: str, run_name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(
                f"logging.wandb=true needs the wandb package ({error}); `pip install wandb`, or set logging.wandb=false"
            ) from error
        self.run_id = _wandb_id(run_dir / "wandb_id")
        settings = wandb.Settings(
            silent=True,  # its messages would cut through the progress line
            console="off",  # no copy of stdout and stderr
            disable_git=True,  # a remote's URL can hold a password
            disable_code=True,
            host="masked",
            x_disable_meta=True,  # command line, user, host
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                project=project,
                name=run_name,
                id=self.run_id,
                dir=str(run_dir),
                mode=mode,  # type: ignore[arg-type]
                resume="allow" if mode == "online" else None,  # offline, the id alone joins the parts on `wandb sync`
                config=mask_secrets(config),
                settings=settings,
            )
        except Exception as error:
            raise RuntimeError(
                f"logging.wandb=true with logging.wandb_mode={mode}: wandb did not start ({error}); "
                "`wandb login`, or set logging.wandb_mode=offline or logging.wandb=false"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({name: value for name, value in record.items() if value is not None})

    def event(self, line: Event, step: int) -> None:
        self._run.log({f"events/{line['kind']}": text_of(line), "step": step})

    def ranks(self, step: int, times: Mapping[str, Sequence[float]]) -> None:
        self._run.log({**curves_of_ranks(times), "step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(path: Path) -> str:
    """The run id kept in path; a new one is written there on the first start."""
    if not path.exists():
        write_atomically(path, secrets.token_hex(4) + "\n")
    run_id = path.read_text().strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id):
        raise ValueError(f"{path} holds {run_id!r}, which is no wandb run id; remove the file to start a new wandb run")
    return run_id
