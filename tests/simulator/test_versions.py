"""Versions under faults: bugs put in on purpose are found, and seeds that found one once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from headwater.server.replication import records as r
from headwater.server.replication.replica import Replica
from headwater.server.table import Table
from headwater.testing import battery
from headwater.testing.faults import FaultPlan
from headwater.testing.scenario import Scenario, harsh, published, scenario, usual
from headwater.testing.versions import SimPartStore
from headwater.versions.leases import Leases
from headwater.versions.lifecycle import Lifecycle
from headwater.versions.part_store import PartStore
from headwater.wire import versions as v
from headwater.wire.messages import Commit

SEEDS = range(300)

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Servers that are told to go say so: that is not what is looked for here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def cut_without_a_word_of_writes(patch: pytest.MonkeyPatch) -> None:
    """What is overwritten while a part is copied is not put aside."""
    patch.setattr(SimPartStore, "before_write", lambda self, shard, table, ranges: None)


def cut_a_step_late(patch: pytest.MonkeyPatch) -> None:
    """Shard 0 takes its part after the next step, and says that it did not."""
    apply = Replica.apply
    waiting: dict[int, tuple[Replica, list[r.Publish]]] = {}

    def late(self: Any, record: Any) -> Any:
        if self.number == 0 and isinstance(record.body, r.Publish):
            waiting.setdefault(id(self), (self, []))[1].append(record.body)
            clocks = tuple((table, self.tables[table].gathering.clock) for table in record.body.tables)
            setting = self._memory._setting
            setting.part_store.outbox.reports.append(v.PartDone(record.body.version, 0, setting.server, clocks=clocks))
            self.lsn = record.lsn
            return []
        happened = apply(self, record)
        if isinstance(record.body, Commit) and id(self) in waiting:
            true = Table.source
            patch.setattr(Table, "source", lambda table: true(table)._replace(clock=true(table).clock - 1))
            for body in waiting.pop(id(self))[1]:
                self._publish(body)
            patch.setattr(Table, "source", true)
        return happened

    patch.setattr(Replica, "apply", late)


def believe_whoever_speaks_first(patch: pytest.MonkeyPatch) -> None:
    """A backup that has run ahead of its primary says what a version is."""
    part = Lifecycle.part
    patch.setattr(Lifecycle, "part", lambda self, done, leads=True: part(self, done, leads=True))


def keep_what_is_dropped(patch: pytest.MonkeyPatch) -> None:
    """Servers do not let go of a version that nobody wants."""
    patch.setattr(PartStore, "drop", lambda self, numbers: None)


def keep_the_leases_of_the_dead(patch: pytest.MonkeyPatch) -> None:
    """A reader that is gone holds its versions for ever."""
    patch.setattr(Leases, "left", lambda self, session, now, clean: None)


def forget_who_was_slow(patch: pytest.MonkeyPatch) -> None:
    """A version whose last holder was silent for a while stays lost."""
    patch.setattr(Lifecycle, "_returned", lambda self: None)


def of_any_shape(seed: int, mode: str | None) -> Scenario:
    return published(usual(seed, mode))


def of_one_shard(seed: int, mode: str | None) -> Scenario:
    return published(harsh(seed, mode))


def slow_holder(seed: int, mode: str | None) -> Scenario:
    """A seed in which the last holder of a version is cut off for a while: few have that."""
    del mode
    return published(scenario(845, "async")) if seed % 2 else scenario(733, "stale")


def bulk(seed: int, mode: str | None) -> Scenario:
    return published(replace(usual(seed, "bulk"), shards=2))


BUGS: list[tuple[Patch, Callable[[int, str | None], Scenario]]] = [
    (cut_without_a_word_of_writes, of_any_shape),
    (cut_a_step_late, bulk),
    (believe_whoever_speaks_first, of_one_shard),
    (keep_what_is_dropped, of_any_shape),
    (keep_the_leases_of_the_dead, of_any_shape),
    (forget_who_was_slow, slow_holder),
]


@pytest.mark.parametrize(("bug", "make"), BUGS, ids=[bug.__name__ for bug, _ in BUGS])
def test_the_battery_catches(
    bug: Patch, make: Callable[[int, str | None], Scenario], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    tally = battery.sweep(SEEDS, stop=lambda tally: bool(tally.violations), make=make)
    assert tally.violations, f"{tally.runs} runs did not find: {bug.__doc__}"


@pytest.mark.parametrize(
    ("seed", "mode"), [(348, "bulk"), (643, "stale"), (733, "stale"), (845, "async"), (855, "bulk")]
)
def test_seeds_that_found_a_bug_once(seed: int, mode: str) -> None:
    """A version waited for ever for a step that a restarted coordinator heard of late; what a backup said that had run
    ahead counted; a version stayed lost although its holder was only slow.
    """
    one = scenario(seed, mode)
    assert battery.play(one if one.versions else published(one)).violation is None


def test_without_faults_everything_that_is_published_is_read_whole() -> None:
    outcome = battery.play(replace(scenario(10, "bulk"), versions=True, plan=FaultPlan(), seconds=3.0))
    assert outcome.violation is None
    assert outcome.published > 0
    assert outcome.reads > outcome.published


def test_a_seed_with_versions_is_the_same_run_every_time() -> None:
    one = published(scenario(10, "stale"))
    first, second = battery.play(one, trace=True), battery.play(one, trace=True)
    assert first.history == second.history
    assert first.reads == second.reads > 0
