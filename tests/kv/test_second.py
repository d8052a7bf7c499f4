"""A second teacher: grown the same each time, or from a folder; two teachers through gates next to each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from kv_families import tiny
from kv_texts import drawn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.kv import judge, second
from tinyonn_lib.kv.cache import KVModel
from tinyonn_lib.kv.contest import Texts
from tinyonn_lib.kv.data import Caches, teachers_of
from tinyonn_lib.kv.projector import KVDimensionProjector
from tinyonn_lib.kv.train import Recipe
from tinyonn_lib.lm import tokenizer

NOUNS = ("router", "neuron", "expert", "layer", "token", "model", "cache", "café")
RECIPE = Recipe(steps=3, batch=4)


def sentences(count: int, start: int = 0) -> list[str]:
    words = [NOUNS[(start + n * (1 + n // 7)) % 8] for n in range(9 * count)]
    return [" the ".join(words[9 * n : 9 * n + 9]) + "." for n in range(count)]


def table(**counts: int) -> pd.DataFrame:
    rows = [
        {"text": text, "source": f"{split} {number % 6}", "split": split}
        for place, (split, count) in enumerate(counts.items())
        for number, text in enumerate(sentences(count, place))
    ]
    return pd.DataFrame(rows)


def grown(**options: Any) -> tuple[Any, Any]:
    return second.grow(sentences(60), **{"tokens": 600, "length": 12, "vocabulary": 300, "width": 16} | options)


def silent(what: str, unit: str) -> Callable[..., None]:
    return lambda done, total, note="": None


def values(model: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_grown_alike_each_time() -> None:
    (one, tok), (two, again), (other, _) = grown(), grown(), grown(seed=1)
    assert torch.equal(values(one), values(two))
    assert not torch.equal(values(one), values(other))
    assert tok.get_vocab() == again.get_vocab()
    assert len(tok) <= 300
    assert one.config.max_position_embeddings == 24
    assert not one.training
    assert KVModel(one).widths.layers == 2


def test_it_has_learnt() -> None:
    (one, tok), (begun, _) = grown(tokens=6000), grown(tokens=100)
    ids = torch.tensor([tok(text)["input_ids"][:15] for text in sentences(60)])
    with torch.no_grad():
        costs = [float(model(input_ids=ids, labels=ids).loss) for model in (one, begun)]
    assert costs[0] < costs[1] - 1


def test_a_killed_growth_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, note: str = "") -> None:
        raise Killed

    notes: list[str] = []
    with pytest.raises(Killed):
        grown(checkpoint=tmp_path / "second.pt", progress=kill)
    if not (tmp_path / "second.pt").exists():
        grown(checkpoint=tmp_path / "second.pt")
    found, _ = grown(checkpoint=tmp_path / "second.pt", progress=lambda done, total, note="": notes.append(note))
    assert any("going on" in note for note in notes)
    assert torch.equal(values(found), values(grown()[0]))


@pytest.fixture(scope="module")
def own() -> Any:
    return tokenizer.train_bpe(sentences(60), 280, max_length=32)


@pytest.fixture(scope="module")
def first(own: Any) -> dict[str, KVModel]:
    size = {"vocab_size": len(own), "num_hidden_layers": 2}
    return {"teacher": KVModel(tiny("Llama", **size)), "student": KVModel(tiny("Qwen3", head_dim=8, **size))}


def both(origin: str, rows: pd.DataFrame, own: Any, first: dict[str, KVModel], folder: Path) -> Texts:
    return second.teachers(
        origin, rows, first, {"teacher": own, "student": own}, folder, silent, tokens=600, grow_tokens=400,
        length=12, eval_tokens=200, seed=0,
    )  # fmt: skip


def test_from_a_folder_with_a_tokenizer_of_its_own(own: Any, first: dict[str, KVModel], tmp_path: Path) -> None:
    model, tok = grown()
    model.save_pretrained(tmp_path / "two")
    tok.save_pretrained(tmp_path / "two")
    found = both(str(tmp_path / "two"), table(calibration=40, heldout=12), own, first, tmp_path)
    assert found.train.names == ["teacher", "second"]
    assert list(found.train._foreign) == ["second"]  # read with its own tokens; the first teacher has the student's
    assert torch.equal(values(found.train.teachers["second"].model), values(model))
    for each in (found.train, found.validation, found.heldout):
        batch = each[torch.arange(2)]
        assert batch["second/keys"].shape[:3] == (2, 2, each.ids.shape[1])
        assert batch["second/keys"].isfinite().all()
    lonely = Texts.draw(table(calibration=40, heldout=12), own, first["student"], {"teacher": first["teacher"]},
                        tokens=600, eval_tokens=200, length=12, seed=0)  # fmt: skip
    assert set(found.heldout.source) == set(lonely.heldout.source)


def test_from_a_folder_with_the_student_s_tokenizer(own: Any, first: dict[str, KVModel], tmp_path: Path) -> None:
    first["teacher"].model.save_pretrained(tmp_path / "same")
    own.save_pretrained(tmp_path / "same")
    found = both(str(tmp_path / "same"), table(calibration=40, heldout=12), own, first, tmp_path)
    batch = found.heldout[torch.arange(3)]
    torch.testing.assert_close(batch["second/keys"], batch["teacher/keys"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "splits", [{"train": 50, "calibration": 40, "heldout": 12}, {"calibration": 40, "heldout": 12}]
)
def test_a_grown_one_learns_from_texts_to_learn_from(
    splits: dict[str, int], own: Any, first: dict[str, KVModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def noted(texts: list[str], **options: Any) -> tuple[Any, Any]:
        seen.append(texts)
        return honest(texts, **options, vocabulary=300, width=16)

    honest = second.grow
    monkeypatch.setattr(second, "grow", noted)
    rows = table(**splits)
    both("grow", rows, own, first, tmp_path)
    assert seen == [rows[rows["split"] == next(iter(splits))]["text"].tolist()]
    assert (tmp_path / "second.pt").exists()


def test_a_missing_folder(own: Any, first: dict[str, KVModel], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="No such file or folder: .*nowhere"):
        both(f"{tmp_path}/nowhere", table(calibration=40, heldout=12), own, first, tmp_path)


# Together


@pytest.fixture(scope="module")
def texts(student: KVModel, teacher: KVModel) -> Texts:
    pair = {"one": teacher, "two": KVModel(tiny("Llama"))}
    return Texts(*(Caches(student, pair, drawn(count, seed)) for seed, count in enumerate((14, 6, 9))))


def test_gates_share_one_among_all_who_speak(texts: Texts) -> None:
    pair, gates = second.together(texts, ["one", "two"], RECIPE)
    assert set(pair["cache"]) == {"one", "two", "one and two", *judge.floors(texts.train)}
    assert gates[["teacher", "layer"]].values.tolist() == [[n, layer] for n in ("one", "two") for layer in range(3)]
    total = gates.groupby("layer")[["keys", "values"]].sum()
    assert total.to_numpy() == pytest.approx(1.0)
    assert ((gates[["keys", "values"]] > 0) & (gates[["keys", "values"]] < 1)).all(None)
    assert gates[["keys", "values"]].nunique().tolist() == [6, 6]


def test_weights_are_means_over_real_tokens(texts: Texts) -> None:
    torch.manual_seed(0)
    configs = {name: model.model.config for name, model in texts.train.teachers.items()}
    projector = KVDimensionProjector.from_configs(configs, texts.train.student.model.config)
    assert projector.gates is not None
    with torch.no_grad():
        projector.gates.normal_()
    found = second._weights(projector, texts).set_index(["teacher", "layer"])
    batch = texts.heldout[torch.arange(len(texts.heldout))]
    weights = projector.weights(teachers_of(batch, ["one", "two"])).detach()
    for side, name in enumerate(("keys", "values")):
        for place, teacher in enumerate(("one", "two")):
            for layer in range(3):
                expected = weights[side, place, :, layer][batch["mask"]].mean()
                assert found.loc[(teacher, layer), name] == pytest.approx(float(expected), rel=1e-5)


def test_together_is_by_its_seed_and_goes_on(texts: Texts, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = second.together(texts, ["one", "two"], RECIPE, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"together_{n}.pt" for n in range(3)}
    torch.manual_seed(2)
    notes: list[str] = []
    again = second.together(
        texts, ["one", "two"], RECIPE, tmp_path, lambda what, unit: lambda done, total, note="": notes.append(note)
    )
    assert sum("going on" in note for note in notes) == 3
    other = second.together(texts, ["one", "two"], Recipe(steps=3, batch=4, seed=1))
    for first, second_time, third in zip(one, again, other, strict=True):
        pd.testing.assert_frame_equal(first, second_time)
        assert not first.equals(third)


def test_a_teacher_alone_is_heard_alone(texts: Texts, student: KVModel) -> None:
    """What one of two says does not depend on who else is there."""
    pair, _ = second.together(texts, ["one", "two"], RECIPE)
    swapped, _ = second.together(texts, ["two", "one"], RECIPE)
    nll = [each.set_index("cache")["nll"] for each in (pair, swapped)]
    for label in ("one", "two", judge.OWN, judge.ZERO):
        assert nll[0][label] == nll[1][label]
    assert "two and one" in nll[1]
