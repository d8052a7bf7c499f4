"""The README's claims are those of the results, failed bars included."""

from __future__ import annotations

import json

import readme


def test_the_readme_shows_every_bar_as_measured() -> None:
    text = (readme.HERE.parent / "README.md").read_text()
    assert readme.written(text, readme.claims(readme.HERE / "results")) == text
    bars = [bar for path in (readme.HERE / "results").glob("*.json") for bar in json.loads(path.read_text())["bars"]]
    assert text.count("**does not hold**") == sum(not bar["holds"] for bar in bars)
    assert len(bars) > 10
