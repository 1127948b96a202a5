"""Which table a worker means: what is new is new, and what is to be gone on with is said."""

from __future__ import annotations

import pytest

from headwater.cluster.recovery import Restored, RestoredTable
from headwater.errors import HeadwaterError, TableConflict, UnknownTable
from headwater.types import Async, Bulk, Claim, OptimizerSpec
from headwater.wire import messages as m
from tests.cluster.fake_peers import READER, SERVER, WORKER, FakePeers, spec
from tests.cluster.test_restart import Kept


def join(script: FakePeers, rank: int, run: str = "", world: int | None = 2, life: int = 0) -> None:
    """Worker ``rank``'s process number ``life`` comes, over the connection that all of them have here."""
    script.ask(WORKER + rank, m.Join("worker", 100 * life + rank, "host", 4000 + rank, rank, world, run=run))
    joined = script.take(WORKER + rank)
    assert any(isinstance(x, m.Joined) for x in joined), joined


def leave(script: FakePeers, *ranks: int) -> None:
    for rank in ranks:
        script.ask(WORKER + rank, m.Leave())
        script.hang_up(WORKER + rank)


def declare(
    script: FakePeers, rank: int, claim: Claim = "new", name: str = "t", **changes: object
) -> int | HeadwaterError:
    """The table's number, or what it is refused with."""
    script.take(WORKER + rank)
    script.ask(WORKER + rank, m.Declare(spec(name, **changes), claim))
    table = max(script.coordinator.tables.by_number, default=0)
    if table and script.coordinator.tables.by_number[table].state == "creating":
        script.create(table)
    for heard in script.take(WORKER + rank):
        if isinstance(heard, HeadwaterError):
            return heard
        if isinstance(heard, m.Declared):
            return heard.table
    raise AssertionError("no answer")


def conflict(found: int | HeadwaterError, says: str) -> None:
    assert isinstance(found, TableConflict)
    assert says in str(found)
    assert "Nothing was changed" in str(found)
    assert "resume=True" in str(found)


def test_all_workers_of_a_run_find_its_table_also_late_ones() -> None:
    script = FakePeers(2)
    join(script, 0)
    assert declare(script, 0) == 1
    join(script, 1)
    assert declare(script, 1) == 1


def test_a_later_run_goes_on_with_a_table_only_where_that_is_said() -> None:
    script = FakePeers(2)
    join(script, 0, "monday")
    assert declare(script, 0) == 1
    leave(script, 0)
    join(script, 0, "tuesday", life=1)
    conflict(declare(script, 0), "an earlier run left in this cluster")
    assert declare(script, 0, name="other") == 2
    assert declare(script, 0, "any") == 1, "for the key-value interface a table is there for all"
    conflict(declare(script, 0), "an earlier run")
    assert declare(script, 0, "resume") == 1
    join(script, 1, "tuesday", life=1)
    assert declare(script, 1) == 1, "it is this run's now"


def test_without_a_name_for_the_run_it_begins_with_the_first_worker_who_finds_no_other() -> None:
    script = FakePeers(2)
    join(script, 0)
    assert declare(script, 0) == 1
    script.hang_up(WORKER)
    join(script, 0, life=1)
    conflict(declare(script, 0), "an earlier run")


@pytest.mark.parametrize("alone", [False, True])
def test_a_worker_that_was_started_again_finds_its_run(alone: bool) -> None:
    script = FakePeers(2, grace=1.0)
    join(script, 0, "run")
    join(script, 1, "run")
    assert [declare(script, rank) for rank in (0, 1)] == [1, 1]
    if alone:
        leave(script, 0)
    script.hang_up(WORKER + 1)
    script.pass_time(5, alive=(SERVER, SERVER + 1, *(() if alone else (WORKER,))))
    join(script, 1, "run", life=1)
    assert declare(script, 1) == 1


def test_one_that_finished_is_not_started_again_but_another_script_of_the_same_command() -> None:
    """``sh -c "python a.py && python b.py"`` under one launcher: b's first model is not a's."""
    script = FakePeers(2)
    for rank in (0, 1):
        join(script, rank, "run")
        assert declare(script, rank) == 1
    leave(script, 0)
    join(script, 0, "run", life=1)
    conflict(declare(script, 0), "an earlier process of worker 0 made of it in this run")
    assert declare(script, 1) == 1, "for the other it is the table that it trains"
    assert declare(script, 0, "resume") == 1
    leave(script, 0, 1)
    join(script, 1, "run", life=1)
    conflict(declare(script, 1), "an earlier run")


def test_launchers_of_several_machines_are_one_run() -> None:
    script = FakePeers(2, grace=1.0)
    join(script, 0, "here")
    join(script, 1, "there")
    assert [declare(script, rank) for rank in (0, 1)] == [1, 1]
    for rank in (0, 1):
        script.hang_up(WORKER + rank)
    script.pass_time(5, alive=(SERVER, SERVER + 1))
    join(script, 1, "there", life=1)
    assert declare(script, 1) == 1


def test_there_must_be_something_to_resume() -> None:
    script = FakePeers(2)
    join(script, 0)
    assert declare(script, 0, name="other") == 1
    found = declare(script, 0, "resume")
    assert isinstance(found, UnknownTable)
    assert "it has 'other'" in str(found)
    assert len(script.coordinator.tables.by_number) == 1


def test_who_resumes_may_have_other_hyperparameters_and_first_values_but_no_other_policy() -> None:
    script = FakePeers(2)
    join(script, 0)
    assert declare(script, 0) == 1
    other = OptimizerSpec("SGD", ({"lr": 0.5},))
    assert isinstance(declare(script, 0, "new", optimizer=other), TableConflict)
    assert declare(script, 0, "resume", optimizer=other, seed=3) == 1
    assert declare(script, 0, "resume", init="values") == 1
    for wrong in ({"max_grad_norm": 1.0}, {"optimizer": OptimizerSpec("Adam", ({},))}):
        assert isinstance(declare(script, 0, "resume", **wrong), TableConflict)


def test_values_that_nobody_has_given_are_nobodys() -> None:
    script = FakePeers(2)
    join(script, 0)
    assert declare(script, 0, init="values") == 1
    leave(script, 0)
    join(script, 0, life=1)
    assert declare(script, 0, init="values") == 1


def test_a_snapshots_tables_are_for_the_first_run() -> None:
    script = FakePeers(2, joined=False)
    begin = Restored("folder", (RestoredTable(1, spec(), 7),), b"")
    script.coordinator = type(script.coordinator)(script.coordinator.rules, script.clock(), begin=begin)
    for number in (0, 1):
        script.start(number)
    script.create(1)
    join(script, 0, "monday")
    assert declare(script, 0) == 1
    leave(script, 0)
    join(script, 0, "tuesday", life=1)
    conflict(declare(script, 0), "an earlier run")


def test_a_reader_means_what_there_is() -> None:
    script = FakePeers(2)
    join(script, 0)
    assert declare(script, 0) == 1
    leave(script, 0)
    script.ask(READER, m.Join("reader", 9))
    script.ask(READER, m.Declare(spec()))
    assert script.last(READER, m.Declared).table == 1


@pytest.mark.parametrize("left", [False, True])
def test_a_coordinator_that_was_restarted_knows_the_runs(left: bool) -> None:
    script = Kept(2)
    for rank in (0, 1):
        join(script, rank, "run")
        assert declare(script, rank) == 1
    leave(script, *([0, 1] if left else [0]))
    script.crash()
    script.back(0, 1)
    if not left:
        script.return_of(1)
    script.pass_time(2, alive=(SERVER, SERVER + 1, WORKER + 1))
    join(script, 0, "run", life=1)
    conflict(declare(script, 0), "an earlier run" if left else "an earlier process of worker 0")


# ---- who is expected again ---------------------------------------------------------------------------


def needed(script: FakePeers) -> tuple[int, ...]:
    """What the shards have heard last, and the coordinator believes."""
    told = [x for x in script.take(SERVER) if isinstance(x, m.Members)]
    assert not told or told[-1].ranks == script.coordinator.membership.needed()
    return script.coordinator.membership.needed()


def two_rounds(*leavers: int, sync: Bulk | Async | None = None) -> FakePeers:
    """All three have trained the first table; those that left are back for the second, or not yet."""
    script = FakePeers(2)
    for rank in range(3):
        join(script, rank, world=3)
        assert declare(script, rank, name="one") == 1
    leave(script, *leavers, 0)
    join(script, 0, world=3, life=1)
    assert declare(script, 0, name="two", sync=sync or Bulk()) == 2
    return script


def test_who_left_before_others_began_a_second_table_is_expected_for_it() -> None:
    script = two_rounds(1)
    assert needed(script) == (0, 1, 2)
    leave(script, 2)
    assert needed(script) == (0, 1, 2), "also one that leaves after that"
    join(script, 1, world=3, life=1)
    assert declare(script, 1, name="two") == 2
    assert needed(script) == (0, 1, 2)
    leave(script, 1)
    assert needed(script) == (0, 2), "this one has finished with it"


def test_who_has_finished_with_all_tables_is_not_waited_for() -> None:
    script = FakePeers(2)
    for rank in range(3):
        join(script, rank, world=3)
        assert declare(script, rank, name="one") == 1
    leave(script, 1)
    assert needed(script) == (0, 2)


def test_one_that_died_is_not_expected() -> None:
    script = FakePeers(2)
    for rank in range(3):
        join(script, rank, world=3)
        assert declare(script, rank, name="one") == 1
    script.hang_up(WORKER + 1)
    assert declare(script, 0, name="two") == 2
    assert needed(script) == (0, 2)


def test_nobody_is_expected_for_a_table_of_which_each_takes_its_own_steps() -> None:
    assert needed(two_rounds(1, sync=Async())) == (0, 2)


def test_a_coordinator_that_was_restarted_knows_who_is_expected() -> None:
    script = Kept(2)
    for rank in (0, 1):
        join(script, rank, world=2)
        assert declare(script, rank, name="one") == 1
    leave(script, 1)
    assert declare(script, 0, name="two") == 2
    script.crash()
    script.back(0, 1)
    script.return_of(0)
    assert script.coordinator.membership.needed() == (0, 1)
