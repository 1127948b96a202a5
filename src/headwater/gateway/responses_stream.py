"""How an answer becomes one of /v1/responses: its items in one piece, or events as they come."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from headwater.gateway.calls import Answer, Argued, Called, Piece, Said
from headwater.gateway.chat import logprobs_of
from headwater.gateway.engine_types import GenerationEnded, Token
from headwater.gateway.generation import EventStream
from headwater.gateway.openai_types import TokenLogprob
from headwater.gateway.responses_types import (
    Answered,
    FunctionCall,
    IncompleteDetails,
    OutputMessage,
    OutputText,
    Reasoning,
    ResponseRequest,
    ResponseUsage,
    Status,
    StreamEvent,
    TextFormat,
    TextOptions,
)
from headwater.gateway.served import fingerprint

if TYPE_CHECKING:
    from headwater.gateway.generation import Run
    from headwater.gateway.problems import Refusal


class Writer:
    """A run of one choice as the Responses API writes it."""

    def __init__(self, asked: ResponseRequest, *, calls: bool) -> None:
        self._asked = asked
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._said = Answer(calls=calls)
        self._output: list[OutputMessage | FunctionCall] = []
        self._open = False
        self._sent = 0
        self._ended: Answered | None = None

    def event(self, run: Run, number: int, event: Token | GenerationEnded) -> Iterator[StreamEvent]:
        del number
        if not self._sent:
            yield self.made("response.created", response=self._answered(run, "in_progress"))
            yield self.made("response.in_progress", response=self._answered(run, "in_progress"))
        pieces = self._said.push(event)
        logprobs = logprobs_of([event])
        for piece in pieces or ([Said("")] if logprobs else []):
            yield from self._piece(piece, logprobs)
            logprobs = []
        if isinstance(event, GenerationEnded):
            if not self._output:
                yield from self._begin_text()
            whole = self._said.finish_reason(event) != "length"
            yield from self._close("completed" if whole else "incomplete")
            self._ended = self._answered(run, "completed" if whole else "incomplete")
            yield self.made(f"response.{self._ended.status}", response=self._ended)

    def usage(self, run: Run) -> Any:
        """Of a stream it is in the last event."""
        raise NotImplementedError

    def whole(self, run: Run, events: Sequence[Sequence[Token | GenerationEnded]]) -> Answered:
        for event in events[0]:
            for _ in self.event(run, 0, event):
                pass
        assert self._ended is not None
        return self._ended

    def made(self, kind: str, **fields: Any) -> StreamEvent:
        """The next event."""
        self._sent += 1
        return StreamEvent(type=kind, sequence_number=self._sent - 1, **fields)

    def _piece(self, piece: Piece, logprobs: list[TokenLogprob]) -> Iterator[StreamEvent]:
        match piece:
            case Said(text):
                if not self._open or not isinstance(self._output[-1], OutputMessage):
                    yield from self._begin_text()
                item = self._output[-1]
                assert isinstance(item, OutputMessage)
                item.content[0].text += text
                item.content[0].logprobs += logprobs
                yield self.made("response.output_text.delta", **self._place(), delta=text, logprobs=logprobs)
            case Called(_, id_, name):
                yield from self._close("completed")
                yield from self._begin(FunctionCall(f"fc_{secrets.token_hex(16)}", id_, name, "", "in_progress"))
            case Argued(_, text):
                item = self._output[-1]
                assert isinstance(item, FunctionCall)
                item.arguments += text
                yield self.made("response.function_call_arguments.delta", **self._place(), delta=text)

    def _begin_text(self) -> Iterator[StreamEvent]:
        yield from self._close("completed")
        item = OutputMessage(f"msg_{secrets.token_hex(16)}", "in_progress", [])
        yield from self._begin(item)
        item.content.append(OutputText("", annotations=[], logprobs=[]))
        yield self.made("response.content_part.added", **self._place(), part=OutputText(""))

    def _begin(self, item: OutputMessage | FunctionCall) -> Iterator[StreamEvent]:
        self._output.append(item)
        self._open = True
        yield self.made("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close(self, status: Status) -> Iterator[StreamEvent]:
        """End the item that is open, if one is."""
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item.status = status
        if isinstance(item, FunctionCall):
            done = {"name": item.name, "arguments": item.arguments}
            yield self.made("response.function_call_arguments.done", **self._place(), **done)
        else:
            (part,) = item.content
            done_text = {"text": part.text, "logprobs": part.logprobs}
            yield self.made("response.output_text.done", **self._place(), **done_text)
            yield self.made("response.content_part.done", **self._place(), part=part)
        yield self.made("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _place(self) -> dict[str, Any]:
        """Where the item that is open is, and its text in it."""
        found: dict[str, Any] = {"output_index": len(self._output) - 1, "item_id": self._output[-1].id}
        return found | ({"content_index": 0} if isinstance(self._output[-1], OutputMessage) else {})

    def _answered(self, run: Run, status: Status) -> Answered:
        asked = self._asked
        used = run.usage()
        ended = status != "in_progress"
        return Answered(
            id=self._id,
            created_at=self._created,
            status=status,
            model=asked.model,
            system_fingerprint=fingerprint(run.versions()),
            output=self._output if ended else [],
            usage=ResponseUsage(used.prompt_tokens, used.completion_tokens, used.total_tokens) if ended else None,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            reasoning=asked.reasoning or Reasoning(),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            text=TextOptions((asked.text.format if asked.text else None) or TextFormat()),
            tool_choice=asked.tool_choice or "auto",
            tools=asked.tools or [],
            top_logprobs=asked.top_logprobs or 0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            user=asked.user,
        )


class ResponseStream(EventStream):
    """Events with names; ``response.completed`` or ``response.incomplete`` is the last, or an ``error``."""

    last = b""
    _writer: Writer

    def frame(self, value: StreamEvent) -> bytes:
        return b"event: " + value.type.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"

    def problem(self, refusal: Refusal) -> bytes:
        """``error`` repeats it as the openai client looks for it."""
        body = refusal.answer().error
        return self.frame(
            self._writer.made(
                "error", code=body.code, message=body.message, param=body.param, error=msgspec.to_builtins(body)
            )
        )
