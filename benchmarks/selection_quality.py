"""Can routers, warmed up by contrast, tell text from trash of a kind they have not seen, and do they add to perplexity?

On the mixture of experts of a finished run (`tinyonn all`), passages of documentation that neither the models nor the
notebooks of 06 saw. Each kind of corruption in turn is left out of the warm-up and then judged (leave one out), with
every seed. AUROC of a clean passage against a corrupted one, intervals paired over source files; a bar's value is the
mean over the left-out kinds, or the lower end of an interval.

The gauge: one vector is added to all rows of each router, which no softmax notices; a score that is the model's own
ranks texts as before.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pandas as pd
from harness import Bar, Row, main

from tinyonn_lib.lm import load
from tinyonn_lib.selection import calibrate, embedded, judge, known, warmup
from tinyonn_lib.selection.bootstrap import Array, Weights, intervals
from tinyonn_lib.selection.corrupt import CORRUPTIONS
from tinyonn_lib.selection.selector import Selector
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES
from tinyonn_lib.workbench.runs import open_run

NAMES = ("literal", "centred", "log_mass", "contrastive", "combined", "perplexity", "perplexity_fitted")
BEFORE = "contrastive, before"
GAUGED = ("centred", "log_mass", "contrastive")
CONTROLS = ("perplexity", "perplexity_fitted")
DRAWS = 1000


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", default="default", help="a finished run (default: default)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--rows", type=int, default=1000, help="passages of each warm-up (default: 1000)")
    parser.add_argument("--judge-rows", type=int, default=300, help="passages to judge on (default: 300)")


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Rows: AUROC of each score for each left-out kind. Bars: as the module says."""
    if args.quick:
        args.seeds, args.rows, args.judge_rows = 1, 160, 64
    phase = PHASES["selector"]
    run = open_run(phase, params.validate(phase, params.compose(phase, [f"run={args.run}"])))
    path = str(run.input("router", "checkpoint"))
    model, tok = load.load_model(path), load.load_tokenizer(path)
    longest = known.longest(model)
    learn, _ = known.halves(
        run.table("pretrain", "texts.parquet"), tok, learn=args.rows, judge=1, length=longest, seed=0
    )
    cold = calibrate.cold(model, tok, learn)
    fresh, _ = embedded.pool(
        ("networkx", "pandas"), cold, rows=args.judge_rows, length=0, dirt=0.0, heldout=0.05, seed=1
    )
    answers = known.paired(fresh, tok, longest, seed=1)
    before = known.scored(cold, answers)
    found: dict[tuple[str, str], list[Array]] = {}
    gauges = []
    for seed in range(args.seeds):
        for kind in CORRUPTIONS:
            warm = _warmed(path, tok, learn, tuple(name for name in CORRUPTIONS if name != kind), seed)
            after = known.scored(warm, answers)
            for name, table in [(BEFORE, before), *((name, after) for name in NAMES)]:
                found.setdefault((name, kind), []).append(_draws(table, name.removesuffix(", before"), kind))
            means = {name: found[name, kind][-1][0] for name in (BEFORE, *NAMES)}
            print(f"seed {seed}, {kind} left out: " + ", ".join(f"{n} {v:.3f}" for n, v in means.items()), flush=True)
        rows = known.as_rows(fresh)
        gauges.append(judge.gauge(warm, rows, seed=seed, scorer_options={}).set_index("score")["spearman"])
    weights = Weights(before["source"][: len(fresh)], DRAWS, 0)
    return _rows(found, pd.concat(gauges, axis=1), weights), _bars(found, pd.concat(gauges, axis=1), weights)


def _warmed(path: str, tok: object, learn: pd.DataFrame, kinds: tuple[str, ...], seed: int) -> Selector:
    *_, (_, warm, _) = warmup.warm_up(
        load.load_model(path), tok, learn, warmup.Recipe(corruptions=kinds, seed=seed)
    )  # fmt: skip
    return warm


def _draws(table: pd.DataFrame, name: str, kind: str) -> Array:
    """AUROC of one score for one kind: the estimate, then its draws, the same for all tables: `(1 + DRAWS,)`."""
    rows = table[table["corruption"].isin(["", kind])]
    _, (values,), _ = judge.aurocs_by_draw(rows, [judge.quality(rows, name)], Weights(rows["source"], DRAWS, 0))
    return values[:, 0]


def _mean(found: dict[tuple[str, str], list[Array]], name: str, kinds: tuple[str, ...]) -> Array:
    each: Array = np.mean([np.mean(found[name, kind], axis=0) for kind in kinds], axis=0)
    return each


def _low(values: Array, weights: Weights) -> float:
    return float(intervals(values[:, None], weights, "value")["low"][0])


def _rows(found: dict[tuple[str, str], list[Array]], gauges: pd.DataFrame, weights: Weights) -> list[Row]:
    rows: list[Row] = []
    for name in (BEFORE, *NAMES):
        for label, kinds in [*((kind, (kind,)) for kind in CORRUPTIONS), (judge.MEAN, tuple(CORRUPTIONS))]:
            line = intervals(_mean(found, name, kinds)[:, None], weights, "auroc").iloc[0]
            rows.append({"what": "AUROC", "score": name, "left out": label, **line.to_dict()})
    for name, values in gauges.iterrows():
        rows.append({"what": "gauge, Spearman", "score": name, "left out": "", "auroc": float(values.min())})
    return rows


def _bars(found: dict[tuple[str, str], list[Array]], gauges: pd.DataFrame, weights: Weights) -> list[Bar]:
    kinds = tuple(CORRUPTIONS)
    lift = _mean(found, "contrastive", kinds) - _mean(found, BEFORE, kinds)
    gains = {name: _mean(found, "combined", kinds) - _mean(found, name, kinds) for name in CONTROLS}
    kind = "on the kind of corruption that was left out, mean over five"
    return [
        *(
            Bar(f"AUROC {kind}, {name}", float(_mean(found, name, kinds)[0]), 0.80, "higher")
            for name in ("contrastive", "log_mass")
        ),
        Bar(f"AUROC {kind}: contrastive after minus before the warm-up, lower end", _low(lift, weights), 0.0, "higher"),
        *(
            Bar(f"AUROC {kind}: combined minus {name}, lower end", _low(gain, weights), 0.0, "higher")
            for name, gain in gains.items()
        ),
        *(
            Bar(f"gauge, {name}: Spearman with itself, at worst", float(gauges.loc[name].min()), 0.9999, "higher")
            for name in GAUGED
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(__doc__, "selection_quality", measure, options))
