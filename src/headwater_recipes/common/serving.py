"""How a run's model is asked over HTTP: what ``headwater serve`` needs of a recipe, and what most of them need for it.

A recipe names a class by ``Recipe.served``. It says which task of the Hugging Face inference API it does, reads what a
client sends, and answers. HTTP, content types, base64, multipart, versions and the page in the browser are the
server's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from headwater.errors import BadInput

__all__ = ["BadInput", "Served", "check_names", "classes", "read_json", "read_text"]

TEXT = "text/plain"
JSON = "application/json"


class Served(Protocol):
    """A model of one task. One object answers all requests, from several threads.

    Attributes:
        task: its name in the Hugging Face API ("image-classification"), which says in what form inputs come and what an
            answer looks like: https://huggingface.co/docs/inference-providers/tasks.
    """

    task: str

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        """The run folder's model, in evaluation mode, and what answers with it. Raises ``DataError``: it is not whole.

        The server puts other versions' values into this module, by the names of its parameters and buffers: they must
        be those of the model that the recipe's ``Task.build`` made.
        """
        ...

    def inputs(self, body: bytes, content_type: str) -> Any:
        """What ``answer`` takes, from one thing that a client sent; not a batch. Needs no model, so no version is held.

        Args:
            body: a file's bytes for tasks of images and sounds; UTF-8 for those of a text; else the JSON of what stood
                under ``inputs``, an object or a list. However the client wrapped it, it is unwrapped here.
            content_type: ``image/png``, ``audio/wav``, ``text/plain``, ``application/json``, lower case and without
                parameters; ``application/octet-stream`` if the client did not say which image or sound it is. It is
                what the client *says*: look at the bytes.

        Raises ``BadInput`` with a message for the client: 400, it cannot be read; 413, it is too large; 415, it is of a
        kind that is not taken.
        """
        ...

    def answer(self, model: nn.Module, inputs: Any, parameters: Mapping[str, Any]) -> Any:
        """Whatever JSON can hold, in the task's form. ``model``: the module of ``read`` at the version that answers; no
        gradients are recorded. ``parameters``: what stood under that name in the request. Raises ``BadInput``.
        """
        ...


def read_text(body: bytes, content_type: str) -> str:
    """For ``Served.inputs`` of a text. Raises ``BadInput``: it is no text, not UTF-8, or there is nothing in it."""
    if content_type != TEXT:
        raise BadInput('this model takes a text: {"inputs": "…"}', 415 if content_type != JSON else 400)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"the text is not UTF-8 (byte {error.start}); nothing was answered") from None
    if not text.strip():
        raise BadInput("the text is empty; nothing was answered")
    return text


def read_json(body: bytes, content_type: str, fields: Sequence[str]) -> dict[str, str]:
    """For ``Served.inputs`` of an object of texts, as ``{"question", "context"}``. Raises ``BadInput``."""
    wanted = ", ".join(f'"{field}"' for field in fields)
    form = f'this model takes {{"inputs": {{…}}}} with {wanted}'
    if content_type != JSON:
        raise BadInput(form, 415)
    found = json.loads(body)
    if not isinstance(found, dict):
        raise BadInput(form)
    for field in fields:
        if not isinstance(found.get(field), str) or not found[field].strip():
            raise BadInput(f"{form}; {field!r} is missing, empty or no text; nothing was answered")
    return {field: found[field] for field in fields}


def check_names(parameters: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ``BadInput`` for a parameter that the model does not have: it would seem to count."""
    for name in parameters:
        if name not in known:
            offered = ", ".join(known) or "none"
            raise BadInput(f"there is no parameter {str(name)[:50]!r} here; there are: {offered}")


def classes(logits: Tensor, labels: Sequence[str], parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer of a classification: ``[{"label", "score"}]``, likeliest first.

    Args:
        logits: (C,) of the C labels.
        labels: their names.
        parameters: ``top_k`` (default: 5 or all), ``function_to_apply`` (``softmax``, ``sigmoid`` or ``none``), as the
            Hugging Face API has them for images, sounds and texts.

    Raises ``BadInput``: a parameter that there is not, or of another value.
    """
    check_names(parameters, ("top_k", "function_to_apply"))
    top, function = parameters.get("top_k"), parameters.get("function_to_apply")
    if top is not None and (type(top) is not int or top < 1):
        raise BadInput(f"'top_k' is {json.dumps(top)[:50]}; it must be a whole number of 1 or more")
    if function not in (None, "softmax", "sigmoid", "none"):
        raise BadInput(f"'function_to_apply' is {json.dumps(function)[:50]}; it is softmax, sigmoid or none")
    values = logits.detach().float().flatten()
    if not values.isfinite().all():
        raise ValueError("the model's logits are not finite: its training has diverged")
    if values.numel() != len(labels):
        raise ValueError(f"{values.numel()} logits for {len(labels)} labels")
    if function != "none":
        values = values.sigmoid() if function == "sigmoid" else values.softmax(0)
    scores, order = torch.sort(values, descending=True, stable=True)
    found = zip(order.tolist(), scores.tolist(), strict=True)
    return [{"label": labels[place], "score": score} for place, score in found][: 5 if top is None else top]
