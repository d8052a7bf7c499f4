"""Write the README's table of claims from benchmarks/results/*.json: `python benchmarks/readme.py [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- claims: written by benchmarks/readme.py -->", "<!-- end of claims -->"


def claims(results: Path) -> str:
    """A Markdown table, one row per bar of every result, those that do not hold included."""
    lines = ["| claim | measured | bar | |", "|---|---|---|---|"]
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        for bar in result["bars"]:
            sign = "≤" if bar["better"] == "lower" else "≥"
            verdict = "holds" if bar["holds"] else "**does not hold**"
            name = f"[{result['benchmark']}](benchmarks/{result['benchmark']}.py): {bar['name']}"
            lines.append(f"| {name} | {_short(bar['value'])} | {sign} {_short(bar['bound'])} | {verdict} |")
    return "\n".join(lines)


def written(readme: str, table: str) -> str:
    """The README with the table between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md has no lines '{BEGIN}' and '{END}' to write between")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def main() -> int:
    """Entry point; with `--check` nothing is written and the exit code says whether the README is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    new = written(text, claims(HERE / "results"))
    if check:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
