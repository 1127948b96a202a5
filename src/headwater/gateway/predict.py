"""POST /v1/predict: one forward of any module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

from headwater.gateway import tensors
from headwater.gateway.gate import record_of
from headwater.gateway.limits import decode_json, media_type, read_body
from headwater.gateway.problems import Refusal, bounded
from headwater.gateway.served import fingerprint, version_card

if TYPE_CHECKING:
    from starlette.requests import Request
    from torch import Tensor

    from headwater.gateway.gateway import Gateway
    from headwater.gateway.live import Live, LiveStatistics
    from headwater.gateway.served import Predictor
    from headwater.types import VersionInfo

_DECODER = msgspec.json.Decoder(tensors.PredictRequest)
_JSON = "application/json"

_ITS_FAULT = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AssertionError, NotImplementedError)
"""What a forward raises for inputs that it was not made for."""


class ModulePredictor:
    """A ``served.Predictor``: a live module's forward."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def predict(
        self, arguments: Sequence[Tensor], named: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], VersionInfo]:
        """See ``tensors.flatten`` for the outputs.

        Raises ``Refusal`` (400) with the module's own message if its forward does not take these inputs.
        """
        with self._live.hold() as (module, version):
            try:
                outputs = module(*arguments, **named)
            except _ITS_FAULT as error:
                said = bounded(f"{type(error).__name__}: {error}", 500)
                message = f"the module does not take these inputs; nothing was answered. It says: {said}"
                raise Refusal(400, message, param="inputs", slug="invalid_inputs") from error
            return tensors.flatten(outputs), version

    def statistics(self) -> LiveStatistics:
        return self._live.statistics()

    def close(self) -> None:
        self._live.close()


async def predict(request: Request, gateway: Gateway) -> Response:
    """Run the module on tensors."""
    kind = media_type(request)
    if kind not in (_JSON, tensors.SAFETENSORS):
        said = f"the content type is {bounded(kind, 100) or 'missing'}; send {_JSON} or {tensors.SAFETENSORS}"
        raise Refusal(415, said, slug="unsupported_media_type")
    as_safetensors = _wants_safetensors(request.headers.get("accept", ""), kind)
    predictor = gateway.served.predictor()
    body = await read_body(request, gateway.limits)
    read = functools.partial(tensors.from_safetensors, body)
    if kind == _JSON:
        asked = decode_json(body, _DECODER)
        if asked.model is not None:
            gateway.served.must_be(asked.model)
        read = functools.partial(tensors.from_json, asked.inputs)
    call = functools.partial(_answer, predictor, read, gateway.served.name, as_safetensors)
    answer, version = await gateway.forward(request, call)
    record_of(request).answered_by(version)
    return Response(answer, headers={"content-type": tensors.SAFETENSORS if as_safetensors else _JSON})


def _wants_safetensors(accepted: str, kind: str) -> bool:
    """The answer is of the request's kind, unless another is accepted and that one is not."""
    kinds = {part.partition(";")[0].strip().lower() for part in accepted.split(",")}
    if tensors.SAFETENSORS in kinds or _JSON in kinds:
        return tensors.SAFETENSORS in kinds and (_JSON not in kinds or kind == tensors.SAFETENSORS)
    return kind == tensors.SAFETENSORS


def _answer(
    predictor: Predictor,
    read: Callable[[], tuple[list[Tensor], dict[str, Tensor]]],
    name: str,
    as_safetensors: bool,
) -> tuple[bytes, VersionInfo]:
    """The body of an answer, and the version that it is of; called in a thread."""
    arguments, named = read()
    outputs, version = predictor.predict(arguments, named)
    if as_safetensors:
        return tensors.to_safetensors(outputs, version), version
    found = tensors.Prediction(tensors.to_json(outputs), name, fingerprint([version]), version_card(version))
    return msgspec.json.encode(found), version
