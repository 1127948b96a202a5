"""Modules that are kept current: swapped between two forwards, all tensors at once, or not at all."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import headwater
from headwater.client import Client, Dense
from headwater.errors import DeadlineExceeded, LinkBroken, ShapeMismatch, UsageError
from headwater.readers import Follower, Reader
from headwater.readers import follow as follow_module
from headwater.types import DenseSpec, Init, OptimizerSpec, ParameterSpec
from tests.patience import PATIENCE


class Net(torch.nn.Module):
    """Nested, with tied weights, a buffer that is kept and one that is not. All its tensors have one value each."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width, dtype=dtype)
        self.inner = torch.nn.Sequential(torch.nn.Linear(width, width, dtype=dtype), torch.nn.Identity())
        self.last = torch.nn.Linear(width, width, bias=False, dtype=dtype)
        self.last.weight = self.first.weight
        self.register_buffer("mean", torch.zeros(width, dtype=dtype))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.between: Callable[[], None] = lambda: None

    def forward(self, nothing: torch.Tensor | None = None) -> set[float]:
        """The values of all its tensors, read in two halves."""
        seen = {float(x) for p in (self.first.weight, self.first.bias) for x in p.detach().reshape(-1)[:2]}
        self.between()
        rest = (self.inner[0].weight, self.inner[0].bias, self.last.weight, self.mean)
        return seen | {float(x) for p in rest for x in torch.as_tensor(p).detach().reshape(-1)[:2]}


class Trainer:
    """Publishes versions of a ``Net``; version n has the value n everywhere."""

    def __init__(self, name: str, width: int = 8) -> None:
        self.ps: Client = headwater.connect(f"inproc://{name}", servers=2, timeout=PATIENCE)
        net = Net(width)
        shapes = {k: tuple(torch.as_tensor(p).shape) for k, p in [*net.named_parameters(), ("mean", net.mean)]}
        parameters = tuple(ParameterSpec(k, shape, init=Init("zeros")) for k, shape in shapes.items())
        self.table = self.ps.table(DenseSpec("net", parameters, OptimizerSpec("SGD", ({"lr": 1.0},))))
        self.shapes = shapes
        self.number = 0

    def publish(self, *, tag: str = "") -> int:
        self.number += 1
        self.table.assign({k: torch.full(shape, float(self.number)) for k, shape in self.shapes.items()})
        self.ps.publish([self.table], f"v{self.number}", tags=[tag] if tag else []).wait()
        return self.number


@pytest.fixture
def trainer(request: pytest.FixtureRequest) -> Iterator[Trainer]:
    made = Trainer(f"follow-{request.node.name}")
    yield made
    made.ps.close()


@pytest.fixture
def reader(trainer: Trainer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with headwater.reader("net", f"inproc://follow-{request.node.name}", timeout=PATIENCE) as made:
        yield made


def until(done: Callable[[], bool], what: str) -> None:
    """Until something that other threads do is done."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)


def staged(follower: Follower, number: int) -> None:
    def there() -> bool:
        found = follower._staged
        return found is not None and found.weights.version.number == number

    until(there, f"version {number} was not staged")


def current(net: Net, follower: Follower, number: int) -> None:
    """Forwards until one is of this version."""
    until(lambda: net() == {float(number)}, f"version {number} never came: {follower.statistics()}")


# ---- swaps -----------------------------------------------------------------------------------------------


def test_a_module_is_current_from_the_first_forward_on(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    addresses = {id(p) for p in net.parameters()}
    with reader.follow(net) as follower:
        assert net() == {1.0}
        trainer.publish()
        current(net, follower, 2)
        assert net.version is not None
        assert net.version.number == follower.version.number == 2  # type: ignore[union-attr]
        assert net.last.weight is net.first.weight
        assert {id(p) for p in net.parameters()} == addresses  # optimizers, hooks and other references stay
        stats = follower.statistics()
        assert (stats.swaps, stats.error) == (2, "")
        assert 0 < stats.pause < stats.sync
    assert net() == {2.0}
    until(lambda: reader.statistics().leases == 0, "the versions before are still leased")


def test_a_forward_ends_on_the_version_that_it_began_with(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net) as follower:

        def meanwhile() -> None:
            trainer.publish()
            staged(follower, 2)
            assert net.inner(torch.zeros(1, 8)).shape == (1, 8)

        net.between = meanwhile
        assert net() == {1.0}
        net.between = lambda: None
        assert net() == {2.0}


def test_forwards_of_many_threads_are_never_mixed(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net, seen, wrong = Net(), set[float](), []
    net.between = os.sched_yield  # let others run
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            found = net()
            seen.update(found)
            if len(found) != 1:
                wrong.append(found)

    with reader.follow(net) as follower:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(2, 12):
            trainer.publish()
            if number % 3 == 0:
                until(lambda number=number: float(number) in seen, f"nobody saw version {number}")  # type: ignore[misc]
        until(lambda: 11.0 in seen, "nobody saw the last version")
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert not wrong
        assert follower.statistics().swaps >= 5
    until(lambda: reader.statistics().leases == 0, "versions that nobody uses are still leased")


def test_swaps_that_do_not_wait_are_found(trainer: Trainer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that swaps under a running forward mixes versions, and this sees it."""
    trainer.publish()
    net = Net()
    stage = Follower._stage

    def hasty(self: Follower) -> int:
        number = stage(self)
        with self._gate:
            if self._staged is not None:
                self._swap()
        return number

    monkeypatch.setattr(Follower, "_stage", hasty)
    with reader.follow(net, wait=False) as follower:
        until(lambda: follower.statistics().swaps == 1, "the first never came")

        def meanwhile() -> None:
            trainer.publish()
            until(lambda: follower.statistics().swaps == 2, "the second never came")

        net.between = meanwhile
        assert net() == {1.0, 2.0}


def test_a_held_version_stays_and_the_others_wait_for_the_end(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net) as follower:
        with follower.hold() as version:
            trainer.publish()
            staged(follower, 2)
            assert version is not None
            assert net() == net() == {1.0}
            found: list[set[float]] = []
            other = threading.Thread(target=lambda: found.append(net()), daemon=True)
            other.start()
            with follower.hold():  # again, in the thread that holds it
                assert net() == {1.0}
        other.join(PATIENCE)
        assert found == [{2.0}]


def test_a_slow_module_skips_to_the_newest(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net) as follower:
        for number in (2, 3, 4):
            trainer.publish()
            staged(follower, number)
        assert net() == {4.0}
        assert follower.statistics().swaps == 2
        until(lambda: reader.statistics().leases == 1, "those that were skipped are still leased")


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_fails_changes_nothing(trainer: Trainer, reader: Reader, kind: type[BaseException]) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net) as follower:

        def fail() -> None:
            raise kind("in the forward")

        net.between = fail
        for _ in range(3):
            with pytest.raises(kind, match="in the forward"):
                net()
        net.between = lambda: None
        assert follower._running == 0
        trainer.publish()
        current(net, follower, 2)


def test_a_copy_of_a_followed_module_is_its_own(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net) as follower:
        twin = copy.deepcopy(net)
        trainer.publish()
        current(net, follower, 2)
        assert twin() == {1.0}
    assert type(net) is type(twin) is Net


# ---- names and policies ------------------------------------------------------------------------------------


def test_a_version_is_pinned_and_a_tag_is_followed_both_ways(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    pinned, tagged = Net(), Net()
    with reader.follow(pinned, "v1"), reader.follow(tagged, "prod", wait=False) as follower:
        trainer.publish()
        assert follower.statistics().version is None
        trainer.publish(tag="prod")
        current(tagged, follower, 3)
        reader.tag("prod", "v2")
        current(tagged, follower, 2)
        assert pinned() == {1.0}


def test_at_most_one_swap_in_some_time(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net, every=3600) as follower:
        for _ in range(3):
            trainer.publish()
        assert net() == {1.0}
        assert follower.statistics().swaps == 1
    other = Net()
    with reader.follow(other, every=3600, wait=False) as follower:  # the first does not wait for that
        current(other, follower, 4)


def test_waiting_for_the_first_version_has_an_end(trainer: Trainer) -> None:
    name = "inproc://follow-test_waiting_for_the_first_version_has_an_end"
    with headwater.reader("net", name, timeout=0.1) as reader:
        with pytest.raises(DeadlineExceeded):
            reader.follow(Net())
        assert reader.statistics().leases == 0


# ---- what does not fit ---------------------------------------------------------------------------------------


def test_a_module_of_another_shape_is_refused_and_nothing_changed(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net(9)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ShapeMismatch, match=r"has shape \(9, 9\) here and \(8, 8\) in version 'v1'"):
        reader.follow(net)
    with pytest.raises(ShapeMismatch, match=r"holds 'first\.weight', which this model does not have"):
        reader.follow(torch.nn.Linear(8, 8))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert reader.statistics().leases == 0
    net()


@pytest.mark.parametrize("wait", [True, False])
def test_a_module_that_cannot_be_followed_is_left_as_it_is(trainer: Trainer, reader: Reader, wait: bool) -> None:
    trainer.publish()

    class Final(Net):
        def __init_subclass__(cls) -> None:
            raise TypeError("nothing is made of this one")

    net = Final()
    with pytest.raises(UsageError, match="a Final cannot be followed"):
        reader.follow(net, wait=wait)
    assert net() != {1.0}
    assert reader.statistics().leases == 0


def test_another_dtype_is_cast_where_that_is_wanted(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net(dtype=torch.bfloat16)
    with pytest.raises(ShapeMismatch, match=r"is torch.bfloat16 here and torch.float32 .* cast=True"):
        reader.follow(net)
    with reader.follow(net, cast=True) as follower:
        trainer.publish()
        current(net, follower, 2)
        assert net.first.weight.dtype == torch.bfloat16


def test_a_later_version_that_does_not_fit_is_said_and_not_tried_again_and_again(
    trainer: Trainer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.publish()
    net = Net()
    leases, lease = [], Reader.lease

    def counting(self: Reader, name: str) -> object:
        leases.append(name)
        return lease(self, name)

    monkeypatch.setattr(Reader, "lease", counting)
    with reader.follow(net) as follower:
        other = trainer.ps.dense("odd", (3,))
        trainer.ps.publish([other], "odd", model="net").wait()
        until(lambda: "holds 'odd', which this model does not have" in follower.statistics().error, "it was not said")
        asked = len(leases)
        with pytest.raises(DeadlineExceeded):
            reader.wait(after=2, timeout=0.2)
        assert len(leases) == asked
        assert net() == {1.0}
        trainer.number += 1
        trainer.publish()
        current(net, follower, 3)
        assert follower.statistics().error == ""


def test_a_module_that_was_changed_meanwhile_keeps_all_of_the_version_before(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net) as follower:
        del net.inner[0].bias  # as a quantizer might
        net.inner[0].bias = torch.ones(8)
        trainer.publish()
        until(lambda: "which this model does not have" in follower.statistics().error, "it is not said")
        assert net() == {1.0}
        assert follower._running == 0
        until(lambda: reader.statistics().leases == 1, "what was refused is still leased")


def test_a_module_that_changes_between_fetch_and_swap_takes_nothing(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    with reader.follow(net) as follower:
        trainer.publish()
        staged(follower, 2)
        del net.inner[0].bias  # as a quantizer might
        net.inner[0].bias = torch.ones(8)
        assert net() == {1.0}
        assert "version number 2 does not go into this module any more" in follower.statistics().error
        until(lambda: reader.statistics().leases == 1, "what was refused is still leased")


def test_a_version_that_does_not_come_in_time_is_said(
    trainer: Trainer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another thing than no news, which is none of anybody's concern."""
    monkeypatch.setattr(follow_module, "POLL", 0.05)
    trainer.publish()
    net, lease, slow = Net(), Reader.lease, threading.Event()

    def late(self: Reader, name: str = "latest", timeout: float | None = None) -> object:
        if slow.is_set():
            raise DeadlineExceeded("the fetch takes longer than the reader's timeout")
        return lease(self, name, timeout)

    monkeypatch.setattr(Reader, "lease", late)
    with reader.follow(net) as follower:
        slow.set()
        trainer.publish()
        until(lambda: "takes longer" in follower.statistics().error, "it is not said")
        slow.clear()
        current(net, follower, 2)
        assert follower.statistics().error == ""


def test_what_goes_wrong_with_one_version_does_not_end_the_following(
    trainer: Trainer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "POLL", 0.05)
    trainer.publish()
    net, ready, failures = Net(), Follower._ready, iter([True])

    def full(self: Follower, weights: object) -> object:
        if weights.version.number == 2 and next(failures, False):  # type: ignore[attr-defined]
            raise RuntimeError("out of memory on the device")
        return ready(self, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(Follower, "_ready", full)
    with reader.follow(net) as follower:
        trainer.publish()
        current(net, follower, 2)


# ---- ends --------------------------------------------------------------------------------------------------


def test_after_close_nothing_is_swapped_and_nothing_leased(trainer: Trainer, reader: Reader) -> None:
    trainer.publish()
    net = Net()
    follower = reader.follow(net)
    trainer.publish()
    staged(follower, 2)
    follower.close()
    follower.close()
    assert net() == {1.0}
    assert reader.statistics().leases == 0


def test_what_is_fetched_while_it_is_closed_is_let_go_of(
    trainer: Trainer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.publish()
    net = Net()
    begun, go = threading.Event(), threading.Event()
    ready = Follower._ready

    def slow(self: Follower, weights: object) -> object:
        if weights.version.number == 2:  # type: ignore[attr-defined]
            begun.set()
            assert go.wait(PATIENCE)
        return ready(self, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(Follower, "_ready", slow)
    follower = reader.follow(net)
    trainer.publish()
    assert begun.wait(PATIENCE)
    follower.close()
    go.set()
    follower._thread.join(PATIENCE)
    assert not follower._thread.is_alive()
    assert reader.statistics().leases == 0
    assert net() == {1.0}


def test_a_cluster_that_cannot_be_reached_is_said_and_so_is_its_return(
    trainer: Trainer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "POLL", 0.05)
    monkeypatch.setattr(follow_module, "RETRY", 0.01)
    trainer.publish()
    net = Net()
    wait, away = Reader.wait, threading.Event()

    def broken(self: Reader, *args: object, **more: object) -> object:
        if away.is_set():
            raise LinkBroken("nobody answers")
        return wait(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "wait", broken)
    with reader.follow(net) as follower:
        away.set()
        until(lambda: follower.statistics().error == "nobody answers", "it is not said")
        assert net() == {1.0}
        away.clear()
        until(lambda: follower.statistics().error == "", "an error that is over is still said")
        trainer.publish()
        current(net, follower, 2)


def test_normalisation_in_training_mode_stays_in_this_process(trainer: Trainer) -> None:
    """A stray write is seen by this process alone: the version that others lease is as it was."""
    ps = trainer.ps
    norm = torch.nn.BatchNorm1d(4, affine=False, track_running_stats=True)
    table: Dense = ps.dense("running_mean", (4,))
    ps.publish([table], "n1", model="norm").wait()
    name = "inproc://follow-test_normalisation_in_training_mode_stays_in_this_process"
    one, other = (headwater.reader("norm", name, timeout=PATIENCE) for _ in range(2))
    with one, other, one.follow(norm) as follower:
        norm.train()
        norm(torch.randn(16, 4) + 5)
        assert norm.running_mean is not None
        assert norm.running_mean.abs().sum() > 0
        with other.lease("n1") as weights:
            assert weights["running_mean"].abs().sum() == 0
        ps.publish([table], "n2", model="norm").wait()
        until(lambda: norm(torch.randn(16, 4)) is not None and follower.statistics().swaps == 2, "it never came")
