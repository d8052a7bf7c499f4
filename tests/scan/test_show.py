from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from scan_totals import CUT, LAYOUT, totals

from tinyonn_lib.scan import readable, show
from tinyonn_lib.scan.server import PrivateServer, private_server
from tinyonn_lib.scan.shards import Holder
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.tables import units_table
from tinyonn_lib.workbench.cli import main


def fill(store: Store) -> None:
    store.begin(LAYOUT, {}, CUT)
    for shard, position in ((0, 3), (1, 4)):
        store.claims.take(shard)
        store.commit(shard, totals(shard), position)
    store.claims.release(0)


def test_tables(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    (scan,) = show.scan_table([store]).to_dict("records")
    known = {"scan": store.scan_id, "done": 4, "samples": 10, "shards": 3, "complete": 1, "targets": 4, "units": 15}
    assert known.items() <= scan.items()
    shards = show.shard_table(store)
    assert shards["worker"].tolist() == ["done", str(Holder.me()), "-"]
    assert shards[["first", "last", "done", "epoch"]].to_numpy().tolist() == [[0, 2, 3, 1], [3, 5, 1, 1], [6, 9, 0, 0]]
    assert scan["bytes"] == shards["bytes"].sum() > 2 * 8 * (9 * 5 + 3 * 3 + 2 * 7)
    monkeypatch.setattr(Holder, "dead", lambda self: True)
    assert show.shard_table(store)["worker"][1] == f"{Holder.me()} (gone)"
    kinds = show.target_table(store.totals())
    assert kinds[["kind", "targets", "units"]].to_numpy().tolist() == [
        ["neurons", 1, 5],
        ["linear", 2, 3],
        ["embedding", 1, 7],
    ]
    top = show.strongest(store.totals(), 2)
    assert top["kind"].value_counts().to_dict() == {"neurons": 2, "linear": 2, "embedding": 2}
    units = units_table(store.totals())
    for kind, rows in top.groupby("kind"):
        assert rows["act"].tolist() == units.loc[units["kind"] == kind, "act"].nlargest(2).tolist()


def test_a_server_with_several_scans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with private_server(tmp_path / "s") as server:
        assert main(["store", "show", "--url", server.url]) == 1
        assert "no scan there; known: none" in capsys.readouterr().err
        for name in ("run/b", "run/a"):
            with Store(server.url, name) as store:
                fill(store)
        assert main(["store", "show", "--url", server.url]) == 0
        said = capsys.readouterr().out
        assert said.index("run/a") < said.index("run/b") < said.index("--scan NAME")
        assert main(["store", "show", "--url", server.url, "--scan", "run/b", "--top", "1"]) == 0
        said = capsys.readouterr().out
        assert said.count("embed_tokens") == 1
        assert str(Holder.me()) in said
        assert main(["store", "publish", "--url", server.url]) == 1
        assert "known: run/a, run/b" in capsys.readouterr().err
        assert main(["store", "publish", "--url", server.url, "--scan", "run/a"]) == 0
        assert "15 units" in capsys.readouterr().out
        with Store(server.url, "run/a") as store:
            assert readable.read(store)["avg_act"].tolist() == units_table(store.totals())["act"].tolist()
        assert main(["store", "show", "--url", server.url, "--scan", "c"]) == 1
        assert "no scan c there" in capsys.readouterr().err


def state(folder: Path) -> pd.Series:
    """Names, sizes and times of everything in a folder."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return pd.Series({name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()})


def test_a_run_is_read_without_disturbing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINYONN_HOME", str(tmp_path))
    folder = tmp_path / "runs/mine/scan/.resume/0123/store"

    def shown(server: PrivateServer | None) -> str:
        before = state(folder)
        assert main(["store", "show", "mine"]) == 0
        pd.testing.assert_series_equal(state(folder), before)
        if server is not None:
            with Store(server.url, "mine/0123") as store:
                assert store.connection.redis.info("server")["process_id"] == server.pid
        return capsys.readouterr().out

    with private_server(folder) as server:
        with Store(server.url, "mine/0123") as store:
            fill(store)
        live = shown(server)
    assert "mine/0123" in live
    copy = shown(None)
    assert copy.partition(" kind ")[2] == live.partition(" kind ")[2] != ""
    assert str(Holder.me()) in copy
    with private_server(folder) as server, Store(server.url, "mine/0123") as store:
        assert store.shards()[1].epoch == 1
    assert main(["store", "show", "yours"]) == 1
    assert "run 'yours' has no scan at work or unfinished" in capsys.readouterr().err
