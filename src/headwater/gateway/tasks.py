"""POST / and /models/NAME: a recipe's model in the form of the Hugging Face inference API of its task.

What a client sends, raw, as JSON with base64 or as multipart, becomes the bytes of each thing that is asked about; the
recipe reads them and answers (``Task``). Errors have the form of that API, ``{"error": "…"}``.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from headwater.gateway.gate import record_of
from headwater.gateway.limits import CLOSE, decode_json, media_type, read_body, unknown_fields
from headwater.gateway.problems import Refusal, bounded, unknown
from headwater.gateway.served import Asked, Thing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path

    from starlette.requests import Request
    from torch import nn

    from headwater.gateway.gateway import Gateway
    from headwater.gateway.limits import Limits
    from headwater.gateway.live import Live, LiveStatistics
    from headwater.gateway.served import Answerer
    from headwater.types import VersionInfo

_JSON, _TEXT, _BYTES, _FORM = "application/json", "text/plain", "application/octet-stream", "multipart/form-data"
_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[^,;]*)*;base64,", re.ASCII)
_PARTS = 8
"""Parts of a form at most; one or two are looked at."""

_TEXTS = {"text-classification", "token-classification", "translation", "summarization", "text-generation"}
_IMAGES = {"object-detection", "depth-estimation", "mask-generation", "zero-shot-object-detection"}
_SOUNDS = {"automatic-speech-recognition", "voice-activity-detection"}


class Task(Protocol):
    """What a recipe gives: ``headwater_recipes.common.serving.Served``, where each is described."""

    task: str

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]: ...
    def inputs(self, body: bytes, content_type: str) -> Any: ...
    def answer(self, model: nn.Module, inputs: Any, parameters: Mapping[str, Any]) -> Any: ...


class TaskRequest(msgspec.Struct, kw_only=True):
    """What is asked about, and how. ``inputs``: a text, a file in base64, an object; texts may come as a list.

    ``options`` are taken and not looked at.
    """

    inputs: msgspec.Raw
    parameters: dict[str, Any] | None = None
    options: dict[str, Any] | None = None


_DECODER = msgspec.json.Decoder(TaskRequest)
_PARAMETERS = msgspec.json.Decoder(dict[str, Any])


def carrier(task: str) -> str:
    """In what form a task's inputs come: ``text``, ``image``, ``audio`` or, of any other task, ``json``."""
    if task in _TEXTS:
        return "text"
    if task in _IMAGES or task.startswith("image-"):
        return "image"
    return "audio" if task in _SOUNDS or task.startswith("audio-") else "json"


class TaskModel:
    """A ``served.Answerer``: a live module and the recipe that reads and answers for it."""

    def __init__(self, live: Live, recipe: Task) -> None:
        self._live = live
        self._recipe = recipe
        self.task = recipe.task

    def answer(self, things: Sequence[Thing], parameters: Mapping[str, Any]) -> tuple[list[Any], VersionInfo]:
        """An answer to each, all of one version. Raises ``BadInput``."""
        read = [self._recipe.inputs(thing.body, thing.kind) for thing in things]
        with self._live.hold() as (module, version):
            return [self._recipe.answer(module, inputs, parameters) for inputs in read], version

    def statistics(self) -> LiveStatistics:
        return self._live.statistics()

    def close(self) -> None:
        self._live.close()


async def answer(request: Request, gateway: Gateway) -> Response:
    """Answer in the form of the model's task; a body may also be an image, a sound, a text or a form."""
    name = request.path_params.get("model")
    if name is not None:
        gateway.served.must_be(name)
    model = gateway.served.answerer()
    asked = await _read(request, model.task, gateway.limits)
    call = functools.partial(_answer, model, asked)
    body, version = await gateway.forward(request, call)
    record_of(request).answered_by(version)
    return Response(body, media_type=_JSON)


def _answer(model: Answerer, asked: Asked) -> tuple[bytes, VersionInfo]:
    """Called in a thread. The classes of one text come in a list of lists, as Hugging Face gives them, and the one
    translation in a list.
    """
    found, version = model.answer(asked.things, asked.parameters)
    listed = not asked.single or model.task in ("text-classification", "translation")
    return msgspec.json.encode(found if listed else found[0]), version


async def _read(request: Request, task: str, limits: Limits) -> Asked:
    """Raises ``Refusal``: 400, 413, 415."""
    kind, form = media_type(request), carrier(task)
    raw = _raw_kind(kind, form)
    if kind not in (_JSON, _FORM) and not raw:
        said = f"the content type is {bounded(kind, 100) or 'missing'}; {_takes(task)}"
        raise Refusal(415, said, slug="unsupported_media_type", headers=CLOSE)
    body = await read_body(request, limits)
    if not body:
        raise Refusal(400, f"the body is empty; {_takes(task)}", slug="empty_body")
    if raw:
        return Asked([Thing(body, raw)], {}, single=True)
    if kind == _FORM:
        return await _of_form(request.headers, body, task, limits)
    return _of_json(request, body, task, limits)


def _raw_kind(kind: str, form: str) -> str:
    """What the body is, if it is the thing itself; "" if it is not, or of a kind that this task does not take."""
    if form == "text":
        return kind if kind == _TEXT else ""
    if form in ("image", "audio") and (kind in ("", _BYTES) or kind.startswith(f"{form}/")):
        return kind or _BYTES
    return ""


def _takes(task: str) -> str:
    form = carrier(task)
    plain = {"text": "text/plain", "image": "an image (image/png, …)", "audio": "a sound (audio/wav, …)"}
    what = "text" if form == "text" else "base64" if form in plain else "…"
    more = f"{plain[form]}, " if form in plain else ""
    return f'for {task}, send {more}{_JSON} {{"inputs": "{what}"}} or {_FORM}, and say which in content-type'


def _of_json(request: Request, body: bytes, task: str, limits: Limits) -> Asked:
    asked = decode_json(body, _DECODER)
    ignored = list(unknown_fields(msgspec.json.decode(body), asked))
    if ignored and limits.strict:
        raise unknown(ignored[0])
    record_of(request).ignored += ignored
    form, inputs, given = carrier(task), msgspec.json.decode(asked.inputs), asked.parameters or {}
    if form == "json":
        return Asked([Thing(bytes(asked.inputs), _JSON)], given, single=True)
    single = not isinstance(inputs, list)
    things = [inputs] if single else inputs
    if not 0 < len(things) <= limits.inputs:
        said = f"'inputs' holds {len(things)} things; this server takes 1 to {limits.inputs} in one request"
        raise Refusal(400, said, param="inputs", slug="too_many_inputs")
    return Asked([_thing(each, form, task) for each in things], given, single=single)


def _thing(value: Any, form: str, task: str) -> Thing:
    """A text as it is, a file out of its base64. Raises ``Refusal``."""
    if form == "text":
        return Thing(value.encode(), _TEXT) if isinstance(value, str) else Thing(msgspec.json.encode(value), _JSON)
    if not isinstance(value, str):
        raise Refusal(400, f"'inputs' must be a file in base64; {_takes(task)}", param="inputs", slug="invalid_value")
    found = _DATA_URL.match(value)
    try:
        return Thing(base64.b64decode(value[found.end() :] if found else value, validate=True), _kind(found, form))
    except (binascii.Error, ValueError):
        said = "an address is not fetched" if value.startswith(("http:", "https:")) else "it cannot be decoded"
        raise Refusal(
            400, f"'inputs' is no base64: {said}; {_takes(task)}", param="inputs", slug="invalid_base64"
        ) from None


def _kind(found: re.Match[str] | None, form: str) -> str:
    said = (found["kind"] or "").lower() if found else ""
    return said if said.startswith(f"{form}/") else _BYTES


async def _of_form(headers: Headers, body: bytes, task: str, limits: Limits) -> Asked:
    """The part ``inputs``, or ``file``, or the first file; JSON in the part ``parameters``. Raises ``Refusal``."""
    parser = MultiPartParser(
        headers, _once(body), max_files=_PARTS, max_fields=_PARTS, max_part_size=max(limits.body, 1)
    )
    try:
        parts = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not {_FORM}: {error}", slug="invalid_form") from None
    try:
        items = parts.multi_items()
        first = next((part for _, part in items if isinstance(part, UploadFile)), None)
        chosen = parts.get("inputs", parts.get("file", first))
        if chosen is None:
            raise Refusal(400, "the form has no part 'inputs' and no file", param="inputs", slug="missing_field")
        given = parts.get("parameters", "{}")
        text = await given.read() if isinstance(given, UploadFile) else given.encode()
        parameters: dict[str, Any] = decode_json(text, _PARAMETERS)
        return Asked([await _part(chosen, carrier(task))], parameters, single=True)
    finally:
        await parts.close()


async def _part(part: UploadFile | str, form: str) -> Thing:
    body = part.encode() if isinstance(part, str) else await part.read()
    kind = (part.content_type or "").partition(";")[0].strip().lower() if isinstance(part, UploadFile) else ""
    if form in ("text", "json"):
        return Thing(body, _TEXT if form == "text" else _JSON)
    if kind not in ("", _BYTES) and not kind.startswith(f"{form}/"):
        said = f"the part is {bounded(kind, 100)}; send one of {form}/…"
        raise Refusal(415, said, param="inputs", slug="unsupported_media_type")
    return Thing(body, kind or _BYTES)


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
