"""Command line of the scanner's files. Imports wait until a command runs, so that `tinyonn --help` stays quick."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tinyonn_lib.errors import BenchError

if TYPE_CHECKING:
    from tinyonn_lib.scan.mscan_file import File


def mscan(parser: argparse.ArgumentParser) -> None:
    """Add `info`, `head` and `export` to the parser of `tinyonn mscan`."""
    commands = parser.add_subparsers(metavar="what", required=True)
    info = commands.add_parser("info", help="what a file holds, and whether it is whole")
    info.set_defaults(do=_info)
    head = commands.add_parser("head", help="its first records")
    head.set_defaults(do=_head)
    export = commands.add_parser("export", help="write it as Parquet or CSV")
    export.set_defaults(do=_export)
    for command in (info, head, export):
        command.add_argument("file", type=Path, help="an .mscan file")
        command.add_argument("--salvage", action="store_true", help="read what is left of a damaged file")
    head.add_argument("-n", type=int, default=10, help="how many (default: 10)")
    export.add_argument("out", type=Path, help="OUT.parquet or OUT.csv")


def store(parser: argparse.ArgumentParser) -> None:
    """Add `show` and `publish` to the parser of `tinyonn store`."""
    commands = parser.add_subparsers(metavar="what", required=True)
    show = commands.add_parser("show", help="scans on a server or of a run: how far they are, their strongest units")
    show.set_defaults(do=_show)
    show.add_argument("run", nargs="?", default="default", help="name of a run (default: default)")
    show.add_argument("--top", type=int, default=5, help="how many units of each kind (default: 5)")
    publish = commands.add_parser("publish", help="write a scan's averages where redis-cli can read them")
    publish.set_defaults(do=_publish)
    for command in (show, publish):
        where = "a server of your own, redis://user@host:port/0; password in TINYONN_REDIS_PASSWORD"
        command.add_argument("--url", default="", required=command is publish, help=where)
        command.add_argument("--scan", default="", help="name of the scan, where there are several")


def _info(args: argparse.Namespace) -> None:
    from tinyonn_lib.scan.mscan import File, summarise

    file = File(args.file, salvage=args.salvage)
    found = summarise(file)
    size = args.file.stat().st_size
    per = f", {size / found.records:.2f} bytes each" if found.records else ""
    share = {
        norm: f"{_share(found.zero[norm], found.records)} 0, {_share(found.missing[norm], found.records)} not measured"
        for norm in ("act", "grad")
    }
    kinds = [target.kind for target in file.header.targets]
    rows = {
        "records": f"{found.records} in {len(file.segments)} segments, {size} bytes{per}",
        "steps": f"{found.steps}, from {found.first} to {found.last}" if found.steps else "none",
        "sequences": f"{found.sequences}, {found.tokens} tokens",
        "targets": f"{len(kinds)}: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        "methods": ", ".join(f"{n} {name}" for name, n in found.methods.items()) or "none",
        "activation": share["act"],
        "gradient": share["grad"],
        **{f"meta {key}": str(value) for key, value in file.header.meta.items()},
    }
    print(args.file)
    for name, text in rows.items():
        print(f"  {name:<12} {text}")
    for place in file.damaged:
        print(f"damaged: {place}")
    if file.torn:
        print(file.torn)
    if found.warning:
        print(f"warning: {found.warning}")


def _head(args: argparse.Namespace) -> None:
    import pandas as pd

    file = _opened(args)
    parts: list[pd.DataFrame] = []
    for part in file:
        parts.append(part)
        if sum(map(len, parts)) >= args.n:
            break
    if not parts:
        raise BenchError(f"{args.file} has no records yet")
    print(pd.concat(parts).head(args.n).to_string(index=False, float_format="{:.4g}".format))


def _export(args: argparse.Namespace) -> None:
    from tinyonn_lib.scan.mscan import export_parquet

    kind = args.out.suffix.lower()
    if kind not in (".parquet", ".csv"):
        raise BenchError(f"'{args.out}': say how to write it by its ending, .parquet or .csv")
    file = _opened(args)
    if kind == ".parquet":
        export_parquet(file, args.out)
    else:
        _export_csv(file, args.out)
    print(f"{args.out}: {file.records} records")


def _export_csv(file: File, out: Path) -> None:
    from tinyonn_lib.scan.mscan_sink import replacing

    with replacing(out) as new:
        new.write(b"step,sequence,tokens,target,layer,kind,method,act,grad\n")
        for part in file:  # six digits: the values are good to 3.2e-4
            new.write(part.to_csv(index=False, header=False, float_format="%.6g", lineterminator="\n").encode())


def _opened(args: argparse.Namespace) -> File:
    from tinyonn_lib.scan.mscan import File, complaints

    file = File(args.file, salvage=args.salvage)
    for line in complaints(file):
        print(f"tinyonn: {line}", file=sys.stderr)
    return file


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _show(args: argparse.Namespace) -> None:
    from tinyonn_lib.scan import connect, show
    from tinyonn_lib.workbench.phases import runs_root

    if args.url:
        _show_server(connect.with_password(args.url), args)
        return
    folders = sorted(runs_root().glob(f"{args.run}/*/.resume/*/store"))
    if not folders:
        raise BenchError(
            f"run '{args.run}' has no scan at work or unfinished; the tables of a finished one are in "
            f"{runs_root() / args.run / 'scan'}. For a server of your own: tinyonn store show --url redis://..."
        )
    for folder in folders:
        with show.reading(folder) as url:
            _show_server(url, args)


def _show_server(url: str, args: argparse.Namespace) -> None:
    from tinyonn_lib.scan import show
    from tinyonn_lib.scan.store import Store

    known = show.scan_ids(url)
    stores = [Store(url, name, retry_seconds=1.0) for name in known if args.scan in ("", name)]
    if not stores:
        raise BenchError(f"{' '.join(filter(None, ('no scan', args.scan)))} there; known: {', '.join(known) or 'none'}")
    print(show.scan_table(stores).to_string(index=False))
    if len(stores) > 1:
        print("one of them more closely: --scan NAME")
        return
    print("\n" + show.shard_table(stores[0]).to_string(index=False))
    if any(shard.epoch for shard in stores[0].shards()):
        totals = stores[0].totals()
        print("\n" + show.target_table(totals).to_string(index=False))
        print("\n" + show.strongest(totals, args.top).to_string(index=False, float_format="{:.4g}".format))


def _publish(args: argparse.Namespace) -> None:
    from tinyonn_lib.scan import connect, readable, show
    from tinyonn_lib.scan.store import Store

    url = connect.with_password(args.url)
    known = [args.scan] if args.scan else show.scan_ids(url)
    if len(known) != 1:
        raise BenchError(f"say which scan with --scan; known: {', '.join(known) or 'none'}")
    with Store(url, known[0]) as store:
        units = store.publish()
        print(
            f"{units} units, each a hash with {', '.join(readable.FIELDS)}:\n  HGETALL {store.key('param:NAME:row:I')}"
        )
