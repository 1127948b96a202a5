"""The handshake's arithmetic: proofs are bound to side, nonces and token."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.errors import AuthenticationFailed, ProtocolError
from headwater.wire import auth

TOKEN = b"the token"


def test_the_right_proof_is_accepted() -> None:
    a, b = auth.nonce(), auth.nonce()
    for side in ("client", "server"):
        auth.check(TOKEN, side, a, b, auth.proof(TOKEN, side, a, b))


@pytest.mark.parametrize(
    "made",
    [
        lambda a, b: auth.proof(b"another token", "client", a, b),
        lambda a, b: auth.proof(b"", "client", a, b),
        lambda a, b: auth.proof(TOKEN, "server", a, b),  # reflected
        lambda a, b: auth.proof(TOKEN, "client", b, a),  # nonces exchanged
        lambda a, b: auth.proof(TOKEN, "client", a, auth.nonce()),  # of an earlier conversation
        lambda a, b: auth.proof(TOKEN, "client", a, b)[:-1],
        lambda a, b: b"",
    ],
    ids=["other token", "no token", "reflected", "exchanged", "replayed", "short", "empty"],
)
def test_any_other_proof_is_not(made: object) -> None:
    a, b = auth.nonce(), auth.nonce()
    with pytest.raises(AuthenticationFailed, match="the client's token is wrong"):
        auth.check(TOKEN, "client", a, b, made(a, b))  # type: ignore[operator]


def test_nonces_are_new_and_of_one_length() -> None:
    assert len({auth.nonce() for _ in range(100)}) == 100
    auth.check_nonce(auth.nonce())
    for wrong in (b"", b"x" * 31, b"x" * 33):
        with pytest.raises(ProtocolError, match="instead of 32"):
            auth.check_nonce(wrong)


def test_the_token_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert auth.token_from_environment() is None
    path = tmp_path / "token"
    path.write_text("from the file\n", encoding="utf-8")
    monkeypatch.setenv("HEADWATER_TOKEN_FILE", str(path))
    assert auth.token_from_environment() == b"from the file"
    monkeypatch.setenv("HEADWATER_TOKEN", "from the environment")
    assert auth.token_from_environment() == b"from the environment"


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(AuthenticationFailed, match="none cannot be read: No such file"):
        auth.token_from_environment()
