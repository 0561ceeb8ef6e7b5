"""Sinks of metrics beside metrics.jsonl: TensorBoard and Weights & Biases, imported only when asked for."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any, Protocol

from trainer.run_info import mask_secrets, write_atomically

Record = dict[str, float | int | None]
"""One training step by field name; None where a field has no value (mfu on a CPU)."""

WANDB_MODES = ("offline", "online")


class Sink(Protocol):
    """Where the numbers of a step go."""

    name: str

    def log(self, record: Record) -> None: ...

    def event(self, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files under run_dir/tensorboard, one scalar per field. The format holds them in fp32."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
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

    def log(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def event(self, text: str) -> None:
        """Events are in events.jsonl; TensorBoard keeps scalars."""

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run that gets the step records and the configuration (secrets masked), and nothing else.

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

    def event(self, text: str) -> None:
        """Events are in events.jsonl."""

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
