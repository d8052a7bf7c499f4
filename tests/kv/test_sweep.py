"""The measured table: exact against trainings one by one, complete, resumable, and honest about what it chose by."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from kv_texts import drawn
from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv import judge, variants
from tinyonn_lib.kv import sweep as sweeping
from tinyonn_lib.kv.adapter import adapter
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.data import Caches
from tinyonn_lib.kv.document import document
from tinyonn_lib.kv.projector import KVDimensionProjector
from tinyonn_lib.kv.ridge import fit_ridge
from tinyonn_lib.kv.stack import Alone, Rows, Schedule, rows_of, train
from tinyonn_lib.kv.sweep import Sweep, sweep
from tinyonn_lib.lm.samples import shuffled
from tinyonn_lib.lm.schedule import lr_factor

PLAN = Schedule(rates=(1e-2, 1e-1, 3.0), seeds=2, steps=12, batch=8, warmup=3, every=5)


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> list[Caches]:
    return [Caches(student, {"t": teacher}, drawn(count, seed)) for seed, count in enumerate((20, 8, 9))]


@pytest.fixture(scope="module")
def measured(texts: list[Caches]) -> Sweep:
    return sweep(*texts, PLAN)


def test_together_as_alone() -> None:
    """Keys and values, two starts, three rates, two seeds: the weights of plain AdamW, one by one, in float64."""
    generator = torch.Generator().manual_seed(0)
    rows, validation = (
        Rows(*(torch.randn(2, n, width, generator=generator, dtype=torch.float64) for width in (6, 4))) for n in (50, 9)
    )
    for options in ({"kind": "linear"}, {"mlp_ratio": 0.5, "activation": "relu"}, {"layernorm": False}):
        modules = [adapter(6, 4, dropout=0.0, **options).double() for _ in range(2 * 2 * 2)]  # type: ignore[arg-type]
        before = [copy.deepcopy(module.state_dict()) for module in modules]
        trained, curves = train(modules, rows, validation, PLAN)
        assert curves.shape == (4, 3, 8)
        for rate, lr in enumerate(PLAN.rates):
            for number, module in enumerate(modules):
                seed, side = number // 4, number // 2 % 2
                losses = _alone(copy.deepcopy(module), lr, rows, validation, side, seed)
                for name, value in losses.pop().items():  # type: ignore[union-attr]
                    torch.testing.assert_close(trained[name][rate, number], value, rtol=0, atol=1e-9)
                torch.testing.assert_close(curves[:, rate, number].tolist(), losses, rtol=1e-9, atol=0)
        for module, state in zip(modules, before, strict=True):  # what was given is as it was
            assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def _alone(module: nn.Module, lr: float, rows: Rows, held: Rows, side: int, seed: int) -> list[Any]:
    """Validation losses at 0, 5, 10 and 12 steps, and the trained state."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    order = shuffled(torch.arange(rows.x.shape[1])[:, None], PLAN.batch, seed)
    found: list[Any] = []
    for step in range(PLAN.steps + 1):
        if step in (0, 5, 10, 12):
            found.append(float((module(held.x[side]) - held.y[side]).square().mean().detach()))
        if step == PLAN.steps:
            break
        optimizer.param_groups[0]["lr"] = lr * lr_factor(step, 12, "trapezoidal", 3, 0.5, 0.0)
        optimizer.zero_grad()
        picked = order(step)[:, 0]
        (module(rows.x[side, picked]) - rows.y[side, picked]).square().mean().backward()
        optimizer.step()
    return [*found, module.state_dict()]


def test_one_that_diverges_spoils_no_other() -> None:
    torch.manual_seed(0)
    rows = Rows(torch.randn(2, 20, 3), torch.randn(2, 20, 2))
    modules: list[nn.Module] = [nn.Linear(3, 2) for _ in range(4)]
    plan = Schedule(rates=(1e-2,), steps=5, batch=4)
    whole, _ = train(modules, rows, rows, plan)
    with torch.no_grad():
        modules[2].weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    spoilt, curves = train(modules, rows, rows, plan)
    assert curves.isnan().any(0).tolist() == [[False, False, True, False]]
    for number in (0, 1, 3):
        assert torch.equal(whole["weight"][0, number], spoilt["weight"][0, number])


def test_rows_are_what_the_projector_reads_and_should_give(texts: list[Caches]) -> None:
    projector = made(texts[0])
    rows = rows_of(projector, texts[0], 10**6)
    assert rows.x.shape == (2, int(texts[0].mask.sum()) * 3, 32)
    assert rows.y.shape == (2, rows.x.shape[1], 16)
    error = judge.error(judge.projected(projector), texts[0])["mse"]
    assert mse(projector, rows) == pytest.approx(error, rel=1e-5)
    few = rows_of(projector, texts[0], 60)
    assert few.x.shape[1] == 60
    # Pairs stay pairs: each of the few is one of the many, with its own target.
    found = (few.x[0][:, None] == rows.x[0][None]).all(-1)
    assert found.any(1).all()
    assert torch.equal(few.y[0], rows.y[0][found.int().argmax(1)])


def made(caches: Caches, **options: Any) -> KVDimensionProjector:
    torch.manual_seed(0)
    return KVDimensionProjector({"t": {"d_model": 32, "num_layers": 5}}, 16, dropout=0.0, student_layers=3, **options)


def mse(projector: KVDimensionProjector, rows: Rows) -> float:
    pairs = zip(("keys", "values"), rows.x, rows.y, strict=True)
    with torch.no_grad():
        return sum(float((projector.of("t", side)[0](x) - y).square().mean()) for side, x, y in pairs)


def test_the_table_is_complete(measured: Sweep) -> None:
    table = measured.table
    assert len(table) == 57 == table["configuration"].nunique()
    mlps = table[table["kind"] == "mlp"]
    factors = ["mlp_ratio", "layernorm", "activation", "init"]
    assert mlps.groupby(factors).size().tolist() == [1] * 54
    linear = table.iloc[0]
    assert linear["parameters"] == 2 * (32 * 16 + 16)
    assert (table["parameters"] == table.apply(parameters, axis=1)).all()
    assert linear["slower"] == 1
    assert (table["seconds_per_step"] > 0).all()
    assert table["initial_loss"].map(math.isfinite).all()
    assert math.isnan(linear["dead_units"])
    assert mlps["dead_units"].between(0, 1).all()
    # Looked at in every curve: 0, 5, 10 and 12 steps of three rates.
    assert measured.curves.groupby(["configuration", "lr"])["step"].apply(list).tolist() == [[0, 5, 10, 12]] * 171
    assert document().columns.intersection(table.columns).tolist() == [
        "configuration", "kind", "mlp_ratio", "layernorm", "parameters", "steps_to_target", "slower",
    ]  # fmt: skip


def parameters(row: pd.Series) -> int:
    hidden = round(row["mlp_ratio"] * 32) if row["kind"] == "mlp" else 0
    each = (32 + 1) * hidden + (hidden + 1) * 16 + (2 * 32 if row["layernorm"] else 0) if hidden else (32 + 1) * 16
    return 2 * each


def test_each_at_the_rate_with_the_least_validation_loss(measured: Sweep) -> None:
    last = measured.curves[measured.curves["step"] == 12]
    for _, row in measured.table.iterrows():
        own = last[last["configuration"] == row["configuration"]].set_index("lr")
        assert own["validation"].idxmin() == row["lr"]
        assert own.index[own["best"]].tolist() == [row["lr"]]
        assert own.loc[row["lr"], "validation"] == row["validation"]
        assert row["lr_at_edge"] == (row["lr"] in (1e-2, 3.0))
    assert measured.table["lr"].nunique() > 1


def test_a_row_is_what_its_projectors_are(texts: list[Caches], measured: Sweep) -> None:
    """Trained again, one at a time, and judged by `judge`."""
    row = measured.table[measured.table["configuration"] == "0.5×, no LayerNorm, gelu, kaiming"].iloc[0]
    projectors = [again(texts, row, seed) for seed in range(2)]
    errors = [judge.error(judge.projected(p), texts[2])["mse"] for p in projectors]
    losses = [judge.loss(judge.projected(p), texts[2]).mean for p in projectors]
    for name, values in (("heldout", errors), ("nll", losses)):
        assert row[name] == pytest.approx(sum(values) / 2, rel=1e-4)
        assert row[f"{name}_spread"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2), rel=1e-2, abs=1e-5)
    assert errors[0] != errors[1]


def again(texts: list[Caches], row: pd.Series, seed: int) -> KVDimensionProjector:
    torch.manual_seed(seed)
    options = {"mlp_ratio": row["mlp_ratio"], "layernorm": row["layernorm"], "activation": row["activation"]}
    projector = KVDimensionProjector(
        {"t": {"d_model": 32, "num_layers": 5}}, 16, dropout=0.0, student_layers=3, init_method=row["init"], **options
    )
    rows = [rows_of(projector, each, 10**6) for each in texts[:2]]
    for side, name in enumerate(("keys", "values")):
        module = projector.of("t", name)[0]
        module.load_state_dict(_alone(module, row["lr"], *rows, side, seed)[-1])
    return projector


def test_the_target_and_the_references(texts: list[Caches], measured: Sweep) -> None:
    references = measured.references.set_index("cache")
    ridge = made(texts[0], kind="linear")
    fit_ridge(ridge, texts[0], texts[1])
    assert references.loc["ridge", "validation"] == pytest.approx(judge.error(judge.projected(ridge), texts[1])["mse"])
    assert measured.target == pytest.approx(1.05 * references.loc["ridge", "validation"])
    floors = judge.floors(texts[0])
    for label in (judge.OWN, judge.ZERO):
        assert references.loc[label, "nll"] == pytest.approx(judge.loss(floors[label], texts[2]).mean)
        assert references.loc[label, "heldout"] == pytest.approx(judge.error(floors[label], texts[2])["mse"])


def test_steps_to_a_target_that_some_reach(texts: list[Caches]) -> None:
    task = variants.Task(*texts, Schedule(rates=(1e-2,), steps=12, batch=8, every=5), texts=2)
    shape = variants.SHAPES[1]
    curve = [c["validation"] for c in task.measured(shape, 0.0)["curves"] if c["configuration"].endswith("normal")]
    for target, steps in ((curve[0], 0), (curve[1], 5), (curve[3], 12), (curve[3] - 1e-6, math.nan)):
        assert curve == sorted(curve, reverse=True)
        found = next(row for row in task.measured(shape, target)["rows"] if row["init"] == "normal")
        assert found["steps_to_target"] == pytest.approx(steps, nan_ok=True)


@pytest.mark.parametrize(("rates", "best", "edge"), [((1e-7, 1e-6, 1e-2), 1e-2, True), ((1e-6, 1e-2, 1e3), 1e-2, False),
                                                     ((1e-2, 1e3), 1e-2, False)])  # fmt: skip
def test_a_best_rate_at_an_edge_is_told(rates: tuple[float, ...], best: float, edge: bool, texts: list[Caches]) -> None:
    rows = variants.Task(*texts, Schedule(rates=rates, steps=12, batch=8), 2).measured(variants.SHAPES[1], 0.0)["rows"]
    assert {(row["lr"], row["lr_at_edge"]) for row in rows} == {(best, edge)}


def test_fewer_texts_for_the_students_loss(texts: list[Caches]) -> None:
    task = variants.Task(*texts, PLAN, texts=4)
    own = judge.loss(judge.floors(texts[0])[judge.OWN], texts[2])
    assert task.references()[0]["nll"] == pytest.approx(own.nats[:4].sum() / own.tokens[:4].sum())


def test_goes_on_after_a_kill(texts: list[Caches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Schedule(rates=(1e-2,), steps=3, batch=4)
    work, told = variants.Task.measured, []
    for module in (sweeping, variants):
        monkeypatch.setattr(module, "SHAPES", variants.SHAPES[:9])

    def killed(self: variants.Task, shape: variants.Shape, target: float) -> Any:
        if shape == variants.SHAPES[7]:
            raise KeyboardInterrupt
        return work(self, shape, target)

    with monkeypatch.context() as patch:
        patch.setattr(variants.Task, "measured", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(*texts, plan, folder=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) >= 7  # the references, and all shapes before; one beside it may have been under way
    damaged = min(kept)
    damaged.write_text('{"rows": [')
    first = sweep(*texts, plan, folder=tmp_path, progress=lambda *said: told.append(said))
    assert len(list(tmp_path.iterdir())) == 11
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items() if path != damaged)
    assert told[0][:2] == (0, 10)
    assert told[-1] == (10, 10, "")
    with monkeypatch.context() as patch:
        patch.setattr(variants.Task, "measured", killed)  # would raise if asked
        second = sweep(*texts, plan, folder=tmp_path)
    for name in ("table", "curves", "references"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
    fresh = sweep(*texts, plan)
    timed = ["seconds_per_step", "slower"]
    pd.testing.assert_frame_equal(first.table.drop(columns=timed), fresh.table.drop(columns=timed))


def test_other_data_or_settings_are_measured_anew(texts: list[Caches]) -> None:
    plan = Schedule(rates=(1e-2,), steps=3)
    keys = [variants.Task(*texts, plan, 2).key(), variants.Task(*texts, plan, 2).key()]
    assert keys[0] == keys[1]
    others = [
        variants.Task(*texts, plan, 3), variants.Task(*texts, Schedule(rates=(2e-2,), steps=3), 2),
        variants.Task(texts[1], texts[0], texts[2], plan, 2), variants.Task(texts[0], texts[1], texts[0], plan, 2),
    ]  # fmt: skip
    assert len({keys[0], *(task.key() for task in others)}) == 5


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        # The two batches of inputs; per side the error (for its square).
        ("linear", lambda b: 2 * b * 32 + 2 * b * 16),
        # Beside: per side what the activation reads and what the second Linear reads.
        ("mlp", lambda b: 2 * b * 32 + 2 * b * 16 + 2 * 2 * b * 32),
    ],
)
def test_memory_is_counted(kind: str, saved: Callable[[int], int], texts: list[Caches]) -> None:
    projector = made(texts[0], kind=kind, layernorm=False)
    rows = rows_of(projector, texts[0], 10**6)
    count = sum(p.numel() for p in projector.parameters())
    for batch in (4, 8):
        assert Alone(projector, rows, batch).memory() == 4 * (4 * count + saved(batch))


def test_alone_trains(texts: list[Caches]) -> None:
    projector = made(texts[0])
    rows = rows_of(projector, texts[0], 10**6)
    before = mse(projector, Rows(rows.x[:, :8], rows.y[:, :8]))
    one = Alone(projector, rows, 8)
    for _ in range(30):
        one.step()
    assert mse(projector, Rows(rows.x[:, :8], rows.y[:, :8])) < 0.7 * before


@pytest.mark.parametrize(
    "settings",
    [{"rates": ()}, {"rates": (1e-2, 1e-3)}, {"rates": (0.0,)}, {"rates": (float("nan"),)}, {"rates": (float("inf"),)},
     {"seeds": 0}, {"steps": 0}, {"batch": 0}, {"every": 0}],
)  # fmt: skip
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(BenchError, match=next(iter(settings))):
        Schedule(**settings)


def test_bad_input(texts: list[Caches], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="texts is 0"):
        sweep(*texts, PLAN, texts=0)
    broken = copy.copy(texts[0])
    broken._kept = {key: value.clone() for key, value in (texts[0]._kept or {}).items()}
    next(value for key, value in broken._kept.items() if key.endswith("keys"))[3, 0, 0] = float("nan")
    with pytest.raises(BenchError, match="NaN"):
        sweep(broken, *texts[1:], PLAN)
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="Cannot write"):
        sweeping._kept(tmp_path / "file" / "below", "key", lambda: 1)


def test_the_documents_own_figures() -> None:
    said = document().set_index("configuration")
    assert said.loc["MLP 1.0x", ["mlp_ratio", "parameters", "steps_to_target", "loss", "slower"]].tolist() == [
        1, 34e6, 15, 0.05, 1.5,
    ]  # fmt: skip
    assert said["parameters"].dropna().tolist() == [7.9e6, 17e6, 34e6, 68e6]
    # What the matrices of one adapter really have, 5120 → h → 1536, and of both at 1024 → h → 256.
    for name, one, both in (("Linear", "7.9", "0.52"), ("MLP 0.5x", "17.0", "1.31"), ("MLP 1.0x", "34.1", "2.62"),
                            ("MLP 2.0x", "68.2", "5.24")):  # fmt: skip
        assert said.loc[name, "fact"].startswith(f"{one} M is one adapter")
        assert f"{both} M" in said.loc[name, "fact"]
    assert said.loc["MLP without LayerNorm, step 40", "loss"] == 6.09
