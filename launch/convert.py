"""Convert: `python launch/convert.py export CHECKPOINT_DIR OUT_DIR` and `import HF_DIR OUT_DIR`.

Large models convert faster, and in less memory, on several processes: `torchrun --nproc-per-node 8 launch/convert.py
...`. Exit codes: 0 done; 2 wrong arguments; 1 anything else, such as a damaged checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone, installed or not

import torch

from launch.errors import exit_code_of
from parallel.mesh import init_distributed, rank_from_env
from parallel.precision import DTYPES
from trainer.config import ConfigError
from trainer.convert import export_checkpoint, import_folder

TIMEOUT_SECONDS = 24 * 3600.0
"""A rank may write a file of gigabytes to a slow disk while the others wait; one that died is the launcher's to see."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Through launch/errors.py, so that one rank speaks."""
        raise ConfigError([f"{message}; {' '.join(self.format_usage().split())}"])


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises ConfigError for a wrong one."""
    parser = _Parser(prog="launch/convert.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|import", parser_class=_Parser)
    export = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    export.add_argument("source", metavar="CHECKPOINT_DIR", type=Path, help="or a run: its newest good checkpoint")
    export.add_argument("out", metavar="OUT_DIR", type=Path, help="must be new or empty")
    export.add_argument(
        "--merged", action="store_true", help="of adapters: the model with them in it; default: a PEFT folder"
    )
    export.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the files; default: as they are")
    into = commands.add_parser("import", help="a Hugging Face folder to a checkpoint (OUT_DIR/step_0)")
    into.add_argument("source", metavar="HF_DIR", type=Path, help="config.json and safetensors")
    into.add_argument("out", metavar="OUT_DIR", type=Path, help="must be new or empty")
    into.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="the run's precision.master")
    into.add_argument(
        "--mtp-depth", type=int, default=0, help="layers for multi-token prediction to take along; default: none"
    )
    return parser.parse_args(arguments)


def convert(arguments: list[str]) -> None:
    """Do what the command line asks for, and say what was done."""
    command = parse(arguments)
    init_distributed(torch.device("cpu"), TIMEOUT_SECONDS)
    dtype = DTYPES[command.dtype] if command.dtype is not None else None
    source, out = command.source.expanduser(), command.out.expanduser()
    if command.command == "export":
        exported = export_checkpoint(source, out, dtype=dtype, merged=command.merged)
        say(f"exported {exported.checkpoint} to {out}")
        if exported.no_tokenizer is not None:
            say(f"no tokenizer was written: {exported.no_tokenizer}")
    else:
        assert dtype is not None
        import_folder(source, out, dtype=dtype, mtp_depth=command.mtp_depth)
        say(f"imported {source}; start from it with: launch/train.py ... checkpoint.resume={out}")


def say(text: str) -> None:
    if rank_from_env() == 0:
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code_of(convert, sys.argv[1:]))
