"""Clusters to be a client of: one of real processes for the whole module, on either transport, or in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

import headwater
from headwater.client import Client
from headwater.launch import Launcher
from tests.patience import PATIENCE

Connect = Callable[..., Client]
_names = itertools.count()


@pytest.fixture(scope="module")
def processes() -> Iterator[Launcher]:
    """A coordinator and two servers. Tests share them, so each leaves with no worker behind."""
    with Launcher(2, advertise=False) as job:
        yield job


@pytest.fixture(params=["local", "tcp", "inproc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def name() -> str:
    """A table's name that no other test has."""
    return f"table-{next(_names)}"


@pytest.fixture
def connect(
    transport: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str
) -> Iterator[Connect]:
    """``headwater.connect`` to one cluster per test; clients that are still open are closed."""
    address = f"inproc://client-{name}"
    if transport != "inproc":
        job = request.getfixturevalue("processes")
        for key, value in job.environment().items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("HEADWATER_TRANSPORT", transport)
        address = job.address
    opened: list[Client] = []

    def open_one(**kwargs: object) -> Client:
        client = headwater.connect(address, **{"timeout": PATIENCE, "servers": 2, **kwargs})  # type: ignore[arg-type]
        opened.append(client)
        return client

    yield open_one
    for client in opened:
        client.close()
