"""From a command line to a TrainConfig, and what a person reads when it cannot become one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import launch.compose
from launch.compose import compose_one, run_jobs
from trainer.config import ConfigError, TrainConfig
from trainer.trainer import Preempted, TrainingDiverged

# An override, and what its line must say besides the override itself.
WRONG = {
    "optim.lrr=1e-3": "there is no key optim.lrr; did you mean optim.lr?",
    "modle=gpt2": "there is no key modle; did you mean model?",
    "+foo=1": "there is no key foo",
    "+train.stepz=1": "there is no key train.stepz; did you mean train.steps?",
    "optim.lr=abc": "optim.lr must be a number",
    "train.steps=1.5": "train.steps must be a whole number",
    "train.steps=": "train.steps must be a whole number",
    "train.compile=maybe": "train.compile must be true or false",
    "train.steps=null": "train.steps must have a value",
    "train.steps=???": "train.steps must have a value",
    "train=null": "train must have a value",
    "data.blend=3": "data.blend must be a list",
    "data.blend=[{wight: 1}]": "data.blend has no key wight",
    "data.blend=[{weight: x}]": "weight must be a number",
    "model=nope": "there is no configs/model/nope.yaml; use one of deepseek_v2_lite, deepseek_v3, gpt2",
    "+exp=nope": "there is no configs/exp/nope.yaml; use one of llama3_1b",
    "optim=null": "optim is chosen by name; use one of adamw, muon",
    "optim=[1]": "optim is chosen by name; use one of adamw, muon",
    "optim.lr": "a value is missing; write optim.lr=VALUE",
    "run.name=a=b": "put it in quotes",
    "optim.lr=1e-3,3e-3": "--multirun",
    "+optim.lr=1": "leave out the +",
    "+model=gpt2": "leave out the +",
    "~train.steps": "train.steps cannot be removed",
    "run.dir=${nope}": "'nope' not found",
}


@pytest.mark.some(10)
@pytest.mark.parametrize(("override", "says"), WRONG.items(), ids=WRONG.keys())
def test_a_wrong_override_is_one_line_that_says_what_to_write_instead(override: str, says: str) -> None:
    """Hydra's own words, such as "Error merging override", which do not say what is wrong; or a key that is ignored."""
    with pytest.raises(ConfigError) as raised:
        compose_one([override])
    (line,) = raised.value.problems
    assert says in line
    assert "\n" not in line
    assert override.startswith("+") or line.startswith(override)


def test_all_wrong_overrides_are_named_at_once() -> None:
    """Fixing a command line one error at a time."""
    with pytest.raises(ConfigError) as raised:
        compose_one(["train.steps=x", "model=gpt2", "optim.lr=abc", "modl.x=3", "seed=1"])
    assert [line.partition(":")[0] for line in raised.value.problems] == [
        "train.steps=x",
        "optim.lr=abc",
        "modl.x=3",
        "seed=1",
    ]


def test_right_overrides_become_a_typed_configuration() -> None:
    """Negative control; and values that arrive as strings, or a group that wins over the field set after it."""
    config = compose_one(
        ["+exp=stdlib", "train.steps=7", "optim.lr=1e-3", "model=gpt2", "model.num_layers=2", "data.path='a b'"]
    )
    assert isinstance(config, TrainConfig)
    assert (config.train.steps, config.optim.lr, config.data.path) == (7, 1e-3, "a b")
    assert (config.model.family, config.model.num_layers, config.train.seq_len) == ("gpt2", 2, 256)


class Sweep:
    """A sweep over three learning rates, in which some fail."""

    def __init__(self, folder: Path, fails: dict[float, Exception]) -> None:
        self.folder = folder
        self.fails = fails
        self.ran: list[tuple[float, str]] = []  # lr and folder of each job that was started

    def run(self) -> None:
        fixed = ["optim.eps=1e-6", "data.path=/some/where", "+exp=stdlib", f"run.dir={self.folder}"]
        run_jobs(["--multirun", *fixed, "optim.lr=1.0,2.0,3.0"], self._job)

    def _job(self, config: TrainConfig) -> None:
        self.ran.append((config.optim.lr, str(Path(config.run.dir).relative_to(self.folder))))
        if config.optim.lr in self.fails:
            raise self.fails[config.optim.lr]


def test_a_sweep_gives_each_job_a_folder_of_its_own(tmp_path: Path) -> None:
    """Jobs that overwrite each other's run directory, or whose name is longer than a file system allows."""
    sweep = Sweep(tmp_path, {})
    sweep.run()
    assert sweep.ran == [(1.0, "optim.lr=1.0"), (2.0, "optim.lr=2.0"), (3.0, "optim.lr=3.0")]


def test_a_sweep_over_groups_and_paths_is_named_by_them(tmp_path: Path) -> None:
    """A slash in a value that makes nested folders; a group that does not count as swept."""
    seen: list[str] = []
    run_jobs(
        ["-m", f"run.dir={tmp_path}", "model=gpt2,opt_125m", "data.path=/a/b,/c", "train.steps=3"],
        lambda config: seen.append(str(Path(config.run.dir).relative_to(tmp_path))),
    )
    assert seen == [
        f"{model},data.path={path}" for model in ("model=gpt2", "model=opt_125m") for path in ("_a_b", "_c")
    ]


def test_a_point_that_diverges_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    """A sweep over learning rates that ends at the first that is too high, or one that hides which were."""
    sweep = Sweep(tmp_path, {1.0: TrainingDiverged("too high"), 3.0: TrainingDiverged("also")})
    with pytest.raises(TrainingDiverged, match=r"optim.lr=1.0: too high\n.*optim.lr=3.0: also"):
        sweep.run()
    assert len(sweep.ran) == 3


@pytest.mark.some(1)
@pytest.mark.parametrize("error", [Preempted("saved"), RuntimeError("a rank died")])
def test_a_preempted_or_broken_job_ends_the_sweep(tmp_path: Path, error: Exception) -> None:
    """Hydra collects failures and goes on: a preempted sweep would train the next job until it is killed."""
    sweep = Sweep(tmp_path, {2.0: error})
    with pytest.raises(type(error), match=str(error)):
        sweep.run()
    assert len(sweep.ran) == 2


def test_a_wrong_sweep_is_explained_as_well(tmp_path: Path) -> None:
    """Errors that take Hydra's own way out, with a traceback."""
    for override, says in {"optim.lrr=1,2": "optim.lrr", "optim.lr=abc,2": "optim.lr must be a number"}.items():
        with pytest.raises(ConfigError, match=says):
            run_jobs(["--multirun", f"run.dir={tmp_path}", override], lambda config: None)


def test_a_configuration_file_that_is_no_yaml_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of a parser for a missing quote."""
    shutil.copytree(launch.compose.CONFIG_DIR, tmp_path / "configs")
    (tmp_path / "configs" / "exp" / "mine.yaml").write_text("train:\n  steps: 5\n bad: [\n")
    monkeypatch.setattr(launch.compose, "CONFIG_DIR", str(tmp_path / "configs"))
    with pytest.raises(ConfigError) as raised:
        compose_one(["+exp=mine"])
    (line,) = raised.value.problems
    assert f'{tmp_path / "configs" / "exp" / "mine.yaml"}", line 3' in line
    assert "\n" not in line
