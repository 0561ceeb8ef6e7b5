"""Drill: train a small model on CPU ranks, injure it at random, and compare it with a run that was left alone.

    python launch/drill.py --faults 10 --dir runs/drill

launches the same run twice with torchrun: once undisturbed, once with a fault of a random kind at random steps and
ranks (trainer/injection.py), restarted by torchrun after each. Prints one JSON object: every fault with what it came
to, and whether final weights, moments, losses and gradient norms are equal to the last bit. Exit codes: 0 all promises
of docs/FAULTS.md were kept; 1 not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

import numpy as np
import torch

from trainer.checkpoint import TensorReader
from trainer.injection import KINDS, PLAN

TRAIN = str(Path(__file__).resolve().parent / "train.py")
RANKS, INTERVAL, SPACING = 2, 3, 3  # steps between checkpoints; between faults
ROOM = {"slow": 5, "full_disk": 2 * INTERVAL}
"""Steps before the next fault: a straggler is named after a window of late steps, and a checkpoint that was not written
is noticed when the next one is due. A fault in between would end the start before."""
PATIENCE = 120.0
"""Seconds for a start, on a loaded machine."""


@dataclass
class Result:
    """What a fault came to. Filled by `judge`."""

    number: int
    kind: str
    step: int
    rank: int
    happened: bool = False
    seconds_to_end: float | None = None  # from the fault until no process of that start was left; None: it ran on
    lost_steps: int | None = None  # done when it ended, and done again; None: it ran on
    resumed_from: int | None = None
    named: str | None = None  # the message that names it, of a hang or a straggler
    problems: list[str] = field(default_factory=list)  # promises that were broken


@dataclass
class Start:
    """One start of the run under torchrun; filled by `watch`."""

    began: float
    ended: float = 0.0
    last_step: int = 0  # the newest one in metrics.jsonl


def overrides(folder: Path, *, steps: int, timeout: float, more: list[str]) -> list[str]:
    """Of a run of milliseconds per step, saved every INTERVAL steps, with every check on."""
    return [
        "data=tokens", f"data.path={folder / 'tokens.npy'}", "data.num_workers=1",
        "model.vocab_size=64", "model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2",
        "model.num_heads=4", "model.num_kv_heads=2", "model.max_seq_len=16", "model.dropout=0.1",
        "parallel=zero1", "train.device=cpu", f"train.steps={steps}", "train.seq_len=16", "train.global_batch_size=4",
        "train.nonfinite=stop", f"train.timeout_seconds={timeout}", "optim.lr=3e-3", "schedule=constant",
        f"checkpoint.interval={INTERVAL}", "resilience.check_interval=1", "resilience.rerun_interval=1",
        "resilience.straggler_interval=2", "logging.console=false",
        f"resilience.first_step_seconds={PATIENCE}", f"resilience.checkpoint_seconds={PATIENCE}",
        f"resilience.loading_seconds={PATIENCE}", *more,
    ]  # fmt: skip


def plan(num_faults: int, *, seed: int, kinds: list[str]) -> list[dict[str, Any]]:
    """Faults one after the other in steps; every kind comes up once before one comes up again.

    A checkpoint is damaged when there are two, if other kinds can come first: nobody can go on from none, and the run
    would rightly refuse to begin anew.
    """
    draw = random.Random(seed)
    bag: list[str] = []
    faults: list[dict[str, Any]] = []
    begin = 2
    for number in range(num_faults):
        if not bag:
            bag = draw.sample(kinds, len(kinds))
        kind = bag.pop()
        if kind == "damaged_checkpoint" and begin < 2 * INTERVAL + 2 and bag:
            bag[0], kind = kind, bag[0]
        # Rank 0 writes metrics.jsonl.
        rank = 0 if kind == "full_disk_for_metrics" else draw.randrange(RANKS)
        step = begin + draw.randrange(SPACING)
        begin = max(begin + SPACING, step + ROOM.get(kind, 1))
        faults.append({"number": number, "kind": kind, "step": step, "rank": rank})
    return faults


def launch(arguments: list[str], log: Path, *, restarts: int, plan_file: Path | None) -> list[Start]:
    """Run training under torchrun to its end; its starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["--max-restarts", str(restarts), TRAIN, *arguments]
    # Without this torchrun's restarts find the addresses of processes that ended (trainer/resilience.py).
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {} if plan_file is None else {PLAN: str(plan_file)}
    run_dir = Path(arguments[-1].partition("=")[2])
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            starts = watch(process, run_dir)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise SystemExit(f"training did not come to its end; the last of {log}:\n{log.read_text()[-4000:]}")
    return starts


def watch(process: subprocess.Popen, run_dir: Path) -> list[Start]:
    """The starts of a launcher's workers, until it ends."""
    starts: list[Start] = []
    alive: set[int] = set()
    while process.poll() is None:
        # Looked at twice: who is listed while a sibling is buried may be left out, and then all would seem to be gone.
        now = workers(process.pid) or (workers(process.pid) if alive else set())
        if now and not alive:
            starts.append(Start(began=time.time()))
        if alive and not now:
            starts[-1].ended, starts[-1].last_step = time.time(), last_step(run_dir)
        alive = now
        time.sleep(0.02)
    if alive:
        starts[-1].ended, starts[-1].last_step = time.time(), last_step(run_dir)
    return starts


def workers(launcher: int) -> set[int]:
    """Ranks that run; one that ended and was not waited for does not."""
    found = set()
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.add(int(pid))
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of JSON objects; none before there is one. Damaged ones are left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.endswith("\n") else []
    return found


def last_step(run_dir: Path) -> int:
    lines = lines_of(run_dir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def judge(
    fault: dict[str, Any],
    faults: list[dict[str, Any]],
    starts: list[Start],
    run_dir: Path,
    plan_file: Path,
    timeout: float,
) -> Result:
    """What a fault came to, and which promises it broke. faults: all of the plan; others may have come in between."""
    result = Result(**fault)
    when = fired_when(fault, plan_file)
    if when is None:
        result.problems.append("the fault did not happen")
        return result
    result.happened = True
    events = [(datetime.fromisoformat(e["time"]).timestamp(), e) for e in lines_of(run_dir / "events.jsonl")]
    index = max(i for i, start in enumerate(starts) if start.began <= when)
    fired_at = [fired_when(other, plan_file) for other in faults if other["number"] != result.number]
    # Of its start: else another fault may have been what ended it.
    alone = not any(at is not None and starts[index].began <= at <= starts[index].ended for at in fired_at)
    if result.kind == "slow":
        named = [e["text"] for at, e in events if at >= when and e["kind"] == "straggler" and e["rank"] == result.rank]
        result.named = named[0] if named else None
        last = starts[index].last_step
        if not named and last >= result.step + 3:  # a window of two late steps
            result.problems.append("no straggler was named")
        elif not named and alone:
            result.problems.append(f"its start ended at step {last}, too soon to tell whether a straggler is named")
        return result
    if index + 1 == len(starts):
        if result.kind not in ("sigkill", "sigterm"):  # may come after the last step
            result.problems.append("the run went on to its end")
        return result
    start, after = starts[index], starts[index + 1]
    result.seconds_to_end = round(start.ended - when, 2)
    resumed = [e["step"] for at, e in events if e["kind"] in ("start", "resume") and at >= after.began]
    saved = [e["step"] for at, e in events if e["kind"] == "checkpoint" and at <= start.ended]
    result.resumed_from = resumed[0] if resumed else None
    if result.resumed_from is None:
        return result
    result.lost_steps = start.last_step - result.resumed_from
    if result.kind == "sigterm" and alone and result.lost_steps:
        result.problems.append(f"step {start.last_step} was done, and the run went on from {result.resumed_from}")
    committed = max(saved, default=0)
    damages = [fired_when(other, plan_file) for other in faults if other["kind"] == "damaged_checkpoint"]
    damaged = any(at is not None and start.began <= at <= start.ended for at in damages)
    spared = INTERVAL if damaged else 0
    if result.resumed_from < committed - spared:
        result.problems.append(f"step_{committed} was saved, and the run went on from step {result.resumed_from}")
    if result.seconds_to_end > timeout + 5:  # torchrun looks after its workers now and then
        result.problems.append(f"{result.seconds_to_end} s passed before the run ended")
    if result.kind == "hang":
        report = hang_report(run_dir, step=result.step, after=when)
        result.named = None if report is None else report["summary"]
        if report is None or report["waited_for"] != [result.rank] or not all(r["stacks"] for r in report["ranks"]):
            result.problems.append("the hang was not reported, or another rank was blamed")
    return result


def fired_when(fault: dict[str, Any], plan_file: Path) -> float | None:
    """When a fault happened; None: it did not."""
    path = plan_file.parent / f"fired_{fault['number']}"
    return float(path.read_text()) if path.exists() else None


def hang_report(run_dir: Path, *, step: int, after: float) -> dict[str, Any] | None:
    for path in sorted((run_dir / "hangs").glob(f"*-step_{step}/report.json")):
        if path.stat().st_mtime >= after:
            return json.loads(path.read_text())
    return None


def differences(run: Path, whole: Path, steps: int) -> list[str]:
    """Tensors and lines of metrics.jsonl of two runs that are not equal to the last bit."""
    found = []
    ours, theirs = (TensorReader(folder / "checkpoints" / f"step_{steps}") for folder in (run, whole))
    for name in sorted(ours.shapes.keys() | theirs.shapes.keys()):
        if name not in ours.shapes or name not in theirs.shapes:
            found.append(f"{name} is in one checkpoint only")
        elif not torch.equal(ours.read(name), theirs.read(name)):
            found.append(name)
    numbers = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    found += ["metrics.jsonl"] if numbers[0] != numbers[1] or len(numbers[0]) != steps else []
    return found


def drill(
    folder: Path, *, num_faults: int, seed: int, kinds: list[str], timeout: float, more: list[str]
) -> dict[str, Any]:
    """Both runs in a new folder, and what came of them."""
    folder.mkdir(parents=True)
    faults = plan(num_faults, seed=seed, kinds=kinds)
    steps = faults[-1]["step"] + max(ROOM.values()) + 1
    tokens = np.random.default_rng(seed).integers(0, 64, size=(steps * 4 + 1) * 16 + 1, dtype=np.uint16)
    np.save(folder / "tokens.npy", tokens)
    plan_file = folder / "plan" / "plan.json"
    plan_file.parent.mkdir()
    plan_file.write_text(json.dumps({"faults": faults}, indent=1))
    settings = overrides(folder, steps=steps, timeout=timeout, more=more)
    whole, run = folder / "whole", folder / "run"
    began = time.time()
    launch([*settings, f"run.dir={whole}"], folder / "whole.log", restarts=0, plan_file=None)
    alone = time.time() - began
    starts = launch([*settings, f"run.dir={run}"], folder / "run.log", restarts=3 * num_faults + 3, plan_file=plan_file)
    results = [judge(fault, faults, starts, run, plan_file, timeout) for fault in faults]
    different = differences(run, whole, steps)
    ends = [r.seconds_to_end for r in results if r.seconds_to_end is not None]
    return {
        "passed": not different and not any(r.problems for r in results),
        "different": different,
        "steps": steps,
        "starts": len(starts),
        "seconds_alone": round(alone, 1),
        "seconds": round(time.time() - began - alone, 1),
        "longest_to_end": max(ends, default=None),
        "most_lost_steps": max((r.lost_steps for r in results if r.lost_steps is not None), default=0),
        "goodput": lines_of(run / "metrics.jsonl")[-1]["goodput"],
        "faults": [asdict(r) for r in results],
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=10, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="decides kinds, steps and ranks")
    parser.add_argument("--dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of faults, with commas between")
    parser.add_argument("--timeout", type=float, default=10.0, help="train.timeout_seconds of the run")
    parser.add_argument("overrides", nargs="*", help="of the run, such as parallel.zero_stage=3")
    given = parser.parse_args(arguments)
    kinds = given.kinds.split(",")
    if given.faults < 1:
        parser.error(f"--faults {given.faults} must be at least 1")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds {','.join(unknown)} is unknown; use some of {','.join(KINDS)}")
    if given.dir.exists():
        parser.error(f"--dir {given.dir} exists; choose another, or delete it")
    found = drill(
        given.dir.resolve(), num_faults=given.faults, seed=given.seed, kinds=kinds, timeout=given.timeout,
        more=given.overrides,
    )  # fmt: skip
    print(json.dumps(found, indent=1))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
