"""The handshake: both sides prove that they know the token, neither sends it (HMAC-SHA-256 challenge)."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from headwater.errors import AuthenticationFailed, ProtocolError

NONCE = 32


def token_from_environment() -> bytes | None:
    """``HEADWATER_TOKEN``, or the contents of the file that ``HEADWATER_TOKEN_FILE`` names; ``None`` without either."""
    token = os.environ.get("HEADWATER_TOKEN")
    path = os.environ.get("HEADWATER_TOKEN_FILE")
    if not token and path:
        try:
            token = Path(path).read_text(encoding="utf8").strip()
        except OSError as error:
            raise AuthenticationFailed(f"HEADWATER_TOKEN_FILE={path} cannot be read: {error.strerror}") from None
    return token.encode() if token else None


def nonce() -> bytes:
    return secrets.token_bytes(NONCE)


def check_nonce(given: bytes) -> None:
    """Raises ``ProtocolError``: with another length, two different pairs of nonces could look the same."""
    if len(given) != NONCE:
        raise ProtocolError(f"a nonce of {len(given)} bytes instead of {NONCE}")


def proof(token: bytes, side: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """HMAC over side and both nonces: a proof cannot be reflected or replayed."""
    return hmac.digest(token, b"headwater-1|" + side.encode() + b"|" + client_nonce + server_nonce, hashlib.sha256)


def check(token: bytes, side: str, client_nonce: bytes, server_nonce: bytes, given: bytes) -> None:
    """Raises ``AuthenticationFailed``; takes the same time for any wrong proof."""
    if not hmac.compare_digest(proof(token, side, client_nonce, server_nonce), given):
        raise AuthenticationFailed(
            f"the {side}'s token is wrong; nothing was sent. "
            "HEADWATER_TOKEN (or HEADWATER_TOKEN_FILE) must be the token that the cluster was started with"
        )
