"""Weights change under running generations: every answer is of one version, from its first token to its last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
from torch import Tensor

from headwater.errors import DeadlineExceeded, LinkBroken, ShapeMismatch, UnknownVersion
from headwater.gateway.engine import Engine
from headwater.gateway.engine_types import EngineClosed, GenerationFailed
from headwater.gateway.hf import ModelFolder
from headwater.gateway.sources import MemorySource, MemoryWeights
from headwater.types import VersionInfo
from tests.gateway.engine_models import PATIENCE, Client, Swapper, ask, folder, greedy, prompts, reference, values

COUNT = 24


@pytest.fixture(scope="module")
def model() -> ModelFolder:
    return folder()


@pytest.fixture(scope="module")
def versions() -> list[dict[str, Tensor]]:
    return [values(seed) for seed in (1, 2, 3)]


@pytest.fixture
def start(model: ModelFolder) -> Iterator[Callable[..., Swapper]]:
    made: list[Swapper] = []

    def begin(source: MemorySource | None = None, **options: object) -> Swapper:
        made.append(Swapper(model, source or MemorySource("tiny"), **options))
        return made[-1]

    yield begin
    for each in made:
        each.engine.close()


def test_a_generation_ends_on_the_version_it_began_with(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start()
    after = Client()

    def swap(n: int) -> None:
        if n == 5:
            swapper.publish(versions[0])
            swapper.engine.submit(greedy(b"same", COUNT), after)

    before, _ = ask(swapper.engine, greedy(b"same", COUNT), Client(swap))
    assert before.finished().version.number == 0
    assert after.finished().version.number == 1
    old, new = reference(b"same", COUNT), reference(b"same", COUNT, versions[0])
    assert sum(a == b for a, b in zip(old, new, strict=True)) <= 1, "the versions must be told apart by every token"
    assert before.ids == old
    assert after.ids == new
    assert swapper.engine.version.number == 1


def test_many_generations_and_many_swaps_never_mix(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start()
    asked = [(p, 3 + 5 * (i % 7)) for i, p in enumerate(prompts(40, seed=3))]
    published: dict[int, dict[str, Tensor] | None] = {0: None}

    def swap(n: int) -> None:
        if n == 2:
            tensors = versions[len(published) % len(versions)]
            published[swapper.publish(tensors).number] = tensors

    clients = [
        ask(swapper.engine, greedy(*a), Client(swap if i % 2 else lambda _: None))[0] for i, a in enumerate(asked)
    ]
    ends = [client.finished() for client in clients]
    assert len({end.version.number for end in ends}) >= 5
    for (prompt, count), client, end in zip(asked, clients, ends, strict=True):
        assert client.ids == reference(prompt, count, published[end.version.number]), end.version
    assert 10 <= swapper.engine.statistics().swaps <= len(published) - 1  # two in one step: the newer is taken
    assert swapper.engine.statistics().finished == {"length": 40}
    assert set(swapper.source.leases) == {swapper.engine.version.number}


def test_versions_and_leases_go_when_their_last_generation_ends(
    versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start()
    engine, leases = swapper.engine, swapper.source.leases
    live: list[tuple[int, ...]] = []

    def swap_again(n: int) -> None:
        if n == 3:
            swapper.publish(versions[1])
        live.append(engine.statistics().versions)

    newer = Client(swap_again)

    def swap(n: int) -> None:
        if n == 2:
            swapper.publish(versions[0])
            engine.submit(greedy(b"b", 12), newer)

    older, _ = ask(engine, greedy(b"a", 40), Client(swap))
    older.wait()
    assert live[-1] == (0, 1, 2)
    last, _ = ask(engine, greedy(b"c", 2))
    last.wait()
    assert engine.statistics().versions == (2,)
    assert leases == {2: 1}


def test_another_clusters_version_of_the_same_number_is_another_version(
    versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start()
    source, newer = swapper.source, Client()

    def swap(n: int) -> None:
        if n == 2:
            swapper.publish(versions[0])
        elif n == 4:  # version 0 is in use
            with source._changed:
                source._newest = msgspec.structs.replace(source._newest, number=-1)
                swapper._ready.clear()
                source.publish(versions[1])
            assert swapper._ready.wait(PATIENCE)
            swapper.engine.submit(greedy(b"same", COUNT), newer)

    older, _ = ask(swapper.engine, greedy(b"same", COUNT), Client(swap))
    assert (older.finished().version.number, older.finished().version.name) == (0, "base")
    assert (newer.finished().version.number, newer.finished().version.name) == (0, "v0")
    assert older.ids == reference(b"same", COUNT)
    assert newer.ids == reference(b"same", COUNT, versions[1])


def test_an_engine_that_fails_lets_nobody_wait(start: Callable[..., Swapper]) -> None:
    engine = start().engine

    def fail(n: int) -> None:
        engine._step = lambda: 1 // 0  # type: ignore[method-assign, assignment, return-value]

    running, _ = ask(engine, greedy(b"x", COUNT), Client(fail))
    assert isinstance(running.error(), EngineClosed)
    with pytest.raises(EngineClosed, match="the engine has failed"):
        engine.submit(greedy(b"x", 1), Client())
    assert engine.statistics().failed == "ZeroDivisionError('integer division or modulo by zero')"


def test_memory_of_versions_that_pile_up_is_bounded(
    versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start(slots=4)
    seen: list[tuple[int, int, int]] = []

    def swap(n: int) -> None:
        now = swapper.engine.statistics()
        seen.append((len(now.versions), now.cache_bytes, now.cache_bound))
        if n == 1:
            swapper.publish(versions[0])

    clients = [ask(swapper.engine, greedy(b"x" * 30, 90 + i), Client(swap))[0] for i in range(12)]
    for client in clients:
        client.finished()
    assert max(count for count, _, _ in seen) >= 3
    assert all(count <= 4 + 1 and held <= bound for count, held, bound in seen)


def test_an_old_version_gives_memory_back_row_by_row(
    versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start(slots=4, chunk=100)
    held: dict[int, int] = {}

    def swap(n: int) -> None:
        held[n] = swapper.engine.statistics().cache_bytes
        if n == 2:
            swapper.publish(versions[0])

    clients = [ask(swapper.engine, greedy(b"x", 6))[0] for _ in range(3)]
    clients.append(ask(swapper.engine, greedy(b"x", 20), Client(swap))[0])
    for client in clients:
        assert client.finished().version.number == 0
    assert held[20] * 4 == held[4] > 0


def test_weights_are_not_copied(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start()
    swapper.publish(versions[0])
    client, _ = ask(swapper.engine, greedy(b"x", 1))
    client.wait()
    for name, parameter in model.module.named_parameters():
        assert parameter.data_ptr() == versions[0][name].data_ptr()
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_version_of_some_parameters_keeps_the_others(model: ModelFolder, start: Callable[..., Swapper]) -> None:
    swapper = start()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {name: values(5)[name]}
    swapper.publish(tensors)
    client, _ = ask(swapper.engine, greedy(b"partly", COUNT))
    assert client.finished().version.number == 1
    assert client.ids == reference(b"partly", COUNT, tensors)
    assert client.ids != reference(b"partly", COUNT)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.norm.weight", (31,), r"'model.norm.weight' has shape \(31,\) there and \(32,\) here"),
        ("model.nothing", (2, 3), r"'model.nothing' of shape \(2, 3\), which the model lacks"),
    ],
)
def test_a_version_that_does_not_fit_is_passed_over(
    model: ModelFolder,
    versions: list[dict[str, Tensor]],
    start: Callable[..., Swapper],
    name: str,
    shape: tuple[int, ...],
    words: str,
) -> None:
    swapper = start()
    swapper.publish(versions[0])
    swapper.source.publish({**versions[1], name: torch.zeros(shape)})
    swapper.publish(versions[2])  # ready only after the one before was refused
    now = swapper.engine.statistics()
    client, _ = ask(swapper.engine, greedy(b"x", COUNT))
    assert client.finished().version.number == 3
    assert client.ids == reference(b"x", COUNT, versions[2])
    assert now.refused_versions <= 1  # 0 if the third came before the second was looked at
    assert now.error == ""
    misfit = MemorySource("tiny")
    misfit.publish({name: torch.zeros(shape)})
    with pytest.raises(ShapeMismatch, match=words):
        Engine(model, misfit)
    assert misfit.leases == {}


class Flaky(MemorySource):
    """A source that can be cut off."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.broken = False
        self.asked = threading.Semaphore(0)

    def wait(self, after: VersionInfo | int, name: str = "latest", timeout: float = 30.0) -> VersionInfo:
        if self.broken:
            self.asked.release()
            raise LinkBroken("no server answers")
        return super().wait(after, name, timeout)

    def lease(self, name: str = "latest") -> MemoryWeights:
        if self.broken:
            raise LinkBroken("no server answers")
        return super().lease(name)


def test_a_source_out_of_reach_fails_no_request(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    source = Flaky("tiny")
    swapper = start(source)
    swapper.publish(versions[0])
    source.broken = True
    source.publish(versions[1])  # nobody hears of it
    for _ in range(3):
        assert source.asked.acquire(timeout=PATIENCE)
    client, _ = ask(swapper.engine, greedy(b"x", COUNT))
    assert client.finished().version.number == 1
    now = swapper.engine.statistics()
    assert now.stale_since is not None
    assert now.error == "no server answers"
    source.broken = False
    assert swapper._ready.wait(PATIENCE)
    swapper.publish(versions[2])
    client, _ = ask(swapper.engine, greedy(b"x", COUNT))
    assert client.finished().version.number == 3
    now = swapper.engine.statistics()
    assert (now.stale_since, now.error) == (None, "")


class Late(MemorySource):
    """A source whose versions do not come in time."""

    late = False

    def lease(self, name: str = "latest") -> MemoryWeights:
        if self.late:
            raise DeadlineExceeded("the fetch takes longer than the reader's timeout")
        return super().lease(name)


def test_a_version_that_does_not_come_in_time_is_said(
    versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    source = Late("tiny")
    swapper = start(source)
    source.late = True
    source.publish(versions[0])
    deadline = time.monotonic() + PATIENCE
    while "takes longer" not in swapper.engine.statistics().error and time.monotonic() < deadline:
        threading.Event().wait(0.002)
    assert "takes longer" in swapper.engine.statistics().error
    source.late = False
    assert swapper._ready.wait(PATIENCE)
    client, _ = ask(swapper.engine, greedy(b"x", COUNT))
    assert client.finished().version.number == 1
    assert swapper.engine.statistics().error == ""


class Empty(MemorySource):
    """A source without a version until one is published."""

    def lease(self, name: str = "latest") -> MemoryWeights:
        if self._newest.number == 0:
            raise UnknownVersion("nothing was published yet")
        return super().lease(name)


def test_before_the_first_version_the_base_answers(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    with pytest.raises(UnknownVersion):
        Engine(model, Empty("tiny"))
    base = VersionInfo("tiny", 0, "pretrained", 0, 0, 0.0, (), 0, "")
    swapper = start(Empty("tiny"), base=base)
    client, _ = ask(swapper.engine, greedy(b"x", COUNT))
    assert client.finished().version == base
    assert client.ids == reference(b"x", COUNT)
    swapper.publish(versions[0])
    client, _ = ask(swapper.engine, greedy(b"x", COUNT))
    assert client.finished().version.number == 1


def test_weights_that_are_not_finite_fail_their_requests_only(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    swapper = start()
    damaged = {name: torch.full_like(tensor, torch.nan) for name, tensor in versions[0].items()}
    unlucky, after = Client(), Client()

    def swap(n: int) -> None:
        if n == 2:
            swapper.publish(damaged)
            swapper.engine.submit(greedy(b"b", 5), unlucky)
        if n == 6:
            swapper.publish(versions[1])
            swapper.engine.submit(greedy(b"c", COUNT), after)

    lucky, _ = ask(swapper.engine, greedy(b"a", COUNT), Client(swap))
    assert isinstance(unlucky.error(), GenerationFailed)
    assert "not" in str(unlucky.error()) or "NaN" in str(unlucky.error())
    lucky.wait()
    after.wait()
    assert lucky.ids == reference(b"a", COUNT)
    assert after.ids == reference(b"c", COUNT, versions[1])


def test_versions_of_another_dtype(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in versions[0].items()}
    swapper = start()
    swapper.publish(halves)
    client, _ = ask(swapper.engine, greedy(b"x", 3))
    assert client.finished().version.number == 1
    assert model.module.model.norm.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    wide = start(dtype=torch.float32)
    wide.publish(halves)
    client, _ = ask(wide.engine, greedy(b"x", COUNT))
    client.wait()
    assert client.ids == reference(b"x", COUNT, {name: t.float() for name, t in halves.items()})


def test_a_tag_that_moves_back(
    model: ModelFolder, versions: list[dict[str, Tensor]], start: Callable[..., Swapper]
) -> None:
    """A rollback while both versions are in use: the older one, still running, answers new requests again."""

    class Tagged(MemorySource):
        def move(self, back: bool) -> None:
            with self._changed:
                self._newest, self._tensors = self.history[0 if back else 1]
                self._changed.notify_all()

        def publish(self, tensors: dict[str, Tensor], name: str = "") -> VersionInfo:  # type: ignore[override]
            info = super().publish(tensors, name)
            self.history.append((info, tensors))
            return info

        history: list[tuple[VersionInfo, dict[str, Tensor]]] = []  # noqa: RUF012

    source = Tagged("tiny")
    source.publish(versions[0])
    swapper = start(source)
    again = Client()

    def swap(n: int) -> None:
        if n == 2:
            swapper.publish(versions[1])
        if n == 4:
            swapper._ready.clear()
            source.move(back=True)
            assert swapper._ready.wait(PATIENCE)
            swapper.engine.submit(greedy(b"b", COUNT), again)

    first, _ = ask(swapper.engine, greedy(b"a", COUNT), Client(swap))
    assert again.finished().version.number == 1
    assert again.ids == reference(b"b", COUNT, versions[0])
    assert first.finished().version.number == 1
    assert first.ids == reference(b"a", COUNT, versions[0])


def test_a_wait_that_only_timed_out_is_not_an_error(model: ModelFolder, start: Callable[..., Swapper]) -> None:
    class Impatient(MemorySource):
        asked = threading.Semaphore(0)

        def wait(self, after: VersionInfo | int, name: str = "latest", timeout: float = 30.0) -> VersionInfo:
            self.asked.release()
            if after in (self._newest, self._newest.number):
                raise DeadlineExceeded("still")
            return super().wait(after, name, timeout)

    source = Impatient("tiny")
    swapper = start(source)
    for _ in range(3):
        assert source.asked.acquire(timeout=PATIENCE)
    assert swapper.engine.statistics().stale_since is None
