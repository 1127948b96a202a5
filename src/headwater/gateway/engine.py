"""The generation engine: continuous batching on weights that change meanwhile.

One thread computes. Each of its steps takes the scheduler's plan: read some of a prompt, then one token for every
running sequence, with one forward for each version that is in use. A second thread follows the source: it leases the
next version and makes it ready, and the computing thread takes it between two steps, by a pointer. A generation ends
on the version that it began on; a version and its lease are given back when its last generation has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headwater.errors import HeadwaterError
from headwater.gateway.cache import KeyValues, Window
from headwater.gateway.detokenize import Detokenizer, StopTexts
from headwater.gateway.engine_types import (
    EngineClosed,
    EngineStatistics,
    Event,
    Failed,
    GenerationEnded,
    GenerationFailed,
    GenerationRequest,
    Guide,
    OnEvent,
    PromptInvalid,
    PromptTooLong,
    Reason,
    Source,
    Token,
)
from headwater.gateway.follow import StagedVersion, VersionFollower
from headwater.gateway.prompt_scores import PromptScores
from headwater.gateway.sampling import Choice, Sampler, Warper, likeliest
from headwater.gateway.scheduler import Chunk, Scheduler, Sequence
from headwater.gateway.weights import Bindable
from headwater.types import VersionInfo

_log = logging.getLogger(__name__)


class Model(Protocol):
    """What the engine needs of a model; ``hf.ModelFolder`` is one."""

    name: str
    module: nn.Module
    context: int
    eos: frozenset[int]
    vocabulary: int
    layers: int

    def forward(self, ids: Tensor, window: Window, past: KeyValues, dtype: torch.dtype, keep: int = 1) -> Tensor: ...
    def warpers(self, request: GenerationRequest) -> list[Warper]: ...
    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]: ...
    def decode(self, ids: Seq[int]) -> str: ...
    def spell(self, ids: Seq[int]) -> str: ...
    def tokenizer_info(self) -> Mapping[str, str | None]: ...
    def guide(self, grammar: str) -> Guide: ...
    def special(self, token: int) -> str: ...
    def apply_chat_template(
        self,
        messages: Seq[Mapping[str, Any]],
        tools: Seq[Mapping[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> tuple[int, ...]: ...


@dataclass(slots=True)
class _Live:
    """A version in use: its tensors, its lease, and the keys and values of the sequences that run on it."""

    ready: StagedVersion
    past: KeyValues


@dataclass(slots=True)
class _Answer:
    """What the engine keeps of a request: where its events go and how its tokens become text."""

    on_event: OnEvent
    sampler: Sampler
    text: Detokenizer
    stops: StopTexts
    scores: PromptScores | None = None
    version: VersionInfo | None = None
    last: int = 0
    over: bool = False


_Running = Sequence[_Answer]


class EngineHandle:
    """A submitted request."""

    def __init__(self, sequence: _Running) -> None:
        self._sequence = sequence

    @property
    def version(self) -> VersionInfo | None:
        """The version that answers; None while the request waits for a slot."""
        return self._sequence.extra.version

    def cancel(self) -> None:
        """The client is gone: the request ends before the next step, and its slot is free. Twice does nothing."""
        self._sequence.cancelled = True


class Engine:
    """Generates for many requests at once on the newest weights of ``source``.

    ``slots`` requests run together, ``queue`` more may wait. ``chunk``: tokens of prompts that are read between two
    tokens of the running answers. ``tag``: which version to follow. ``dtype``: compute in it, by a copy of each version
    that has another; default: the version's own, without a copy. ``base``: if the source has nothing yet, begin on the
    model's own values under this name. ``retry``: seconds between questions to a source that does not answer.

    Key-value memory is at most 2 × ``slots`` × the model's context, and grows with what is in use.
    Raises what ``source.lease`` raises, and ``ShapeMismatch`` if its first version does not fit the model.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        *,
        slots: int = 8,
        queue: int = 64,
        chunk: int = 64,
        tag: str = "latest",
        dtype: torch.dtype | None = None,
        base: VersionInfo | None = None,
        retry: float = 1.0,
    ) -> None:
        self._model = model
        self._weights = Bindable(model.module, dtype)
        self._scheduler: Scheduler[_Answer] = Scheduler(slots, queue, chunk)
        self._work = threading.Condition()
        self._closing = False
        self._failed = ""
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._last_step = self._swap_pause = self._swap_seconds = 0.0
        self._position_bytes = 0
        self._live: dict[int, _Live] = {}  # by keys of our own: another cluster's versions count from 1 again
        self._keys = count(1)
        self._follower = VersionFollower(source, self._weights.fit, self._wake, tag=tag, retry=retry)
        self._newest, self._current = self._take(self._follower.first(base))
        self._warm_up()
        self._thread = threading.Thread(target=self._run, name="headwater-engine", daemon=True)
        self._thread.start()
        self._follower.start(self._newest)

    # What callers on other threads use.

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> EngineHandle:
        """Queue a request. ``on_event`` is called on the engine's thread and must not block; the last event is
        ``GenerationEnded`` or ``Failed``.

        Raises ``QueueFull``, ``PromptTooLong``, ``PromptInvalid`` or ``EngineClosed``; then nothing was queued.
        """
        self._check(request.prompt, generating=request.max_tokens > 0)
        answer = _Answer(
            on_event,
            Sampler(request, self._model.warpers(request), self._spell),
            Detokenizer(self._model.decode, request.prompt),
            StopTexts(request.stop),
        )
        if request.prompt_logprobs is not None:
            answer.scores = PromptScores(request, self._model.decode, self._spell)
        sequence = Sequence(request, answer)
        with self._work:
            if self._closing:
                raise EngineClosed(f"{self._end_of_it}; nothing was queued: ask another one")
            self._scheduler.add(sequence)
            self._work.notify()
        return EngineHandle(sequence)

    def _spell(self, ids: Seq[int]) -> str:
        """A token by itself, for those who ask for logprobs: special ones have a text there."""
        return self._model.special(ids[0]) or self._model.decode(ids)

    def _check(self, prompt: tuple[int, ...], *, generating: bool) -> None:
        if not prompt:
            raise PromptInvalid("the prompt has no tokens; nothing was queued: send at least one")
        if len(prompt) + generating > self._model.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens; this model's maximum context length is {self._model.context} "
                "with the answer; nothing was queued: shorten it"  # words that clients look for (LiteLLM)
            )
        if not 0 <= min(prompt) <= max(prompt) < self._model.vocabulary:
            raise PromptInvalid(f"token ids go from 0 to {self._model.vocabulary - 1} here; nothing was queued")

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The tokens of a text, if ``special`` with those that belong around one."""
        return self._model.encode(text, special=special)

    def decode(self, ids: Seq[int]) -> str:
        """The text of tokens, without special ones."""
        return self._model.decode(ids)

    def spell(self, ids: Seq[int]) -> str:
        """The text of tokens, special ones among them; or ``PromptInvalid``."""
        return self._model.spell(ids)

    def tokenizer_info(self) -> Mapping[str, str | None]:
        """The tokenizer's class, special tokens and chat template."""
        return self._model.tokenizer_info()

    def apply_chat_template(
        self,
        messages: Seq[Mapping[str, Any]],
        tools: Seq[Mapping[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> tuple[int, ...]:
        """The tokens of a conversation, up to where the answer begins; or ``PromptInvalid``."""
        return self._model.apply_chat_template(messages, tools, answer=answer)

    def guide(self, grammar: str) -> Guide:
        """What holds an answer to a grammar; or ``GrammarInvalid``, ``GuideMissing``."""
        return self._model.guide(grammar)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._model.vocabulary

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._model.context

    @property
    def version(self) -> VersionInfo:
        """The version that a new request would begin on."""
        return self._newest

    def statistics(self) -> EngineStatistics:
        """A moment of the engine."""
        with self._work:
            live = list(self._live.values())
            return EngineStatistics(
                running=self._scheduler.running,
                waiting=len(self._scheduler.waiting),
                slots=self._scheduler.slots,
                queue=self._scheduler.queue,
                prompt_tokens=self._counts["prompt_tokens"],
                tokens_generated=self._counts["tokens"],
                finished=dict(self._finished),
                swaps=self._counts["swaps"],
                refused_versions=self._follower.refused,
                versions=tuple(each.ready.binding.version.number for each in live),
                version=self._newest,
                steps=self._counts["steps"],
                last_step_seconds=self._last_step,
                swap_pause=self._swap_pause,
                swap_seconds=self._swap_seconds,
                stale_since=self._follower.stale_since,
                error=self._follower.error,
                cache_bytes=sum(each.past.nbytes for each in live),
                cache_bound=2 * self._scheduler.slots * self._model.context * self._position_bytes,
                failed=self._failed,
            )

    def close(self, timeout: float = 30.0) -> None:
        """End: requests that run or wait get ``Failed`` (``EngineClosed``), leases are released. Twice does nothing."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        self._follower.close(timeout)
        self._thread.join(timeout)

    @property
    def _end_of_it(self) -> str:
        return "the engine has failed, its log says why" if self._failed else "the gateway is shutting down"

    def _warm_up(self) -> None:
        """One token through the model: it is known to run, and how large a position is."""
        live = self._live[self._current]
        try:
            with torch.inference_mode():
                self._forward(live, torch.tensor([[0]]), Window(0, torch.tensor([[0]]), 1))
        except BaseException:
            live.ready.release()
            raise
        live.past.free()

    def _wake(self) -> None:
        with self._work:
            self._work.notify_all()

    # The computing thread.

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                while self._wait_for_work():
                    self._swap()
                    began = time.perf_counter()
                    if self._step():
                        self._last_step = time.perf_counter() - began
                    self._retire()
            except Exception as error:  # noqa: BLE001 - whatever it is, else requests would wait for ever
                self._failed = repr(error)
                _log.exception("the engine of %s has failed and answers no more: restart it", self._model.name)
            with self._work:
                self._closing = True
            self._shut()

    def _wait_for_work(self) -> bool:
        with self._work:
            self._work.wait_for(
                lambda: self._closing or self._scheduler.running or self._scheduler.waiting or self._follower.has_next
            )
            return not self._closing

    def _step(self) -> bool:
        """One plan; False if there was nothing to do."""
        with self._work:
            plan = self._scheduler.plan(time.monotonic(), self._current)
        for sequence, reason in plan.over:
            self._finish(sequence, reason)
        for sequence in plan.begun:
            sequence.extra.version = self._newest
        for chunk in plan.chunks:
            self._attempt([chunk.sequence], partial(self._read, chunk))
        for version in plan.versions:
            running = self._scheduler.generating(version)
            if running:
                self._attempt(running, partial(self._generate, running, self._live[version]))
        self._counts["steps"] += not plan.empty
        return not plan.empty

    def _attempt(self, sequences: list[_Running], work: Callable[[], None]) -> None:
        """Do ``work``; if it raises, those whose work it was fail, and nobody else."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever a model raises, the engine goes on
            _log.exception("a forward of %s failed", self._model.name)
            failure = error if isinstance(error, HeadwaterError) else _forward_failed(error)
            for sequence in sequences:
                self._fail(sequence, failure)

    def _read(self, chunk: Chunk[_Answer]) -> None:
        """Some of a prompt; behind its last token comes the answer's first."""
        sequence = chunk.sequence
        scores = sequence.extra.scores
        live = self._live[sequence.version or 0]
        ids = torch.tensor([sequence.request.prompt[chunk.start : chunk.stop]])
        window = Window(self._scheduler.row(sequence), torch.arange(chunk.start, chunk.stop)[None], chunk.stop)
        logits = self._forward(live, ids, window, keep=ids.shape[1] if scores else 1)
        if scores:
            if None in likeliest(logits):
                raise _not_finite()
            scores.take(chunk.start, logits)
        sequence.length = chunk.stop
        self._counts["prompt_tokens"] += chunk.stop - chunk.start
        if sequence.decoding:
            self._begin(sequence, logits[-1:])

    def _begin(self, sequence: _Running, logits: Tensor) -> None:
        """The prompt has been read. ``logits``: (1, vocabulary), of the answer's first token."""
        if sequence.extra.scores:
            self._tell(sequence, sequence.extra.scores.read())
        if sequence.request.max_tokens:
            self._deliver([sequence], logits)
        else:
            self._finish(sequence, "length")

    def _generate(self, running: list[_Running], live: _Live) -> None:
        """One token for each of a version's sequences."""
        lengths = [s.length for s in running]
        ids = torch.tensor([[s.extra.last] for s in running])
        window = Window(0, torch.tensor(lengths)[:, None], max(lengths) + 1)
        logits = self._forward(live, ids, window)
        # For all of them before any of them leaves: rows move by what is stored.
        for sequence in running:
            sequence.length += 1
        self._deliver(running, logits)

    def _forward(self, live: _Live, ids: Tensor, window: Window, keep: int = 1) -> Tensor:
        live.past.reserve(window.first + window.rows, window.length)
        self._weights.bind(live.ready.binding)
        logits = self._model.forward(ids, window, live.past, live.ready.binding.dtype, keep)
        self._position_bytes = live.past.nbytes_of_position
        return logits

    def _deliver(self, sequences: list[_Running], logits: Tensor) -> None:
        for sequence, token, row in zip(sequences, likeliest(logits), logits, strict=True):
            self._attempt([sequence], partial(self._extend, sequence, token, row))

    def _extend(self, sequence: _Running, likeliest: int | None, logits: Tensor) -> None:
        """One token more, as text, and the end of the sequence if it was the last."""
        if likeliest is None:
            raise _not_finite()
        request, answer = sequence.request, sequence.extra
        choice = Choice(likeliest) if answer.sampler.plain else answer.sampler.pick(logits)
        answer.last = choice.id
        sequence.generated += 1
        self._counts["tokens"] += 1
        ended = choice.id in request.stop_token_ids or (choice.id in self._model.eos and not request.ignore_eos)
        said, special = ("", "") if ended else (answer.text.push(choice.id), self._model.special(choice.id))
        text, stopped = answer.stops.push(said, special)
        ended = ended or (request.guide is not None and request.guide.complete)
        full = sequence.generated >= request.max_tokens or sequence.length + 1 >= self._model.context
        if not stopped and (ended or full):
            rest, stopped = _rest(answer)
            text += rest
        reason: Reason | None = "stop" if ended or stopped else "length" if full else None
        self._tell(sequence, Token(text, choice.id, choice.own, choice.top))
        if reason:
            self._finish(sequence, reason)

    def _finish(self, sequence: _Running, reason: Reason) -> None:
        version = sequence.extra.version or self._newest
        self._leave(sequence)
        self._finished[reason] += 1
        text = _rest(sequence.extra)[0] if reason in ("deadline", "cancelled") else ""
        self._tell(sequence, GenerationEnded(reason, len(sequence.request.prompt), sequence.generated, version, text))

    def _fail(self, sequence: _Running, error: HeadwaterError) -> None:
        if sequence.extra.over:
            return
        self._leave(sequence)
        self._finished["failed"] += 1
        self._tell(sequence, Failed(error))

    def _tell(self, sequence: _Running, event: Event) -> None:
        try:
            sequence.extra.on_event(event)
        except Exception:  # noqa: BLE001 - a listener's error is its own
            _log.exception("whoever asked cannot be told; the request is cancelled")
            sequence.cancelled = True

    def _leave(self, sequence: _Running) -> None:
        """Free a sequence's slot, and close the gap in the memory of its version."""
        sequence.extra.over = True
        if sequence.version is None:
            return
        past = self._live[sequence.version].past
        with self._work:
            vacated = self._scheduler.leave(sequence)
        # A forward that raised may have written beyond what counts as stored.
        past.clear(vacated.row, vacated.length + self._scheduler.chunk)
        for source, target, length in vacated.moves:
            past.move(source, target, length)
        if sequence.version not in self._scheduler.batches:
            past.free()

    # Versions.

    def _take(self, ready: StagedVersion) -> tuple[VersionInfo, int]:
        past = KeyValues(self._model.layers, self._scheduler.slots, self._model.context)
        key = next(self._keys)
        with self._work:
            self._live[key] = _Live(ready, past)
        return ready.binding.version, key

    def _swap(self) -> None:
        """If the follower has a version ready, new requests begin on it from here on."""
        ready = self._follower.take()
        if ready is None:
            return
        began = time.perf_counter()
        version = ready.binding.version
        known = next((key for key, live in self._live.items() if live.ready.binding.version == version), None)
        if known is not None:  # the tag came back to a version that is still in use
            ready.release()
            self._newest, self._current = version, known
        else:
            self._newest, self._current = self._take(ready)
        self._retire()
        self._weights.bind(self._live[self._current].ready.binding)
        self._swap_pause, self._swap_seconds = time.perf_counter() - began, ready.seconds
        self._counts["swaps"] += 1
        _log.info("version %s (number %d, step %d) answers from now on", version.name, version.number, version.step)

    def _retire(self) -> None:
        """Give back versions that nobody uses any more, and the memory of rows that an old one does not need."""
        for key in [key for key in self._live if key != self._current]:
            rows = self._scheduler.batches.get(key)
            if rows:
                self._live[key].past.shrink(len(rows))
            else:
                self._drop(key)

    def _drop(self, key: int) -> None:
        with self._work:
            live = self._live.pop(key)
        self._weights.forget(live.ready.binding)
        live.ready.release()

    def _shut(self) -> None:
        with self._work:
            left = [*self._scheduler.waiting, *(s for rows in self._scheduler.batches.values() for s in rows)]
            self._scheduler.waiting.clear()
        for sequence in left:
            self._fail(sequence, EngineClosed(f"{self._end_of_it}; the answer was not ended: ask another one"))
        for key in list(self._live):
            self._drop(key)


def _rest(answer: _Answer) -> tuple[str, bool]:
    """What is held back of an answer that ends, and whether a stop text is in it."""
    text, stopped = answer.stops.push(answer.text.flush())
    return text + ("" if stopped else answer.stops.flush()), stopped


def _not_finite() -> GenerationFailed:
    return GenerationFailed(
        "the model's logits are NaN or infinite: this version's weights are damaged, or its training has diverged; "
        "the generation was given up: ask for an older version, or publish a better one"
    )


def _forward_failed(error: Exception) -> GenerationFailed:
    return GenerationFailed(
        f"the model raised {type(error).__name__}: {error}; this request was given up, others go on: "
        "if it happens again, the model or the version does not suit the gateway"
    )
