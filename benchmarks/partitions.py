"""Which partition, which router: all of the table's, on more text and with more seeds than 04_experts takes.

On the model of a finished run (`tinyonn all`): held-out text of the same kind, Python code, and any other text given by
`--texts`, at 25, 50 and 75 % active FFN parameters. ΔNLL to the dense model, nats per token. The bars ask whether S_p's
partition with the ridge router loses less than FLAP's better static pruning, and than the best of the other partitions
under routers that can be built; a value is the upper end of the paired 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from harness import Bar, Row, main

from tinyonn_lib.errors import BenchError
from tinyonn_lib.experts import evidence, judge, methods, trial
from tinyonn_lib.experts.judge import mean
from tinyonn_lib.lm import load, models, samples
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES
from tinyonn_lib.workbench.runs import open_run

LENGTH = 128
SHARES = (0.25, 0.5, 0.75)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", default="default", help="a finished run (default: default)")
    parser.add_argument("--texts", default="", help="more text to judge on: a local path or hub id")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of what is random (default: 3)")


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Rows: a cell of the trial each. Bars: as the module says."""
    phase = PHASES["experts"]
    run = open_run(phase, params.validate(phase, params.compose(phase, [f"run={args.run}"])))
    tokens = 3000 if args.quick else 10_000
    known, courts = _prepare(run, args, tokens)
    divided = methods.divide(known, methods.METHODS, methods.shapes(known, 28, shared=0.125), range(args.seeds))
    found = trial.trial(courts, divided, SHARES, lambda done, of, note: print(f"\r{done} of {of} {note:<40}", end=""))
    print()
    table = found.table()
    bars = []
    for (text, active), losses in found.losses.items():
        ours = "sp, ridge router"
        others = [label for label in losses if ", oracle" not in label and not label.startswith("sp")]
        rivals = {"static pruning": courts[text].best_static(losses)}
        if text == "held-out":
            rivals["the best other"] = min(others, key=mean(losses))
        for what, rival in rivals.items():
            name = f"sp with ridge minus {what} ({rival}), {text}, {active:.0%} active: upper end of ΔNLL"
            bars.append(Bar(name, found.between(text, active, ours, rival).high, 0.0, "lower"))
    columns = ["text", "active", "share", "k", "partition", "router", "mean", "low", "high", "seeds", "files"]
    return table[columns].to_dict("records"), bars


def _prepare(run: Any, args: argparse.Namespace, tokens: int) -> tuple[evidence.Evidence, dict[str, judge.Judge]]:
    model, tok = load.load_model(run.model()), load.load_tokenizer(run.model())
    ffns = models.ffns(model)
    neurons, scores = run.table("scan", "neurons.parquet"), run.table("cluster", "scores.parquet")
    texts = dict(list(run.table("scan", "texts.parquet").groupby("split")))
    drawn = samples.draw(texts["calibration"], tok, 8000, LENGTH, 0)
    known = evidence.Evidence(ffns, neurons, scores, evidence.collect(model, ffns, drawn["ids"].tolist()))
    rows = {"held-out": samples.draw(texts["heldout"], tok, tokens, LENGTH, 0)}
    rows |= samples.other("", tok, tokens, LENGTH, 0)
    if args.texts:
        more = samples.other(args.texts, tok, tokens, LENGTH, 0)
        if taken := set(more) & set(rows):
            raise BenchError(f"--texts {args.texts}: its name {taken} is that of another text here; rename the file.")
        rows |= more
    return known, {name: judge.Judge(model, ffns, each, neurons) for name, each in rows.items()}


if __name__ == "__main__":
    sys.exit(main(__doc__, "partitions", measure, options))
