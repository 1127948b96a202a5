"""A chat's request: its messages and tools as templates take them, and the form that its answer must have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from headwater.gateway import grammar
from headwater.gateway.problems import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headwater.gateway.openai_types import Message, ResponseFormat, Tool, ToolChoice
    from headwater.gateway.served import Generator


class Form(NamedTuple):
    """What an answer must look like. ``grammar``: "" for any text; ``calls``: whether it may call ``tools``."""

    grammar: str
    calls: bool
    tools: list[dict[str, Any]] | None


class Tooling(NamedTuple):
    """The tools of a request: those that are described to the model, and whether they may or must be called."""

    tools: Sequence[Tool]
    choice: str | ToolChoice | None
    several: bool


def form(tooling: Tooling, response_format: ResponseFormat | None) -> Form:
    """Raises ``Refusal``: a choice without its tool, a name twice, a format without its schema."""
    answer = _schema(response_format)
    tools, choice = tooling.tools, tooling.choice or "auto"
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise Refusal(400, "two of the tools have one name", param="tools", slug="invalid_value")
    told = [_described(tool) for tool in tools] or None
    if choice == "none" or (choice == "auto" and not tools):
        return Form(grammar.lark(answer) if answer else "", calls=False, tools=told if choice != "none" else None)
    if not isinstance(choice, str):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if not tools:
        said = "no such tool is among 'tools'" if names else "there are no 'tools' to be called"
        raise Refusal(400, f"'tool_choice': {said}", param="tool_choice", slug="invalid_value")
    callable_ = [grammar.Callee(tool.function.name, _arguments(tool)) for tool in tools]
    must = choice != "auto"
    several = tooling.several and (not must or choice == "required")
    return Form(grammar.lark(answer, callable_, "must" if must else "may", several=several), calls=True, tools=told)


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates take one."""
    function = tool.function
    parameters = function.parameters or {"type": "object", "properties": {}}
    described = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": described}


def _schema(asked: ResponseFormat | None) -> grammar.Schema | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return grammar.ANY_OBJECT
    if asked.json_schema is None:
        raise Refusal(400, "it needs a 'json_schema'", param="response_format.json_schema", slug="missing_field")
    schema = asked.json_schema.schema
    return grammar.Schema({} if schema is None else schema, exact=bool(asked.json_schema.strict))


def _arguments(tool: Tool) -> grammar.Schema:
    """What a function's schema says, an object in any case."""
    schema = tool.function.parameters
    if not schema:
        return grammar.Schema({"type": "object", "properties": {}, "additionalProperties": False}, exact=True)
    value = schema if "type" in schema else {"type": "object", **schema}
    return grammar.Schema(value, exact=bool(tool.function.strict))


def read_chat(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, generator: Generator, *, answer: bool = True
) -> tuple[int, ...]:
    """The token ids of a conversation. Raises ``Refusal``, ``PromptInvalid``."""
    said = [as_template(message, f"messages[{number}]") for number, message in enumerate(messages)]
    return tuple(generator.apply_chat_template(said, tools, answer=answer))


def as_template(message: Message, place: str) -> dict[str, Any]:
    """A message as chat templates take one; arguments are objects there. ``place``: its name in an error.

    Raises ``Refusal``: content is missing, arguments are no JSON.
    """
    if message.content is msgspec.UNSET and message.role != "assistant":
        raise Refusal(400, f"'{place}.content' is missing", param=f"{place}.content", slug="missing_field")
    if message.content is None and message.role != "assistant":
        said = f"'{place}.content' is null, which only an assistant's may be"
        raise Refusal(400, said, param=f"{place}.content", slug="invalid_value")
    made: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _object(call.function.arguments, f"{place}.tool_calls[{number}].function.arguments"),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.role == "tool" and message.name is not None:
        made["name"] = message.name
    return made


def _object(text: str, place: str) -> dict[str, Any]:
    """Arguments; "" means none."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refusal(400, f"{place!r} is not the JSON of an object", param=place, slug="invalid_value")
    return found
