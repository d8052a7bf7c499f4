"""What is each choice in pretraining worth: optimiser, schedule, packing, MTP, experts, attention, tokenizer?

Small models on the embedded corpus, bits per byte on held-out source files, at equal tokens and at equal time: speeds
are measured first, in turns, and every recipe gets the tokens that it manages while the default manages its budget.
The controls choose their learning rates on other files. Besides: document 002's lessons, and tokenizers side by side.
A run that was stopped goes on in `--folder`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from harness import Bar, Row, main

from tinyonn_lib.lm import corpus, tokenizer
from tinyonn_lib.pretrain import ablation
from tinyonn_lib.pretrain.contest import Contest
from tinyonn_lib.pretrain.lineup import DEFAULT, LINEUP, around
from tinyonn_lib.progress import Progress
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES

TUNED, PLAIN = "AdamW, tuned, cosine", "AdamW, one rate, cosine, a text a row"
LONG = (DEFAULT, TUNED, PLAIN, "document masks", "cosine", "batch ramp")
SIZES = ("width", "layers", "heads", "kv_heads", "head_dim", "ffn")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("runs/pretrain_recipe"), help="keeps what is done")
    parser.add_argument("--tokens", type=int, default=300_000, help="budget of the default recipe (default: 300,000)")
    parser.add_argument("--long", type=int, default=900_000, help="that of the bars' rows (default: 900,000)")
    parser.add_argument("--seeds", type=int, default=3, help="of the main rows (default: 3)")


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Rows: recipes at both budgets, lessons, tokenizers. Bars: as the module says."""
    p = params.validate(PHASES["pretrain"], params.defaults(PHASES["pretrain"]))
    table = corpus.split(corpus.python_docs(p.corpus_packages.split()), p.seed, calibration=0.05, heldout=0.03)
    if args.quick:
        args.tokens, args.long, args.seeds = 40_000, 60_000, 1
        table = table.groupby("split").head(400)
    train = table.loc[table["split"] == "train", "text"].tolist()
    tok = tokenizer.train_bpe(train, p.vocab_size, max_length=p.length)
    texts = ablation.Texts(table, tok, p.length, {name: getattr(p, name) for name in SIZES})
    contest = ablation.recipes(
        texts, args.folder, tokens=args.tokens, seeds=args.seeds, rounds=2 if args.quick else 31, progress=_told
    )
    # The bars at a budget nearer to that of 01_pretrain; the controls choose again, around the short one's best rates.
    long = contest.again(args.folder / "long", args.long)
    for name in LONG:
        entry = LINEUP[name]
        long.enter(name, around(entry, contest.rates[name]) if entry.rates else entry, LINEUP[DEFAULT], ("time",))
    found = {
        "recipe": contest.table(),
        "recipe, long": long.table(),
        "lesson": _kept(
            args.folder / f"lessons_{args.tokens}_{args.seeds}.parquet",
            lambda: ablation.both_lessons(texts, tokens=args.tokens, seeds=args.seeds),
        ),
        "tokenizer": _kept(
            args.folder / f"tokenizers_{args.seeds}_{args.quick}.parquet",
            lambda: ablation.vocabularies(texts, seconds=1.0 if args.quick else 15.0, seeds=args.seeds),
        ),
    }
    rows = [{"kind": kind, **row} for kind, part in found.items() for row in part.to_dict("records")]
    return rows, _bars(long, found["recipe"])


def _kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table that is measured once."""
    if not path.exists():
        make().to_parquet(path, index=False)
    return pd.read_parquet(path)


def _told(what: str, _: str) -> Progress:
    """A line per training."""
    return lambda done, total, note: print(f"{what}: {total} steps, {note}", flush=True) if done == total else None


def _bars(contest: Contest, short: pd.DataFrame) -> list[Bar]:
    bars = []
    for control, bound in ((TUNED, 0.03), (PLAIN, 0.10)):
        saved = contest.saving(DEFAULT, control, "time")
        name = f"share of the bits per byte of '{control}' that the default recipe saves at equal time"
        bars += [Bar(name, saved.mean, bound, "higher"), Bar(f"{name}, lower end", saved.low, 0.0, "higher")]
    for table, budget in ((short, "at the short budget"), (contest.table(), "at the long budget")):
        at_time = table[(table["budget"] == "time") & table["dense"]].set_index("recipe")["difference"].drop(DEFAULT)
        name = f"bits per byte at equal time, {budget}: the best other recipe of a plain Qwen3 minus the default"
        bars.append(Bar(name, float(at_time.min()), 0.0, "higher"))
    return bars


if __name__ == "__main__":
    sys.exit(main(__doc__, "pretrain_recipe", measure, options))
