"""The ASGI application: which path is answered by what."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from headwater.gateway.chat import chat_completions
from headwater.gateway.completions import completions
from headwater.gateway.embeddings import embeddings
from headwater.gateway.gate import Gate, plain
from headwater.gateway.gateway import Gateway
from headwater.gateway.limits import Limits
from headwater.gateway.metrics import CONTENT_TYPE, Metrics
from headwater.gateway.openai_types import ModelList
from headwater.gateway.openapi import HEADERS, Info, document
from headwater.gateway.page import page
from headwater.gateway.predict import predict
from headwater.gateway.problems import no_such_model, not_allowed, not_found
from headwater.gateway.responses import responses
from headwater.gateway.tasks import answer
from headwater.gateway.tokens import detokenize, tokenize, tokenizer_info

if TYPE_CHECKING:
    from headwater.gateway.auth import Keys
    from headwater.gateway.served import Served

Handler = Callable[[Request, Gateway], Awaitable[Response]]


def make_app(
    served: Served, limits: Limits | None = None, keys: Keys | None = None, cors: Sequence[str] = ()
) -> Starlette:
    """The application. ``app.state.gateway`` is what it shares; its lifespan's end closes it, and the model.

    Args:
        served: the model, which may be attached later: until then most paths answer 503.
        limits: what a client may ask.
        keys: who may ask; None: everybody.
        cors: origins of pages that may read answers in a browser; ``*``: all.
    """
    limits = limits or Limits()
    metrics = Metrics(served)
    described = document(ROUTES, version=metadata.version("headwater"), keys=keys is not None, strict=limits.strict)
    gateway = Gateway(served, limits, metrics, described)
    app = Starlette(
        routes=[_route(gateway, *named, handler) for named, handler in ROUTES.items()],
        middleware=[*_cors(cors), Middleware(Gate, served=served, metrics=metrics, keys=keys)],
        exception_handlers={HTTPException: _unrouted},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Before the gate: a browser asks without a key whether it may ask with one, and must be able to read errors."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[*HEADERS, "retry-after"],
        )
    ]


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    app.state.gateway.close()


def _route(gateway: Gateway, method: str, path: str, handler: Handler) -> Route:
    async def endpoint(request: Request) -> Response:
        return await handler(request, gateway)

    return Route(path.replace("{model}", "{model:path}"), endpoint, methods=[method])


def _unrouted(request: Request, error: Exception) -> Response:
    """What the router refuses: no such path, another method."""
    path = request.url.path
    if getattr(error, "status_code", 404) == 405:
        here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        refusal = not_allowed(request.method, path, sorted({each for route in here for each in route.methods}))
    else:
        refusal = not_found(path)
    return refusal.response(plain=plain(path))


async def healthz(request: Request, gateway: Gateway) -> Response:
    """The process lives and can answer: else a restart is the remedy."""
    del request
    if gateway.served.failed():
        return _json({"status": "failed"}, 503)
    return _json({"status": "ok"})


async def readyz(request: Request, gateway: Gateway) -> Response:
    """The first version is there and the server is not ending."""
    del request
    if gateway.served.failed():
        return _json({"status": "failed"}, 503)
    if gateway.served.closing or gateway.served.standing() is None:
        return _json({"status": "ending" if gateway.served.closing else "loading"}, 503)
    return _json({"status": "ready"})


async def models(request: Request, gateway: Gateway) -> Response:
    """The one model."""
    del request
    return _json(ModelList([gateway.served.card()]))


async def model(request: Request, gateway: Gateway) -> Response:
    """The one model, by its name."""
    name: str = request.path_params["model"]
    if name != gateway.served.name:
        raise no_such_model(name, gateway.served.name)
    return _json(gateway.served.card())


async def info(request: Request, gateway: Gateway) -> Response:
    """What is served, and the task that it does."""
    del request
    served, card = gateway.served, gateway.served.card()
    return _json(Info(served.name, served.task(), ready=card.headwater_version is not None))


async def answer_by_name(request: Request, gateway: Gateway) -> Response:
    """As POST /, by the model's name."""
    return await answer(request, gateway)


async def metrics(request: Request, gateway: Gateway) -> Response:
    """Prometheus' text format."""
    del request
    return Response(gateway.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def openapi(request: Request, gateway: Gateway) -> Response:
    """This document."""
    del request
    return _json(gateway.document)


ROUTES: dict[tuple[str, str], Handler] = {
    ("GET", "/healthz"): healthz,
    ("GET", "/readyz"): readyz,
    ("GET", "/metrics"): metrics,
    ("GET", "/openapi.json"): openapi,
    ("GET", "/"): page,
    ("POST", "/"): answer,
    ("POST", "/models/{model}"): answer_by_name,
    ("GET", "/info"): info,
    ("GET", "/v1/models"): models,
    ("GET", "/v1/models/{model}"): model,
    ("POST", "/v1/completions"): completions,
    ("POST", "/v1/chat/completions"): chat_completions,
    ("POST", "/v1/responses"): responses,
    ("POST", "/v1/embeddings"): embeddings,
    ("POST", "/tokenize"): tokenize,
    ("POST", "/detokenize"): detokenize,
    ("GET", "/tokenizer_info"): tokenizer_info,
    ("POST", "/v1/predict"): predict,
}
"""What answers, by method and path; ``openapi.OPERATIONS`` describes the same."""
