"""What tests of several parts share."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.mistakes")  # what it asserts is shown as in a test


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of something that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]
