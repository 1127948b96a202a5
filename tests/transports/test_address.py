"""Addresses are read strictly, and what only this host reaches is known."""

from __future__ import annotations

import pytest

from headwater.errors import UsageError
from headwater.transports.address import Address, host_identity, parse


@pytest.mark.parametrize(
    ("text", "found", "loopback"),
    [
        ("tcp://127.0.0.1:80", Address("tcp", "127.0.0.1", 80), True),
        ("tcp://[::1]:80", Address("tcp", "::1", 80), True),
        ("tcp://localhost:0", Address("tcp", "localhost", 0), True),
        ("tcp://127.9.9.9:65535", Address("tcp", "127.9.9.9", 65535), True),
        ("tcp://0.0.0.0:80", Address("tcp", "0.0.0.0", 80), False),
        ("tcp://[::]:80", Address("tcp", "::", 80), False),
        ("tcp://10.0.0.7:80", Address("tcp", "10.0.0.7", 80), False),
        ("tcp://node7.example:80", Address("tcp", "node7.example", 80), False),
        ("tcp://localhost.example:80", Address("tcp", "localhost.example", 80), False),
        ("inproc://", Address("inproc", ""), True),
        ("inproc://a:b", Address("inproc", "a:b"), True),
        ("local://x", Address("local", "x"), True),
    ],
)
def test_an_address_is_read_and_written(text: str, found: Address, loopback: bool) -> None:
    assert parse(text) == found
    assert str(found) == text
    assert found.loopback is loopback


@pytest.mark.parametrize(
    "text",
    ["", "tcp://", "tcp://host", "host:80", "tcp://host:", "tcp://host:65536", "tcp://host:-1", "http://host:80"],
)
def test_anything_else_is_refused_with_the_forms_that_are_allowed(text: str) -> None:
    with pytest.raises(UsageError, match="tcp://HOST:PORT and inproc://NAME"):
        parse(text)


def test_the_host_is_the_same_every_time() -> None:
    assert host_identity() == host_identity()
