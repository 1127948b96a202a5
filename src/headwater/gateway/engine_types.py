"""What the engine and its callers say to each other. Light to import: no torch, no transformers.

The engine's errors, beside those of ``headwater.errors``:

UsageError
├── PromptTooLong       the prompt leaves no room in the model's context; HTTP 400
├── PromptInvalid       empty, a token that the vocabulary lacks, a text that cannot be made; HTTP 400
├── GrammarInvalid      no answer can be held to the schema that was sent; HTTP 400
└── GuideMissing        nothing here can hold an answer to a schema; HTTP 400
ClusterError
├── QueueFull           as many requests wait as may; HTTP 429
├── EngineClosed        the engine was closed, is being closed, or has failed; HTTP 503
└── GenerationFailed    the model's forward raised; the other requests go on; HTTP 500
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from headwater.errors import ClusterError, HeadwaterError, UsageError
from headwater.types import VersionInfo

if TYPE_CHECKING:
    import torch

Reason = Literal["stop", "length", "cancelled", "deadline"]
"""Why a generation ended: an end token or a stop string; ``max_tokens`` or the context; the client; the clock."""


class PromptTooLong(UsageError):
    """The prompt leaves no room for an answer in the model's context; nothing was queued."""


class PromptInvalid(UsageError):
    """The prompt cannot be read by this model; nothing was queued."""


class GrammarInvalid(UsageError):
    """No answer can be held to this grammar."""


class GuideMissing(UsageError):
    """The library that holds answers to a grammar is not there, or does not know this tokenizer."""


class QueueFull(ClusterError):
    """As many requests wait as may; nothing was queued. Come back later."""


class EngineClosed(ClusterError):
    """The engine was closed; the request was not answered, or not to its end."""


class GenerationFailed(ClusterError):
    """The model's forward raised; this request has no answer, others go on."""


class Guide(Protocol):
    """Where one answer is in its grammar. It has a state, so each request needs one of its own.

    ``allowed``: which tokens may follow, (vocabulary,) bool; ``push``: this one came; ``complete``: nothing can follow.
    ``warnings``: what of the schema is not enforced.
    """

    def copy(self) -> Guide: ...
    def allowed(self) -> torch.Tensor: ...
    def push(self, token: int) -> None: ...
    @property
    def complete(self) -> bool: ...
    @property
    def warnings(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation. ``prompt``: token ids. ``max_tokens``: 0 reads the prompt alone; the context may end it earlier.

    ``temperature`` 0 is greedy, else logits are divided by it; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 leave all
    tokens. Order: repetition penalty, the other penalties, bias, guide; then as in ``transformers`` temperature, top-k,
    top-p, min-p. ``repetition_penalty`` divides (or multiplies, below zero) the logits of tokens in the prompt or the
    answer. ``frequency_penalty`` (times a token's count) and ``presence_penalty`` (once) are taken off the logits of
    tokens already generated; the prompt does not count. ``logit_bias``: pairs of token id and what its logit gains.
    ``guide``: the grammar that the answer keeps to; its end ends the answer.
    ``seed``: the same request with the same seed on the same version draws the same tokens, whatever runs beside it
    (but for the last bits of float32 logits, which depend on the size of a batch; ``hf.steady`` for half precision).
    ``stop``: texts that end the generation and
    are not emitted. ``deadline``: ``time.monotonic()`` seconds. ``logprobs``: None for none, else how many of the
    likeliest alternatives to name (0: the chosen token's alone), before penalties, temperature and cuts;
    ``prompt_logprobs``: the same of the prompt's tokens, in a ``PromptRead``. ``stop_token_ids`` end it, and have no
    text, as end tokens do. ``ignore_eos``: end tokens do not end it.

    Raises ``UsageError`` for a value out of range.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    deadline: float | None = None
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    prompt_logprobs: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        for holds, problem in (
            (self.max_tokens >= 0, f"max_tokens={self.max_tokens}: 0 or more"),
            (0.0 <= self.temperature < float("inf"), f"temperature={self.temperature}: a finite number, 0 or more"),
            (0.0 < self.top_p <= 1.0, f"top_p={self.top_p}: more than 0, 1 at most"),
            (0.0 <= self.min_p <= 1.0, f"min_p={self.min_p}: 0 to 1"),
            (0.0 < self.repetition_penalty < float("inf"), f"repetition_penalty={self.repetition_penalty}: above 0"),
            (all(abs(bias) < float("inf") for _, bias in self.logit_bias), "logit_bias: finite numbers"),
            (self.top_k >= 0, f"top_k={self.top_k}: 0 (all tokens) or more"),
            (all(self.stop), "stop: an empty text would end every answer before it begins"),
            (self.logprobs is None or self.logprobs >= 0, f"logprobs={self.logprobs}: None, or 0 or more"),
            (
                abs(self.frequency_penalty) < float("inf"),
                f"frequency_penalty={self.frequency_penalty}: a finite number",
            ),
            (abs(self.presence_penalty) < float("inf"), f"presence_penalty={self.presence_penalty}: a finite number"),
        ):
            if not holds:
                raise UsageError(f"this request cannot be run: {problem}; nothing was queued")


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that came, or could have. ``text``: of it alone, U+FFFD for half a character; ``logprob``: in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of a prompt. ``text``: characters that are complete with it; ``alone``: its own, as ``Alternative``.

    ``logprob``: of it behind those before it, None for the first; ``top``: the likeliest at its place.
    """

    text: str
    id: int
    alone: str
    logprob: float | None
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class PromptRead:
    """A prompt and how likely it was; before the first token, if the request asked for ``prompt_logprobs``."""

    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, an end token included.

    ``text`` is what may be shown now: whole characters only, "" while a character is incomplete or a stop text may be
    coming; the last token brings what was held back. The texts of all tokens make the answer.
    ``own`` (the token itself) and ``top`` (likeliest first) are given if the request asked for ``logprobs``.
    """

    text: str
    id: int
    own: Alternative | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """The end of a generation; the last event.

    ``version`` computed every token of it; if none was computed, it is the one that would have. ``text``: what was
    still held back, where no token was the last to bring it.
    """

    reason: Reason
    prompt_tokens: int
    completion_tokens: int
    version: VersionInfo
    text: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The generation ended with an error; the last event."""

    error: HeadwaterError


Event = PromptRead | Token | GenerationEnded | Failed
OnEvent = Callable[[Event], None]


class Weights(Protocol):
    """A leased version: a mapping from names to tensors that are read-only memory until ``release``."""

    @property
    def version(self) -> VersionInfo: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...
    def __len__(self) -> int: ...
    def release(self) -> None: ...


class Source(Protocol):
    """Where versions come from; ``headwater.reader`` is one.

    ``wait`` returns the version of a tag once it is not ``after``, or raises ``DeadlineExceeded``. A source
    that can be out of reach while it waits has ``statistics()`` too, with ``connected`` (bool) and ``error`` (str).
    """

    def lease(self, name: str = "latest") -> Weights: ...
    def wait(self, after: VersionInfo | int, name: str = "latest", timeout: float = 30.0) -> VersionInfo: ...


class Handle(Protocol):
    """A submitted request."""

    @property
    def version(self) -> VersionInfo | None: ...
    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A moment of the engine. Counters count from its start; times are seconds.

    ``running`` requests hold one of ``slots``, ``waiting`` ones do not (``queue`` at most). ``finished``: how many have
    ended, by reason, with "failed" among them. ``versions``: the numbers of those in memory, oldest first; ``version``
    answers new requests. ``refused_versions`` did not fit the model. ``swap_pause``: how long the last swap kept the
    engine's thread from its next step; ``swap_seconds``: what it took beside that thread, from the lease on.
    ``stale_since``: ``time.time()`` since when the source does not answer, None while it does; ``error`` says why, or
    why the last version was refused. ``cache_bytes``: key-value memory now; ``cache_bound``: the most it can become.
    ``failed``: why the engine answers nothing any more, empty while it does.
    """

    running: int
    waiting: int
    slots: int
    queue: int
    prompt_tokens: int
    tokens_generated: int
    finished: Mapping[str, int]
    swaps: int
    refused_versions: int
    versions: tuple[int, ...]
    version: VersionInfo
    steps: int
    last_step_seconds: float
    swap_pause: float
    swap_seconds: float
    stale_since: float | None
    error: str
    cache_bytes: int
    cache_bound: int
    failed: str = ""
