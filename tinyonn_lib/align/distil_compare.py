"""Is a teacher worth its time? Students from one start, taught by text and by a larger model, on held-out text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tinyonn_lib.align.distil import Way, distil, teacher_nats
from tinyonn_lib.evaluate.losses import Loss, paired
from tinyonn_lib.lm import judge, resume, texts
from tinyonn_lib.lm.threads import default_shards, threads
from tinyonn_lib.pretrain.layout import Rows
from tinyonn_lib.pretrain.recipe import Recipe
from tinyonn_lib.pretrain.turns import in_turns
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAYS = {
    "text alone": Way(0.0),
    "teacher alone": Way(1.0),
    "half and half": Way(0.5),
    "teacher alone, T = 2": Way(1.0, 2.0),
}
"""Who takes part in `compare`; the first is the control."""


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows | Tensor,
    tokenizer: PreTrainedTokenizerBase,
    heldout: pd.DataFrame,
    *,
    tokens: int,
    folder: Path,
    ways: Mapping[str, Way] | None = None,
    recipe: Recipe | None = None,
    seeds: int = 3,
    progress: Callable[[str, str], Progress] | None = None,
) -> pd.DataFrame:
    """Students from the same start, each taught in another way, judged on held-out text.

    At equal tokens everybody reads `tokens`. At equal time the text alone reads them, and the others as many as they
    would manage meanwhile; their speeds are measured first, in turns.

    Args:
        student: the start; stays as it is. So does the teacher.
        heldout: columns text and source; texts of one source are drawn together for the intervals.
        folder: keeps what is done; a comparison that was killed goes on there.
        ways: name → way; the first is the control. None is `WAYS`.
        seeds: orders of the rows, averaged.
        progress: (what, unit) → reporter.

    Returns:
        method, share, temperature, budget ("none" for start and teacher, "tokens", "time"), tokens, cost (seconds per
        token, control = 1), nats_per_token, bits_per_byte, kl (of the teacher from the student, nats per token at T =
        1, held-out), difference (bits per byte more than the control's) with its 95 % interval low, high and its
        standing, seeds.
    """
    rows, ways = rows if isinstance(rows, Rows) else Rows(rows), dict(ways or WAYS)
    judged = _Judge(teacher, tokenizer, heldout, int(rows.ids.shape[1]))
    costs = _costs(student, teacher, rows, ways, recipe or Recipe(), folder / "costs.json")
    ends = {"start": student, "teacher": teacher}
    table = [judged.row([model], method=name, budget="none")[0] for name, model in ends.items()]
    control: list[Loss] = []
    for name, way in ways.items():
        for budget in ("tokens", "time") if control else ("tokens",):
            budgeted = tokens if budget == "tokens" else max(1, round(tokens / costs[name]))
            taught = [copy.deepcopy(student) for _ in range(seeds)]
            for seed, model in enumerate(taught):
                label = f"{name}, equal {budget}, seed {seed}"
                report = progress(label, "steps") if progress is not None else None
                distil(model, teacher, rows, way, recipe, tokens=budgeted, seed=seed, progress=report,
                       checkpoint=folder / f"{label}.pt")  # fmt: skip
            row, bits = judged.row(taught, method=name, share=way.share, temperature=way.temperature, budget=budget,
                                   tokens=budgeted, cost=costs[name], seeds=seeds)  # fmt: skip
            if control:
                gap = paired(bits, control, judged.sources, over_seeds=True)
                row |= {"difference": gap.mean, "low": gap.low, "high": gap.high, "standing": gap.standing}
            control = control or bits
            table.append(row)
    return pd.DataFrame(table)


class _Judge:
    """What students pay for held-out text, and how far they are from the teacher."""

    def __init__(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: pd.DataFrame, length: int
    ) -> None:
        self.teacher, self.tokenizer = teacher, tokenizer
        self.texts, self.sources = heldout["text"].tolist(), heldout["source"].tolist()
        self.bytes = np.array([len(text.encode("utf-8")) for text in self.texts], np.int64)
        ids = tokenizer(self.texts, add_special_tokens=False, verbose=False)["input_ids"]
        self.tokens = sum(map(len, ids))
        self.blocks = texts.pack(ids, length, judge.start_token(tokenizer))

    def row(self, models: Sequence[PreTrainedModel], **known: object) -> tuple[dict[str, object], list[Loss]]:
        """A row of the table, the mean over the models; and the bits and bytes of each text, for each model."""
        bits = [Loss(judge.text_nats(m, self.tokenizer, self.texts) / math.log(2), self.bytes) for m in models]
        mean = float(np.mean([each.mean for each in bits]))
        nats = mean * math.log(2) * float(self.bytes.sum()) / self.tokens
        kl = float(np.mean([kl_from(model, self.teacher, self.blocks) for model in models]))
        return {**known, "bits_per_byte": mean, "nats_per_token": nats, "kl": kl}, bits


def kl_from(student: PreTrainedModel, teacher: PreTrainedModel, blocks: Tensor, batch: int = 16) -> float:
    """KL(teacher ‖ student) at temperature 1 over all but the last place of blocks (N, length), nats per token."""
    device = next(student.parameters()).device

    def total(part: Tensor) -> float:
        with torch.inference_mode():  # here, because the mode belongs to a thread
            ids = part[:, :-1].to(device)
            one, two = (model(input_ids=ids, use_cache=False).logits.float() for model in (student, teacher))
            return float((teacher_nats(one, two) - teacher_nats(two, two)).double().sum())

    with threads(default_shards(device)) as each:
        return sum(each(total, blocks.split(batch))) / blocks[:, :-1].numel()


def _costs(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, ways: Mapping[str, Way], recipe: Recipe, file: Path
) -> dict[str, float]:
    """Seconds per token of each way, the first one's as 1; measured once in turns, remembered in `file`."""
    key = repr((list(ways.items()), recipe, student.num_parameters(), teacher.num_parameters(), rows.ids.shape[1]))
    if (known := resume.read_json(file)) and known["key"] == key:
        return {name: float(value) for name, value in known["costs"].items()}
    budget = 4 * recipe.batch * int(rows.ids.shape[1])

    def look(way: Way) -> Callable[[], float]:
        def taught() -> float:
            timing: dict[str, float] = {}
            distil(copy.deepcopy(student), teacher, rows, way, recipe, tokens=budget, timing=timing)
            return timing["seconds"]

        taught()
        return taught

    took = in_turns({name: look(way) for name, way in ways.items()}, rounds=4)
    first = next(iter(took.values()))
    costs = {name: value / first for name, value in took.items()}
    resume.write_json(file, {"key": key, "costs": costs})
    return costs
