"""Parameters: one flat YAML per phase is the truth; Hydra composes it outside the notebook.

`compose` gives the values of one phase from `params/<phase>.yaml`, an optional overlay
`params/<profile>/<phase>.yaml` and overrides `key=value`; `expand` turns a sweep into its jobs; `validate`
is the one gate through which every set of values passes, in the command line and in the notebook.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench.phases import PHASES, ROOT, Phase
from tinyonn_lib.workbench.schemas import Params

_LINE = re.compile(r"^(?P<key>[A-Za-z_]\w*):[ \t]*(?P<value>.*?)(?:[ \t]+#[ \t]*(?P<comment>.*))?$")


def defaults(phase: Phase) -> dict[str, Any]:
    """The embedded default of a phase, as `params/<phase>.yaml` has it."""
    return dict(yaml.safe_load(phase.params_file.read_text("utf-8")))


def comments(phase: Phase) -> dict[str, str]:
    """The comment behind each key of `params/<phase>.yaml`: its meaning and unit."""
    lines = phase.params_file.read_text("utf-8").splitlines()
    found = {m["key"]: m["comment"] or "" for m in map(_LINE.match, lines) if m}
    return found


def validate(phase: Phase, values: Mapping[str, Any]) -> Params:
    """Check one set of values against the phase's model.

    Raises:
        BenchError: One line naming the key, its value and what is allowed; the first problem only.
    """
    known = phase.schema.model_fields
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(known)}."
            raise BenchError(f"{phase.name} has no parameter '{key}'.{hint}")
    try:
        return phase.schema.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # a rule about several keys says all by itself
            raise BenchError(f"{phase.name}: {said}.") from None
        key = str(first["loc"][0])
        if first["type"] == "missing":
            raise BenchError(f"{phase.name} needs the parameter '{key}'; params/{phase.name}.yaml has it.") from None
        meaning = comments(phase).get(key, "")
        shown = "…" if key.endswith("url") else repr(first["input"])  # a URL may hold a password
        more = f" ({key}: {meaning})" if meaning else ""
        raise BenchError(f"{phase.name}.{key} = {shown}: {said}.{more}") from None


def changed(phase: Phase, values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Parameters that differ from the default: `{key: [default, value]}`."""
    base = defaults(phase)
    return {k: [base.get(k), v] for k, v in values.items() if k not in ("run", "base") and base.get(k) != v}


def compose(phase: Phase, overrides: Sequence[str] = (), profile: str = "") -> dict[str, Any]:
    """Default ← profile ← overrides, checked.

    `overrides` are Hydra's `key=value`; `profile` names a folder of overlays under `params/`.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = defaults(phase)
    for text in overrides:
        key = text.split("=", 1)[0]
        if "=" not in text:
            raise BenchError(f"'{text}' is not an override; write key=value, such as {next(iter(known))}=….")
        if key not in known:
            validate(phase, {key: None})
    more = [f"+{profile}@_global_={phase.name}"] if overlay(phase, profile) else []
    try:
        with initialize_config_dir(str(ROOT / "params"), version_base="1.3"):
            config = hydra_compose(phase.name, overrides=[*more, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise BenchError(f"{phase.name}: {_first_line(error)}") from None
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    return validate(phase, {str(k): v for k, v in values.items()}).model_dump()


def overlay(phase: Phase, profile: str) -> set[str]:
    """The parameters of a phase that a profile sets; none without a profile.

    Raises:
        BenchError: there is no such profile, or its file cannot be read.
    """
    if not profile:
        return set()
    folder = ROOT / "params" / profile
    if not folder.is_dir():
        names = sorted(p.name for p in (ROOT / "params").iterdir() if p.is_dir() and p.name != "accelerate")
        raise BenchError(f"There is no profile '{profile}' under params/. Known: {', '.join(names) or 'none yet'}.")
    file = folder / f"{phase.name}.yaml"
    try:
        found = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BenchError(f"Cannot read params/{profile}/{file.name}: {_first_line(error)}") from error
    return {str(key) for key in found or ()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep: `lr=1.0e-3,3.0e-3 seed=1` gives two lists of plain overrides (Hydra's grammar)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise BenchError(f"Cannot read the overrides: {_first_line(error)}") from None
    choices = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
        for o in parsed
    ]
    return [[str(text) for text in job] for job in itertools.product(*choices)]


def literal(value: object) -> str:
    """A parameter's value as Python source, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def parameters_cell(phase: Phase) -> str:
    """The source of the notebook's `parameters` cell: the YAML's values, several to a line of up to 100 characters.

    Their meanings are not in it: `start` shows them below, next to the values of the run.
    """
    lines = [f"# Mirrors params/{phase.name}.yaml; change it there, then `tinyonn sync`.", "# fmt: off"]
    packed = ""
    for key, value in defaults(phase).items():
        part = f"{key} = {literal(value)}"
        if packed and len(packed) + len(part) + 2 > 100:
            lines.append(packed)
            packed = ""
        packed += f"; {part}" if packed else part
    return "\n".join([*lines, packed])


def sync(check: bool = False) -> list[str]:
    """Write every notebook's `parameters` cell from its YAML; return the phases that had drifted.

    With `check` nothing is written.
    """
    import nbformat

    drifted = []
    for phase in PHASES.values():
        notebook = nbformat.read(phase.notebook, as_version=4)
        cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        if len(cells) != 1:
            raise BenchError(f"{phase.notebook.name} needs exactly one cell tagged 'parameters', it has {len(cells)}.")
        wanted = parameters_cell(phase)
        if cells[0].source != wanted:
            drifted.append(phase.name)
            if not check:
                cells[0].source = wanted
                nbformat.write(notebook, phase.notebook)
    return drifted


def lint(paths: Sequence[Path]) -> list[str]:
    """Complaints about params files: nested values, interpolation, and `1e-4`, which PyYAML reads as a string."""
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            where = f"{path.name}:{number}"
            match = _LINE.match(line)
            if line.strip() and not line.startswith("#") and not match:
                found.append(f"{where}: not a flat `key: value`")
            elif match and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\d+|[+-]?\d+[eE][+-]?\d+", match["value"]):
                found.append(f"{where}: write {match['value']} as 1.0e-4, with a point and a sign")
            elif match and "${" in match["value"]:
                found.append(f"{where}: interpolation would reach papermill unresolved")
            elif match and not match["comment"]:
                found.append(f"{where}: {match['key']} has no comment with meaning and unit")
    return found
