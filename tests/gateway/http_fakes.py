"""An engine that a test can stop between two tokens, and a real server around it."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from headwater.errors import HeadwaterError
from headwater.gateway.app import make_app
from headwater.gateway.auth import Keys
from headwater.gateway.engine_types import (
    Alternative,
    EngineClosed,
    EngineStatistics,
    Event,
    Failed,
    GenerationEnded,
    GenerationRequest,
    Guide,
    OnEvent,
    PromptInvalid,
    PromptRead,
    PromptToken,
    PromptTooLong,
    QueueFull,
    Token,
)
from headwater.gateway.limits import Limits
from headwater.gateway.served import Model, Served
from headwater.gateway.serving import Server, bind
from headwater.types import VersionInfo
from tests.patience import PATIENCE

"""Seconds that a wait of a test may take on a machine that is busy with something else."""


def version(number: int) -> VersionInfo:
    return VersionInfo(
        "toy", number, f"step-{100 * number}", number - 1, 100 * number, 1.7e9, ("toy",), 64, f"{number:x}"
    )


@dataclass
class _Generation:
    request: GenerationRequest
    send: OnEvent
    answer: str
    version: VersionInfo | None = None
    sent: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeEngine:
    """One letter is one token. The answer is drawn from the seed; at temperature 0 it is the alphabet.

    ``hold()`` stops it: nothing is begun or generated until ``let(n)`` allows n steps, or ``go()`` all. Deadlines pass
    while it is stopped, so that a slow machine does not change what is generated before.
    """

    slots: int = 2
    queue: int = 2
    context: int = 64
    version: VersionInfo = field(default_factory=lambda: version(1))
    stale_since: float | None = None
    failure: HeadwaterError | None = None
    begun: Callable[[], None] = lambda: None
    failed: str = ""
    vocabulary: int = 256
    announced: bool = False
    says: str = ""

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Generation] = []
        self._running: list[_Generation] = []
        self._steps = -1
        self._closed = False
        self._finished: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hold(self) -> None:
        self.let(0)

    def let(self, steps: int) -> None:
        with self._changed:
            self._steps = steps
            self._changed.notify_all()

    def go(self) -> None:
        self.let(-1)

    def publish(self, number: int) -> None:
        self.version = version(number)

    def encode(self, text: str, *, special: bool = True) -> Sequence[int]:
        del special
        return tuple(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def spell(self, ids: Sequence[int]) -> str:
        if max(ids, default=0) >= self.vocabulary:
            raise PromptInvalid(f"token ids are 0 to {self.vocabulary - 1}")
        return self.decode(ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> Sequence[int]:
        self.read = (list(messages), tools)
        said = "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages)
        return self.encode(said + ("a:" if answer and self.announced else ""))

    def tokenizer_info(self) -> Mapping[str, str | None]:
        return {"tokenizer_class": "Bytes", "eos_token": None}

    def guide(self, grammar: str) -> Guide:
        self.grammar = grammar
        return Unguided()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> _Generation:
        if not request.prompt:
            raise PromptInvalid("the prompt is empty; nothing was queued")
        if max(request.prompt) > 255:
            raise PromptInvalid("token ids are 0 to 255; nothing was queued")
        if len(request.prompt) >= self.context:
            raise PromptTooLong(f"{len(request.prompt)} tokens; the context is {self.context}; nothing was queued")
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine is closed; nothing was queued")
            if len(self._waiting) >= self.queue and len(self._running) >= self.slots:
                raise QueueFull(f"{len(self._waiting)} wait; nothing was queued")
            made = _Generation(request, on_event, self._answer(request))
            self._waiting.append(made)
            self._changed.notify_all()
        return made

    def statistics(self) -> EngineStatistics:
        with self._changed:
            return EngineStatistics(
                running=len(self._running),
                waiting=len(self._waiting),
                slots=self.slots,
                queue=self.queue,
                prompt_tokens=0,
                tokens_generated=0,
                finished=dict(self._finished),
                swaps=self.version.number - 1,
                refused_versions=0,
                versions=(self.version.number,),
                version=self.version,
                steps=0,
                last_step_seconds=0.0,
                swap_pause=0.0,
                swap_seconds=0.0,
                stale_since=self.stale_since,
                error="",
                cache_bytes=0,
                cache_bound=0,
                failed=self.failed,
            )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def wait_for(self, holds: Callable[[FakeEngine], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self), PATIENCE)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def finished(self) -> Mapping[str, int]:
        return self._finished

    def _answer(self, request: GenerationRequest) -> str:
        if self.says:
            return self.says[: request.max_tokens]
        letters = "abcdefghijklmnopqrstuvwxyz"
        draw = random.Random(f"{request.seed if request.seed is not None else time.monotonic_ns()}{request.prompt}")
        if request.temperature == 0:
            return letters[: request.max_tokens] if request.max_tokens < 26 else letters
        room = min(request.max_tokens, self.context - len(request.prompt))
        return "".join(draw.choice(letters) for _ in range(room))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
                if self._closed:
                    for one in self._waiting + self._running:
                        one.send(Failed(EngineClosed("the engine was closed")))
                    self._waiting, self._running = [], []
                    self._changed.notify_all()
                    return
                self._step()
                self._changed.notify_all()
                self._changed.wait(0.005 if self._steps == 0 else 0)

    def _step(self) -> None:
        for one in [*self._running, *self._waiting]:
            late = self._steps == 0 and time.monotonic() > (one.request.deadline or math.inf)
            if one.cancelled or late:
                self._end(one, GenerationEnded("cancelled" if one.cancelled else "deadline", *self._ended(one)))
        if self._steps == 0:
            return
        self._steps -= 1 if self._steps > 0 else 0
        while self._waiting and len(self._running) < self.slots:
            self._running.append(self._waiting.pop(0))
            self._running[-1].version = self.version
            self.begun()
        for one in list(self._running):
            if self.failure is not None:
                self._end(one, Failed(self.failure))
            else:
                self._advance(one)

    def _advance(self, one: _Generation) -> None:
        if one.sent == 0 and one.request.prompt_logprobs is not None:
            one.send(_prompt_read(one.request.prompt, one.request.prompt_logprobs))
        if not one.answer:
            self._end(one, GenerationEnded("length", *self._ended(one)))
            return
        said = one.answer[: one.sent + 1]
        letter = one.answer[one.sent]
        one.sent += 1
        if any(said.endswith(stop) for stop in one.request.stop):
            self._end(one, GenerationEnded("stop", *self._ended(one)))
            return
        own = None if one.request.logprobs is None else Alternative(ord(letter), letter, -0.5)
        top = tuple(
            Alternative(ord(letter) + i, chr(ord(letter) + i), -0.5 - i) for i in range(one.request.logprobs or 0)
        )
        one.send(Token(letter, ord(letter), own, top))
        if one.sent == len(one.answer):
            reason = "length" if len(one.answer) == one.request.max_tokens else "stop"
            self._end(one, GenerationEnded(reason, *self._ended(one)))  # type: ignore[arg-type]

    def _ended(self, one: _Generation) -> tuple[int, int, VersionInfo]:
        return len(one.request.prompt), one.sent, one.version or self.version

    def _end(self, one: _Generation, event: Event) -> None:
        for group in (self._running, self._waiting):
            if one in group:
                group.remove(one)
        reason = event.reason if isinstance(event, GenerationEnded) else "failed"
        self._finished[reason] = self._finished.get(reason, 0) + 1
        one.send(event)


def _prompt_read(prompt: Sequence[int], count: int) -> PromptRead:
    top = tuple(Alternative(97 + i, chr(97 + i), -1.0 - i) for i in range(count))
    return PromptRead(
        tuple(
            PromptToken(chr(token), token, chr(token), -2.0 if place else None, top if place else ())
            for place, token in enumerate(prompt)
        )
    )


class Unguided:
    """A guide that is asked nothing: the fake engine says what it is told to."""

    complete = False

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def copy(self) -> Unguided:
        return self

    def allowed(self) -> Any:
        raise AssertionError

    def push(self, token: int) -> None:
        raise AssertionError(token)


@dataclass
class Running:
    """A server in a thread of this process. ``address``: (host, port)."""

    address: tuple[str, int]
    server: Server
    served: Served
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def client(self, key: str = "none", **options: object) -> openai.OpenAI:
        settings = {"max_retries": 0, "timeout": PATIENCE} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **settings)  # type: ignore[arg-type]

    def end(self) -> None:
        """Ask it to end; ``thread`` does."""
        self.server.should_exit = True


@contextlib.contextmanager
def running(
    model: Model | None, limits: Limits | None = None, keys: Path | None = None, cors: Sequence[str] = ()
) -> Iterator[Running]:
    """A real uvicorn on a free port of the loopback."""
    limits = limits or Limits()
    served = Served("toy", model)
    app = make_app(served, limits, Keys(keys) if keys else None, cors)
    sock = bind("127.0.0.1", 0, proven=keys is not None)
    server = Server(app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    found = Running(sock.getsockname(), server, served, thread)
    try:
        yield found
    finally:
        found.end()
        thread.join(PATIENCE)
        sock.close()
        assert not thread.is_alive()
