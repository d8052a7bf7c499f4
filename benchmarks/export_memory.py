"""Peak memory of an export from a folder: how far from loading the whole model?

A checkpoint of random weights with the layers of a 4-B Qwen (d_model 2560, d_ffn 6912; fewer of them, and a smaller
vocabulary) is written piece by piece, then divided by `export` in a process of its own. What counts is the largest
resident memory that this process reached above what it held after its imports, against twice the largest layer plus
one output shard. Mapped pages would count as well; none are used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import Bar, Row, main
from safetensors.torch import save_file

from tinyonn_lib.errors import BenchError

WIDTH, FFN, HEADS, VOCABULARY, EXPERTS = 2560, 6912, 20, 8192, 64
LAYERS, QUICK_LAYERS = 12, 4
SHARD = 300_000_000
MIB = 2**20


def write_checkpoint(folder: Path, kind: str, layers: int, dtype: torch.dtype) -> int:
    """A dense model of random weights, one layer per file; returns the bytes of its largest layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, tie_word_embeddings=True,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    places: dict[str, str] = {}
    sizes = []
    for group in ["model.embed_tokens.", "model.norm.", *(f"model.layers.{i}." for i in range(layers))]:
        tensors = {n: torch.empty(s, dtype=dtype).normal_(0, 0.02) for n, s in shapes.items() if n.startswith(group)}
        name = f"model-{group.removeprefix('model.').rstrip('.')}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return max(sizes)


def export_alone(line: Connection, source: Path, out: Path, layers: int, shared: int) -> None:
    """In its own process: export, and report the memory before and the peak."""
    torch.set_num_threads(1)
    from transformers import AutoConfig, AutoModelForCausalLM

    from tinyonn_lib.experts import export
    from tinyonn_lib.experts.partition import Partition

    with torch.device("meta"):  # the imports that an export needs
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    order = torch.randperm(FFN)
    routed = (FFN - shared) // EXPERTS * EXPERTS
    index, rest = order[:routed].view(EXPERTS, -1).sort(-1).values, order[routed:].sort().values
    part = Partition("random", (index,) * layers, (rest,) * layers)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    export.export(source, part, out, shard_bytes=SHARD)
    seconds = time.perf_counter() - start
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    line.send((before, int(status["VmHWM"].split()[0]) * 1024, seconds))


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    if sys.platform != "linux":
        raise BenchError("Peak memory is read from /proc: run this on Linux.")
    layers, rows = QUICK_LAYERS if args.quick else LAYERS, []
    # Into which class decides what is written besides: qwen2 → Qwen2Moe, llama → Glm4Moe with shared experts.
    cases: list[tuple[str, torch.dtype, int]] = [("qwen2", torch.bfloat16, 0), ("llama", torch.bfloat16, 512)]
    for kind, dtype, shared in cases:
        with tempfile.TemporaryDirectory(prefix="tinyonn-") as scratch:
            source = Path(scratch, "dense")
            layer = write_checkpoint(source, kind, layers, dtype)
            context: Any = multiprocessing.get_context("spawn")  # a fork would hold this process's memory
            ours, theirs = context.Pipe()
            process = context.Process(target=export_alone, args=(theirs, source, Path(scratch, "moe"), layers, shared))
            process.start()
            theirs.close()
            try:
                before, peak, seconds = ours.recv()
            except EOFError:
                raise BenchError("The export's process died: too little memory or disk?") from None
            process.join()
            model = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            shards = len(list(Path(scratch, "moe").glob("*.safetensors")))
        bound = 2 * layer + SHARD
        rows.append(
            {
                "dense": kind, "dtype": str(dtype).removeprefix("torch."), "layers": layers, "shards": shards,
                "model_mib": model / MIB, "layer_mib": layer / MIB, "baseline_mib": before / MIB,
                "peak_mib": (peak - before) / MIB, "bound_mib": bound / MIB, "peak_to_bound": (peak - before) / bound,
                "seconds": seconds,
            }
        )  # fmt: skip
    worst = max(row["peak_to_bound"] for row in rows)
    return rows, [Bar("export: peak memory / (2 largest layers + shard)", worst, 1.0, "lower")]


if __name__ == "__main__":
    sys.exit(main(__doc__, "export_memory", measure))
