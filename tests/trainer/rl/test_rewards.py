"""Rewards: answers of mathematics, programs in a sandbox, functions of the user's that fail."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from trainer.rl import sandbox
from trainer.rl.config import RewardConfig, RLConfig
from trainer.rl.maths import final_answer, number_of, same_answer
from trainer.rl.rewards import Answer, RewardError, Rewards, check_rewards
from trainer.rl.sandbox import Outcome, run_program


def answer(text: str, **row: Any) -> Answer:
    return Answer(prompt="how many?", text=text, token_ids=[1, 2], finish_reason="stop", row=row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{12} or rather \boxed{\frac{3}{4}}, of 7", r"\frac{3}{4}"),
        (r"\boxed{a_{1} + \boxed{2}} and \boxed{unclosed", "2"),
        ("steps 1, 2 and 3\n#### 1,234 apples", "1,234 apples"),
        ("first 12, then -3.50 is left.", "-3.50"),
        ("of 1,234,567 there are 12,5", "5"),
        ("no number", None),
    ],
)
def test_the_final_answer_is_the_last_that_is_marked(text: str, expected: str | None) -> None:
    """A number of the way to the answer; a brace inside of it."""
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", Fraction(2469, 2)),
        ("$-7$", Fraction(-7)),
        (r"\dfrac{-3}{4}", Fraction(-3, 4)),
        (r"-\frac34", Fraction(-3, 4)),
        ("6/8", Fraction(3, 4)),
        ("50%", Fraction(1, 2)),
        (r"50\%", Fraction(1, 2)),
        ("1.5e3", Fraction(1500)),
        ("12.", Fraction(12)),
        ("1/0", None),
        ("x+1", None),
        ("", None),
        ("9" * 500, None),
    ],
)
def test_numbers_are_exact(text: str, value: Fraction | None) -> None:
    """Floats that are nearly equal; a division by zero that ends the run; a string that takes minutes to parse."""
    assert number_of(text) == value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r" x + 1 ", "X+1."),
        ("0.1", r"\frac{1}{10}"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\textbf{A}", "a"),
        (r"\text{\textbf{odd}}", r"\mathrm{odd}"),
        (r"\text{New York}", "new  york"),
        (r"\left(1,\; 2\right)", "(1, 2)"),
        ("2 x", "2x"),
        (r"12 \text{ cm}", "12"),
        (r"12\text{ cm}^2", r"12 \mathrm{cm}"),
        (r"\frac12\text{ cups}", "0.5"),
        ("10,000 dollars.", "10000"),
        (r"1\,234", "1,234"),
        (r"1{,}234", "1234"),
        (r"90^{\circ}", "90"),
        (r"\$5.00", "5"),
    ],
)
def test_answers_are_the_same_however_they_are_written(one: str, other: str) -> None:
    """A right answer that is worth nothing: text in a command, a unit, thousands."""
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x", "y"),
        ("0.3333", "1/3"),
        (r"\text{Paris}", r"\text{London}"),
        (r"\text{(B)}", r"\text{(C)}"),
        (r"\mathrm{odd}", r"\mathrm{even}"),
        ("", r"\text{Evelyn}"),
        ("", ""),
        (r"\text{}", "$$"),
        ("", "12"),
        ("1 2", "12"),
        ("1  2", "12"),
        ("5,6", "56"),
        (r"5\text{ or }7", "57"),
        ("50%", "50"),
        (r"12\text{ cm}", r"12\text{ m}"),
        (r"3\text{ million}", "3"),
        (r"3\mathrm{i}", "3"),
        ("2 pi", "2"),
        ("New York", "Newyork"),
        (r"x\leftarrow y", "xarrow y"),
    ],
)
def test_other_answers_are_not_the_same(one: str, other: str) -> None:
    """Answers of which all is dropped that tells them apart, and a reward of 1 for any of them."""
    assert not same_answer(one, other)
    assert not same_answer(other, one)


@pytest.mark.parametrize("column", ["so 48+24=72. #### 72", r"48+24=\boxed{72}", "72", 72])
def test_a_rows_answer_may_be_its_solution(column: str | int) -> None:
    """The column of GSM8K, which no answer ever was the same as."""
    rewards = Rewards(RLConfig())
    found = rewards.of([answer(text, answer=column) for text in ("it is 72", "#### 72 clips", "it is 48")])
    assert [one.total for one in found] == [1.0, 1.0, 0.0]


def test_boxes_that_never_close_are_read_once() -> None:
    """A completion of nothing but these, which took minutes."""
    begin = time.process_time()
    assert final_answer("\\boxed{" * 100_000) is None
    assert final_answer("\\boxed{7}" + "\\boxed{{" * 100_000) == "7"
    assert time.process_time() - begin < 5


def test_a_program_passes_where_it_reaches_its_end() -> None:
    """An exit code of 0 that the program gave itself, before any test ran; an error that is lost."""
    assert run_program("def f(x):\n    return 2 * x\nassert f(2) == 4").passed
    failed = run_program("def f(x):\n    return x\nassert f(2) == 4, 'not 4'")
    assert (failed.passed, failed.error) == (False, "AssertionError: not 4")
    for early in ("import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "print('x' * 32)\n1/0"):
        assert not run_program(f"{early}\nassert True").passed, early
    assert "SyntaxError" in run_program("def f(:").error


def test_a_program_has_limits() -> None:
    """A loop, a bomb of memory, a child that outlives it, the secrets of the environment, files in the way."""
    begin = time.monotonic()
    assert run_program("while True: pass", seconds=0.5).error == "it took longer than 0.5 s"
    sleeper = "import subprocess\nsubprocess.Popen(['/bin/sleep', '60'])\nwhile True: pass"
    assert not run_program(sleeper, seconds=0.5).passed
    assert time.monotonic() - begin < 40
    assert "MemoryError" in run_program("x = bytearray(1 << 30)", memory_mb=256).error
    assert run_program("import os\nassert not dict(os.environ)\nassert os.listdir('.') == []").passed
    assert not run_program("open('x', 'wb').write(bytes(32 << 20))").passed


@pytest.mark.parametrize("namespaces", [True, False])
def test_nothing_that_a_program_started_outlives_it(monkeypatch: pytest.MonkeyPatch, namespaces: bool) -> None:
    """A grandchild in a session of its own, which held the trainer's pipe for as long as it liked. Where the kernel
    gives no namespaces the judge kills it by hand."""
    monkeypatch.setattr(sandbox, "_NAMESPACES", namespaces)
    mark = f"6{os.getpid()}"  # seconds that nobody else sleeps for
    start = f"import os, subprocess\nsubprocess.Popen(['/bin/sleep', '{mark}'], start_new_session=True)\n"
    orphan = f"if os.fork() == 0:\n    subprocess.Popen(['/bin/sleep', '{mark}'])\n    os._exit(0)\n"
    begin = time.monotonic()
    assert run_program(start + orphan, seconds=20).passed
    assert not run_program(start + orphan + "while True: pass", seconds=1).passed
    assert time.monotonic() - begin < 60
    assert mark.encode() not in b"\0".join(_command_lines()).split(b"\0")


def _command_lines() -> list[bytes]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes())
    assert found
    return found


def test_what_a_program_prints_takes_no_memory_of_the_trainer() -> None:
    """200 MiB of errors, which the trainer kept three times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flood = "import os\nfor _ in range(3200):\n    os.write(2, bytes(1 << 16))\n1 / 0"
    assert run_program(flood, seconds=40, memory_mb=128).error == "ZeroDivisionError: division by zero"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_a_program_has_few_processes_where_they_are_counted_for_it_alone() -> None:
    """A bomb of forks. Root is never held by this limit, so it is read and not run into."""
    counted = f"os.readlink('/proc/self/ns/user') != {os.readlink('/proc/self/ns/user')!r}"
    limit = "resource.getrlimit(resource.RLIMIT_NPROC)[0]"
    assert run_program("import os, resource", f"assert not {counted} or 0 < {limit} <= 64, {limit}").passed


FORGED = {
    "by its name": "import __main__, os; __main__.finish(); os._exit(0)",
    "by its frame": "import os, sys; sys._getframe(1).f_globals['finish'](); os._exit(0)",
    "by what the judge writes": """
import os
for file in range(3, 64):
    try:
        os.write(file, b"passed")
    except OSError:
        pass
os._exit(0)
""",
    "by no tests": "import builtins; builtins.exec = builtins.compile = lambda *given, **named: None",
    "by tests in a text": "'''",
    "by tests in a branch": "if False: \\",
}


@pytest.mark.parametrize("how", FORGED)
def test_a_program_that_says_it_has_passed_has_not(how: str) -> None:
    """What reported success lay in the program's own module, and its tests behind it in one text."""
    assert not run_program(FORGED[how], "assert False, '''no'''").passed


def test_a_program_does_not_see_its_tests_while_it_runs() -> None:
    """Answers that are read off the tests, in the frames and objects of one interpreter."""
    look = """
import gc, sys
frame, seen = sys._getframe(), []
while frame is not None:
    seen += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
seen += gc.get_objects()
found = [one for one in seen if isinstance(one, (str, bytes)) and "SEC" + "RET" in str(one)]
"""
    assert run_program(look, "assert not found  # SECRET") == Outcome(True, "")
    told = run_program(look.replace("import gc", "given = '''SECRET'''\nimport gc"), "assert not found")
    assert told.error.startswith("AssertionError")  # the control


def test_a_program_and_its_tests_are_one_module() -> None:
    """A dataclass whose annotations cannot be looked up; tests of more bytes than a pipe holds."""
    program = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int"
    tests = f"#{'x' * 200_000}\nimport __main__\nassert A(1).x == 1 and __main__.A is A and __name__ == '__main__'"
    assert run_program(program, tests) == Outcome(True, "")


def test_code_is_rewarded_by_its_rows_tests() -> None:
    text = "First:\n```python\ndef f(): return 1\n```\nno, rather\n```python\ndef f(): return 2\n```\ndone"
    scored = Rewards(RLConfig(rewards=[RewardConfig("code")])).of(
        [answer(text, tests=["assert f() == 2"]), answer(text, tests="assert f() == 1"), answer("f = 3", tests="f")]
    )
    assert [one.total for one in scored] == [1.0, 0.0, 1.0]


def test_several_rewards_are_summed_by_weight() -> None:
    rewards = Rewards(RLConfig(rewards=[RewardConfig("math", 2.0), RewardConfig("finished", -0.5)]))
    found = rewards.of([answer("it is 7", answer="7"), answer("it is 8", answer=7)])
    assert [one.total for one in found] == [1.5, -0.5]
    assert found[0].each == {"math": 1.0, "finished": 1.0}


def raises(given: Answer) -> float:
    raise LookupError("no such thing")


def not_a_number(given: Answer) -> float:
    return math.nan if "bad" in given.text else 1.0


def no_number(given: Answer) -> Any:
    return "1.0"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "raised LookupError: no such thing"),
        ("not_a_number", "returned nan, no finite number"),
        ("no_number", "returned '1.0', no finite number"),
    ],
)
def test_a_reward_function_that_fails_is_never_silent(name: str, says: str) -> None:
    """A NaN in a group's mean makes every advantage of it NaN, or an update of nothing."""
    config = RLConfig(rewards=[RewardConfig(f"tests.trainer.rl.test_rewards:{name}")])
    found = Rewards(config).of([answer("good"), answer("bad")])
    assert found[1].total is None
    assert (found[0].total == 1.0) == (name == "not_a_number")
    with pytest.raises(RewardError, match=says) as raised:
        check_rewards([found[1].error], config)
    assert "recipe.rl.bad_reward=skip" in str(raised.value)
    assert "'bad' of 'how many?'" in str(raised.value)
    config.bad_reward = "skip"
    check_rewards([found[1].error], config)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("maths", "recipe.rl.rewards[0].function=maths is unknown; use math, exact"),
        ("no.such:thing", "recipe.rl.rewards[0].function=no.such:thing cannot be imported: ModuleNotFoundError"),
        ("math:pi", "recipe.rl.rewards[0].function=math:pi is float, which cannot be called"),
    ],
)
def test_a_function_that_is_not_there_is_named(name: str, says: str) -> None:
    with pytest.raises(ValueError, match="function=") as raised:
        Rewards(RLConfig(rewards=[RewardConfig(name)]))
    assert str(raised.value).startswith(says)


ENDING = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from tests.trainer.rl.test_rewards import ask_the_endless
threading.Thread(target=ask_the_endless, daemon=True).start()
time.sleep(0.5)
"""


def endless(_: Answer) -> float:
    threading.Event().wait()
    return 0.0


def ask_the_endless() -> None:
    rewards = Rewards(RLConfig(rewards=[RewardConfig(f"{__name__}:endless")], reward_threads=4))
    rewards.of([answer("one"), answer("two")])


def test_a_function_that_never_returns_does_not_keep_the_process() -> None:
    """Threads that are joined when the interpreter ends."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", ENDING, str(root)]
    subprocess.run(command, cwd=root, timeout=60, check=True)


def test_answers_keep_their_order_over_threads_and_failures_come_through() -> None:
    rewards = Rewards(RLConfig(rewards=[RewardConfig(f"{__name__}:length")], reward_threads=4))
    answers = [answer("x" * n) for n in range(20)]
    assert [scored.total for scored in rewards.of(answers)] == list(range(20))

    def stop() -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        rewards.of(answers, check=stop)


def length(given: Answer) -> float:
    return float(len(given.text))
