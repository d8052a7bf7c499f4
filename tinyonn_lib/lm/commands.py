"""Command line of models. Imports wait until a command runs, so `tinyonn --help` stays quick."""

from __future__ import annotations

import argparse
from pathlib import Path


def gguf(parser: argparse.ArgumentParser) -> None:
    """Fill in the parser of `tinyonn gguf`."""
    parser.set_defaults(do=_gguf)
    parser.add_argument("checkpoint", type=Path, help="folder of a dense model or one of experts, with its tokenizer")
    parser.add_argument("out", type=Path, help="OUT.gguf")
    parser.add_argument("--dtype", choices=("f32", "f16", "q8_0"), default="f32", help="of the matrices (default: f32)")


def _gguf(args: argparse.Namespace) -> None:
    from tinyonn_lib.lm.gguf import BESIDE, to_gguf

    print(to_gguf(args.checkpoint, args.out, args.dtype))
    for name, why in BESIDE.items():
        if (args.checkpoint / name).exists():
            print(f"{name} stays behind: {why}")
