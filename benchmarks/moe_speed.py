"""Tokens per second of a dense model and of mixtures cut from it: where is the mixture slower?

A Qwen3-like model of random weights is divided at random, once into 100 small and once into 8 large experts, exported
with random router rows, and loaded by plain transformers. At 25, 50 and 75 % of the FFN parameters active, by each
implementation of experts, in prefill and decoding, at batch 1 and 16; next to it a dense model as narrow, which is what
pruning to the same share gives without any routing. All take turns. The share is that of the FFNs: attention, embedding
and head, which do the same work everywhere, are not counted.

As many threads as OMP_NUM_THREADS says, else one per core: the rows name them. Float32 on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from harness import Bar, Row, main
from steps import Size, build

from tinyonn_lib.experts import speed
from tinyonn_lib.experts.export import export
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm import load

EXPERTS = (100, 8)
SHARES = (0.25, 0.5, 0.75)
BATCHES = (1, 16)
TIMED = (("prefill", 16), ("decode", 1))  # what the bars are about, at the least share


@dataclass(frozen=True)
class Plan:
    """What is measured, and about how long."""

    size: Size
    length: int  # of a prompt, tokens
    seconds: float


CPU = Plan(Size(layers=4, width=512, ffn=3200, vocabulary=4096), 128, 160)
GPU = Plan(
    Size(layers=12, width=2048, ffn=6400, heads=16, kv_heads=4, head_dim=128, vocabulary=32_768), 512, 120
)  # fmt: skip
QUICK = Plan(Size(layers=2, width=128, ffn=1600, heads=2, kv_heads=1, vocabulary=512), 24, 8)


def models(plan: Plan, dtype: load.Dtype, device: str, scratch: Path) -> tuple[Any, list[speed.Variant]]:
    """The dense model, mixtures cut from it, and dense ones as narrow as their active parts; each from its folder."""

    def loaded(folder: Path) -> Any:
        return load.load_model(str(folder), dtype, device)

    def saved(model: Any, name: str) -> Path:
        model.save_pretrained(scratch / name)
        return scratch / name

    size, kind = plan.size, getattr(torch, dtype)
    dense = build(size).to(kind)
    variants = []
    for experts in EXPERTS:
        generator = torch.Generator().manual_seed(experts)
        orders = [torch.randperm(size.ffn, generator=generator) for _ in range(size.layers)]
        part = Partition("random", tuple(order.view(experts, -1).sort(-1).values for order in orders))
        rows = [0.02 * torch.randn(experts, size.width, generator=generator) for _ in orders]
        name = f"{experts} experts of {part.size}"
        folder = export(dense, part, scratch / name, routers=rows)
        active = {part.k(share): part.share(part.k(share)) for share in SHARES}
        variants.append(speed.Variant(name, loaded(folder), active))
    for share in SHARES:
        narrow = build(replace(size, ffn=round(share * size.ffn))).to(kind)
        name = f"dense, {share:.0%} of the FFN"
        variants.append(speed.Variant(name, loaded(saved(narrow, name)), {0: share}))
    return loaded(saved(dense, "dense")), variants


def bars(table: pd.DataFrame, where: str) -> list[Bar]:
    """Is a mixture with the least active share at least as fast as the dense model, by its fastest implementation?"""
    found = []
    for label in table.loc[table["k"] > 0, "model"].unique():
        for stage, batch in TIMED:
            rows = table[(table["model"] == label) & (table["stage"] == stage) & (table["batch"] == batch)]
            ratio = rows.loc[rows["active"] == rows["active"].min(), "ratio"].max()
            name = f"{label}, {rows['active'].min():.0%} of the FFN active, {stage}, batch {batch}, {where}: tokens/s "
            found.append(Bar(name + "of the fastest implementation / dense", ratio, 1.0, "higher"))
    return found


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    place = load.pick_device(args.device)
    plan = QUICK if args.quick else GPU if place.type == "cuda" else CPU
    dtype: load.Dtype = "bfloat16" if place.type == "cuda" else "float32"
    with tempfile.TemporaryDirectory(prefix="tinyonn-") as scratch:
        dense, variants = models(plan, dtype, args.device, Path(scratch))
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, plan.size.vocabulary, (max(BATCHES), plan.length), generator=generator)
        table = speed.throughput(dense, variants, prompts, batches=BATCHES, seconds=plan.seconds)
    threads = torch.get_num_threads()
    where = "GPU" if place.type == "cuda" else f"CPU with {threads} thread{'s' * (threads > 1)}"
    print(speed.verdict(table))
    rows: list[Row] = table.rename(columns={"active": "active share of FFN"}).to_dict("records")
    about = {"conditions": speed.conditions(dense), "threads": threads, "prompt": plan.length}
    return [row | about for row in rows], bars(table, where)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one")


if __name__ == "__main__":
    sys.exit(main(__doc__, "moe_speed", measure, options))
