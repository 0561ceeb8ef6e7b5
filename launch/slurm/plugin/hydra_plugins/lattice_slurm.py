"""A sweep as a job array: `launch/train.py --multirun hydra/launcher=slurm hydra.launcher.nodes=2 optim.lr=1e-3,3e-3`.

Hydra takes launchers from the namespace package hydra_plugins only, and imports all it finds there for every program:
what this one needs is imported when it is used. Annotations are no strings here (`from __future__`), as Hydra executes
the file without entering it in sys.modules, where dataclasses would look them up.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SlurmLauncherConfig:
    """`hydra.launcher`: what launch/slurm/submit.py takes as options, for each point of the sweep."""

    _target_: str = "hydra_plugins.lattice_slurm.SlurmLauncher"
    nodes: int = 1
    spare_nodes: int = 0
    gpus_per_node: str | None = None
    ranks_per_node: int | None = None
    max_restarts: int = 0
    max_parallel: int = 0  # points that run at a time; 0: as many as fit
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, as '--name=value'


ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmLauncherConfig, provider="lattice")


class SlurmLauncher(Launcher):
    """Submits every point as a task of one array and returns; a task that is requeued continues its own run."""

    def __init__(self, **options: Any) -> None:
        """options: the fields of SlurmLauncherConfig."""
        self.options = options
        self.sweep: list[str] = []  # the command line, with all values. Filled by `setup`

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.sweep = list(config.hydra.overrides.task)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises ConfigError for every point that is wrong, and SubmitError; then nothing has been submitted."""
        from launch.slurm.submit import Submission, submit_sweep

        options = dict(self.options)
        max_parallel = options.pop("max_parallel")
        places = {name: options.pop(name) for name in ("time", "partition", "account")}
        sbatch = [f"--{name}={value}" for name, value in places.items() if value is not None]
        submission = Submission(**options | {"sbatch": sbatch + list(options["sbatch"])})
        with _outside_of_hydra():  # points are composed as their tasks will
            job, folder = submit_sweep(submission, self.sweep, job_overrides, max_parallel=max_parallel)
        print(f"submitted job array {job}, {len(job_overrides)} tasks; logs in {folder}")
        returns = [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]
        for job_return in returns:
            job_return.return_value = None  # there is none yet; unset, Hydra would call it an error
        return returns


@contextlib.contextmanager
def _outside_of_hydra() -> Iterator[None]:
    """Let others compose: Hydra allows one of itself at a time, and is running the sweep."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running
