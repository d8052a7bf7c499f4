"""What the second cell of every notebook calls."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from tinyonn_lib.workbench import words
from tinyonn_lib.workbench.params import changed, comments, literal, validate
from tinyonn_lib.workbench.phases import PHASES, Phase
from tinyonn_lib.workbench.runs import Run, open_run
from tinyonn_lib.workbench.schemas import Params


def start(phase: str, namespace: Mapping[str, Any]) -> tuple[Any, Run]:
    """Check the parameters that the cells above set, open the run folder, show what the parameters mean.

    Args:
        phase: Name of the phase, such as `"scan"`.
        namespace: The notebook's `globals()`.

    Returns:
        The parameters as a frozen object (`p.tokens`) and the `Run`.
    """
    chosen = PHASES[phase]
    values = assigned([str(source) for source in namespace.get("In", [])])
    if not values:  # not under IPython, as in a test: take what has a parameter's name
        values = {name: namespace[name] for name in chosen.schema.model_fields if name in namespace}
    params: Params = validate(chosen, values)
    _quiet()
    run = open_run(chosen, params)
    _show(chosen, params)
    return params, run


def _show(phase: Phase, params: Params) -> None:
    """The parameters of this run and their meanings, folded."""
    from IPython.display import HTML, display

    values = params.model_dump()
    defaults = {name: literal(default) for name, (default, _) in changed(phase, values).items()}
    meanings = comments(phase)
    shown = {name: literal(values[name]) for name in meanings}
    display(HTML(words.parameters(shown, defaults, meanings)))


def assigned(sources: list[str]) -> dict[str, Any]:
    """Names and values set by the parameters cell and by what papermill injected below it.

    papermill only warns about a name that no parameter has, and then runs with the default; this finds it. It also
    keeps a parameter safe from an import of the same name further down.
    """
    found: dict[str, Any] = {}
    for source in sources:
        if not source.startswith(("# Mirrors params/", "# Parameters\n")):
            continue
        try:
            body = ast.parse(source).body
        except SyntaxError:
            continue
        for node in body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _constant(node.value):
                found[node.targets[0].id] = eval(ast.unparse(node.value), {"__builtins__": {}})
    return found


def _constant(node: ast.expr) -> bool:
    """Literals and arithmetic on them: `3`, `-1.0`, `2 * 10**5`, `["a"]`; nothing that could look up a name."""
    allowed = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.List, ast.Tuple, ast.Load)
    return all(isinstance(part, allowed) for part in ast.walk(node))


def _quiet() -> None:
    """Libraries' own bars and notes belong to their users' terminals, not into a report."""
    import os

    import torch

    quiet = {
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if not torch.cuda.is_available():
        # transformers imports DeepSpeed to save a model, and that reports at warning level that it found no GPU.
        quiet["DS_ACCELERATOR"] = "cpu"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
