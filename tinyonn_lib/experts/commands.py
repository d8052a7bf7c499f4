"""Command line of partitions and checkpoints. Imports wait until a command runs, so `tinyonn --help` stays quick."""

from __future__ import annotations

import argparse
from pathlib import Path


def moe(parser: argparse.ArgumentParser) -> None:
    """Add `convert` to the parser of `tinyonn moe`."""
    commands = parser.add_subparsers(metavar="what", required=True)
    convert = commands.add_parser(
        "convert", help="divide a model's folder by a partition, layer by layer, without loading it as a whole"
    )
    convert.set_defaults(do=_convert)
    convert.add_argument("model", help="folder or hub id of the dense model")
    convert.add_argument("partition", type=Path, help="which neuron goes where: a partition_*.parquet of 04_experts")
    convert.add_argument("out", type=Path, help="folder of the checkpoint")
    convert.add_argument(
        "--routers", type=Path, metavar="FILE", help="who chooses the experts: a routers.safetensors of 04_experts"
    )
    convert.add_argument(
        "-k", type=int, help="active experts per token that the checkpoint asks for; needs --routers (default: all)"
    )


def _convert(args: argparse.Namespace) -> None:
    from tinyonn_lib.errors import BenchError
    from tinyonn_lib.experts.export import export
    from tinyonn_lib.experts.partition import Partition
    from tinyonn_lib.experts.router_file import load_routers

    part = Partition.read(args.partition)
    if args.k is not None and not 1 <= args.k <= part.count:
        raise BenchError(f"-k {args.k}: the partition has {part.count} experts per layer, choose 1 to {part.count}.")
    weights, biases = load_routers(args.routers) if args.routers else (None, None)
    card = {"router": f"from {args.routers.name}"} if args.routers else {}
    export(args.model, part, args.out, k=args.k, routers=weights, biases=biases, card=card)
    print(f"{args.out}: AutoModelForCausalLM.from_pretrained loads it")
