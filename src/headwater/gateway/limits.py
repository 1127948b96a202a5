"""What one client may ask of the server, and how a body is read within it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from headwater.gateway.gate import record_of
from headwater.gateway.problems import Refusal, invalid, unknown

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")

CLOSE = {"connection": "close"}
"""A header: what is left of the body is not read."""

_DRAINED = 8 << 20
"""Bytes of a body that is too long which are thrown away before the answer, so that a client that sends before it
reads sees the answer and not a broken connection."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one server. Bytes and seconds.

    ``body``: of a request. ``deadline``: from a request's head to its answer's end. ``body_timeout``: for a whole body
    to arrive; ``head_timeout``: for a whole head, and for a client that has stopped reading. ``messages``: of a chat.
    ``choices``: ``n`` times the number of prompts. ``max_tokens``: of one choice. ``inputs``: of one request for
    embeddings. ``threads``: forwards of /v1/predict and /v1/embeddings at once, ``queue``: how many more may wait.
    ``connections``: open ones. ``grace``: for what is running when the server ends. ``strict``: fields that a request
    does not have are refused, and not ignored and named.
    """

    body: int = 1 << 20
    deadline: float = 60.0
    body_timeout: float = 10.0
    head_timeout: float = 10.0
    messages: int = 512
    choices: int = 64
    max_tokens: int = 4096
    inputs: int = 512
    threads: int = 1
    queue: int = 64
    connections: int = 512
    grace: float = 10.0
    strict: bool = False


def media_type(request: Request) -> str:
    """``application/json`` of ``Application/JSON; charset=utf-8``."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body, if it is within the limits.

    Raises:
        Refusal: 413, it is too long; 408, it came too slowly.
    """
    declared = request.headers.get("content-length", "")
    over = declared.isdecimal() and int(declared[:20]) > limits.body
    if over and "expect" in request.headers:
        raise _too_long(limits)  # the client waits for leave to send it
    parts: list[bytes] = []
    received = 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for part in request.stream():
                received += len(part)
                over = over or received > limits.body
                if over and received > _DRAINED:
                    break
                if not over:
                    parts.append(part)
    except TimeoutError:
        if not over:
            raise Refusal(
                408,
                f"the body did not arrive within {limits.body_timeout:g} s ({received} bytes did); nothing was done",
                kind="timeout_error",
                slug="body_timeout",
                headers=CLOSE,
            ) from None
    if over:
        raise _too_long(limits)
    return b"".join(parts)


def _too_long(limits: Limits) -> Refusal:
    return Refusal(
        413,
        f"the body is longer than this server takes ({limits.body} bytes); nothing was done",
        slug="body_too_long",
        headers=CLOSE,
    )


async def read_json(request: Request, decoder: msgspec.json.Decoder[T], limits: Limits) -> T:
    """The body as what ``decoder`` reads. Fields that it does not know are noted as ignored.

    Raises:
        Refusal: 415, it is said to be something else; 400, it is no JSON, not this request, or has unknown fields on a
            strict server; as ``read_body``.
    """
    kind = media_type(request)
    if kind != "application/json":
        raise Refusal(
            415,
            f"the content type is {kind or 'missing'}; send JSON with content-type: application/json",
            slug="unsupported_media_type",
            headers=CLOSE,
        )
    body = await read_body(request, limits)
    asked = decode_json(body, decoder)
    ignored = list(unknown_fields(msgspec.json.decode(body), asked))
    if ignored and limits.strict:
        raise unknown(ignored[0])
    record_of(request).ignored += ignored
    return asked


def unknown_fields(sent: Any, read: Any, place: str = "") -> Iterator[str]:
    """The fields of what was sent that the structs in ``read`` do not have, as ``messages[0].colour``."""
    if isinstance(read, msgspec.Struct) and isinstance(sent, dict):
        known = {*read.__struct_fields__, read.__struct_config__.tag_field}
        for name, value in sent.items():
            if name not in known:
                yield f"{place}{name}"
            else:
                yield from unknown_fields(value, getattr(read, name, None), f"{place}{name}.")
    elif isinstance(read, list) and isinstance(sent, list):
        for number, (value, item) in enumerate(zip(sent, read, strict=True)):
            yield from unknown_fields(value, item, f"{place.removesuffix('.')}[{number}].")


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """See ``read_json``."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", slug="invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body is not read: its JSON is nested too deeply", slug="invalid_json") from None
