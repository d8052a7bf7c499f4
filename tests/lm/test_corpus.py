from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import corpus

DOC = "Compute the thing that has to be computed, and return it to the caller as it was found, or nearly so, always. "


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the path with docstrings, a test folder, a broken file and a Latin-1 file."""
    root = tmp_path / "zzpack"
    (root / "sub").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text(f'"""{DOC}module"""\nraise RuntimeError("never imported")\n')
    (root / "sub" / "a.py").write_text(
        f'class A:\n    """{DOC}\n\n    indented\n      deeper"""\n    async def f(self):\n        """{DOC}async"""\n'
        f'if True:\n    def g():\n        """{DOC}in an if"""\n        def h():\n            """too short"""\n'
        f'def again():\n    """{DOC.upper()}  MODULE"""\n'
    )
    (root / "tests" / "t.py").write_text(f'"""{DOC}of a test"""\n')
    (root / "broken.py").write_text(f'"""{DOC}broken"""\nprint "python 2"\n')
    (root / "latin.py").write_bytes(f'"""{DOC}\xe9"""\n'.encode("latin-1"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "zzpack"


def test_docstrings_of_modules_classes_functions(package: str) -> None:
    docs = corpus.python_docs([package])
    assert docs["source"].tolist() == ["zzpack/__init__.py"] + ["zzpack/sub/a.py"] * 3
    assert docs["text"].tolist()[0] == f"{DOC}module"
    assert docs["text"].tolist()[1].endswith("\n\nindented\n  deeper")  # cleandoc keeps relative indentation
    assert docs["text"].tolist()[3].endswith("in an if")  # and the upper-case repeat is gone


def test_parallel_reading_changes_nothing(package: str) -> None:
    files = corpus._files(package)
    assert sorted(corpus._read_parallel(files)) == sorted(corpus._read(files))


def test_stdlib_is_clean_and_repeatable() -> None:
    docs = corpus.python_docs(["stdlib"])
    assert len(docs) > 1000
    assert docs["source"].str.startswith("stdlib/").all()
    assert not docs["source"].str.contains("/test/|idlelib|site-packages").any()
    assert not docs["text"].map(corpus.normalised).duplicated().any()
    pd.testing.assert_frame_equal(docs, corpus.python_docs(["stdlib"]))


@pytest.mark.parametrize("packages", [["no_such_package_here"], ["os.path"], ["../evil"], [], "numpy", ["math"]])
def test_bad_packages(packages: list[str]) -> None:
    with pytest.raises(BenchError):
        corpus.python_docs(packages)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12), st.sampled_from(["x", "X ", " x"])), min_size=3),
    seed=st.integers(0, 5),
)
def test_split_never_mixes(rows: list[tuple[int, int, str]], seed: int) -> None:
    table = pd.DataFrame([(f"{f} {t}", f"s{s}") for t, s, f in rows], columns=["text", "source"])
    try:
        parts = corpus.split(table, seed, calibration=0.2, heldout=0.2)
    except BenchError:
        return
    assert parts.groupby("source")["split"].nunique().max() == 1
    assert parts.groupby(parts["text"].map(corpus.normalised))["split"].nunique().max() == 1
    assert set(parts["split"]) == set(corpus.SPLITS)


def test_split_shares_and_seed() -> None:
    table = pd.DataFrame([(f"text number {i} " * 20, f"s{i // 3}") for i in range(900)], columns=["text", "source"])
    parts = corpus.split(table, 0, calibration=0.1, heldout=0.05)
    sizes = parts["text"].str.len().groupby(parts["split"]).sum() / table["text"].str.len().sum()
    assert sizes["calibration"] == pytest.approx(0.1, abs=0.01)
    assert sizes["heldout"] == pytest.approx(0.05, abs=0.01)
    pd.testing.assert_frame_equal(parts, corpus.split(table, 0, calibration=0.1, heldout=0.05))
    assert (parts["split"] != corpus.split(table, 1, calibration=0.1, heldout=0.05)["split"]).any()


@pytest.mark.parametrize("shares", [(0.0, 0.1), (0.1, 0.6), (-1, 0.1)])
def test_split_refuses_bad_shares(shares: tuple[float, float]) -> None:
    table = pd.DataFrame({"text": ["a", "b", "c"], "source": ["1", "2", "3"]})
    with pytest.raises(BenchError, match="Shares"):
        corpus.split(table, 0, calibration=shares[0], heldout=shares[1])


def test_split_needs_sources() -> None:
    with pytest.raises(BenchError, match="source"):
        corpus.split(pd.DataFrame({"text": ["a", "b"], "source": ["1", "1"]}), 0)
    with pytest.raises(BenchError, match="missing: source"):
        corpus.split(pd.DataFrame({"text": ["a", "b"]}), 0)


def test_code_is_without_docstrings_and_comments() -> None:
    texts = corpus.python_code("json", files=3)
    assert len(texts) == 3
    assert texts["source"].is_unique
    decoder = corpus.python_code("json", files=99).set_index("source").loc["json/decoder.py", "text"]
    assert "def raw_decode(" in decoder
    assert "Implementation of JSONDecoder" not in decoder  # its docstring
    assert "#" not in decoder
    assert corpus.docstrings(decoder) == []
