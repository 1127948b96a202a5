"""GET /: a page to try the model in a browser. It is one file, and asks the server as any client does."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.requests import Request

    from headwater.gateway.gateway import Gateway

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self' blob:; "
        "img-src blob: data:; media-src blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Whatever came into the page, it could ask this server alone."""


async def page(request: Request, gateway: Gateway) -> Response:
    """A page to try the model in a browser."""
    del request, gateway
    text = resources.files("headwater.gateway").joinpath("page.html").read_bytes()
    return Response(text, media_type="text/html", headers=_HEADERS)
