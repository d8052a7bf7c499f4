"""The embedded corpus: the documentation of the Python packages that are installed anyway.

Every machine that can run the bench carries tens of megabytes of English in its docstrings, so the default
needs no hub and no download (DESIGN.md §5, PEERS.md §7).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from tinyonn_lib.errors import BenchError

STDLIB = "stdlib"
SPLITS = ("train", "calibration", "heldout")
_SKIPPED_FOLDERS = {
    "test", "tests", "testing", "_test", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3",
    "turtledemo", "ensurepip", "pydoc_data", "config", "_vendor", "vendored", "externals",
}  # fmt: skip


def normalised(text: str) -> str:
    """`text` in lower case with every run of white space made one blank: the key for telling duplicates."""
    return re.sub(r"\s+", " ", text).strip().lower()


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).hexdigest()


def _root(package: str) -> Path:
    """Folder (or single file) that holds the sources of an installed package, found without importing it."""
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    if not re.fullmatch(r"[A-Za-z_]\w*", package):
        raise BenchError(f"'{package}' is not an import name: give top-level packages such as numpy or sklearn.")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise BenchError(
            f"Package '{package}' is not installed here: remove it from the list of packages, or install it "
            "(the name is the one used after 'import')."
        )
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec.origin and spec.origin.endswith(".py"):
        return Path(spec.origin)
    raise BenchError(f"Package '{package}' has no Python sources to read: remove it from the list of packages.")


def _files(package: str) -> list[tuple[str, str]]:
    """(path, "package/relative/file.py") of every source file, in a fixed order."""
    root = _root(package)
    if root.is_file():
        return [(str(root), f"{package}/{root.name}")]
    found = []
    for folder, folders, names in os.walk(root):  # not rglob: it would walk through site-packages, too
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [(str(path), f"{package}/{path.relative_to(root).as_posix()}") for path in paths]
    return sorted(found, key=lambda pair: pair[1])


def docstrings(code: str) -> list[str]:
    """Docstrings of a module, its classes and functions in the order of the source, indentation removed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code are not our news
        tree = ast.parse(code)
    return [inspect.cleandoc(doc) for doc in _raw_docstrings(tree)]


def _raw_docstrings(node: ast.AST) -> Iterator[str]:
    # Definitions are statements: walking statement lists alone skips the expressions, most of the tree.
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield first.value.value
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()) or ():
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _raw_docstrings(child)


def _read(files: Sequence[Sequence[str]]) -> list[list[str]]:
    """[text, source] of every docstring in `files`; a file that does not parse or decode gives none."""
    rows = []
    for path, source in files:
        try:
            texts = docstrings(Path(path).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError, OSError, RecursionError):
            continue  # templates, Python 2 samples, latin-1 sources: not ours to repair
        rows += [[text, source] for text in texts]
    return rows


def _read_parallel(files: list[tuple[str, str]]) -> list[list[str]]:
    """`_read`, half of it in a second interpreter: safe inside a notebook kernel, where forking is not."""
    helper = (
        "import json, sys; from tinyonn_lib.lm.corpus import _read; json.dump(_read(json.load(sys.stdin)), sys.stdout)"
    )
    package_root = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {package_root!r}); {helper}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(files[1::2]).encode())
    child.stdin.close()
    own = _read(files[0::2])
    answer = child.stdout.read()
    other = json.loads(answer) if child.wait() == 0 else _read(files[1::2])
    return own + other


def python_docs(packages: Sequence[str], min_characters: int = 100) -> pd.DataFrame:
    """Docstrings of installed packages, each text once.

    Args:
        packages: import names; the word "stdlib" means the standard library (its tests, idlelib … left out).
        min_characters: shorter docstrings are dropped (after removing the indentation).

    Returns:
        Columns `text` and `source` ("package/relative/file.py"), ordered by package as given, file, and place
        in the file. Texts that differ only in case or white space are kept once, the first time.

    Raises:
        BenchError: a package is not installed, or nothing is left.
    """
    if isinstance(packages, str) or not packages:
        raise BenchError("packages must be a list of import names, for example [stdlib, numpy].")
    files: list[tuple[str, str]] = []
    for package in dict.fromkeys(packages):
        files += _files(package)
    rows = _read_parallel(files) if len(files) > 200 else _read(files)
    order = {source: place for place, (_, source) in enumerate(files)}
    rows.sort(key=lambda row: order[row[1]])  # stable: keeps the order inside a file
    seen: set[str] = set()
    kept = []
    for text, source in rows:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded
        if len(text) < min_characters or (key := _digest(normalised(text))) in seen:
            continue
        seen.add(key)
        kept.append((text, source))
    if not kept:
        raise BenchError(f"No docstring of at least {min_characters} characters in {', '.join(packages)}.")
    return pd.DataFrame(kept, columns=["text", "source"])


def python_code(package: str = STDLIB, files: int = 60) -> pd.DataFrame:
    """Source code without docstrings and comments: text from outside the domain of `python_docs`, on every machine.

    Args:
        package: an import name, or "stdlib".
        files: at most this many, chosen by a hash of their names.

    Returns:
        Columns `text` and `source`, one row per file.

    Raises:
        BenchError: the package is not installed, or nothing is left.
    """
    rows: list[tuple[str, str]] = []
    for path, source in sorted(_files(package), key=lambda pair: _digest(pair[1])):
        if len(rows) == files:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = ast.unparse(_without_docstrings(ast.parse(Path(path).read_text(encoding="utf-8"))))
        except (SyntaxError, UnicodeDecodeError, ValueError, OSError, RecursionError):
            continue
        if len(code) > 1000:  # an empty __init__ tells nothing
            rows.append((code, source))
    if not rows:
        raise BenchError(f"No Python source of some length in {package}.")
    return pd.DataFrame(rows, columns=["text", "source"])


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return tree


def split(texts: pd.DataFrame, seed: int, calibration: float = 0.03, heldout: float = 0.03) -> pd.DataFrame:
    """Divide texts into train, calibration and held-out by whole sources, so that no document is in two.

    Sources are ordered by a hash of seed and name; held-out takes sources from the front until it has its share
    of the characters, calibration the next ones, train the rest. A source larger than a whole share goes to train.
    Rows whose normalised text already appeared in another split are dropped.

    Args:
        texts: columns `text` and `source` (one source = one document that must not be torn apart).
        seed: another seed, another division.
        calibration, heldout: shares of all characters, each in (0, 0.5).

    Returns:
        The rows in their order with one more column, `split`.

    Raises:
        BenchError: impossible shares, missing columns, or fewer than three sources.
    """
    if not (0 < calibration < 0.5 and 0 < heldout < 0.5):
        raise BenchError(f"Shares must lie in (0, 0.5), got calibration={calibration}, heldout={heldout}.")
    if missing := {"text", "source"} - set(texts.columns):
        raise BenchError(f"split needs the columns text and source; missing: {', '.join(sorted(missing))}.")
    texts = texts.reset_index(drop=True)
    sizes = texts["text"].str.len().groupby(texts["source"]).sum()
    if len(sizes) < 3:
        raise BenchError(f"Only {len(sizes)} source(s) of text: train, calibration and held-out need one each.")
    waiting = sorted(sizes.index, key=lambda source: _digest(seed, source))
    part = dict.fromkeys(waiting, "train")
    for name, share in (("heldout", heldout), ("calibration", calibration)):
        target, total = share * float(sizes.sum()), 0.0
        small = [source for source in waiting if sizes[source] <= target]
        for source in small or [min(waiting, key=lambda source: (sizes[source], _digest(seed, source)))]:
            part[source] = name
            total += float(sizes[source])
            if total >= target:
                break
        waiting = [source for source in waiting if part[source] == "train"]
        if not waiting:
            raise BenchError("No text is left for training: give more texts or smaller shares.")
    result = texts.assign(split=texts["source"].map(part))
    # Held-out is the most precious: it keeps a text that train has, too, and train loses it.
    rank = result["split"].map({"heldout": 0, "calibration": 1, "train": 2})
    keys = result["text"].map(normalised)
    first = rank.groupby(keys).transform("min")
    result = result[rank == first].reset_index(drop=True)
    if set(result["split"]) != set(SPLITS):
        raise BenchError("After removing repeated texts a split is empty: give more different texts.")
    return result
