"""Requests and answers of the OpenAI-compatible routes.

A field of a request is one of four kinds:

- **honoured**: it does what OpenAI's documentation says;
- **harmless**: it cannot change the answer (``user``, ``metadata``, ``service_tier``, …): taken and not looked at;
- **unsupported**: it would change the answer in a way that this server cannot. Its type here is that of its neutral
  values alone (``suffix: ""``, ``functions: []``, null), and anything else is refused by name;
- **unknown**: not among a struct's fields. It is ignored and named in a header, or refused under ``--strict``
  (``limits.read_json``).

``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids`` and ``ignore_eos`` are not OpenAI's; other servers of
this kind have them too. Null is the default of every field that may be left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Temperature = Annotated[float, Meta(ge=0, le=2, description="0: the likeliest token each time.")]
TopP = Annotated[float, Meta(gt=0, le=1, description="Of the likeliest tokens whose probabilities sum to this.")]
TopK = Annotated[int, Meta(ge=-1, le=1 << 20, description="Of so many likeliest tokens; 0 or -1: of all.")]
MinP = Annotated[float, Meta(ge=0, le=1, description="Of tokens at least so likely, relative to the likeliest.")]
Repetition = Annotated[
    float, Meta(gt=0, le=100, description="Of tokens in the prompt or the answer; 1: none. As in transformers.")
]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
CountOrNone = Annotated[int, Meta(ge=0, le=1 << 20)]
Choices = Annotated[int, Meta(ge=1, le=128, description="How many answers; choice i draws with seed + i.")]
Seed = Annotated[
    int,
    Meta(
        ge=-(1 << 63),
        le=(1 << 63) - 1,
        description="The same request with the same seed on the same version draws the same tokens.",
    ),
]
_LONGEST_STOP = 256
StopText = Annotated[str, Meta(min_length=1, max_length=_LONGEST_STOP)]
Stop = Annotated[str, Meta(max_length=_LONGEST_STOP)] | Annotated[list[StopText], Meta(max_length=32)] | None
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenIds = Annotated[list[TokenId], Meta(max_length=256)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=1024, description="Added to the logits of these token ids; -100 bans a token."),
]
Model = Annotated[str, Meta(min_length=1, max_length=256, description="The model's name, as /v1/models lists it.")]
Label = Annotated[str, Meta(max_length=256)]


class StreamOptions(msgspec.Struct):
    """``include_usage``: one more event before the end, with the usage and no choices."""

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class JsonSchema(msgspec.Struct):
    """A schema that an answer keeps to. Without ``strict``, what of it cannot be enforced is ignored and named."""

    name: Label | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = False
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    """Of an answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class Common(msgspec.Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: Model
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Choices | None = 1
    temperature: Temperature | None = 1.0
    top_p: TopP | None = 1.0
    top_k: TopK | None = 0
    min_p: MinP | None = 0.0
    stop: Stop = None
    stop_token_ids: TokenIds | None = None
    seed: Seed | None = None
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    repetition_penalty: Repetition | None = 1.0
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = False
    # harmless
    user: Label | None = None


Prompt = str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions. ``prompt``: a text, token ids, or a list of either; not a mixture."""

    prompt: Prompt
    max_tokens: CountOrNone | None = 16
    echo: bool | None = False
    logprobs: bool | Annotated[int, Meta(ge=0, le=5)] | None = None
    # unsupported
    suffix: Literal[""] | None = None
    best_of: Choices | None = None


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    """A part of a message that is text."""

    text: str


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal"):
    """A part of an answer of another server that declined. No other kind of part is supported."""

    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class CalledFunction(msgspec.Struct):
    """``arguments``: JSON, as a text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that an answer asks its client to make."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    """One message of a chat. ``developer`` is read as ``system``; other roles are the chat template's affair.

    An assistant's ``content`` may be null or left out. ``tool_call_id``: which call a ``tool``'s message answers.
    """

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[TextPart | RefusalPart] | UnsetType | None = UNSET
    name: Label | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: Label | None = None
    # what an answer has beside these, so that it can be sent back as it came
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


FunctionName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.\-]+$")]


class Function(msgspec.Struct):
    """``parameters``: the JSON schema of the arguments; left out: it has none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = False


class Tool(msgspec.Struct):
    """A function of the client's that an answer may ask it to call."""

    function: Function
    type: Literal["function"] = "function"


class FunctionChoice(msgspec.Struct):
    name: str


class ToolChoice(msgspec.Struct):
    """This function and no other is to be called."""

    function: FunctionChoice
    type: Literal["function"] = "function"


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions. ``max_completion_tokens`` wins over ``max_tokens``; neither: the server's bound."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = True
    # unsupported
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1)] | None = None
    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Meta(max_length=0)] | None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    # harmless
    metadata: dict[str, str] | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None
    store: Literal[False] | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings. ``input``: a text, token ids, or a list of either; not a mixture."""

    model: Model
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Count | None = None
    user: Label | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(msgspec.Struct):
    """One entry for each token: its text, its log-probability (nats), the likeliest, where it begins in ``text``.

    A prompt's first token, if ``echo`` shows it, has null for the middle two: nothing is before it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(msgspec.Struct, kw_only=True, omit_defaults=False):
    """An answer of /v1/completions, and each event of a stream of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Likely(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Likely]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class Reply(msgspec.Struct):
    """``content`` is null if the answer is calls alone; ``tool_calls`` is left out if there are none."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, kw_only=True):
    """An answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct):
    """A call as it comes: first its id and name, then its arguments piece by piece."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Embeddings(msgspec.Struct):
    """An answer of /v1/embeddings. ``embedding``: floats, or the base64 of little-endian float32."""

    data: list[Embedding]
    model: str
    system_fingerprint: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class VersionCard(msgspec.Struct):
    """A version as answers name it. ``time``: seconds since 1970."""

    name: str
    number: int
    step: int
    time: float
    digest: str


class ModelCard(msgspec.Struct):
    """What /v1/models says of a model; ``headwater_version`` answers new requests, null until there is one."""

    id: str
    created: int
    headwater_version: VersionCard | None
    object: Literal["model"] = "model"
    owned_by: Literal["headwater"] = "headwater"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"
