"""What every page shares: scripts under a content security policy, safe HTML, words for numbers, atomic files."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TEMPLATE = Path(__file__).parent / "template"


class Scripts(NamedTuple):
    """The script elements of a page, and the policy that allows exactly these."""

    html: str
    csp: str


def page_scripts(own: str, specs: Iterable[tuple[int, Any]]) -> Scripts:
    """plotly.js once (if there is anything to plot), each spec as inert JSON, and `template/<own>`.

    plotly's WebGL traces compile their shaders' wrappers with `new Function`, hence `unsafe-eval`. Inline scripts run
    only if their hash is in the policy, so it still lets nothing run that the page's text smuggled in.
    """
    data = [f'<script type="application/json" data-figure="{number}">{_json(spec)}</script>' for number, spec in specs]
    code = [(TEMPLATE / own).read_text(encoding="utf-8")] if own else []
    if data:
        from plotly.offline import get_plotlyjs

        code.insert(0, get_plotlyjs())
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in code)
    csp = (
        f"default-src 'none'; script-src {hashes + ' ' if hashes else ''}'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )
    return Scripts("\n".join(data + [f"<script>{c}</script>" for c in code]), csp)


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, so no `</script>` and no comment; NaN becomes null."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write `text` so that a reader, or a kill, never meets half a page."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:  # on a full disk the half page would keep it full
        part.unlink(missing_ok=True)
        raise


def read_manifest(folder: Path, name: str = "manifest.json") -> dict[str, Any]:
    """The phase's manifest, or nothing when there is none that can be read (the phase did not finish)."""
    try:
        manifest = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


# -- HTML that came out of a notebook ------------------------------------------------------------------------------

_TAGS = {
    *("a", "abbr", "b", "blockquote", "br", "caption", "code", "col", "colgroup", "dd", "del", "details", "div", "dl"),
    *("dt", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "li", "mark", "ol", "p", "pre", "s", "small"),
    *("span", "strong", "sub", "summary", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "tt", "u", "ul"),
}
_STYLES = ["color", "background-color", "text-align", "font-weight", "font-style", "width", "white-space"]


def _attribute(tag: str, name: str, value: str) -> bool:
    if tag == "img" and name == "src":  # only pictures that are in the page already
        return value.startswith(("data:image/png", "data:image/jpeg", "data:image/gif", "data:image/svg+xml"))
    if tag == "a" and name == "href":
        return value.startswith(("#", "https:", "http:", "mailto:")) or ":" not in value
    if name == "id":  # in-page links to headings; elsewhere an id could stand in for one of ours
        return tag in {"h1", "h2", "h3", "h4", "h5", "h6"}
    return name in {"class", "style", "alt", "title", "colspan", "rowspan", "align", "start", "open", "scope"}


def clean_html(text: object) -> str:
    """Markup reduced to what a page of text needs; anything else stays, as visible text."""
    # pandas writes a <style scoped> before each frame; shown as text it would only be noise.
    safe: str = _cleaner().clean(re.sub(r"<style[^>]*>.*?</style\s*>", "", str(text), flags=re.S | re.I))
    return _align_numbers(safe) if 'class="dataframe' in safe else safe


@cache
def _cleaner() -> Any:
    from bleach.css_sanitizer import CSSSanitizer
    from bleach.html5lib_shim import Filter
    from bleach.sanitizer import Cleaner

    class Pictures(Filter):
        """Say where a picture was that would have been fetched from outside the page."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for token in super().__iter__():
                if token.get("name") == "img" and (None, "src") not in token["data"]:
                    token = {"type": "Characters", "data": "[picture left out]"}
                yield token

    css = CSSSanitizer(allowed_css_properties=_STYLES)
    protocols = ["http", "https", "mailto", "data"]
    return Cleaner(tags=_TAGS, attributes=_attribute, protocols=protocols, css_sanitizer=css, filters=[Pictures])


def _align_numbers(text: str) -> str:
    """Mark the numeric columns of data frames, which the style sheet then sets flush right."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    for table in soup.select("table.dataframe"):
        rows = [row.find_all(["th", "td"]) for row in table.select("tr")]
        for column in zip(*rows, strict=False):
            cells = [c.get_text().strip() for c in column if c.name == "td"]
            if cells and all(re.fullmatch(r"[-+−]?[\d,.]+(e[-+]?\d+)?%?|NaN|None|nan|inf|–", c) for c in cells):
                for cell in column:
                    cell["class"] = ["n"]
    return str(soup)


# -- words and numbers -----------------------------------------------------------------------------------------------


def number_text(value: Any) -> str:
    """A value as people read it: five significant digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e5 or not math.isfinite(value) else f"{value:,.0f}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def seconds_text(seconds: Any) -> str:
    """A duration as people say it: `4.2 s`, `3 min 10 s`, `2 h 05 min`."""
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size_text(size: Any) -> str:
    """Bytes in decimal units."""
    if not isinstance(size, int | float):
        return ""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def short_text(text: str, limit: int = 60) -> str:
    """`text`, cut with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
