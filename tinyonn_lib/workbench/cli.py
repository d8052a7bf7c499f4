"""The command `tinyonn`: run phases, sweep, see where you are, build the reports."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tinyonn_lib import __version__
from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench import params, runs
from tinyonn_lib.workbench.phases import PHASES, ROOT, Phase, home, reports_root, runs_root

SHARED = ("run", "base", "profile")
"""Overrides that mean the same for every phase and so need no `phase.` in front."""

TOOLS = {
    "mscan": ("look into .mscan files", "tinyonn_lib.scan.commands:mscan"),
    "store": ("look into the store of a scan", "tinyonn_lib.scan.commands:store"),
    "moe": ("divide a model's folder into experts", "tinyonn_lib.experts.commands:moe"),
    "gguf": ("write a model's folder as a GGUF file for llama.cpp", "tinyonn_lib.lm.commands:gguf"),
}
"""Commands that others bring: name -> (help, module:function that fills in the parser)."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 a clear error, 2 a wrong command line, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return int(args.do(args) or 0)
    except BenchError as error:
        print(f"tinyonn: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(
            f"tinyonn: {error.strerror}: {error.filename or home()}. Make room there, or set TINYONN_HOME to a folder "
            "on another disk that may be written to; then run the same command again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("tinyonn: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinyonn",
        description="Take a language model apart, neuron by neuron, and put it together again as small experts.",
        epilog="Without a command: where you are and what to do next.",
    )
    parser.add_argument("--version", action="version", version=f"tinyonn {__version__}")
    parser.set_defaults(do=_status, run="default")
    commands = parser.add_subparsers(metavar="command")

    def add(name: str, text: str, do: Any, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(do=do, phase=name)
        return command

    everything = add("all", "run every phase that is not up to date, then build the reports", _run)
    each = [add(p.name, p.title, _run, _explain(p)) for p in PHASES.values()]
    for command in (everything, *each):
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="parameters; profile=NAME adds an overlay"
        )
        command.add_argument("-m", "--multirun", action="store_true", help="sweep over values given as key=a,b,c")
        command.add_argument("--force", action="store_true", help="run again what is up to date")
    status = add("status", "where every phase of a run stands", _status)
    status.add_argument("run", nargs="?", default="default", help="name of the run (default: default)")
    add("report", "build missing reports and reports/index.html", _report)
    add("lab", "open JupyterLab on the notebooks", _lab)
    lint = add("lint", "check params files: flat, commented, floats that YAML reads as floats", _lint)
    lint.add_argument("files", nargs="*", type=Path, help="files to check (default: all under params/)")
    sync = add("sync", "write the notebooks' parameters cells from params/*.yaml", _sync)
    sync.add_argument("--check", action="store_true", help="only say what has drifted; exit 1 if anything has")
    for name, (text, where) in TOOLS.items():
        module, _, function = where.partition(":")
        getattr(import_module(module), function)(commands.add_parser(name, help=text, description=text))
    return parser


def _explain(phase: Phase) -> str:
    notes = params.comments(phase)
    rows = [f"  {f'{key}={value}':<34} {notes[key]}" for key, value in params.defaults(phase).items()]
    return "parameters and defaults (params/" + phase.name + ".yaml):\n" + "\n".join(rows)


def _run(args: argparse.Namespace) -> int:
    jobs = params.expand(args.overrides) if args.multirun else [args.overrides]
    plans = [_plan(args.phase, job, sweep=args.multirun) for job in jobs]  # all checked before the first one starts
    failed: list[BenchError] = []
    for number, plan in enumerate(plans, 1):
        if len(plans) > 1:
            print(f"job {number} of {len(plans)}: run {plan[0][1]['run']}", flush=True)
        try:
            _run_plan(plan, force=args.force)
        except BenchError as error:
            failed.append(error)
    for earlier in failed[:-1]:
        print(f"tinyonn: {earlier}", file=sys.stderr)
    if failed:
        if not any(isinstance(each, Busy) for each in failed):  # else its pages belong to the one at work
            with contextlib.suppress(OSError):  # the error is what counts
                _report(args)  # what is there, and how far the failed phase got
        raise failed[-1]
    return _report(args)


class Busy(BenchError):
    """Another command works on the run."""


Plan = list[tuple[Phase, dict[str, Any]]]


def _plan(which: str, overrides: Sequence[str], sweep: bool) -> Plan:
    """The phases of one job with their checked parameters.

    A run keeps what was once chosen for it: default ← profile ← what its last results were made with, where that
    differed from the default ← overrides.
    """
    chosen = list(PHASES.values()) if which == "all" else [PHASES[which]]
    pairs = [o.split("=", 1) for o in overrides if "=" in o]
    shared = {key: value.strip("'\"") for key, value in pairs if key in SHARED}
    own = [o for o in overrides if o.split("=", 1)[0] not in SHARED]
    if sweep:
        shared.setdefault("base", shared.get("run", "default"))
        name = re.sub(r"[^A-Za-z0-9._+,=-]+", "-", ",".join([shared["base"], *own]))
        shared["run"] = name if len(name) <= 200 else f"{name[:183]},{runs.digest(own)}"  # folders' names have a limit
    mine: dict[str, list[str]] = {phase.name: [] for phase in chosen}
    for text in own:
        head, _, rest = text.partition(".")
        if head in mine and "=" in rest:
            mine[head].append(rest)
        elif which != "all":
            mine[which].append(text)
        else:
            raise BenchError(
                f"'{text}': say whose parameter it is, such as scan.tokens=1000 (phases: {', '.join(mine)})."
            )
    for_all = [f"{key}='{value}'" for key, value in shared.items() if key != "profile"]
    plan = []
    for phase in chosen:
        values = params.compose(phase, [*mine[phase.name], *for_all], shared.get("profile", ""))
        given = {text.split("=", 1)[0] for text in mine[phase.name]} | params.overlay(phase, shared.get("profile", ""))
        plan.append((phase, _anchored(_kept(phase, values, given))))
    return [(phase, values) for phase, values in plan if which != "all" or phase.name in _wanted(plan)]


def _kept(phase: Phase, values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """`values` with what the run's last result of this phase was made with, unless given anew."""
    manifest = runs.read_manifest(runs.folder_of(values["run"], phase.name))
    defaults = params.defaults(phase)
    kept = {
        key: value
        for key, (_, value) in (manifest["changed"] if manifest else {}).items()
        if key in values and key not in given and values[key] == defaults[key] != value
    }
    if kept:
        shown = ", ".join(f"{key}={value}" for key, value in kept.items())
        print(f"{phase.name} keeps {shown} from its last result in run '{values['run']}'", flush=True)
    return params.validate(phase, {**values, **kept}).model_dump()


def _anchored(values: dict[str, Any]) -> dict[str, Any]:
    """Paths made absolute, because notebooks run in another folder than the one the command was given in."""
    return {
        key: str(Path(value).resolve()) if key in runs.PATHS and value and Path(value).exists() else value
        for key, value in values.items()
    }


def _wanted(plan: Plan) -> set[str]:
    """The phases that have a part in the run: pretrain has none when scan brings its own model and texts."""
    read = {name for phase, values in plan for name in phase.reads(values)}
    return {phase.name for phase, _ in plan if phase.inputs or phase.name in read}


def _run_plan(plan: Plan, force: bool) -> None:
    from tinyonn_lib.workbench.execute import execute

    run = plan[0][1]["run"]
    (runs_root() / run).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs_root() / run / ".lock", timeout=0):
            table = []
            for phase, values in plan:
                began = time.perf_counter()
                if not force and runs.state(phase, values) == "done":
                    said = "up to date"
                else:
                    print(f"{phase.number:02d} {phase.name}: {phase.title}", flush=True)
                    execute(phase, values)
                    said = "ran"
                table.append((phase, said, time.perf_counter() - began, runs.find(phase.name, run, values["base"])))
            _print_table(table)
    except Timeout:
        raise Busy(
            f"Another tinyonn is working on run '{run}': wait for it, or choose another folder with run=NAME."
        ) from None


def _print_table(table: Sequence[tuple[Phase, str, float, Any]]) -> None:
    print(f"\n{'phase':<10} {'':<10} {'seconds':>8}  result")
    for phase, said, seconds, hit in table:
        headline = hit[1]["headline"]
        print(f"{phase.name:<10} {said:<10} {seconds:>8.1f}  {headline['value']} {headline['label']}")
    print(f"{'all':<10} {'':<10} {sum(row[2] for row in table):>8.1f}")


def _status(args: argparse.Namespace) -> int:
    names = runs.known_runs()
    if args.run not in names and args.run != "default":
        raise BenchError(f"There is no run '{args.run}'. Known: {', '.join(names) or 'none yet'}.")
    print(f"run {args.run} in {runs.runs_root() / args.run}")
    manifests = {name: runs.read_manifest(runs_root() / args.run / name) for name in PHASES}
    base = next((m["params"]["base"] for m in manifests.values() if m and m["params"]["base"]), "")
    following = ""
    hits = {name: runs.find(name, args.run, base) for name in PHASES}
    made = {name: hit[1]["params"] if hit else params.defaults(PHASES[name]) for name, hit in hits.items()}
    plan = [(phase, {**made[name], "run": args.run, "base": base}) for name, phase in PHASES.items()]
    for phase, values in plan:
        if phase.name not in _wanted(plan):
            continue
        hit, state = hits[phase.name], runs.state(phase, values)
        lent = hit is not None and not manifests[phase.name]
        if lent and state != "done":  # the base run's result stands on other inputs: it is not this run's
            hit, state = None, "not run"
        headline = f"{hit[1]['headline']['value']} {hit[1]['headline']['label']}" if hit else phase.title
        tail = f" (from run {base})" if hit and lent else ""
        print(f"  {phase.number:02d} {phase.name:<10} {state:<10} {headline}{tail}")
        following = following or (phase.name if state != "done" else "")
    others = [n for n in names if n != args.run]
    if others:
        print(f"other runs: {', '.join(others)}")
    place = "" if args.run == "default" else f" run={args.run}" + (f" base={base}" if base else "")
    print(
        f"next: `tinyonn {following}{place}`" + ("" if base else f", or `tinyonn all{place}` for all that is left")
        if following
        else "everything is done: `tinyonn report` builds reports/index.html, `tinyonn lab` opens the notebooks"
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    from tinyonn_lib.workbench.index import publish

    print(f"reports: {publish(runs_root(), reports_root(), list(PHASES.values()), runs.status_of)}")
    return 0


def _lab(args: argparse.Namespace) -> int:
    from tinyonn_lib.workbench.execute import threads

    command = [sys.executable, "-m", "jupyterlab", "--notebook-dir", str(ROOT)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.call(command, env={**os.environ, **threads(), "PATH": path})


def _lint(args: argparse.Namespace) -> int:
    files = args.files or sorted((ROOT / "params").rglob("*.yaml"))
    complaints = params.lint([file for file in files if file.parent.name != "accelerate"])  # those are accelerate's own
    print("\n".join(complaints) or "params: nothing to complain about")
    return 1 if complaints else 0


def _sync(args: argparse.Namespace) -> int:
    drifted = params.sync(check=args.check)
    verb = "differ from" if args.check else "written from"
    print(f"parameters cells {verb} params/: {', '.join(drifted) or 'none'}")
    return 1 if args.check and drifted else 0


if __name__ == "__main__":
    sys.exit(main())
