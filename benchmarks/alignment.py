"""Does a program's verdict teach, and is a teacher worth its time?

GSPO on the embedded model against the warm model it began with, and against its controls at as many generated answers:
GRPO, imitating its own right answers, DPO; at as many steps: more solutions; and without training: half the
temperature. Then students taught by the text, by the larger model, or by both. Begins with 01_pretrain of a run
(`tinyonn pretrain`); everything else is that of 11_align, with more seeds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from harness import Bar, Row, main

from tinyonn_lib.align import answers, contest, distil_compare, filtering, tasks, warm
from tinyonn_lib.lm import load, samples
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.progress import Progress
from tinyonn_lib.workbench import params
from tinyonn_lib.workbench.phases import PHASES
from tinyonn_lib.workbench.runs import open_run


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", default="default", help="with a finished 01_pretrain (default: default)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every method (default: 3)")
    parser.add_argument("--prompts", type=int, default=600, help="held-out prompts (default: 600)")
    parser.add_argument("--tokens", type=int, default=400_000, help="text that a student reads (default: 400,000)")
    parser.add_argument("--folder", type=Path, help="keeps what is done; a run that was stopped goes on there")


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Rows: lifts of the methods, and the students. Bars: as the module says."""
    phase = PHASES["align"]
    given = [f"run={args.run}", f"distil_tokens={args.tokens}"]
    if args.quick:
        args.seeds, args.prompts = 1, 60
        given = [f"run={args.run}", "distil_tokens=40000", "steps=2", "warm_prompts=1000", "prompts=200"]
    p = params.validate(phase, params.compose(phase, given))
    run = open_run(phase, p)
    path = str(run.input("pretrain", "model"))
    model, tok = load.load_model(path, device=p.device), load.load_tokenizer(path)
    student = load.load_model(str(run.input("pretrain", "student")), device=p.device)
    table = run.table("pretrain", "texts.parquet")
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        taught = _taught(p, table, model, student, tok, args.seeds, folder)
        lifts = _lifts(p, model, tok, args, folder)
    rows = [{"what": "reward", **row} for row in lifts.to_dict("records")]
    rows += [{"what": "distillation", **row} for row in taught.to_dict("records")]
    return rows, _bars(lifts, taught)


def _taught(p: Any, table: pd.DataFrame, model: Any, student: Any, tok: Any, seeds: int, folder: Path) -> pd.DataFrame:
    learn = table[table["split"] == "train"].sample(frac=1, random_state=p.seed)
    blocks = samples.blocks(samples.draw(learn, tok, p.distil_tokens, p.length, p.seed), p.length)
    held = table[table["split"] == "heldout"]
    return distil_compare.compare(
        student, model, blocks, tok, held, tokens=p.distil_tokens, folder=folder / "distil", seeds=seeds,
        recipe=Recipe().faster(p.distil_rate), progress=_told,
    )  # fmt: skip


def _lifts(p: Any, model: Any, tok: Any, args: argparse.Namespace, folder: Path) -> pd.DataFrame:
    learned = tasks.prompts(p.task, p.warm_prompts, seed=p.seed)
    asked = tasks.prompts(p.task, p.prompts, seed=p.seed + 1)
    tune = tasks.prompts(p.task, p.tune_prompts, split="tune", seed=p.seed)
    heldout = tasks.prompts(p.task, args.prompts, split="heldout", seed=p.seed)
    warm.teach(model, tok, learned, steps=p.warm_steps, seed=p.seed)
    left, _ = filtering.keep(asked, answers.answers(model, tok, asked, p.answers, p.temperature, p.seed))
    plan = contest.Budget(p.steps, p.prompts_per_step, p.group, p.updates, p.temperature, p.beta)
    rates = {name: method.rates[:1] for name, method in contest.METHODS.items()}
    return contest.contest(
        model, tok, left, tune, heldout, rates, budget=plan, seeds=args.seeds, seed=p.seed, folder=folder / "contest",
        progress=_told,
    ).lifts  # fmt: skip


def _told(what: str, _: str) -> Progress:
    """A line per training."""
    return lambda done, total, note: print(f"{what}: {total} steps, {note}", flush=True) if done == total else None


def _bars(lifts: pd.DataFrame, taught: pd.DataFrame) -> list[Bar]:
    sampled = lifts[(lifts["how"] == "sampled") & (lifts["method"] == contest.LEADER)].set_index("against")["low"]
    share = "share of right sampled answers, GSPO minus"
    bars = [
        Bar(f"{share} {name}, lower end", float(low), 0.0, "higher")
        for name, low in sampled.rename({"warm": "the warm model", "cooler": "the warm model at T / 2"}).items()
    ]
    rows = taught[(taught["method"] == "teacher alone") & taught["high"].notna()].set_index("budget")["high"]
    return bars + [
        Bar(f"bits per byte that a teacher saves at equal {budget}, lower end", -float(high), 0.0, "higher")
        for budget, high in rows.items()
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, "alignment", measure, options))
