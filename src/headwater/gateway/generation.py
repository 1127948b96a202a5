"""From the engine's thread to a client: the generations of one request, answered at once or as a stream of events.

A client that hangs up, before its first token or amid a stream, cancels its generations: the engine frees their slots
at its next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
from starlette.responses import Response

from headwater.gateway.engine_types import Event, Failed, GenerationEnded, PromptRead, Token
from headwater.gateway.gate import ClientGone
from headwater.gateway.openai_types import Usage
from headwater.gateway.problems import Refusal, refusal_of, too_late, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

    from headwater.gateway.engine_types import GenerationRequest, Handle
    from headwater.gateway.gate import RequestRecord
    from headwater.gateway.served import Generator
    from headwater.types import VersionInfo

_Sign = Literal["gone", "closing"]


@dataclass(slots=True)
class Choice:
    """One generation. ``tokens``: how many have come; ``finished``: how it ended, once it has.

    ``prompt``: its tokens and how likely they were, if that was asked for.
    """

    request: GenerationRequest
    handle: Handle
    tokens: int = 0
    prompt: PromptRead | None = None
    finished: GenerationEnded | None = None

    @property
    def version(self) -> VersionInfo | None:
        return self.finished.version if self.finished else self.handle.version


class Run:
    """The generations of one request. Iterate over (choice's number, ``Token`` or ``GenerationEnded``); then ``close``.

    Args:
        deadline: seconds that the request had, for the message if they pass.
        each: choices of one prompt; ``requests`` has them one after the other.

    Raises, from the constructor: ``QueueFull``, ``PromptTooLong``, … of ``Generator.submit``; nothing is left queued.
    Raises, from the iteration: ``ClientGone``; ``Refusal`` if a generation failed, the deadline passed before there was
    any token, or the server ends.
    """

    def __init__(
        self,
        generator: Generator,
        requests: Sequence[GenerationRequest],
        receive: Receive,
        record: RequestRecord,
        runs: Runs,
        deadline: float,
        each: int = 1,
    ) -> None:
        self._each = each
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | _Sign] = asyncio.Queue()
        self._record = record
        self._runs = runs
        self._deadline = deadline
        self._held: tuple[int, Token | GenerationEnded] | None = None
        self.choices: list[Choice] = []
        try:
            for number, request in enumerate(requests):
                handle = generator.submit(request, self._sender(number))
                self.choices.append(Choice(request, handle))
        except BaseException:
            self._cancel()
            raise
        self._watch = self._loop.create_task(self._watch_client(receive))
        runs.add(self)

    def stop(self) -> None:
        """The server ends: what has not been generated will not be."""
        self._events.put_nowait("closing")

    def close(self) -> None:
        """Cancel what runs; book the rest. Safe to call twice."""
        self._runs.discard(self)
        self._watch.cancel()
        self._cancel()
        self._record.prompt_tokens = self._prompt_tokens()
        self._record.completion_tokens = sum(choice.tokens for choice in self.choices)

    async def first(self) -> None:
        """Wait until there is something to answer: its version is known then, and an error has its own status."""
        self._held = await anext(self, None)

    def __aiter__(self) -> AsyncIterator[tuple[int, Token | GenerationEnded]]:
        return self

    async def __anext__(self) -> tuple[int, Token | GenerationEnded]:
        if self._held is not None:
            held, self._held = self._held, None
            return held
        if all(choice.finished for choice in self.choices):
            raise StopAsyncIteration
        match await self._events.get():
            case "gone":
                raise ClientGone
            case "closing":
                raise unavailable(f"the server is ending; {self._so_far()}", "closing")
            case (_, Failed(error)):
                raise refusal_of(error)
            case (int(number), PromptRead() as prompt):
                self.choices[number].prompt = prompt
                return await anext(self)
            case (int(number), Token() | GenerationEnded() as event):
                self._note(number, event)
                return number, event
            case other:
                raise AssertionError(f"no such event: {other!r}")

    def versions(self) -> list[VersionInfo]:
        """The distinct ones of the choices so far."""
        found: list[VersionInfo] = []
        for choice in self.choices:
            if choice.version is not None and choice.version not in found:
                found.append(choice.version)
        return found

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        made = sum(choice.finished.completion_tokens for choice in self.choices if choice.finished)
        read = self._prompt_tokens()
        return Usage(read, made, read + made)

    def _prompt_tokens(self) -> int:
        return sum(len(choice.request.prompt) for choice in self.choices[:: self._each])

    def _note(self, number: int, event: Token | GenerationEnded) -> None:
        choice = self.choices[number]
        if isinstance(event, Token):
            choice.tokens += 1
            if self._record.first_token is None:
                self._record.first_token = time.monotonic()
        else:
            choice.finished = event
        self._record.answered_by(choice.version)
        if isinstance(event, GenerationEnded) and event.reason == "deadline":
            self._record.problem = "deadline"
            if not any(choice.tokens for choice in self.choices):
                raise too_late(self._deadline, self._so_far())
        if isinstance(event, GenerationEnded) and event.reason == "cancelled":
            raise unavailable(f"the generation was cancelled; {self._so_far()}", "cancelled")

    def _so_far(self) -> str:
        made = sum(choice.tokens for choice in self.choices)
        if not made:
            return "no token was generated"
        return f"{made} tokens were generated and {'sent' if self._record.streamed else 'not sent'}"

    def _sender(self, number: int) -> Callable[[Event], None]:
        """What the engine's thread calls."""

        def send(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
            except RuntimeError:
                return  # the loop is closed: the server has ended, and the engine must not stumble over it

        return send

    async def _watch_client(self, receive: Receive) -> None:
        await hung_up(receive)
        self._events.put_nowait("gone")

    def _cancel(self) -> None:
        for choice in self.choices:
            if choice.finished is None:
                choice.handle.cancel()


async def hung_up(receive: Receive) -> None:
    """Until the client is gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Runs(set[Run]):
    """What a server generates now, so that it can end in time."""

    def stop(self) -> None:
        for run in tuple(self):
            run.stop()


class Writer(Protocol):
    """How a run becomes an answer: chat's way, or that of completions. ``event``: structs of one event of a stream."""

    def event(self, run: Run, number: int, event: Token | GenerationEnded) -> Iterator[Any]: ...
    def usage(self, run: Run) -> Any: ...
    def whole(self, run: Run, events: Sequence[Sequence[Token | GenerationEnded]]) -> Any: ...


async def answer(
    run: Run,
    writer: Writer,
    record: RequestRecord,
    *,
    stream: bool,
    usage: bool,
    written: type[EventStream] | None = None,
) -> Response:
    """The answer to a request: in one piece, or a response that streams.

    ``usage``: the stream ends with it. ``written``: how a stream is; default: ``EventStream``.
    The run is closed when the answer is out, or has failed.
    """
    try:
        if stream:
            record.streamed = True
            await run.first()
            return (written or EventStream)(run, writer, record, usage)
        events: list[list[Token | GenerationEnded]] = [[] for _ in run.choices]
        async for number, event in run:
            events[number].append(event)
        body = msgspec.json.encode(writer.whole(run, events))
    except BaseException:
        run.close()
        raise
    run.close()
    return Response(body, media_type="application/json")


class EventStream(Response):
    """Server-sent events, each one ``data: JSON``; the last is ``data: [DONE]``.

    What goes wrong once the head is out is an event ``data: {"error": …}``, which the openai client raises.
    """

    media_type = "text/event-stream"
    last = b"data: [DONE]\n\n"

    def __init__(self, run: Run, writer: Writer, record: RequestRecord, usage: bool) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._run = run
        self._writer = writer
        self._record = record
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in self._parts():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        finally:
            self._run.close()
        await send({"type": "http.response.body", "body": self.last, "more_body": False})

    async def _parts(self) -> AsyncIterator[bytes]:
        try:
            async for number, event in self._run:
                if parts := b"".join(self.frame(part) for part in self._writer.event(self._run, number, event)):
                    yield parts
            if self._usage:
                yield self.frame(self._writer.usage(self._run))
        except Refusal as refusal:
            self._record.problem = refusal.slug or ""
            yield self.problem(refusal)

    def frame(self, value: Any) -> bytes:
        """One event."""
        return b"data: " + msgspec.json.encode(value) + b"\n\n"

    def problem(self, refusal: Refusal) -> bytes:
        """The event of what went wrong."""
        return self.frame(refusal.answer())
