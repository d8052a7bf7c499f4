from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

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
