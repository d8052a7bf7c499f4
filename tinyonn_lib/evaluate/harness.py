"""Benchmarks on a model in memory, through lm-eval."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.evaluate import local, mmlu, outcome
from tinyonn_lib.evaluate.task import Task
from tinyonn_lib.lm import hub
from tinyonn_lib.progress import Progress


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | Task],
    *,
    limit: int | None = None,
    batch: int = 16,
    fewshot: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> outcome.Outcome:
    """Ask a model in memory the questions of some tasks.

    Args:
        model: a causal language model, on its device; an adapter has been merged or is active.
        tasks: `Task`s, which touch neither network nor cache, or names of lm-eval's own tasks and groups, from the hub.
        limit: at most this many documents of each task, from the front; None for all.
        batch: sequences per forward pass.
        fewshot: examples in front of each question, for tasks given by name that can have some; None leaves lm-eval's.
        seed: draws the few-shot examples where a task draws them.
        progress: told documents done and in all.

    Raises:
        BenchError: lm-eval is not installed, no such task, a hub that is not reachable, or a limit or batch below 1.
    """
    names = [task for task in tasks if isinstance(task, str)]
    require(tasks)
    if batch < 1 or (limit is not None and limit < 1):
        raise BenchError(f"limit={limit}, batch={batch}: give at least 1 (or no limit).")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from tinyonn_lib.evaluate.scorer import Scorer

    ours = {task.name: task for task in tasks if isinstance(task, Task)}
    with _quiet():
        manager = TaskManager(include_defaults=bool(names))
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise BenchError(f"lm-eval has no task '{unknown[0]}': 'lm-eval ls tasks' lists what it has.")
        made = [ConfigurableTask(config=_with_documents(task)) for task in ours.values()]
        loaded = _load(manager, [*made, *names])
        documents: Counter[str] = Counter()
        for task in loaded["tasks"].values():
            if fewshot is not None and task.task_name not in ours and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=fewshot)
            task.set_fewshot_seed(seed=seed)
            kind = "loglikelihood" if task.OUTPUT_TYPE == "multiple_choice" else task.OUTPUT_TYPE
            documents[kind] += min(len(task.eval_docs), limit or len(task.eval_docs))
        said = progress or (lambda done, total, note: None)
        scorer = Scorer(model, tokenizer, batch, documents, lambda done, total: said(done, total, ""))
        # `evaluate`, not `simple_evaluate`: that one spends three seconds on asking pip and git for versions.
        found: Any = evaluate(scorer, loaded, limit=limit, bootstrap_iters=0)
    return outcome.read(found, ours, scorer.cut)


def named(
    names: Sequence[str], built: Sequence[Task] = (), mmlu_folder: str | Path = "", fewshot: int = 5
) -> list[str | Task]:
    """What `run` takes, for names that a user gives.

    Args:
        names: "bits_per_byte" and "cloze" (of `built`), "mmlu" (from `mmlu_folder` if given), or lm-eval's own names.
        built: of `local.build` or `local.tasks`.
        fewshot: of MMLU from a folder.

    Raises:
        BenchError: as in `require`, a local task that is not in `built`, or a folder that does not hold MMLU.
    """
    ready = {task.name: task for task in built}
    found: list[str | Task] = []
    for name in dict.fromkeys(names):
        if name in ready:
            found.append(ready[name])
        elif name in local.NAMES:
            raise BenchError(f"The task {name} is made from held-out documents: none were given.")
        elif name == "mmlu" and mmlu_folder:
            found += mmlu.tasks(mmlu_folder, fewshot)
        else:
            found.append(name)
    require(found)
    return found


def require(tasks: Sequence[str | Task]) -> None:
    """Return if these tasks can be asked here; else say why not, within seconds and before anything is loaded.

    Raises:
        BenchError: lm-eval is not installed, or a task comes from the hub, and the hub is not reachable.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise BenchError("Benchmarks need the extra 'eval': pip install 'tinyonn[eval]'.") from None
    names = [task for task in tasks if isinstance(task, str)]
    if not tasks:
        raise BenchError("No task to evaluate: name at least one.")
    if names:
        _require_hub(names)


def _require_hub(names: Sequence[str]) -> None:
    from datasets import config

    # Offline on purpose and with a cache of data sets, lm-eval may find there what it needs.
    cache = Path(config.HF_DATASETS_CACHE)
    if config.HF_HUB_OFFLINE and cache.is_dir() and any(cache.iterdir()):
        return
    if "mmlu" in names:
        try:
            hub.require_hub("cais/mmlu", "dataset")
        except BenchError as error:
            raise BenchError(f"{error} As mmlu=FOLDER.") from error
    elif not hub.reachable():  # which data sets a task takes lm-eval knows only after half a minute
        raise BenchError(
            f"The task '{names[0]}' comes from the hub, which is not reachable from here. Offline there are "
            "bits_per_byte, cloze, and mmlu with a folder of its CSV files."
        )


def _with_documents(task: Task) -> dict[str, Any]:
    from datasets import Dataset

    return {
        **task.config,
        "custom_dataset": lambda **_: {split: Dataset.from_list(rows) for split, rows in task.documents.items()},
    }


def _load(manager: Any, tasks: list[Any]) -> Any:
    try:
        return manager.load(tasks)
    except Exception as error:  # datasets and the hub raise many kinds; for a user they are one
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BenchError(f"Cannot load the tasks from the hub: {line}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its log and its bars."""
    from lm_eval.api import task as module

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels, bar = [logger.level for logger in loggers], module.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
