"""What a server serves: one model under one name, in one of four forms, once it is there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

from headwater.gateway.openai_types import ModelCard, VersionCard
from headwater.gateway.problems import no_such_model, not_offered, unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from headwater.gateway.engine_types import EngineStatistics, GenerationRequest, Guide, Handle, OnEvent
    from headwater.types import VersionInfo


class Standing(Protocol):
    """Which versions a model is at, and whether it still hears of new ones. ``EngineStatistics`` is one.

    ``versions``: the numbers in memory; ``version`` answers new requests. ``stale_since``: ``time.time()`` from which
    on no server could be asked, None while one can; ``error`` says why.
    """

    @property
    def version(self) -> VersionInfo: ...
    @property
    def versions(self) -> tuple[int, ...]: ...
    @property
    def swaps(self) -> int: ...
    @property
    def refused_versions(self) -> int: ...
    @property
    def stale_since(self) -> float | None: ...
    @property
    def error(self) -> str: ...


class Generator(Protocol):
    """A language model: ``gateway.engine.Engine``, as the HTTP side sees it."""

    @property
    def version(self) -> VersionInfo: ...
    @property
    def context(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    def encode(self, text: str, *, special: bool = True) -> Sequence[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def spell(self, ids: Sequence[int]) -> str: ...
    def tokenizer_info(self) -> Mapping[str, str | None]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> Sequence[int]: ...
    def guide(self, grammar: str) -> Guide: ...
    def submit(self, request: GenerationRequest, on_event: OnEvent) -> Handle: ...
    def statistics(self) -> EngineStatistics: ...
    def close(self) -> None: ...


class Embedder(Protocol):
    """A sentence encoder. ``width``: of a vector; ``longest``: tokens of a text."""

    @property
    def width(self) -> int: ...
    @property
    def longest(self) -> int: ...
    def encode(self, text: str) -> Sequence[int]: ...
    def embed(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, VersionInfo]: ...
    def statistics(self) -> Standing: ...
    def close(self) -> None: ...


class Predictor(Protocol):
    """Any other module."""

    def predict(
        self, arguments: Sequence[torch.Tensor], named: Mapping[str, torch.Tensor]
    ) -> tuple[Any, VersionInfo]: ...
    def statistics(self) -> Standing: ...
    def close(self) -> None: ...


class Thing(NamedTuple):
    """One thing that is asked about: its bytes, and what kind the client says that it is."""

    body: bytes
    kind: str


class Asked(NamedTuple):
    """A request to a recipe's model. ``single``: one thing came by itself, and not in a list."""

    things: Sequence[Thing]
    parameters: Mapping[str, Any]
    single: bool


class Answerer(Protocol):
    """A recipe's model. ``task``: its name in the Hugging Face API."""

    task: str

    def answer(self, things: Sequence[Thing], parameters: Mapping[str, Any]) -> tuple[list[Any], VersionInfo]: ...
    def statistics(self) -> Standing: ...
    def close(self) -> None: ...


Model = Generator | Embedder | Predictor | Answerer


class Served:
    """A model by the name that clients ask for. It is attached when its first version is there."""

    def __init__(self, name: str, model: Model | None = None) -> None:
        self.name = name
        self.created = int(time.time())
        self.closing = False
        self._model = model

    def attach(self, model: Model) -> None:
        self._model = model

    def standing(self) -> Standing | None:
        return self._model.statistics() if self._model is not None else None

    def engine(self) -> EngineStatistics | None:
        """A language model's own figures."""
        return self._model.statistics() if self._model is not None and _generates(self._model) else None

    def failed(self) -> str:
        """Why a language model's engine answers nothing any more, empty while it does."""
        engine = self.engine()
        return engine.failed if engine is not None else ""

    def generator(self) -> Generator:
        """Raises ``Refusal``: not there yet, or not a language model."""
        model = self._ready()
        if not _generates(model):
            raise not_offered("generation", f"{self.name!r} is not a language model")
        return model

    def embedder(self) -> Embedder:
        """Raises ``Refusal``: not there yet, or not a sentence encoder."""
        model = self._ready()
        if not _embeds(model):
            raise not_offered("/v1/embeddings", f"{self.name!r} is not a sentence encoder")
        return model

    def predictor(self) -> Predictor:
        """Raises ``Refusal``: not there yet, or a model that answers by text or vectors."""
        model = self._ready()
        if not _predicts(model):
            where = "/" if _answers(model) else "the OpenAI-compatible paths"
            raise not_offered("/v1/predict", f"{self.name!r} answers at {where}")
        return model

    def answerer(self) -> Answerer:
        """Raises ``Refusal``: not there yet, or not a model whose recipe answers."""
        model = self._ready()
        if not _answers(model):
            where = "/v1/predict" if _predicts(model) else "the OpenAI-compatible paths"
            raise not_offered("this", f"{self.name!r} answers at {where}")
        return model

    def task(self) -> str:
        """Its name in the Hugging Face API; "" of a module of one's own, and before the model is there."""
        model = self._model
        if model is None or _predicts(model):
            return ""
        if _answers(model):
            return model.task
        return "text-generation" if _generates(model) else "feature-extraction"

    def must_be(self, name: str) -> None:
        """Raises ``Refusal`` if a request names another model."""
        if name != self.name:
            raise no_such_model(name, self.name)

    def _ready(self) -> Model:
        if self.closing:
            raise unavailable("the server is ending; nothing was done", "closing")
        if self._model is None:
            raise unavailable(f"{self.name!r} has no version yet: it is being loaded, or none is published", "loading")
        return self._model

    def card(self) -> ModelCard:
        standing = self.standing()
        return ModelCard(self.name, self.created, version_card(standing.version) if standing else None)

    def close(self) -> None:
        """Close the model, if there is one; safe to call twice."""
        self.closing = True
        if self._model is not None:
            self._model.close()


def _generates(model: Model) -> TypeGuard[Generator]:
    return hasattr(model, "submit")


def _embeds(model: Model) -> TypeGuard[Embedder]:
    return hasattr(model, "embed")


def _predicts(model: Model) -> TypeGuard[Predictor]:
    return hasattr(model, "predict")


def _answers(model: Model) -> TypeGuard[Answerer]:
    return hasattr(model, "answer")


def version_card(version: VersionInfo) -> VersionCard:
    return VersionCard(version.name, version.number, version.step, version.time, version.digest)


def fingerprint(versions: Sequence[VersionInfo]) -> str:
    """``system_fingerprint``: name and number of the version; of all, if a new one came between two choices."""
    return ", ".join(dict.fromkeys(f"{version.name}#{version.number}" for version in versions))
