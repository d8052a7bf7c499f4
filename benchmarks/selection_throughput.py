"""How much slower is scoring texts than the model's forward pass alone?

Two mixtures of random weights, of the embedded default's shape and of OLMoE's proportions, and the same texts in the
same batches and threads, in turns: the bare forward pass `model(input_ids, attention_mask, use_cache=False).logits` of
batches that are ready, and all that `Scorer` does from texts to table, tokenising included. "bare again" is noise. The
ratio is tokens/s of the variant / of the bare pass of the same round. IFD needs a second pass over the answers, here
half of the tokens: it has no bar.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from harness import Bar, Row, main
from peers import Arm
from turns import in_turns

from tinyonn_lib.lm import corpus, load
from tinyonn_lib.lm.threads import default_shards, threads
from tinyonn_lib.lm.tokenizer import train_bpe
from tinyonn_lib.selection import rows as data
from tinyonn_lib.selection.routers import routers
from tinyonn_lib.selection.scoring import Scorer, batches
from tinyonn_lib.selection.selector import Selector

BOUND = 0.95
VOCABULARY = 4096  # of the tokenizer: the head does the work of all its rows either way
CALIBRATED = {"combined": {"contrastive": 1.0, "log_perplexity": -1.0, "intercept": 0.0}}
EMBEDDED = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "n_routed_experts": 28, "num_experts_per_tok": 12, "n_shared_experts": 4,
    "moe_intermediate_size": 16, "first_k_dense_replace": 0, "max_position_embeddings": 128, "norm_topk_prob": False,
    "routed_scaling_factor": 2.0, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = {
    "vocab_size": 50_304, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 64, "num_experts_per_tok": 8,
    "max_position_embeddings": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A model, how many tokens of text a round has, the longest text, and rounds."""

    name: str
    kind: str
    fields: dict[str, Any]
    tokens: int
    longest: int
    rounds: int


CPU = (
    Plan("embedded, 3 layers of 128", "glm4_moe", EMBEDDED, 8_000, 126, 11),
    Plan("OLMoE's shape, 8 layers of 512", "olmoe", LARGE, 1_200, 200, 5),
)
GPU = (
    Plan("embedded, 3 layers of 128", "glm4_moe", EMBEDDED, 400_000, 126, 15),
    Plan("OLMoE's shape, 8 layers of 512", "olmoe", LARGE, 400_000, 1000, 9),
)
QUICK = (
    Plan("embedded, 3 layers of 128", "glm4_moe", EMBEDDED, 4_000, 126, 3),
    Plan("OLMoE's shape, 2 layers of 64", "olmoe", {**LARGE, "num_hidden_layers": 2, "hidden_size": 64}, 2_000, 200, 3),
)


def build(plan: Plan, device: torch.device) -> Any:
    """The model, its router rows as small as an export's where gates are sigmoids."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(plan.kind, **plan.fields))
    with torch.no_grad():
        for layer in routers(model):
            layer.weight.normal_(0, 1e-4 if plan.kind == "glm4_moe" else 0.02)
    return model.to(device).eval()


def pieces(texts: list[str], tokenizer: Any, plan: Plan) -> list[str]:
    """Pieces of the texts, of 5 tokens up to the longest, as long together as the plan wants."""
    make = np.random.default_rng(0)
    stream = [token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in ids]
    # A piece may be cut differently on its own, into a few tokens more.
    ends = np.cumsum(make.integers(5, round(0.95 * plan.longest), plan.tokens // 4))
    ends = ends[ends <= plan.tokens]
    stream = stream * -(-plan.tokens // len(stream))
    return [tokenizer.decode(stream[begin:end]) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def bare(scorer: Scorer, selector: Selector, rows: list[data.Row], device: torch.device) -> Callable[[], None]:
    """The forward pass of the scorer's batches, ready made, in as many threads."""
    start = selector.tokenizer.bos_token_id
    ids = [[start, *one] for one in selector.tokenizer([row.text for row in rows])["input_ids"]]
    shards = default_shards(device)
    ready = []
    for places in batches({place: len(one) for place, one in enumerate(ids)}, scorer.room, shards):
        width = len(ids[places[0]])
        mask = torch.tensor([[1] * len(ids[place]) + [0] * (width - len(ids[place])) for place in places])
        padded = torch.tensor([ids[place] + [start] * (width - len(ids[place])) for place in places])
        ready.append((padded.to(device), mask.to(device)))

    def forward(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        with torch.no_grad():
            _ = selector.model(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits

    def run() -> None:
        with threads(max(1, min(shards, len(ready)))) as each:
            each(forward, ready)

    return run


def compare(plan: Plan, texts: list[str], tokenizer: Any, device: torch.device) -> list[Row]:
    """One row per variant."""
    model = build(plan, device)
    selector = Selector(model, tokenizer, (1.0,) * len(routers(model)), combined=CALIBRATED)
    plain = [data.Row("texts", place, text) for place, text in enumerate(pieces(texts, tokenizer, plan))]
    asked = [data.Row("texts", row.source_index, row.text, row.text[: len(row.text) // 2]) for row in plain]
    full, only = Scorer(selector), Scorer(selector, baselines=False)
    table, bad = full(plain)
    if bad:
        raise RuntimeError(f"the texts do not fit: {bad[0]}")
    forward = bare(full, selector, plain, device)
    variants: dict[str, Callable[[], Any]] = {
        "bare": forward,
        "bare again": forward,
        "all scores": lambda: only(plain),
        "all scores, perplexity": lambda: full(plain),
        "all scores, perplexity, IFD": lambda: full(asked),
    }
    found = in_turns({name: Arm(step) for name, step in variants.items()}, plan.rounds, 1, device)
    tokens, rows = int(table["tokens"].sum()), []
    for name in list(variants)[1:]:
        middle, low, high = (1 / value for value in found[name].ratio(found["bare"]))
        rows.append(
            {
                "model": plan.name, "variant": name, "texts": len(plain), "tokens": tokens,
                "bare_tokens_per_s": tokens / median(found["bare"].seconds),
                "tokens_per_s": tokens / median(found[name].seconds), "ratio": middle, "low": high, "high": low,
                "rounds": plan.rounds, "batch_tokens": full.room, "threads": default_shards(device),
                "experts": model.config._experts_implementation,
            }
        )  # fmt: skip
    return rows


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    device = load.pick_device(args.device)
    texts = [text for _, text in zip(range(400), corpus.python_code()["text"], strict=False)]
    tokenizer = train_bpe(texts, VOCABULARY)
    plans = QUICK if args.quick else GPU if device.type == "cuda" else CPU
    rows = [row for plan in plans for row in compare(plan, texts, tokenizer, device)]
    return rows, bars(rows)


def bars(rows: list[Row]) -> list[Bar]:
    """Scoring in one pass is about as fast as that pass."""
    return [
        Bar(f"{row['model']}: {row['variant']}, tokens/s / bare forward pass", row["ratio"], BOUND, "higher")
        for row in rows
        if row["variant"] in ("all scores", "all scores, perplexity")
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one")


if __name__ == "__main__":
    sys.exit(main(__doc__, "selection_throughput", measure, options))
