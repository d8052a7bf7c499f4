"""The live explorer of neurons in JupyterLab: weights of S_p, a map, what the selected neurons fire on, *Save choice*.

Everything comes from arrays that are already there: a move of a slider is one weighted sum and one message with the new
colours. In batch the same call gives a plain figure with a button for each named set of weights.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
import ipywidgets as w
import numpy as np
import pandas as pd
import traitlets
import yaml
from numpy.typing import NDArray

from tinyonn_lib import plots
from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench.page import TEMPLATE, write_atomic
from tinyonn_lib.workbench.params import comments, defaults, validate
from tinyonn_lib.workbench.phases import PHASES, ROOT
from tinyonn_lib.workbench.progress import live

LOCAL = ROOT / "params" / "local"
WEIGHTS = ("w_act", "w_grad", "w_freq")
STATISTICS = ("act", "grad", "freq", "saliency")
OWN = "own weights"
SHOWN = 12  # neurons in the panel's table
QUOTED = 4  # of them with a text on which they fire

Scores = NDArray[np.float64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Passage = Callable[[int, int], tuple[str, str, str]]


def explore(
    neurons: pd.DataFrame,
    features: Callable[[pd.DataFrame, str, bool], pd.DataFrame],
    examples: pd.DataFrame,
    passage: Passage,
    presets: Mapping[str, Any],
    params: Any,
) -> Any:
    """The explorer: a widget in JupyterLab, a figure with buttons in batch.

    Args:
        neurons: One row per neuron: `layer, neuron, act, grad, freq, saliency, cluster, x, y`, and `chosen`, whether
            the parameters' choice names it.
        features: `(neurons, scope, log) → table` of z-scores `z_act, z_grad, z_freq`, such as `score.feature_table`.
        examples: The tokens on which each neuron fires most: `layer, neuron, rank, sample, position, token`.
        passage: `(sample, position) → (text before, the token, text after)`.
        presets: Name → definition of S_p with `act, grad, freq, log, scope`, such as `score.PRESETS`.
        params: The cluster phase's parameters; their definition of S_p comes first.
    """
    data = Data(neurons, features, examples)
    if not live():
        return _static(data, presets, params)
    return Explorer(data, passage, presets, params).box


class Data:
    """The cached arrays behind a re-scoring and a look at some neurons."""

    def __init__(
        self,
        neurons: pd.DataFrame,
        features: Callable[[pd.DataFrame, str, bool], pd.DataFrame],
        examples: pd.DataFrame,
    ) -> None:
        self.neurons = neurons.reset_index(drop=True)
        self.x, self.y = (_unit(self.neurons[name].to_numpy(np.float64)) for name in ("x", "y"))
        self.z = {}
        for scope in ("layer", "global"):
            for log in (True, False):
                table = features(self.neurons, scope, log)
                if len(table) != len(neurons):
                    raise BenchError(f"{len(table)} z-scores do not fit {len(neurons)} neurons: compute them anew.")
                self.z[scope, log] = tuple(table[name].to_numpy(np.float64) for name in ("z_act", "z_grad", "z_freq"))
        place = pd.MultiIndex.from_frame(self.neurons[["layer", "neuron"]])
        owner = place.get_indexer(pd.MultiIndex.from_frame(examples[["layer", "neuron"]]))
        order = np.lexsort((examples["rank"].to_numpy(), owner))[(owner < 0).sum() :]
        token = examples["token"].astype("category").cat
        self.words = [str(word) for word in token.categories]
        self.owner, self.token = owner[order], token.codes.to_numpy()[order].astype(np.int64)
        self.sample, self.position = (examples[name].to_numpy()[order] for name in ("sample", "position"))
        self.begins = np.searchsorted(self.owner, np.arange(len(self.neurons) + 1))
        self.first = np.zeros(len(self.owner), bool)  # a neuron's first example with this token
        self.first[np.unique(self.owner * len(self.words) + self.token, return_index=True)[1]] = True

    def scores(self, weights: Sequence[float], scope: str, log: bool) -> Scores:
        """S_p = w_act·z(act) − w_grad·z(grad) + w_freq·z(freq) of every neuron (document 000 §1.4)."""
        act, grad, freq = self.z[scope, log]
        return weights[0] * act - weights[1] * grad + weights[2] * freq

    def tokens(self, row: int) -> list[str]:
        """The distinct tokens on which a neuron fires most, strongest first."""
        own = slice(self.begins[row], self.begins[row + 1])
        return [self.words[code] for code in self.token[own][self.first[own]]]

    def common(self, chosen: Mask, count: int) -> list[tuple[str, int]]:
        """The tokens that stand out among those of the chosen neurons, and how many of these have it.

        Ordered by n·log(n / expected), with n the neurons that have the token and `expected` how many of as many at
        random would; where all are chosen nothing stands out, and n decides.
        """
        every = np.bincount(self.token[self.first], minlength=len(self.words))
        seen = np.bincount(self.token[self.first & chosen[self.owner]], minlength=len(self.words))
        expected = np.maximum(every, 1) * chosen.mean()
        weight = seen * np.log(np.maximum(seen, 1) / expected) if not chosen.all() else seen
        return [(self.words[i], int(seen[i])) for i in np.argsort(-weight, kind="stable")[:count] if weight[i] > 0]


def _unit(values: Scores) -> Scores:
    """Moved and scaled into [0, 1], with a margin."""
    low, high = values.min(), values.max()
    return 0.02 + 0.96 * (values - low) / ((high - low) or 1.0)


def _density(x: Scores, y: Scores, side: int = 120) -> bytes:
    """How many of all neurons lie where, as the opacity of a picture `(side, side)`, top row first."""
    counts = np.histogram2d(y, x, bins=side, range=((0, 1), (0, 1)))[0][::-1]
    return bytes((np.sqrt(counts / counts.max()) * 140).astype(np.uint8).tobytes())


def best(scores: Scores, rows: Rows, count: int) -> Rows:
    """Of `rows` those with the highest scores, best first."""
    if len(rows) > count:
        rows = rows[np.argpartition(-scores[rows], count)[:count]]
    return rows[np.lexsort((rows, -scores[rows]))]


def inside(x: NDArray[Any], y: NDArray[Any], corners: Sequence[Sequence[float]]) -> Mask:
    """Which points lie in a polygon, by the even-odd rule."""
    polygon = np.asarray(corners, float)
    (left, low), (right, high) = polygon.min(0), polygon.max(0)
    near = np.flatnonzero((x >= left) & (x <= right) & (y >= low) & (y <= high))
    px, py, odd = x[near], y[near], np.zeros(len(near), bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if ay != by:
            odd ^= ((ay > py) != (by > py)) & (px < (bx - ax) * (py - ay) / (by - ay) + ax)
    found = np.zeros(len(x), bool)
    found[near] = odd
    return found


class Map(anywidget.AnyWidget):
    """The map in the browser (template/explorer.js): 80 kB travel per re-colouring of 20,000 points.

    plotly's FigureWidget needed several times as long for each, brings 5 MB of script along, and loses a selection that
    a hover follows at once.
    """

    _esm = TEMPLATE / "explorer.js"
    points = traitlets.Bytes().tag(sync=True)  # float32 (n, 2) in [0, 1]
    names = traitlets.Bytes().tag(sync=True)  # int32 (n, 3): layer, neuron, cluster
    density = traitlets.Bytes().tag(sync=True)  # uint8 (side, side), from the top; empty: none
    palette = traitlets.List(traitlets.Unicode()).tag(sync=True)
    values = traitlets.Bytes().tag(sync=True)  # float32 (n,)
    span = traitlets.Float().tag(sync=True)  # |value| of the last colour
    alt = traitlets.Unicode().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)
    tool = traitlets.Unicode("lasso").tag(sync=True)
    regions: Any = traitlets.List().tag(sync=True)  # polygons of [x, y] that were drawn; []: the choice at the start
    chosen = traitlets.Bytes().tag(sync=True)  # uint8 (n,); empty: none of all neurons


class Explorer:
    """The widget. Its state is the chosen neurons and the scores; the weights are the sliders' own."""

    def __init__(self, data: Data, passage: Passage, presets: Mapping[str, Any], params: Any) -> None:
        self.data, self.passage, self.presets, self.params = data, passage, presets, params
        start = [float(getattr(params, name)) for name in WEIGHTS]
        widest = max(3.0, *(abs(v) for each in presets.values() for v in _weights(each)), *map(abs, start))
        self.sliders = [
            w.FloatSlider(value, min=-widest, max=widest, step=0.05, description=name)
            for name, value in zip(WEIGHTS, start, strict=True)
        ]
        self.preset = w.Dropdown(options=[*presets, OWN], description="S_p")
        self.scope = w.Dropdown(options=["layer", "global"], value=params.scope, description="z within")
        self.log = w.Checkbox(params.log, description="of logarithms", indent=False)
        self.tool = w.ToggleButtons(options=["lasso", "box", "move"], style={"button_width": "64px"})
        self.save = w.Button(description="Save choice", button_style="primary", icon="save")
        self.panel, self.said = w.HTML(), w.HTML()

        self.chosen: Mask = data.neurons["chosen"].to_numpy(bool)
        self.drawn = plots.stratified(data.neurons, plots.MAP_SAMPLE).index.to_numpy()
        self.scores = self._scores()
        self.map = Map(
            points=np.stack([data.x, data.y], 1)[self.drawn].astype(np.float32).tobytes(),
            names=data.neurons.loc[self.drawn, ["layer", "neuron", "cluster"]].to_numpy(np.int32).tobytes(),
            density=_density(data.x, data.y) if len(self.drawn) < len(data.neurons) else b"",
            palette=plots.palette(64),
            caption=f"n = {len(data.neurons):,}, {len(self.drawn):,} drawn",
            regions=[[]] if self.chosen.any() else [],
            chosen=self._marks(),
        )
        self._changed()
        for widget in self._inputs():
            widget.observe(self._changed, "value")
        self.preset.observe(self._take, "value")
        self.map.observe(self._select, "regions")
        traitlets.dlink((self.tool, "value"), (self.map, "tool"))
        self.save.on_click(self._save)
        row = {"align_items": "center", "flex_flow": "row wrap"}
        self.box = w.VBox(
            [
                w.HBox([self.preset, self.scope, self.log], layout=row), w.HBox(self.sliders, layout=row), self.map,
                w.HBox([self.tool, self.save], layout=row), self.said, self.panel,
            ]
        )  # fmt: skip

    def _inputs(self) -> list[Any]:
        return [*self.sliders, self.scope, self.log]

    def _values(self) -> list[Any]:
        return [widget.value for widget in self._inputs()]

    def _scores(self) -> Scores:
        *weights, scope, log = self._values()
        return self.data.scores(weights, scope, log)

    def _changed(self, change: Any = None) -> None:
        """Score and colour anew."""
        self.scores = self._scores()
        drawn = plots.score_colours(self.scores[self.drawn])
        with self.map.hold_sync():  # one message
            self.map.span, self.map.values = drawn["cmax"], drawn["color"].tobytes()
            self.map.alt = f"Map of {len(self.scores):,} neurons coloured by S_p, weights and z {self._values()}"
        self.preset.value = next((n for n, each in self.presets.items() if _definition(each) == self._values()), OWN)
        self._show()

    def _take(self, change: Any) -> None:
        """Put a preset's definition into the sliders, and score once."""
        wanted = _definition(self.presets[change["new"]]) if change["new"] != OWN else self._values()
        if wanted == self._values():
            return
        for widget, value in zip(self._inputs(), wanted, strict=True):
            widget.unobserve(self._changed, "value")
            widget.value = value
            widget.observe(self._changed, "value")
        self._changed()

    def _select(self, change: Any) -> None:
        """Choose every neuron in the regions drawn on the map, also those that are not among the drawn points."""
        self.chosen = np.zeros(len(self.chosen), bool)
        for corners in change["new"]:
            start = self.data.neurons["chosen"].to_numpy(bool)
            self.chosen |= inside(self.data.x, self.data.y, corners) if corners else start
        self.map.chosen = self._marks()
        self._show()

    def _marks(self) -> bytes:
        """The choice among the drawn points, for the browser."""
        return self.chosen[self.drawn].tobytes() if self.chosen.any() else b""

    def _show(self) -> None:
        self.panel.value = panel(self.data, self.scores, self.chosen, self.passage)

    def _save(self, button: Any) -> None:
        *weights, scope, log = self._values()
        try:
            self.said.value = save(self.data.neurons[self.chosen], weights, scope, log, str(self.params.run))
        except (BenchError, OSError) as error:
            self.said.value = f"<b>Not saved.</b> {html.escape(str(error))}"


def _weights(preset: Any) -> tuple[float, float, float]:
    return float(preset.act), float(preset.grad), float(preset.freq)


def _definition(preset: Any) -> list[Any]:
    """As `Explorer._values` has it."""
    return [*_weights(preset), preset.scope, preset.log]


STYLE = """<style>
.tn-panel {font-size: 13px; line-height: 1.45; overflow-x: auto}
.tn-panel table {border-collapse: collapse; margin: 6px 0}
.tn-panel :is(th, td) {padding: 2px 10px; text-align: right; border-bottom: 1px solid var(--jp-border-color2, #ddd)}
.tn-panel th:last-child, .tn-panel td:last-child {text-align: left; white-space: nowrap}
.tn-panel code {background: var(--jp-layout-color2, #eee); padding: 0 3px; border-radius: 3px; margin-right: 4px}
.tn-panel blockquote {margin: 4px 0; padding-left: 10px; border-left: 3px solid #0b6e6e}
</style>"""


def panel(data: Data, scores: Scores, chosen: Mask, passage: Passage) -> str:
    """HTML: how many are chosen, what they fire on, the best of them with statistics, tokens and a text.

    Without a choice it is about all neurons. Text from data sets is escaped here.
    """
    about = chosen if chosen.any() else np.ones_like(chosen)
    rows = best(scores, np.flatnonzero(about), SHOWN)
    if chosen.any():
        mean = f"their mean S_p is {scores[about].mean():+.2f}"
        head, whose = f"<b>{about.sum():,} of {len(chosen):,} neurons chosen</b>; {mean}. The best of them:", "their"
    else:
        how = "draw a lasso or a box on the map, with Shift another; a double click clears them"
        head, whose = f"<b>No neuron chosen</b>: {how}. The best of all {len(chosen):,}:", "all"
    common = ", ".join(f"{_code(word)}×{seen:,}" for word, seen in data.common(about, SHOWN))
    columns = ["layer", "neuron", "S_p", *STATISTICS, "cluster", "fires on"]
    lines = [
        [*_identity(data.neurons, row), f"{scores[row]:+.2f}",
         *(f"{data.neurons[name].iat[row]:.3g}" for name in STATISTICS),
         str(data.neurons["cluster"].iat[row]), "".join(map(_code, data.tokens(row)))]
        for row in rows
    ]  # fmt: skip
    quotes = []
    for row in rows[:QUOTED]:
        if data.begins[row] < data.begins[row + 1]:
            at = data.begins[row]
            left, token, right = map(html.escape, passage(int(data.sample[at]), int(data.position[at])))
            layer, neuron = _identity(data.neurons, row)
            quotes.append(f"<blockquote>{layer}/{neuron}: … {left}<mark>{token}</mark>{right} …</blockquote>")
    table = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    head += f"<table><tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>{table}</table>"
    return f"{STYLE}<div class='tn-panel'>{head}Frequent among {whose} tokens: {common}{''.join(quotes)}</div>"


def _identity(neurons: pd.DataFrame, row: int) -> tuple[str, str]:
    return str(neurons["layer"].iat[row]), str(neurons["neuron"].iat[row])


def _code(word: str) -> str:
    return f"<code>{html.escape(word)}</code>"


def save(chosen: pd.DataFrame, weights: Sequence[float], scope: str, log: bool, run: str) -> str:
    """Write `params/local/cluster.yaml` and, if neurons are chosen, `choice.parquet`; what to do with them, in HTML.

    The overlay keeps whatever other parameters it had. Each file is replaced whole or not at all.

    Raises:
        BenchError: the values are not valid, such as a damaged overlay; nothing is written.
        OSError: the folder cannot be written to.
    """
    phase, path, choice = PHASES["cluster"], LOCAL / "cluster.yaml", LOCAL / "choice.parquet"
    values: dict[str, float | str] = dict(zip(WEIGHTS, weights, strict=True))
    values |= {"scope": scope, "log": log, "choice": str(choice) if len(chosen) else ""}
    old = path.read_text("utf-8").splitlines() if path.is_file() else []
    kept = [line for line in old if not re.match(rf"#|\s*$|({'|'.join(values)}):", line)]
    meaning = comments(phase)
    lines = [
        "# Chosen in the explorer of 03_cluster: tinyonn cluster profile=local",
        *(f"{f'{name}: {_yaml(value)}':<32} # {meaning[name]}" for name, value in values.items()),
        *kept,
    ]
    text = "\n".join(lines) + "\n"
    try:
        validate(phase, {**defaults(phase), **yaml.safe_load(text)})
    except (yaml.YAMLError, TypeError):
        raise BenchError(f"{path} is not a flat YAML file: mend or delete it.") from None
    if len(chosen):
        buffer = io.BytesIO()
        chosen[["layer", "neuron"]].to_parquet(buffer, index=False)
        write_atomic(choice, buffer.getvalue())
    write_atomic(path, text)
    what = f"{len(chosen):,} neurons and the weights" if len(chosen) else "The weights (no neuron is chosen)"
    where = html.escape(str(path.parent))
    return (
        f"{what} are in <code>{where}</code>. Next: <code>tinyonn cluster run={html.escape(run)} profile=local</code>"
    )


def _yaml(value: float | str) -> str:
    return json.dumps(value) if isinstance(value, str | bool) else repr(round(float(value), 3))


def _static(data: Data, presets: Mapping[str, Any], params: Any) -> Any:
    """The map with a button for each definition of S_p; its table has the best neurons of each and their tokens."""
    here = [*(float(getattr(params, name)) for name in WEIGHTS), params.scope, params.log]
    named = {name: _definition(each) for name, each in presets.items()}
    if here not in named.values():
        named = {"this run": here, **named}
    scores = {name: data.scores(weights, scope, log) for name, (*weights, scope, log) in named.items()}
    everyone = np.arange(len(data.neurons))
    rows = [
        (name, *data.neurons.loc[row, ["layer", "neuron"]], each[row], " ".join(data.tokens(row)))
        for name, each in scores.items()
        for row in best(each, everyone, plots.TABLE_ROWS // len(scores))
    ]
    table = pd.DataFrame(rows, columns=["S_p by", "layer", "neuron", "S_p", "fires on"])
    return plots.explorer_map(data.neurons, scores, table)
