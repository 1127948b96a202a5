"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

from headwater.gateway.gate import record_of
from headwater.gateway.limits import read_json
from headwater.gateway.openai_types import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from headwater.gateway.problems import Refusal
from headwater.gateway.requests import read_prompts
from headwater.gateway.served import fingerprint

if TYPE_CHECKING:
    from starlette.requests import Request
    from torch import Tensor

    from headwater.gateway.gateway import Gateway
    from headwater.gateway.served import Embedder

_DECODER = msgspec.json.Decoder(EmbeddingRequest)


async def embeddings(request: Request, gateway: Gateway) -> Response:
    """A vector for each text, all of one version."""
    asked = await read_json(request, _DECODER, gateway.limits)
    gateway.served.must_be(asked.model)
    embedder = gateway.served.embedder()
    if asked.dimensions is not None and asked.dimensions != embedder.width:
        said = f"this model's vectors have {embedder.width} dimensions, and they cannot be shortened; leave it out"
        raise Refusal(400, said, param="dimensions", slug="unsupported")
    texts = await read_prompts(asked.input, "input", embedder.encode, gateway)
    _check(texts, embedder, gateway.limits.inputs)
    vectors, version = await gateway.forward(request, lambda: embedder.embed(texts))
    record = record_of(request)
    record.answered_by(version)
    record.prompt_tokens = sum(map(len, texts))
    data = [Embedding(number, found) for number, found in enumerate(_written(vectors, asked.encoding_format))]
    usage = EmbeddingUsage(record.prompt_tokens, record.prompt_tokens)
    body = msgspec.json.encode(Embeddings(data, gateway.served.name, fingerprint([version]), usage))
    return Response(body, media_type="application/json")


def _check(texts: list[tuple[int, ...]], embedder: Embedder, most: int) -> None:
    """Raises ``Refusal``: too many texts, an empty one, one that is too long."""
    if len(texts) > most:
        said = f"{len(texts)} texts; this server takes {most} in one request"
        raise Refusal(400, said, param="input", slug="too_many_inputs")
    for number, text in enumerate(texts):
        if not text:
            raise Refusal(400, f"text {number} is empty", param="input", slug="invalid_value")
        if len(text) > embedder.longest:
            said = f"text {number} has {len(text)} tokens; the model reads {embedder.longest}: shorten it"
            raise Refusal(400, said, param="input", slug="context_length_exceeded")


def _written(vectors: Tensor, encoding: str | None) -> list[list[float] | str]:
    """(texts, width) float32, as lists of floats or as base64 of little-endian float32."""
    if encoding == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors.numpy()]
    return list(vectors.tolist())
