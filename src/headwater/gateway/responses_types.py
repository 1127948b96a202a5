"""Requests, answers and events of /v1/responses. Which kinds of fields there are: see ``openai_types``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from headwater.gateway.openai_types import Common, Count, FunctionName, Label, TokenLogprob


class InputPart(msgspec.Struct):
    """A part of an item that is text; no other kind is supported."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = ""
    refusal: str = ""
    # what an answer's part has beside these
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(msgspec.Struct):
    """A message (``type`` may be left out), a call that an earlier answer made, or what it returned.

    ``reasoning`` of another server is passed over.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    role: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    content: str | list[InputPart] | None = None
    call_id: Label | None = None
    name: Label | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    # harmless
    id: Label | None = None
    status: Label | None = None
    phase: Label | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None


class TextFormat(msgspec.Struct):
    """Of an answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Label | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(msgspec.Struct):
    """A function of the client's that an answer may ask it to call. ``parameters``: the schema of its arguments."""

    type: Literal["function"]
    name: FunctionName
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class FunctionToolChoice(msgspec.Struct):
    """This function and no other is to be called."""

    type: Literal["function"]
    name: str


class Reasoning(msgspec.Struct):
    effort: Literal["none"] | None = None
    # harmless
    summary: Label | None = None
    generate_summary: Label | None = None


class ResponseRequest(Common, kw_only=True):
    """POST /v1/responses. Nothing is kept: send the whole conversation each time."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice | None = None
    parallel_tool_calls: bool | None = True
    include: list[Label] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    # unsupported
    store: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: Reasoning | None = None
    # harmless
    max_tool_calls: Count | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None


Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct):
    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    """An answer's text."""

    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class FunctionCall(msgspec.Struct, tag_field="type", tag="function_call"):
    """A call that the answer asks for. ``call_id`` names it where its result is sent."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputDetails(msgspec.Struct):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = msgspec.field(default_factory=InputDetails)
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)


class Answered(msgspec.Struct, kw_only=True):
    """An answer of /v1/responses: what was asked for, and ``output``."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    system_fingerprint: str
    output: list[OutputMessage | FunctionCall]
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: Reasoning
    background: Literal[False] = False
    store: Literal[False] = False
    temperature: float
    text: TextOptions
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    user: str | None


class StreamEvent(msgspec.Struct, kw_only=True):
    """One event of a stream of /v1/responses. ``type`` says what happened and so which fields there are."""

    type: str
    sequence_number: int
    response: Answered | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputMessage | FunctionCall | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    # of an error
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET
    error: dict[str, str | None] | UnsetType = UNSET
