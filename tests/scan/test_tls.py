from __future__ import annotations

import contextlib
import shutil
import socket as sockets
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scan_totals import CUT, LAYOUT, bits, totals

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.server import private_server
from tinyonn_lib.scan.store import Store


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ca.pem`, and `server.pem`/`server.key` for localhost signed by it."""
    folder = tmp_path_factory.mktemp("tls")
    if not shutil.which("openssl"):
        pytest.skip("no openssl command to make certificates with")
    (folder / "san").write_text("subjectAltName=DNS:localhost")
    new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for command in (
        f"{new} -x509 -days 2 -keyout ca.key -out ca.pem -subj /CN=authority",
        f"{new} -keyout server.key -out server.csr -subj /CN=localhost",
        "openssl x509 -req -days 2 -in server.csr -out server.pem -CA ca.pem -CAkey ca.key -set_serial 1 -extfile san",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


@contextlib.contextmanager
def tls_server(folder: Path, certificates: Path, *, client_needs_one: bool = False) -> Iterator[int]:
    """The port of TLS in front of a real server: the packaged binary is built without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    if client_needs_one:
        context.load_verify_locations(certificates / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED

    def pump(source: sockets.socket, sink: sockets.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(sockets.SHUT_RDWR)

    def serve(listener: sockets.socket, inside: Path) -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                client, inner = context.wrap_socket(raw, server_side=True), sockets.socket(sockets.AF_UNIX)
                inner.connect(str(inside))
                for pair in ((client, inner), (inner, client)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with private_server(folder) as server, sockets.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener, server.socket), daemon=True).start()
        yield listener.getsockname()[1]


def test_tls_checks_the_certificate(tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tls_server(tmp_path / "s", certificates) as port:
        url = f"rediss://localhost:{port}/0"
        refused = r"certificate of rediss://localhost:\d+/0 is not accepted.*TINYONN_REDIS_CA"
        with pytest.raises(BenchError, match=refused):
            Store(url, "tls").begin(LAYOUT, {}, CUT)
        monkeypatch.setenv("TINYONN_REDIS_CA", str(certificates / "ca.pem"))
        with Store(url, "tls") as store:
            store.begin(LAYOUT, {}, CUT)
            store.claims.take(0)
            store.commit(0, totals(1), 3)
            assert bits(store.totals()) == bits(totals(1))
        with pytest.raises(BenchError, match="not accepted .*use the host name"):
            Store(f"rediss://127.0.0.1:{port}/0", "tls").begin(LAYOUT, {}, CUT)
        monkeypatch.setenv("TINYONN_REDIS_CA", str(certificates / "none.pem"))
        with pytest.raises(BenchError, match=r"TINYONN_REDIS_CA names .*none\.pem"):
            Store(url, "tls")


def test_a_client_certificate_goes_into_the_url(
    tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYONN_REDIS_CA", str(certificates / "ca.pem"))
    own = f"?ssl_certfile={certificates}/server.pem&ssl_keyfile={certificates}/server.key"
    with tls_server(tmp_path / "s", certificates, client_needs_one=True) as port:
        with pytest.raises(BenchError, match="no Redis server answers at"):
            Store(f"rediss://localhost:{port}/0", "tls").begin(LAYOUT, {}, CUT)
        with Store(f"rediss://localhost:{port}/0{own}", "tls") as store:
            store.begin(LAYOUT, {}, CUT)
            assert len(store.shards()) == CUT.shards
            assert str(certificates) not in store.address
