"""The OpenAPI document that is served at /openapi.json, made from the structs that read and write the bodies."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from headwater.gateway.openai_types import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    ModelCard,
    ModelList,
)
from headwater.gateway.problems import ErrorAnswer, PlainError
from headwater.gateway.responses_types import Answered, ResponseRequest, StreamEvent
from headwater.gateway.tasks import TaskRequest
from headwater.gateway.tensors import SAFETENSORS, Prediction, PredictRequest
from headwater.gateway.tokens_types import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

_JSON = "application/json"
_BINARY = {"type": "string", "format": "binary"}
_TEMPLATE = "#/components/schemas/{name}"
_REFERENCE = re.compile(_TEMPLATE.format(name=r"(\w+)"))


class Health(msgspec.Struct):
    """What a load balancer asks. ``status``: ``ok``, ``ready``, ``loading``, ``ending`` or ``failed``."""

    status: str


class Info(msgspec.Struct):
    """``task``: its name in the Hugging Face API, "" if there is none. ``ready``: a version answers."""

    model: str
    task: str
    ready: bool


class Operation(NamedTuple):
    """One path's method. ``takes`` and ``gives``: content types with a struct, or with a schema of their own.

    ``errors``: statuses with the body of an error, a ``failure``; 500 is among every operation's.
    """

    gives: Mapping[str, Any]
    takes: Mapping[str, Any] = {}
    errors: tuple[int, ...] = ()
    open: bool = False
    failure: type[msgspec.Struct] = ErrorAnswer


_POST = (400, 404, 408, 413, 415, 429, 503, 504)


def _events(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Of each server-sent event."""
    chunk = {"$ref": _TEMPLATE.format(name=kind.__name__)}
    data = {"type": "string", "contentMediaType": _JSON, "contentSchema": chunk}
    return {
        "type": "object",
        "description": "Each server-sent event. Its data is JSON, an error's body if it failed; [DONE] is the last.",
        "properties": {"data": data},
        "required": ["data"],
    }


_TASK = Operation({_JSON: {}}, {_JSON: TaskRequest, "application/octet-stream": _BINARY}, _POST, failure=PlainError)
"""An answer is what its task says; bodies are also text/plain, image/…, audio/… and multipart/form-data."""

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/healthz"): Operation({_JSON: Health}, open=True),
    ("GET", "/readyz"): Operation({_JSON: Health}, open=True),
    ("GET", "/metrics"): Operation({"text/plain": {"type": "string"}}),
    ("GET", "/openapi.json"): Operation({_JSON: {"type": "object"}}),
    ("GET", "/"): Operation({"text/html": {"type": "string"}}, open=True, failure=PlainError),
    ("POST", "/"): _TASK,
    ("POST", "/models/{model}"): _TASK,
    ("GET", "/info"): Operation({_JSON: Info}),
    ("GET", "/v1/models"): Operation({_JSON: ModelList}),
    ("GET", "/v1/models/{model}"): Operation({_JSON: ModelCard}, errors=(404,)),
    ("POST", "/v1/completions"): Operation(
        {_JSON: Completion, "text/event-stream": _events(Completion)}, {_JSON: CompletionRequest}, _POST
    ),
    ("POST", "/v1/chat/completions"): Operation(
        {_JSON: ChatCompletion, "text/event-stream": _events(ChatChunk)}, {_JSON: ChatRequest}, _POST
    ),
    ("POST", "/v1/responses"): Operation(
        {_JSON: Answered, "text/event-stream": _events(StreamEvent)}, {_JSON: ResponseRequest}, _POST
    ),
    ("POST", "/v1/embeddings"): Operation({_JSON: Embeddings}, {_JSON: EmbeddingRequest}, _POST),
    ("POST", "/tokenize"): Operation({_JSON: Tokenized}, {_JSON: TokenizeRequest}, _POST),
    ("POST", "/detokenize"): Operation({_JSON: Detokenized}, {_JSON: DetokenizeRequest}, _POST),
    ("GET", "/tokenizer_info"): Operation(
        {_JSON: {"type": "object", "additionalProperties": {"type": ["string", "null"]}}}, errors=(404, 503)
    ),
    ("POST", "/v1/predict"): Operation(
        {_JSON: Prediction, SAFETENSORS: _BINARY}, {_JSON: PredictRequest, SAFETENSORS: _BINARY}, _POST
    ),
}
"""By method and path."""

_SAID = {
    400: "The request is wrong; error.param names the field.",
    401: "No API key was sent, or a wrong one.",
    404: "No such model here, or the model does not do this.",
    408: "The body came too slowly.",
    413: "The body is too long.",
    415: "The body is of another content type.",
    429: "As many requests wait as may; come back after retry-after seconds.",
    500: "The model or the server failed.",
    503: "No version is there yet, or the server is ending.",
    504: "The server's deadline passed; error.message says what was generated.",
}

HEADERS = {
    "x-headwater-version": (
        "The version that answered; several, by comma, if a new one came between choices.",
        "string",
    ),
    "x-headwater-version-number": ("Its number.", "string"),
    "x-headwater-version-step": ("The trainer's clock at its cut.", "string"),
    "x-headwater-ignored": ("Fields of the request that are none, or are not enforced; by comma.", "string"),
    "x-request-id": ("The request's id: the client's own if it sent one in this header.", "string"),
    "x-headwater-stale": ("Seconds since a server of the cluster could be asked; only while none can.", "integer"),
}


def document(handlers: Mapping[tuple[str, str], Any], *, version: str, keys: bool, strict: bool) -> dict[str, Any]:
    """The document.

    Args:
        handlers: by method and path; the first line of a handler's docstring is its summary.
        version: of Headwater.
        keys: whether clients must show a key.
        strict: whether unknown fields are refused.
    """
    headers = {name: {"description": said, "schema": {"type": kind}} for name, (said, kind) in HEADERS.items()}
    structs = [kind for operation in OPERATIONS.values() for kind in _structs(operation)]
    _, schemas = msgspec.json.schema_components(
        [*structs, ErrorAnswer, PlainError, ChatChunk, StreamEvent], ref_template=_TEMPLATE
    )
    if strict:
        _close(schemas, [kind for operation in OPERATIONS.values() for kind in operation.takes.values()])
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation, handlers[method, path], keys)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headwater",
            "version": version,
            "description": "One model over HTTP, with weights that stay current. Every answer names its version.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": headers,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}} if keys else {},
        },
    }


def _structs(operation: Operation) -> list[type[msgspec.Struct]]:
    return [kind for kind in (*operation.gives.values(), *operation.takes.values()) if isinstance(kind, type)]


def _close(schemas: dict[str, Any], kinds: Sequence[Any]) -> None:
    """Say of the structs of requests, and of those in them, that they have no other fields."""
    names = {kind.__name__ for kind in kinds if isinstance(kind, type)}
    found: set[str] = set()
    while names:
        schema = schemas[name := names.pop()]
        found.add(name)
        if "properties" in schema:
            schema["additionalProperties"] = False
        names |= set(_REFERENCE.findall(json.dumps(schema))) - found


def _operation(method: str, path: str, operation: Operation, handler: Any, keys: bool) -> dict[str, Any]:
    errors = [500, *operation.errors, *([401] if keys and not operation.open else [])]
    responses = {str(status): _response(_SAID[status], {_JSON: operation.failure}) for status in sorted(errors)}
    if operation.gives.get(_JSON) is Health:
        responses["503"] = _response("Not yet, or no more.", operation.gives)
    made: dict[str, Any] = {
        "operationId": handler.__name__,
        "summary": (inspect.getdoc(handler) or "").partition("\n")[0],
        "responses": {"200": _response("The answer.", operation.gives)} | responses,
    }
    if operation.takes:
        made["requestBody"] = {"required": True, "content": _content(operation.takes)}
    if "{model}" in path:
        made["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if keys:
        made["security"] = [] if operation.open else [{"key": []}]
    return made


def _response(said: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in HEADERS}
    return {"description": said, "headers": headers, "content": _content(kinds)}


def _content(kinds: Mapping[str, Any]) -> dict[str, Any]:
    return {
        kind: {"schema": {"$ref": _TEMPLATE.format(name=what.__name__)} if isinstance(what, type) else what}
        for kind, what in kinds.items()
    }
