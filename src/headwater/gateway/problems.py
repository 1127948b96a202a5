"""Answers that are errors, in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``.

A handler raises ``Refusal``; what the engine and the cluster raise becomes one in ``refusal_of``. No stack trace, no
path and no secret leaves the server: an error that nobody foresaw is a 500 that says so, and its story is in the log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

from headwater.errors import BadInput, DeadlineExceeded, HeadwaterError, InternalError, UsageError
from headwater.gateway.engine_types import (
    EngineClosed,
    GenerationFailed,
    GrammarInvalid,
    GuideMissing,
    PromptInvalid,
    PromptTooLong,
    QueueFull,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

RETRY_AFTER = 1
"""Seconds after which a client that found the queue full may come back: a slot frees within a step or an answer."""

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<where>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"unknown field `(?P<name>.*)`", re.DOTALL)
_NOT_ONE_OF = re.compile(r"Invalid (?:enum )?value (?P<value>.*)", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>.*)`", re.DOTALL)
_LONGEST = 600
"""Characters of a message. What a client sent may be named in it, but not sent back whole."""


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong: whose fault, what is true now, what to do. ``param``: the field of the request, if it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorBody


class PlainError(msgspec.Struct, frozen=True):
    """The body of an error at the paths of the Hugging Face API."""

    error: str


class Refusal(HeadwaterError):
    """An answer that is an error. ``kind`` is OpenAI's ``type``, ``slug`` its ``code``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        slug: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(bounded(message))
        self.status = status
        self.kind = kind
        self.param = bounded(param, 100) if param else None
        self.slug = slug
        self.headers = dict(headers or {})

    def answer(self) -> ErrorAnswer:
        return ErrorAnswer(ErrorBody(str(self), self.kind, self.param, self.slug))

    def response(self, *, plain: bool = False) -> Response:
        """``plain``: in the form of the Hugging Face API."""
        answer = PlainError(str(self)) if plain else self.answer()
        return Response(msgspec.json.encode(answer), self.status, headers=self.headers, media_type="application/json")


def bounded(text: str, most: int = _LONGEST) -> str:
    """The beginning of a text that somebody else may have made long; no half of a surrogate pair."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= most else f"{text[:most]} …"


def not_found(path: str) -> Refusal:
    return Refusal(
        404, f"there is nothing at {bounded(path, 100)}; /openapi.json lists what there is", slug="not_found"
    )


def not_allowed(method: str, path: str, allowed: Sequence[str]) -> Refusal:
    offered = ", ".join(sorted(allowed))
    return Refusal(
        405,
        f"{bounded(method, 20)} {bounded(path, 100)} is not offered; this path takes {offered}",
        slug="method_not_allowed",
        headers={"allow": offered},
    )


def no_such_model(asked: str, served: str) -> Refusal:
    return Refusal(
        404,
        f"the model {bounded(asked, 100)!r} is not served here; this server has {served!r}",
        param="model",
        slug="model_not_found",
    )


def not_offered(what: str, why: str) -> Refusal:
    """The path exists for other models."""
    return Refusal(404, f"{what} is not offered: {why}", slug="not_offered")


def too_late(seconds: float, state: str) -> Refusal:
    """The deadline passed. A client that tried again would wait as long again, so it is told not to."""
    message = f"the server's deadline of {seconds:g} s passed: {state}"
    return Refusal(504, message, kind="timeout_error", slug="deadline_exceeded", headers={"x-should-retry": "false"})


def busy(message: str) -> Refusal:
    return Refusal(429, message, kind="rate_limit_error", slug="queue_full", headers={"retry-after": str(RETRY_AFTER)})


def unavailable(message: str, slug: str) -> Refusal:
    return Refusal(503, message, kind="server_error", slug=slug, headers={"retry-after": str(RETRY_AFTER)})


def unforeseen() -> Refusal:
    return Refusal(500, "the server failed on this request; its log says why", kind="server_error", slug="internal")


def unknown(field: str) -> Refusal:
    """A field that a request does not have, where that is not ignored."""
    return Refusal(
        400, f"{bounded(field, 100)!r} is not a field of this request; leave it out", param=field, slug="unknown_field"
    )


def invalid(error: msgspec.ValidationError) -> Refusal:
    """A body that is JSON but not this request: which field, and what is wrong with it."""
    found = _PLACE.match(str(error))
    what, where = (found["what"], found["where"] or "") if found else (str(error), "")
    if named := _UNKNOWN.search(what):
        return unknown(f"{where}.{named['name']}".removeprefix("."))
    if named := _MISSING.search(what):
        param = f"{where}.{named['name']}".removeprefix(".")
        return Refusal(400, f"{bounded(param, 100)!r} is missing", param=param, slug="missing_field")
    if chosen := _NOT_ONE_OF.match(what):
        said = f"{bounded(where, 100)!r}: {bounded(chosen['value'], 100)} is not supported by this server"
        return Refusal(400, said, param=where, slug="unsupported")
    if what.startswith("Expected `null`"):
        return Refusal(
            400,
            f"{bounded(where, 100)!r} is not supported by this server; leave it out",
            param=where,
            slug="unsupported",
        )
    return Refusal(400, f"{bounded(where, 100) or 'the body'}: {what}", param=where or None, slug="invalid_value")


def refusal_of(error: HeadwaterError) -> Refusal:
    """What the engine or the cluster raised, as an answer."""
    match error:
        case Refusal():
            return error
        case PromptTooLong():
            return Refusal(400, str(error), param="prompt", slug="context_length_exceeded")
        case PromptInvalid():
            return Refusal(400, str(error), param="prompt", slug="invalid_prompt")
        case GrammarInvalid() | GuideMissing():
            return Refusal(400, str(error), slug="invalid_schema")
        case QueueFull():
            return busy(str(error))
        case EngineClosed():
            return unavailable(str(error), "closing")
        case GenerationFailed():
            return Refusal(500, str(error), kind="server_error", slug="generation_failed")
        case BadInput():
            return Refusal(error.status, str(error), param="inputs", slug="invalid_inputs")
        case UsageError():
            return Refusal(400, str(error), slug="invalid_value")
        case InternalError():
            return Refusal(500, str(error), kind="server_error", slug="internal")
        case DeadlineExceeded():
            return unavailable(str(error), "deadline_exceeded")
    return unavailable(str(error), error.code)
