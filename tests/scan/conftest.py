from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mscan_files import make

from tinyonn_lib.scan.mscan import File
from tinyonn_lib.scan.server import PrivateServer, private_server
from tinyonn_lib.scan.store import Store


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    """A real server for tests that neither kill nor configure it."""
    with private_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def store(server: PrivateServer, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store on that server, with a scan id of its own."""
    with Store(server.socket, re.sub(r"\W+", "-", request.node.nodeid)) as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scan.mscan"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in five segments, finished."""
    return make(tmp_path_factory.mktemp("whole") / "whole.mscan", range(10), flush=(1, 3, 5, 7))


@pytest.fixture(scope="module")
def ends(whole: Path) -> list[int]:
    """Byte after the header, after each segment, and the size."""
    file = File(whole)
    return [segment.offset for segment in file.segments] + [file.end, whole.stat().st_size]
