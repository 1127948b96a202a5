"""Requests and answers of the OpenAI-compatible routes.

A field of a request is one of four kinds:

- **honoured**: it does what OpenAI's documentation says;
- **harmless**: it cannot change the answer (``user``, ``metadata``, ``service_tier``, …): taken and not looked at;
- **unsupported**: it would change the answer in a way that this server cannot. Its type here is that of its neutral
  value alone (``tools: null``, ``response_format: {"type": "text"}``), and anything else is refused by name;
- **unknown**: refused by name, so that a misspelt ``max_token`` does not pass for an answer of any length.

``top_k`` and ``ignore_eos`` are not OpenAI's; other servers of this kind have them too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Temperature = Annotated[float, Meta(ge=0, le=2, description="0: the likeliest token each time.")]
TopP = Annotated[float, Meta(gt=0, le=1, description="Of the likeliest tokens whose probabilities sum to this.")]
TopK = Annotated[int, Meta(ge=0, le=1 << 20, description="Of so many likeliest tokens; 0: of all.")]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Choices = Annotated[int, Meta(ge=1, le=128, description="How many answers; choice i draws with seed + i.")]
Seed = Annotated[
    int,
    Meta(
        ge=-(1 << 63),
        le=(1 << 63) - 1,
        description="The same request with the same seed on the same version draws the same tokens.",
    ),
]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=4)] | None
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Model = Annotated[str, Meta(min_length=1, max_length=256, description="The model's name, as /v1/models lists it.")]
Label = Annotated[str, Meta(max_length=256)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``include_usage``: one more event before the end, with the usage and no choices."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The only format of an answer: text."""

    type: Literal["text"] = "text"


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat completions have in common."""

    model: Model
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Choices | None = 1
    temperature: Temperature | None = 1.0
    top_p: TopP | None = 1.0
    top_k: TopK | None = 0
    stop: Stop = None
    seed: Seed | None = None
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    ignore_eos: bool | None = False
    # unsupported
    logit_bias: None = None
    # harmless
    user: Label | None = None


Prompt = str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]


class CompletionRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions. ``prompt``: a text, token ids, or a list of either; not a mixture."""

    prompt: Prompt
    max_tokens: Count | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    # unsupported
    suffix: None = None
    best_of: Choices | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message that is text; no other kind is supported."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a chat. ``developer`` is read as ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Label | None = None
    # what an answer has beside these, so that it can be sent back as it came
    refusal: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Common, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions. ``max_completion_tokens`` wins over ``max_tokens``; neither: the server's bound."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    # unsupported
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1)] | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    reasoning_effort: None = None
    tool_choice: Literal["none"] | None = None
    tools: None = None
    verbosity: None = None
    web_search_options: None = None
    # harmless
    metadata: dict[str, str] | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None
    store: Literal[False] | None = None


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
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


FinishReason = Literal["stop", "length"]


class CompletionLogprobs(msgspec.Struct):
    """One entry for each token: its text, its log-probability (nats), the likeliest, where it begins in ``text``."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
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
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


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


class Delta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


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
