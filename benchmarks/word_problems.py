"""Word problems of addition and subtraction, with answers that can be checked: for recipe=sft, dpo and grpo.

    python benchmarks/word_problems.py data FOLDER          sft, worked, preferences, prompts, held_out; a tokenizer
    python benchmarks/word_problems.py check OUT.jsonl      how many of the answers that mode=generate wrote are right
    python benchmarks/word_problems.py plot RUN_DIR OUT.png what a run's greedy answers were worth, step by step

A problem tells of a person, a thing and five numbers; its answer is what is left at the end. The texts to be fine-tuned
on answer in two ways, as texts of the world do: most say the result at once, which a small model guesses, and some
write down one step after the other, of which each is easy. Nothing says which way is better; a reward does, and so do
the texts of worked.jsonl, which all write it down. No problem is told twice, so held-out prompts are those of no other
row.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from data.tokenizer import train_bpe
from trainer.rl.maths import final_answer, same_answer

NAMES = ("Tom", "Ana", "Ben", "Eva", "Leo", "Mia", "Sam", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "stones")
MORE = ("gets", "finds", "buys", "wins")
LESS = ("loses", "sells", "drops", "lends")
STEPS = 4
LARGEST = 6  # of a number in a story
MOST = 12  # that anybody has at any time
WORKED = 0.15
"""Share of the texts that write their steps down."""
HELD_OUT = 500


def problem(draw: random.Random) -> dict[str, str]:
    """A row with prompt, answer, and the text of its steps."""
    held = draw.randint(1, LARGEST)
    story = f"{draw.choice(NAMES)} has {held} {draw.choice(THINGS)}"
    worked = ""
    for _ in range(STEPS):
        change = draw.randint(1, LARGEST)
        adds = held + change <= MOST and (held < change or draw.random() < 0.5)
        change = change if adds else min(change, held)
        after = held + change if adds else held - change
        story += f", {draw.choice(MORE if adds else LESS)} {change}"
        worked += f" {held}{'+' if adds else '-'}{change}={after}"
        held = after
    return {"prompt": f"{story}. How many now? Answer:", "answer": str(held), "worked": worked}


def completion(row: dict[str, str], *, worked: bool, answer: str | None = None) -> str:
    """What a text answers; `answer`, another number than the right one, ends it where it is given."""
    result = answer or row["answer"]
    if not worked:
        return f" {result}"
    return f"{row['worked'][: -len(row['answer'])]}{result}. {result}"


def make(
    folder: Path, *, num_examples: int = 12000, num_pairs: int = 2000, num_prompts: int = 8000, num_worked: int = 1000
) -> None:
    """Write the five parts and the tokenizer."""
    draw = random.Random(0)
    rows: dict[str, dict[str, str]] = {}  # by their text, each once
    _tell(rows, num_examples + num_pairs + num_prompts + HELD_OUT, draw)
    different = list(rows.values())
    _tell(rows, len(rows) + num_worked, random.Random(1))
    written_down = list(rows.values())[len(different) :]
    examples, pairs = different[:num_examples], different[num_examples : num_examples + num_pairs]
    prompts = different[num_examples + num_pairs : -HELD_OUT]
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "sft": [{"prompt": r["prompt"], "completion": completion(r, worked=draw.random() < WORKED)} for r in examples],
        "worked": [{"prompt": r["prompt"], "completion": completion(r, worked=True)} for r in written_down],
        "preferences": [_pair(row, draw) for row in pairs],
        "prompts": [{"prompt": row["prompt"], "answer": row["answer"]} for row in prompts],
        "held_out": [{"prompt": row["prompt"], "answer": row["answer"]} for row in different[-HELD_OUT:]],
    }
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Without digits: each stays a token of its own.
    texts = ["".join(letter for letter in row["prompt"] if not letter.isdigit()) for row in prompts]
    train_bpe(iter(texts), 384).save(folder / "tokenizer")


def _tell(rows: dict[str, dict[str, str]], count: int, draw: random.Random) -> None:
    """Add problems until there are so many."""
    while len(rows) < count:
        row = problem(draw)
        rows[row["prompt"]] = row


def _pair(row: dict[str, str], draw: random.Random) -> dict[str, str]:
    """The right answer and a wrong one, told in the same way: nothing is said about the way."""
    worked = draw.random() < WORKED
    wrong = str(int(row["answer"]) + draw.choice((-2, -1, 1, 2)))
    wrong = wrong if int(wrong) >= 0 else "1" if row["answer"] != "1" else "2"
    chosen, rejected = completion(row, worked=worked), completion(row, worked=worked, answer=wrong)
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def check(path: Path) -> dict[str, float | None]:
    """Of answers as launch/lab.py mode=generate writes them: the shares that are right, that show steps, and that are
    right of those that do and of the others."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    right = [same_answer(final_answer(line["text"]) or "", line["answer"]) for line in lines]
    worked = ["=" in line["text"] for line in lines]

    def share(way: bool) -> float | None:
        of_them = [is_right for is_right, shows in zip(right, worked, strict=True) if shows == way]
        return sum(of_them) / len(of_them) if of_them else None

    found = {"problems": len(lines), "exact_match": sum(right) / len(lines), "worked": sum(worked) / len(lines)}
    return found | {"exact_match_worked": share(True), "exact_match_at_once": share(False)}


def plot(run_dir: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    checked = [line for line in lines if line.get("validation_exact_match") is not None]
    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    axes.plot(
        [line["step"] for line in lines], [line["reward"] for line in lines], color="0.75", label="reward, sampled"
    )
    axes.plot(
        [line["step"] for line in checked],
        [line["validation_exact_match"] for line in checked],
        marker="o",
        label="exact match, greedy, held-out problems",
    )
    axes.set(xlabel="step", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "data":
        make(Path(sys.argv[2]))
    elif len(sys.argv) == 3 and sys.argv[1] == "check":
        print(json.dumps(check(Path(sys.argv[2]))))
    elif len(sys.argv) == 4 and sys.argv[1] == "plot":
        plot(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
