"""Recipes' models that a test can see through: scores are the weights, an answer says what was read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import torch
from torch import nn

from headwater.errors import BadInput
from headwater.gateway.limits import Limits
from headwater.gateway.live import Live
from headwater.gateway.loading import Still
from headwater.gateway.sources import MemorySource
from headwater.gateway.tasks import TaskModel
from headwater_recipes.common.serving import classes, read_json, read_text
from tests.gateway.http_fakes import PATIENCE, Running, running

LABELS = ("low", "middle", "high")
PNG = b"\x89PNG\r\n\x1a\n\r\n--x"  # with what a parser that minds lines would spoil
WAV = b"RIFF\x00\x00\n\rWAVE"


class Scores(nn.Module):
    """Logits of three labels, whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def forward(self) -> torch.Tensor:
        return self.weight


class Toy:
    """A ``Served`` of any task. ``seen``: what ``inputs`` was given."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.seen: list[tuple[bytes, str]] = []

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Toy]:
        return Scores(), cls(folder.name)

    def inputs(self, body: bytes, content_type: str) -> Any:
        self.seen.append((body, content_type))
        if self.task == "text-classification":
            return read_text(body, content_type)
        if self.task == "question-answering":
            return read_json(body, content_type, ("question", "context"))
        if self.task == "image-classification" and not body.startswith(b"\x89PNG"):
            raise BadInput("this is no image that can be read; nothing was answered")
        if len(body) > 1000:
            raise BadInput("the sound is longer than a minute; nothing was answered", 413)
        return body

    def answer(self, model: nn.Module, inputs: Any, parameters: Mapping[str, Any]) -> Any:
        if self.task == "question-answering":
            start = inputs["context"].index("Clara")
            return {"answer": "Clara", "score": 0.5, "start": start, "end": start + 5}
        return classes(model(), LABELS, parameters)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    said: Any


def post(server: Running, body: bytes | dict[str, Any], kind: str | None = None, path: str = "/") -> Answer:
    """``kind``: the content type; None: JSON."""
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    given = kind if kind is not None else "application/json"
    try:
        with urlopen(Request(server.url + path, content, {"content-type": given}), timeout=PATIENCE) as answer:
            return Answer(
                answer.status, {k.lower(): v for k, v in answer.headers.items()}, msgspec.json.decode(answer.read())
            )
    except HTTPError as error:
        with error:
            return Answer(
                error.code, {k.lower(): v for k, v in error.headers.items()}, msgspec.json.decode(error.read())
            )


@contextlib.contextmanager
def serving(
    task: str, limits: Limits | None = None, source: MemorySource | None = None, keys: Path | None = None
) -> Iterator[tuple[Running, Toy, Live]]:
    """A real server with a toy of this task."""
    toy = Toy(task)
    live = Live(Scores(), source or Still("toy", 7), retry=0.01)
    with running(TaskModel(live, toy), limits, keys) as server:
        yield server, toy, live
