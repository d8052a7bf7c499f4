"""The contest of all methods: who trains with what, what is handed over, and what it says of those that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch

from tests.align.small import SETTINGS, weights
from tinyonn_lib.align import trained as module
from tinyonn_lib.align.borrow import NothingToLearn
from tinyonn_lib.align.contest import COOLER, Contest, contest
from tinyonn_lib.align.methods import METHODS, Budget, Method, Rate
from tinyonn_lib.align.reinforce import reinforce
from tinyonn_lib.align.tasks import prompts
from tinyonn_lib.align.verify import success
from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench import values

Fresh = Callable[[], Any]
PLAN = Budget(**{**SETTINGS, "steps": 2})


@pytest.fixture(scope="module")
def heldout() -> pd.DataFrame:
    return prompts("arithmetic", 8, size=9, split="heldout")


@pytest.fixture(scope="module")
def tune() -> pd.DataFrame:
    return prompts("arithmetic", 8, size=9, split="tune")


def test_the_parameters_know_the_methods() -> None:
    assert list(get_args(values.Method)) == list(METHODS)


def test_all_methods_and_again_without_training(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, tune: pd.DataFrame, heldout: pd.DataFrame, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rates: dict[str, list[Rate]] = {name: [("gains", 1.0e-2)] for name in METHODS}
    rates["gold"] = [("all", 1.0e-9), ("all", 3.0e-3)]
    told: list[str] = []

    def reporter(what: str, unit: str) -> Callable[[int, int, str], None]:
        told.append(what)
        return lambda done, total, note: None

    def run() -> Contest:
        return contest(half(), tokenizer, sums, tune, heldout, rates, budget=PLAN, seeds=2, seed=3, folder=tmp_path,
                       progress=reporter)  # fmt: skip

    found = run()
    runs, lifts = found.runs, found.lifts
    assert runs["method"].tolist() == ["warm", *(name for name in METHODS for _ in range(2)), COOLER]
    assert runs["seed"].tolist() == [3, *[3, 4] * 5, 3]
    generated = runs.set_index("method")["tokens"]
    assert generated["warm"] == 0
    assert (generated["gold"] == 0).all()
    # As many answers for each: 64, of 1 to 6 tokens.
    assert all(64 <= count <= 64 * 6 for name in ("gspo", "grpo", "rejection", "dpo") for count in generated[name])
    mean = runs[runs["method"] == "gspo"]["sampled"].mean() - runs["sampled"].iloc[0]
    first = lifts.query("method == 'gspo' and against == 'warm' and how == 'sampled'").iloc[0]
    assert first["difference"] == pytest.approx(mean)
    against = dict.fromkeys(("grpo", "rejection", "dpo", "gold", COOLER), 2)
    assert lifts["against"].value_counts().to_dict() == {"warm": 12, **against}
    assert dict(zip(lifts["method"], lifts["seeds"], strict=True)) == {**dict.fromkeys(METHODS, 2), COOLER: 1}
    assert set(lifts["note"]) == {""}
    # Half the temperature, no training: the likeliest answers are the warm model's.
    cool = lifts.query("method == @COOLER").set_index("how")
    assert cool.loc["greedy", "difference"] == 0
    assert cool.loc["sampled", "tuned"] == runs["sampled"].iloc[-1]
    assert found.history["method"].tolist() == ["gspo"] * 2 + ["grpo"] * 2
    assert len(told) == 11
    assert told[:2] == ["GSPO, gains 0.01, seed 3", "GSPO, gains 0.01, seed 4"]

    assert len(list(tmp_path.iterdir())) == 11  # no checkpoint is left
    again = run()
    assert len(told) == 11
    for name in ("runs", "lifts", "history"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert torch.equal(weights(again.model), weights(found.model))


def test_the_model_handed_over_is_the_one_judged(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, heldout: pd.DataFrame, tmp_path: Path
) -> None:
    """GSPO's first seed at the chosen rate, to the bit: from memory and from the folder."""
    tried: list[Rate] = [("gains", 2.0e-2), ("gains", 1.0)]
    seen = []
    for folder in (None, tmp_path, tmp_path):
        tried = tried[::-1]
        warm = half()
        found = contest(warm, tokenizer, sums, sums, heldout, {"gspo": tried}, budget=PLAN, seeds=2, seed=6,
                        folder=folder)  # fmt: skip
        chosen = found.runs.query("method == 'gspo' and seed == 6").iloc[0]
        seen.append(tried[0][1] == chosen["lr"])
        direct = half()
        history = reinforce(direct, tokenizer, sums, **{**SETTINGS, "steps": 2}, lr=chosen["lr"], seed=6)
        assert torch.equal(weights(found.model), weights(direct))
        assert torch.equal(weights(warm), weights(half()))
        pd.testing.assert_frame_equal(found.history.drop(columns="method"), history)
        judged = success(found.model, tokenizer, heldout, PLAN.samples, 1.0, 6)
        assert (judged["sampled"].mean(), judged["greedy"].mean()) == (chosen["sampled"], chosen["greedy"])
    assert set(seen) == {False, True}  # also one that was not tried first


def _fixed(share: dict[float, tuple[float, float]]) -> Callable[..., pd.DataFrame]:
    """In the place of `success`: rate → share of right answers on tune (prompts of `tune`) and on heldout."""

    def found(model: Any, tokenizer: Any, table: pd.DataFrame, *rest: Any) -> pd.DataFrame:
        both = share[getattr(model, "rate", 0.0)]
        right = both[0 if (table["split"] == "tune").all() else 1]
        return table[["task", "prompt"]].assign(greedy=right, sampled=right)

    return found


def _method(*rates: float, broken: dict[tuple[float, int], Exception] | None = None) -> Method:
    """Learns nothing but its own rate; raises for the given pairs of rate and seed."""

    def train(model: Any, tokenizer: Any, prompts: Any, plan: Any, **options: Any) -> pd.DataFrame:
        model.rate = options["lr"]
        if error := (broken or {}).get((options["lr"], options["seed"])):
            raise error
        return pd.DataFrame({"step": [1], "reward": [0.5], "tokens": [10]})

    return Method("Some", train, tuple(("all", rate) for rate in rates))


@pytest.fixture
def run(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, tune: pd.DataFrame, heldout: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Contest]:  # fmt: skip
    """A contest of methods that do not train, each trying all of its rates."""

    def contested(
        share: dict[float, tuple[float, float]], seeds: int = 1, tried: int = 3, **methods: Method
    ) -> Contest:
        monkeypatch.setattr(module, "success", _fixed(share))
        monkeypatch.setattr("tinyonn_lib.align.contest.METHODS", methods)
        monkeypatch.setattr(module, "METHODS", methods)
        rates = {name: method.rates[:tried] for name, method in methods.items()}
        tables = tune.assign(split="tune"), heldout.assign(split="heldout")
        return contest(half(), tokenizer, sums, *tables, rates, seeds=seeds)

    return contested


def test_the_rate_is_chosen_on_the_tuning_prompts(run: Callable[..., Contest]) -> None:
    shares = {0.0: (0.0, 0.1), 1.0: (0.2, 0.9), 2.0: (0.8, 0.3)}
    found = run(shares, gspo=_method(1.0, 2.0))
    assert found.runs["lr"].tolist() == [0.0, 2.0, 0.0]
    assert found.runs["sampled"].tolist() == pytest.approx([0.1, 0.3, 0.1])


def test_nothing_to_learn_is_a_result(run: Callable[..., Contest]) -> None:
    """The untouched model is that method's; of the leader it is an error, since it would be handed over."""
    nothing = NothingToLearn("no pairs", 77)
    shares = {0.0: (0.2, 0.2), 1.0: (0.6, 0.6), 2.0: (0.2, 0.2)}
    found = run(shares, seeds=2, gspo=_method(1.0), dpo=_method(2.0, broken={(2.0, 0): nothing, (2.0, 1): nothing}))
    rows = found.runs.query("method == 'dpo'")
    assert rows["note"].tolist() == ["nothing to learn"] * 2
    assert rows["tokens"].tolist() == [77, 77]
    assert rows["sampled"].tolist() == found.runs.query("method == 'warm'")["sampled"].tolist() * 2
    notes = found.lifts.set_index(["method", "against", "how"])["note"]
    assert notes["dpo", "warm", "greedy"] == notes["gspo", "dpo", "sampled"] == "nothing to learn"
    assert notes["gspo", "warm", "sampled"] == ""
    assert found.history["method"].tolist() == ["gspo"]

    one = run(shares, seeds=3, gspo=_method(1.0), dpo=_method(2.0, broken={(2.0, 1): nothing}))
    assert set(one.lifts.query("method == 'dpo'")["note"]) == {"nothing to learn in 1 of 3"}
    with pytest.raises(
        BenchError, match="Some finds nothing to learn.*warm up more or less, or raise `group`"
    ) as error:
        run(shares, gspo=_method(1.0, broken={(1.0, 0): nothing}))
    assert type(error.value) is BenchError  # a kernel names other classes by their traceback


def test_a_rate_that_diverges_loses_the_choice(run: Callable[..., Contest]) -> None:
    lost = BenchError("The loss is not finite at step 3: lower the learning rate.")
    shares = {0.0: (0.2, 0.2), 1.0: (0.0, 0.5), 2.0: (0.9, 0.9)}
    grpo = _method(2.0, 1.0, broken={(2.0, 0): lost})
    found = run(shares, gspo=_method(1.0), grpo=grpo)
    assert found.runs.query("method == 'grpo'")[["lr", "note"]].to_numpy().tolist() == [[1.0, ""]]
    # A later seed counts as no right answer.
    later = run(shares, seeds=2, gspo=_method(1.0), grpo=_method(2.0, broken={(2.0, 1): lost})).runs
    assert later.query("method == 'grpo'")[["sampled", "note", "tokens"]].to_numpy().tolist() == [
        [pytest.approx(0.9), "", 10], [0.0, "diverged", 0],
    ]  # fmt: skip
    with pytest.raises(BenchError, match=r"Some diverges at each of its learning rates, 2 \(all\): raise `rates` to 2"):
        run(shares, tried=1, gspo=_method(1.0), grpo=grpo)
    both = _method(2.0, 1.0, broken={(2.0, 0): lost, (1.0, 0): lost})
    with pytest.raises(BenchError, match=r"2 \(all\), 1 \(all\): name it lower ones in align/methods.py"):
        run(shares, gspo=both)
    other = BenchError("No prompts.")
    with pytest.raises(BenchError, match="No prompts"):
        run(shares, gspo=_method(1.0, broken={(1.0, 0): other}))


def test_weights_and_probabilities_that_are_not_finite(
    half: Fresh, tokenizer: Any, sums: pd.DataFrame, heldout: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training ended well, the model is broken: NaN in the weights, or only in what it computes."""

    def train(model: Any, *rest: Any, lr: float, **options: Any) -> pd.DataFrame:
        with torch.no_grad():
            model.model.norm.weight.fill_(lr)
        return pd.DataFrame({"reward": [0.5], "tokens": [1]})

    def judged(model: Any, *rest: Any) -> pd.DataFrame:
        assert all(param.isfinite().all() for param in model.parameters())  # on a GPU it would end the process
        return success(model, *rest)

    monkeypatch.setattr(module, "success", judged)
    for value in (float("nan"), 3.0e38):
        methods = {"gspo": METHODS["gspo"], "dpo": Method("DPO", train, (("all", value), ("all", 1.0)))}
        monkeypatch.setattr("tinyonn_lib.align.contest.METHODS", methods)
        monkeypatch.setattr(module, "METHODS", methods)
        rates = {"gspo": [("gains", 1e-2)], "dpo": methods["dpo"].rates}
        found = contest(half(), tokenizer, sums, heldout, heldout, rates, budget=PLAN, seeds=1)
        assert found.runs.query("method == 'dpo'")[["lr", "note"]].to_numpy().tolist() == [[1.0, ""]]


def test_bad_contests(half: Fresh, tokenizer: Any, sums: pd.DataFrame) -> None:
    with pytest.raises(BenchError, match="Unknown method 'ppo'"):
        contest(half(), tokenizer, sums, sums, sums, {"ppo": [("all", 1.0)]})
    with pytest.raises(BenchError, match="learning rate for each"):
        contest(half(), tokenizer, sums, sums, sums, {"gspo": []})
    with pytest.raises(BenchError, match="needs gspo, whose controls"):
        contest(half(), tokenizer, sums, sums, sums, {"dpo": [("all", 1.0)]})
    with pytest.raises(BenchError, match="seeds=0"):
        contest(half(), tokenizer, sums, sums, sums, {"gspo": [("all", 1.0)]}, seeds=0)
