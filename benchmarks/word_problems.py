"""Word problems of addition and subtraction, with answers that can be checked: for recipe=sft and recipe=grpo.

    python benchmarks/word_problems.py data FOLDER          sft.jsonl, prompts.jsonl and a tokenizer
    python benchmarks/word_problems.py plot RUN_DIR OUT.png what a run's greedy answers were worth, step by step

A problem names a person, a thing and two numbers up to 9; its answer is a number. Fine-tuning ends early on purpose: a
model learns how an answer looks, and is often wrong. The text of a held-out prompt is that of no other row.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

from data.tokenizer import train_bpe

NAMES = ("Tom", "Ana", "Ben", "Eva", "Leo", "Mia", "Sam", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "stones")
MORE = ("{name} has {a} {thing} and gets {b} more.", "{name} finds {a} {thing}, then {b} others.")
LESS = ("{name} has {a} {thing} and loses {b}.", "{name} buys {a} {thing} and gives away {b}.")
LARGEST = 9
HELD_OUT = 128


def problem(a: int, b: int, *, adds: bool, draw: random.Random) -> dict[str, str]:
    """A row with prompt and answer."""
    story = draw.choice(MORE if adds else LESS).format(name=draw.choice(NAMES), thing=draw.choice(THINGS), a=a, b=b)
    return {"prompt": f"{story} How many now? Answer:", "answer": str(a + b if adds else a - b)}


def make(folder: Path, *, num_examples: int = 1000, num_prompts: int = 4000, seed: int = 0) -> None:
    """Write the three parts. The last HELD_OUT of the prompts are held out."""
    draw = random.Random(seed)
    pairs = [(a, b, adds) for adds in (True, False) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    pairs = [(a, b, adds) for a, b, adds in pairs if adds or a >= b]
    rows: dict[str, dict[str, str]] = {}  # by their text, each once
    while len(rows) < num_examples + num_prompts + HELD_OUT:
        a, b, adds = draw.choice(pairs)
        row = problem(a, b, adds=adds, draw=draw)
        rows[row["prompt"]] = row
    different = list(rows.values())
    folder.mkdir(parents=True, exist_ok=True)
    examples = [{"prompt": r["prompt"], "completion": f" {r['answer']}"} for r in different[:num_examples]]
    prompts = different[num_examples:]
    for name, lines in (("sft.jsonl", examples), ("prompts.jsonl", prompts)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Without digits: each stays a token of its own.
    texts = ["".join(letter for letter in row["prompt"] if not letter.isdigit()) for row in prompts]
    train_bpe(iter(texts), 384).save(folder / "tokenizer")


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
    elif len(sys.argv) == 4 and sys.argv[1] == "plot":
        plot(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
