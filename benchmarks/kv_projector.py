"""Does a small projector let a student think with its teacher's memory, better than ridge and the document's do?

On the embedded teacher and student of a finished run (`tinyonn pretrain`), held-out documents, each method at its own
best learning rate of those tried (chosen on other texts), several seeds; intervals are paired over source files.
Besides: parameter counts against the formulas of ERRATA.md (003), RoPE off and on again against transformers' own
caches, size at the widths of C2C's example, and the speed of projection against its two bare matrix products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from typing import Any

import torch
from harness import Bar, Row, main

from tinyonn_lib.kv import alternatives, stack, sweep
from tinyonn_lib.kv.cache import KV, KVModel
from tinyonn_lib.kv.contest import LINEUP, RIDGE, RIDGE_TRAINED, Contest, Texts
from tinyonn_lib.kv.projector import KVDimensionProjector
from tinyonn_lib.kv.train import Recipe
from tinyonn_lib.lm import load
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES
from tinyonn_lib.workbench.runs import open_run

PAIRS = (
    ("Qwen2-7B", 3584, 2048),
    ("Qwen2-14B", 5120, 1536),
    ("Llama-3-70B", 8192, 2048),
    ("Qwen2-14B, with others", 5120, 2048),
    ("Qwen2-72B, with others", 8192, 2048),
)
"""The document's five: teacher, its d_model, the student's."""

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic NTK": {"rope_type": "dynamic", "factor": 4.0},
    "YaRN": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "Llama-3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip

C2C = 17.1e6
"""Parameters per layer of C2C's projector from Qwen2.5-0.5B to Qwen3-0.6B (PEERS.md §8)."""

SPEEDS = (
    (64, 64, 1.0),
    (128, 1024, 2.0),
    (512, 256, 1.0),
    (512, 256, 2.0),
    (1024, 256, 1.0),
    (5120, 1536, 0.5),
)
"""Width, student's width, ratio: the embedded pair, C2C's, Qwen2.5-7B, 14B (KV heads) into 1.5B, the document's own."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", default="default", help="a finished run (default: default)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each training (default: 200)")


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Rows: the contest, the document's table, counts, RoPE, speed. Bars: as the module says."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tokens, held = 120_000, 30_000
    if args.quick:
        args.seeds, args.steps, rates, tokens, held = 1, 20, (3e-3,), 6000, 4000
    phase = PHASES["kv"]
    run = open_run(phase, params.validate(phase, params.compose(phase, [f"run={args.run}"])))
    teacher, student = (KVModel(load.load_model(str(run.input("pretrain", name)))) for name in ("model", "student"))
    tok = load.load_tokenizer(str(run.input("pretrain", "model")))
    table = run.table("pretrain", "texts.parquet")
    # Another order than the notebook's: not the texts on which anything was developed.
    texts = Texts.draw(table, tok, student, {"teacher": teacher}, tokens=tokens, eval_tokens=held, length=128, seed=1)
    ring = Contest(texts, recipe=Recipe(steps=args.steps, seed=1), rates=rates, seeds=args.seeds)
    for entry in LINEUP:
        ring.enter(entry)
        print(f"{entry.label}: {statistics.mean(each.mean for each in ring.losses[entry.label]):.4f}", flush=True)
    alternatives.lora_student(ring)
    plan = stack.Schedule(rates=tuple(10 * rate for rate in rates), seeds=args.seeds, steps=min(args.steps, 150))
    measured = sweep.sweep(texts.train, texts.validation, texts.heldout, plan)
    rows: list[Row] = [{"what": "contest", **row} for row in ring.table().to_dict("records")]
    rows += [{"what": "the document's table", **row} for row in measured.table.to_dict("records")]
    counts, ropes, speeds = _counts(), _ropes(), _speeds(4 if args.quick else 12)
    return [*rows, *counts, *ropes, *speeds], [*_bars(ring), *_exact(counts, ropes, speeds)]


def _bars(ring: Contest) -> list[Bar]:
    best = ring.best(["ours"])
    own = ring.table().set_index("cache").loc[best]
    gaps = {name: ring.duel(best, name).high for name in (RIDGE, "linear", RIDGE_TRAINED, ring.best(["document"]))}
    return [
        Bar("share of the gap from zero to own cache that our best closes", float(own["closed"]), 0.92, "higher"),
        *(Bar(f"our best ({best}) minus {name}, nats per token, upper end", gap, 0.0, "lower")
          for name, gap in gaps.items()),
    ]  # fmt: skip


def _exact(counts: list[Row], ropes: list[Row], speeds: list[Row]) -> list[Bar]:
    from transformers import Qwen2Config, Qwen3Config

    qwen2 = Qwen2Config(num_hidden_layers=24, hidden_size=896, num_attention_heads=14, num_key_value_heads=2)
    qwen3 = Qwen3Config(num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        per_layer = KVDimensionProjector.from_configs({"teacher": qwen2}, qwen3).count_parameters()["per_layer"]
    return [
        Bar("parameters: largest difference from the formula, five pairs × three ratios",
            float(max(abs(row["weights"] - row["formula"]) for row in counts)), 0.0, "lower"),
        Bar("RoPE off and on again, largest difference from what k_proj gives and the model caches",
            float(max(row["difference"] for row in ropes)), 1e-5, "lower"),
        Bar("parameters per layer, ours at Qwen2.5-0.5B → Qwen3-0.6B (C2C: 17.1 M)", float(per_layer["teacher"]), C2C,
            "lower"),
        Bar("speed of projection ÷ its two bare matrix products, slowest of the widths",
            float(min(row["ratio"] for row in speeds)), 0.8, "higher"),
    ]  # fmt: skip


def _counts() -> list[Row]:
    rows: list[Row] = []
    for name, width, student in PAIRS:
        for ratio in (0.5, 1.0, 2.0):
            with torch.device("meta"):
                made = KVDimensionProjector({name: {"d_model": width, "num_layers": 2}}, student, mlp_ratio=ratio)
            count, hidden = made.count_parameters(), round(ratio * width)
            rows.append(
                {"what": "parameters", "pair": name, "mlp_ratio": ratio, "formula": width * hidden + hidden * student,
                 "weights": count["weights_per_adapter"][name], "per adapter": count["per_adapter"][name],
                 "per teacher": count["per_teacher"][name]}
            )  # fmt: skip
    return rows


@torch.no_grad()
def _ropes() -> list[Row]:
    from transformers import LlamaConfig, LlamaForCausalLM

    rows: list[Row] = []
    for name, rope in ROPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256 if "original_max_position_embeddings" in rope else 64,
            rope_parameters={"rope_theta": 10_000.0, **rope},
        )  # fmt: skip
        model = KVModel(LlamaForCausalLM(config).eval())
        ids = torch.randint(8, 128, (2, 160))
        before: list[torch.Tensor] = []  # what k_proj gives: keys that were never rotated
        hooks = [
            layer.self_attn.k_proj.register_forward_hook(partial(_note, before)) for layer in model.model.model.layers
        ]
        own = model.model(ids, use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        taken = model.taken(own)
        again = model.cache(taken)
        worst = max(float((a.keys - b.keys).abs().max()) for a, b in zip(own.layers, again.layers, strict=True))
        worst = max(worst, float((taken.keys - torch.stack(before, 1)).abs().max()))
        rows.append({"what": "RoPE round trip", "scaling": name, "difference": worst})
    return rows


def _note(before: list[torch.Tensor], _module: torch.nn.Module, _given: object, keys: torch.Tensor) -> None:
    before.append(keys)


@torch.no_grad()
def _speeds(rounds: int) -> list[Row]:
    """Projection of 2,048 tokens of one layer next to x @ A @ B of the same sizes, in turns, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        for width, student, ratio in SPEEDS:
            made = KVDimensionProjector({"t": {"d_model": width, "num_layers": 1}}, student, mlp_ratio=ratio).eval()
            kv = KV(torch.randn(1, 1, 2048, width), torch.randn(1, 1, 2048, width))
            hidden = round(ratio * width)
            pairs = [(torch.randn(width, hidden), torch.randn(hidden, student)) for _ in range(2)]
            ratios, ours = [], []
            for _ in range(rounds):
                begin = time.perf_counter()
                made.project_teacher_kv("t", kv)
                middle = time.perf_counter()
                for x, (first, last) in zip((kv.keys, kv.values), pairs, strict=True):
                    (x @ first) @ last
                end = time.perf_counter()
                ratios.append((end - middle) / (middle - begin))
                ours.append(2048 / (middle - begin))
            rows.append({"what": "speed", "width": width, "student": student, "mlp_ratio": ratio,
                         "ratio": statistics.median(ratios), "tokens per second": statistics.median(ours)})  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    sys.exit(main(__doc__, "kv_projector", measure, options))
