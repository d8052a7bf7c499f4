"""What lm-eval found, as a table of scores and one of every single answer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tinyonn_lib.evaluate.task import Task


@dataclass(frozen=True)
class Outcome:
    """What a model scored.

    Attributes:
        scores: one row per task and metric: `task, metric, value, stderr, n, better` ("higher" or "lower"). `stderr`
            treats documents of one group as one draw; NaN where a metric is not an average over documents.
        samples: one row per document and metric: `task, parent, doc_id, metric, value, weight, group, better, prompt,
            target`. A metric of the task is Σ value·weight / Σ weight. `margin` (multiple choice, nats) is the
            log-likelihood of the right answer minus that of the best wrong one; where `acc_mutual_info` is measured,
            each minus its log-likelihood without the question.
        tasks: task to `{"version", "fewshot", "documents", "cut", "hash"}`. `cut` documents had a prompt longer than
            the model takes, and lost its front; `hash` covers config, prompts and targets.
    """

    scores: pd.DataFrame
    samples: pd.DataFrame
    tasks: dict[str, dict[str, Any]]


def read(found: Mapping[str, Any], ours: Mapping[str, Task], cut: Collection[str]) -> Outcome:
    """The outcome in what `lm_eval.evaluator.evaluate` returned.

    Args:
        ours: the tasks that were no names, by name.
        cut: prompts that were too long for the model.
    """
    parents = {name: task.parent for name, task in ours.items()} | _top_groups(found["group_subtasks"])
    rows: list[dict[str, Any]] = []
    tasks: dict[str, dict[str, Any]] = {}
    for name, samples in found["samples"].items():
        better = found["higher_is_better"][name]
        for sample in samples:
            shared = {
                "task": name,
                "parent": parents.get(name, ""),
                "doc_id": int(sample["doc_id"]),
                "group": str(sample["doc"][ours[name].group]) if name in ours and ours[name].group else "",
                "prompt": str(sample["arguments"][0][0]),
                "target": str(sample["target"]),
            }
            for metric, value, weight in _measured(sample):
                up = "higher" if better.get(metric.split(",")[0], True) else "lower"
                rows.append({**shared, "metric": metric, "value": value, "weight": weight, "better": up})
        tasks[name] = {
            "version": found["versions"][name],
            "fewshot": found["n-shot"][name],
            "documents": found["n-samples"][name]["effective"],
            "cut": len({sample["doc_id"] for sample in samples if sample["arguments"][0][0] in cut}),
            "hash": _hash(found["configs"][name], samples),
        }
    table = pd.DataFrame(rows)
    alone = table["group"] == ""
    table.loc[alone, "group"] = table["task"][alone] + ":" + table["doc_id"][alone].astype(str)
    return Outcome(*_scores(found, table), tasks)


def _top_groups(children: dict[str, list[str]]) -> dict[str, str]:
    """Task to the outermost group of lm-eval that it is in."""

    def leaves(name: str) -> list[str]:
        return [leaf for child in children[name] for leaf in leaves(child)] if name in children else [name]

    inner = {child for each in children.values() for child in each}
    return {leaf: group for group in children if group not in inner for leaf in leaves(group)}


def _measured(sample: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(metric, value, weight) of one answer; what is no average over documents, such as F1, is left out."""
    suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
    for metric in sample["metrics"]:
        value = sample[metric]
        if metric == "bits_per_byte":
            yield metric, -value[0] / math.log(2) / value[1], float(value[1])
        elif isinstance(value, (int, float, np.number)):
            yield metric + suffix, float(value), 1.0
    right, number = sample["target"], len(sample["arguments"])
    if "acc" not in sample["metrics"] or not isinstance(right, int):
        return
    logs = [float(answer[0]) for answer in sample["filtered_resps"]]
    if "acc_mutual_info" in sample["metrics"]:  # the second half: each choice without its question
        number //= 2
        logs = [given - alone for given, alone in zip(logs[:number], logs[number:], strict=True)]
    if number > 1 and len({arguments[0] for arguments in sample["arguments"][:number]}) == 1:
        yield "margin", logs.pop(right) - max(logs), 1.0


def _scores(found: Mapping[str, Any], samples: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of scores, and the samples without those metrics that are not averages of them."""
    told = {
        (name, key.removesuffix(",none")): float(value)
        for name, values in found["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
    rows: list[dict[str, Any]] = []
    for level in ("task", "parent"):
        for (name, metric), each in samples[samples[level] != ""].groupby([level, "metric"], sort=False):
            value, stderr = _mean(each)
            if math.isclose(told.get((name, metric), value), value, rel_tol=1e-6, abs_tol=1e-9):
                told.pop((name, metric), None)
                rows.append({"task": name, "metric": metric, "value": value, "stderr": stderr, "n": len(each),
                             "better": each["better"].iloc[0]})  # fmt: skip
            elif level == "task":  # such as lambada's perplexity, the exponential of an average
                samples = samples.drop(each.index)
            else:  # a group that weights its tasks alike, whatever their size
                samples.loc[each.index, "parent"] = ""
    for (name, metric), value in told.items():
        up = found["higher_is_better"].get(name, {}).get(metric.split(",")[0], True)
        rows.append({"task": name, "metric": metric, "value": value, "stderr": math.nan,
                     "n": found["results"][name]["sample_len"], "better": "higher" if up else "lower"})  # fmt: skip
    return pd.DataFrame(rows), samples.reset_index(drop=True)


def _mean(samples: pd.DataFrame) -> tuple[float, float]:
    """Weighted mean and its standard error over groups (linearised ratio; for single documents of weight 1: s / √n)."""
    total = samples["weight"].sum()
    mean = float((samples["value"] * samples["weight"]).sum() / total)
    off = ((samples["value"] - mean) * samples["weight"]).groupby(samples["group"]).sum()
    count = len(off)
    return mean, float(math.sqrt((off**2).sum() * count / (count - 1)) / total) if count > 1 else math.nan


def _hash(config: dict[str, Any], samples: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of how a task asks, without where its data were, and of what was asked."""
    kept = {key: value for key, value in config.items() if key not in ("custom_dataset", "dataset_kwargs")}
    # By name: a function's own text would hold its address.
    head = json.dumps(kept, sort_keys=True, default=lambda value: getattr(value, "__qualname__", type(value).__name__))
    digest = hashlib.sha256(head.encode())
    for sample in samples:
        digest.update("".join(sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")).encode())
    return digest.hexdigest()
