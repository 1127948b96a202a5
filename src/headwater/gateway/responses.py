"""POST /v1/responses, without a memory: each request brings its whole conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from headwater.gateway.gate import record_of
from headwater.gateway.generation import Run, answer
from headwater.gateway.limits import read_json
from headwater.gateway.openai_types import (
    CalledFunction,
    Function,
    FunctionChoice,
    JsonSchema,
    Message,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
)
from headwater.gateway.problems import Refusal
from headwater.gateway.requests import Wanted, generations, guide_of
from headwater.gateway.responses_stream import ResponseStream, Writer
from headwater.gateway.responses_types import InputItem, InputPart, ResponseRequest
from headwater.gateway.tools import Tooling, form, read_chat

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from headwater.gateway.gateway import Gateway

_DECODER = msgspec.json.Decoder(ResponseRequest)
T = TypeVar("T")
_LOGPROBS = "message.output_text.logprobs"


async def responses(request: Request, gateway: Gateway) -> Response:
    """Answer a conversation, in the form of the Responses API."""
    asked = await read_json(request, _DECODER, gateway.limits)
    gateway.served.must_be(asked.model)
    generator = gateway.served.generator()
    record = record_of(request)
    messages = _messages(asked, record.ignored)
    if len(messages) > gateway.limits.messages:
        raise Refusal(400, f"{len(messages)} messages; this server takes {gateway.limits.messages}", param="input")
    if asked.n not in (None, 1):
        raise Refusal(400, "'n' is 1 here: one answer", param="n", slug="unsupported")
    wanted_form = form(_tooling(asked), _format(asked))
    prompt = await gateway.tokenize(lambda: read_chat(messages, wanted_form.tools, generator))
    guide = await guide_of(wanted_form, generator, gateway, record)
    logprobs = (asked.top_logprobs or 0) if _LOGPROBS in (asked.include or ()) or asked.top_logprobs else None
    wanted = Wanted(asked.max_output_tokens, logprobs=logprobs, guide=guide)
    wanted_all = generations(asked, [prompt], wanted, generator, gateway.limits)
    run = Run(generator, wanted_all, request.receive, record, gateway.runs, gateway.limits.deadline)
    writer = Writer(asked, calls=wanted_form.calls)
    return await answer(run, writer, record, stream=bool(asked.stream), usage=False, written=ResponseStream)


def _tooling(asked: ResponseRequest) -> Tooling:
    tools = [Tool(Function(tool.name, tool.description, tool.parameters, tool.strict)) for tool in asked.tools or ()]
    choice = asked.tool_choice
    named = choice if choice is None or isinstance(choice, str) else ToolChoice(FunctionChoice(choice.name))
    return Tooling(tools, named, asked.parallel_tool_calls is not False)


def _format(asked: ResponseRequest) -> ResponseFormat | None:
    found = asked.text.format if asked.text else None
    if found is None:
        return None
    if found.type == "json_schema" and found.schema is None:
        raise _missing("text.format.schema")
    return ResponseFormat(found.type, JsonSchema(found.name, found.schema, found.strict))


def _messages(asked: ResponseRequest, ignored: list[str]) -> list[Message]:
    """The conversation as chat completions take it. A call belongs to the assistant's message before it."""
    found: list[Message] = []
    if asked.instructions:
        found.append(Message("system", asked.instructions))
    if isinstance(asked.input, str):
        return [*found, Message("user", asked.input)]
    for number, item in enumerate(asked.input):
        place = f"input[{number}]"
        match item.type:
            case "reasoning":
                ignored.append(f"{place} (reasoning)")
            case "function_call":
                call = _call(item, place)
                if not found or found[-1].role != "assistant":
                    found.append(Message("assistant", None))
                found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
            case "function_call_output":
                call_id = _needed(item.call_id, f"{place}.call_id")
                found.append(Message("tool", _text(item.output, f"{place}.output"), tool_call_id=call_id))
            case _:
                role = _needed(item.role, f"{place}.role")
                said = item.content or "" if role == "assistant" else item.content
                found.append(Message(role, _text(said, f"{place}.content")))
    return found


def _call(item: InputItem, place: str) -> ToolCall:
    name = _needed(item.name, f"{place}.name")
    arguments = _needed(item.arguments, f"{place}.arguments")
    return ToolCall(_needed(item.call_id, f"{place}.call_id"), CalledFunction(name, arguments))


def _needed(value: T | None, place: str) -> T:
    if value is None:
        raise _missing(place)
    return value


def _missing(place: str) -> Refusal:
    return Refusal(400, f"{place!r} is missing", param=place, slug="missing_field")


def _text(content: str | list[InputPart] | None, place: str) -> str:
    if content is None:
        raise _missing(place)
    return content if isinstance(content, str) else "".join(part.text or part.refusal for part in content)
