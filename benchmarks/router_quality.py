"""Does a trained router earn its keep? ΔNLL of trained routers next to what they must beat, at 25 and 50 % active.

On the model of a finished run (`tinyonn all`), held-out text that the notebooks do not judge on, nats per token. Every
contender trains on the same text with the same loss (KL to the dense model), as many steps, its own seed; the intervals
are paired, over source files:

- ours: S_p's partition, refined together with its router, then trained; with the same k for every token, and with a
  threshold per layer that lets k vary around the same mean; also refined from a random partition instead of S_p's;
- pruning, trained: FLAP's static pruning with trained scales and biases of every remaining neuron's gate, up and output
  and a bias per layer; it keeps as many more weights as the routers have;
- cmoe, trained: CMoE's partition under the same training, with fixed and with variable k;
- sp, trained: without refinement; random start: the refined partition, its router beginning randomly as the document
  has it.

A bar's value is the upper end of an interval, or the share of the gap between analytic router (ridge regression) and
oracle (both with fixed k) that the training closes over the same partition.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pandas as pd
from harness import Bar, Row, main

from tinyonn_lib.experts import contest, evidence, judge, methods, refine, training
from tinyonn_lib.experts.partition import Partition
from tinyonn_lib.lm import load, models, samples, texts
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES
from tinyonn_lib.workbench.runs import open_run

SHARES = (0.25, 0.5)
LENGTH, BATCH = 128, 8
SEEN = 12_000  # held-out tokens on which the method was developed, and which 05_router judges on
OURS = {"ours, fixed k": False, "ours, variable k": True}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", default="default", help="a finished run (default: default)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--tokens", type=int, default=80_000, help="training text of each (default: 80000)")
    parser.add_argument("--eval-tokens", type=int, default=30_000, help="held-out text (default: 30000)")
    parser.add_argument("--refine", type=int, default=refine.ROUNDS, help="rounds of refinement (default: 6)")


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Rows: ΔNLL of each method at each share. Bars: as the module says."""
    if args.quick:
        args.seeds, args.tokens = 1, 8 * BATCH * LENGTH
    phase = PHASES["router"]
    run = open_run(phase, params.validate(phase, params.compose(phase, [f"run={args.run}"])))
    model, tok = load.load_model(run.model()), load.load_tokenizer(run.model())
    ffns, split = models.ffns(model), dict(list(run.table("scan", "texts.parquet").groupby("split")))
    neurons, scores = run.table("scan", "neurons.parquet"), run.table("cluster", "scores.parquet")
    part = Partition.from_table(run.table("experts", "partition_sp.parquet"), "sp")
    known_text = len(samples.draw(split["heldout"], tok, SEEN, LENGTH, 0))  # a longer draw begins with the same pieces
    held = samples.draw(split["heldout"], tok, SEEN + (2000 if args.quick else args.eval_tokens), LENGTH, 0)
    held = held.iloc[known_text:].reset_index(drop=True)
    court = judge.Judge(model, ffns, held, neurons)
    blocks = texts.pack(texts.encode(split["calibration"]["text"], tok, None), LENGTH, tok.eos_token_id, seed=0)
    rings: dict[float, list[contest.Contest]] = {share: [] for share in SHARES}
    for seed in range(args.seeds):
        drawn = samples.draw(split["calibration"], tok, 16_000, LENGTH, seed)
        known = evidence.Evidence(
            ffns, neurons, scores, evidence.collect(model, ffns, drawn["ids"].tolist(), saliency=False)
        )
        for share in SHARES:
            ring = contest.Contest(
                court, known, blocks, active=part.share(part.k(share)), tokens=args.tokens, batch=BATCH,
                recipe=training.Recipe(), seed=seed, shards=2,
            )  # fmt: skip
            compete(ring, part, args.refine)
            rings[share].append(ring)
            for label in ring.losses:
                print(f"seed {seed}, {share:.0%}: {label:<28} {ring.mean(label):+.4f}", flush=True)
    found = {share: together(each) for share, each in rings.items()}
    rows = [row for share, each in found.items() for row in table(each, rings[share], share).to_dict("records")]
    return rows, [bar for share, each in found.items() for bar in bars(court, each, share)]


def compete(ring: contest.Contest, part: Partition, rounds: int) -> None:
    """One seed at one share: everybody."""
    starts = {"sp": part, "random": methods.alike(ring.evidence, "random", part, ring.seed)}
    refined, from_random = (
        refine.refine(ring.evidence, each, k=part.k(ring.active), rounds=rounds, seed=ring.seed).partition
        for each in starts.values()
    )
    cmoe = methods.alike(ring.evidence, "cmoe", part, ring.seed)
    for label, variable in OURS.items():
        ring.route(label, refined, variable=variable)
    ring.route("refined from random, variable k", from_random, variable=True)
    ring.prune("pruning, trained", refined)
    for label, variable in {"cmoe, trained": False, "cmoe, trained, variable k": True}.items():
        ring.route(label, cmoe, kind="control", variable=variable)
    ring.route("sp, trained", part)
    ring.route("random start, trained", refined, init="random")
    ring.static()
    for label, each in {"refined": refined, "sp": part, "refined from random": from_random, "cmoe": cmoe}.items():
        ring.references(label, each)


def together(rings: list[contest.Contest]) -> judge.Losses:
    """All seeds of each method; what has no seed counts once."""
    return {label: [loss for ring in rings for loss in ring.losses[label]] for label in rings[0].losses}


def table(losses: judge.Losses, rings: list[contest.Contest], share: float) -> pd.DataFrame:
    """Of one share of active parameters."""
    found = rings[0].court.table(losses, share)
    found["share"] = [np.mean([ring.share[label] for ring in rings]) for label in found["method"]]
    return found.assign(steps=rings[0].steps)


def bars(court: judge.Judge, losses: judge.Losses, share: float) -> list[Bar]:
    """Of our router with a variable k and of the one with a fixed k, each next to CMoE's of its kind."""
    of, found = judge.mean(losses), []
    for ours, rival in (("ours, variable k", "cmoe, trained, variable k"), ("ours, fixed k", "cmoe, trained")):
        for control in ("pruning, trained", rival):
            high = court.between(losses, ours, control).high
            name = f"{ours} minus {control} the same, {share:.0%} active: upper end of ΔNLL"
            found.append(Bar(name, high, 0.0, "lower"))
        if share == 0.5:
            closed = (of("refined, analytic") - of(ours)) / (of("refined, analytic") - of("refined, oracle"))
            name = f"{ours}: share of the gap between analytic router and oracle that is closed, {share:.0%} active"
            found.append(Bar(name, closed, 0.5, "higher"))
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__, "router_quality", measure, options))
