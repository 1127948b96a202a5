"""The core: what it takes, what it hands out, and what it does when the other side changes, fails or is silent."""

from __future__ import annotations

import pytest

from headwater.errors import (
    ClusterError,
    DeltaCorrupt,
    LinkBroken,
    NotEnoughMemory,
    ProtocolError,
    UnknownVersion,
    VersionExpired,
)
from headwater.relay.events import Back, Taken, Trouble
from headwater.types import VersionInfo
from headwater.versions.entries import ASKERS
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from headwater.wire.outgoing import Outgoing
from tests.relay.fake_upstream import ME, SPEC, UPSTREAM, A, B, FakeUpstream


def test_the_newest_version_is_fetched_and_leased_with_the_relay_as_its_holder(stage: FakeUpstream) -> None:
    leased = stage.lease(A)
    assert leased.info == stage.theirs[1].info
    assert leased.shards == 2
    assert dict(leased.specs)[7] == SPEC
    assert {part.holders for part in leased.parts} == {(ME,)}
    assert stage.content(leased).startswith(b"lm 1 .")
    assert stage.news == [Taken(leased.info, 123, "whole", 0.5)]


def test_a_reader_that_knows_the_layout_is_not_told_again(stage: FakeUpstream) -> None:
    known = ((7, v.fingerprint(SPEC)),)
    assert stage.ask(A, v.Lease("lm", "latest", known), v.Leased).specs == ()


def test_a_watch_hears_of_the_next_version_when_it_is_here(stage: FakeUpstream) -> None:
    seq = stage.send(A, v.Watch("lm", "latest", 1))
    stage.has(2)
    stage.lists()
    assert stage.answer(seq) is None
    stage.fetch()
    assert stage.answer(seq) == v.Found(stage.theirs[2].info)


def test_a_delta_goes_on_as_it_came(stage: FakeUpstream) -> None:
    stage.has(2)
    stage.lists()
    assert [base.number for base in stage.job().bases] == [1]
    stage.fetch(delta=b"what changed", base=1)
    assert stage.content(stage.lease(A), base=1) == b"what changed"
    assert stage.content(stage.lease(A), base=9).startswith(b"lm 2 .")
    assert isinstance(stage.news[-1], Taken)
    assert stage.news[-1].way == "delta"


# ---- tags --------------------------------------------------------------------------------------------


def test_a_tag_moves_here_when_its_version_is_here(stage: FakeUpstream) -> None:
    stage.has(1, "v1", "production")
    stage.lists()
    stage.has(2)
    stage.has(3, "v3", "production")
    stage.lists()
    assert stage.lease(A, "production").info.number == 1
    seq = stage.send(A, v.Watch("lm", "production", 1))
    assert stage.fetch_all() == ["v3"]  # tagged and newest; what is neither does not come
    assert stage.answer(seq) == v.Found(stage.theirs[3].info)
    assert stage.names() == {"v1": (), "v3": ("latest", "production")}


def test_a_tag_comes_in_one_list_with_its_version(stage: FakeUpstream) -> None:
    """Whoever hears from this relay that a version is here can have it by its tag: another relay, for example."""
    stage.has(2, "v2", "production")
    stage.lists()
    seq = stage.send(A, v.ListVersions(after=stage.listed().revision))
    stage.fetch()
    heard = stage.answer(seq)
    assert isinstance(heard, v.VersionList)
    assert {each.info.name: each.tags for each in heard.versions}["v2"] == ("latest", "production")


def test_a_version_that_comes_from_a_cluster_that_has_none_any_more_takes_no_tag_away(stage: FakeUpstream) -> None:
    stage.has(2, "v2", "production")
    stage.lists()
    stage.fetch()
    stage.has(3, "v3")
    stage.lists()
    stage.theirs.clear()
    stage.lists()
    stage.fetch()
    assert stage.lease(A, "production").info.name == "v2"


def test_a_relay_that_begins_takes_the_newest_first_and_later_what_is_tagged() -> None:
    stage = FakeUpstream()
    stage.has(1, "v1", "production")
    stage.has(2)
    stage.lists()
    assert stage.fetch_all() == ["v2", "v1"]
    stage.has(3, "v3", "production")
    stage.has(4)
    stage.lists()
    assert stage.fetch_all() == ["v3", "v4"]  # a newest one that changes ever again keeps no tag away


def test_a_rollback_is_a_version_that_is_fetched_if_it_has_to_be() -> None:
    stage = FakeUpstream(keep=1)
    stage.has(1)
    stage.has(2, "v2", "production")
    stage.lists()
    stage.fetch_all()
    stage.join(A)
    stage.has(2)
    stage.has(1, "v1", "production")  # rolled back
    stage.lists()
    assert stage.lease(A, "production").info.number == 2
    stage.fetch_all()
    assert stage.lease(A, "production").info.number == 1
    assert stage.lease(A).info.number == 2


def test_a_tag_that_is_taken_away_is_no_tag_here(stage: FakeUpstream) -> None:
    stage.has(1, "v1", "production")
    stage.lists()
    stage.has(1)
    stage.lists()
    with pytest.raises(UnknownVersion, match="no version or tag 'production'"):
        stage.lease(A, "production")


# ---- what readers ask for by name ----------------------------------------------------------------------


def test_a_version_that_only_the_other_side_has_is_fetched_for_a_patient_reader(stage: FakeUpstream) -> None:
    stage.has(2)
    stage.has(3)
    stage.lists()
    stage.fetch()
    assert stage.names() == {"v1": (), "v3": ("latest",)}
    with pytest.raises(UnknownVersion, match="'v2'"):
        stage.lease(A, "v2")  # without patience
    seq = stage.send(A, v.Lease("lm", "v2", patience=5.0))
    assert stage.fetch().name == "v2"
    leased = stage.answer(seq)
    assert isinstance(leased, v.Leased)
    assert leased.info.name == "v2"


def test_a_version_that_was_asked_for_stays_for_whoever_only_watched() -> None:
    stage = FakeUpstream(keep=1)
    for number in (1, 2, 3):
        stage.has(number)
    stage.lists()
    stage.fetch()
    stage.join(A)
    seq = stage.send(A, v.Watch("lm", "v1"))
    stage.fetch()
    assert stage.answer(seq) == v.Found(stage.theirs[1].info)
    assert stage.lease(A, "v1").info.number == 1
    stage.notify(A, v.Release(1))
    for _ in range(12):
        stage.tick(1.0)
        stage.beat(A)
    assert stage.names() == {"v3": ("latest",)}  # and then it goes


def test_no_more_versions_than_keep_are_fetched_for_those_who_ask() -> None:
    stage = FakeUpstream(keep=2)
    for number in range(1, 6):
        stage.has(number)
    stage.lists()
    stage.fetch()
    stage.join(A)
    for name in ("v1", "v2"):
        seq = stage.send(A, v.Lease("lm", name, patience=5.0))
        stage.fetch()
        assert isinstance(stage.answer(seq), v.Leased)
    with pytest.raises(ClusterError, match=r"no place for it: 2 versions are held.*--keep.*Lease it from"):
        stage.ask(A, v.Lease("lm", "v3", patience=5.0), v.Leased)


def test_a_reader_that_waits_for_what_is_not_there_yet_gets_it_or_is_gone() -> None:
    stage = FakeUpstream()
    stage.join(A)
    stage.join(B)
    early = stage.send(A, v.Lease("lm", "latest", patience=1.0))  # before the other side has said anything
    stage.has(1)
    stage.lists()
    seqs = [stage.send(peer, v.Lease("lm", "latest", patience=1.0)) for peer in (A, B)]
    late = stage.send(A, v.Lease("lm", "latest", patience=0.2))
    stage.gone(B)
    stage.tick(0.5)
    stage.fetch()
    assert isinstance(stage.answer(early), v.Leased)
    assert isinstance(stage.answer(seqs[0]), v.Leased)
    assert stage.answer(seqs[1]) is None
    assert stage.answer(late) is None  # its reader has given up
    (status,) = stage.listed().versions
    assert status.leases == 2


def test_a_reader_that_asks_and_asks_does_not_fill_the_relay() -> None:
    stage = FakeUpstream()
    stage.join(A)
    seqs = [stage.send(A, v.Lease("lm", "latest", patience=float("inf"))) for _ in range(ASKERS + 5)]
    stage.has(1)
    stage.lists()
    stage.fetch()
    answered = [seq for seq in seqs if stage.answer(seq) is not None]
    assert answered == seqs[5:]


# ---- leases on the other side ---------------------------------------------------------------------------


def test_the_base_of_the_next_delta_stays_leased_on_the_other_side(stage: FakeUpstream) -> None:
    assert stage.released() == []
    stage.has(2)
    stage.lists()
    stage.fetch()
    assert stage.released() == [1]
    stage.has(4)
    stage.lists()
    stage.fetch()
    stage.send(A, v.Lease("lm", "v4"))
    assert stage.released() == [1, 2]


def test_what_is_fetched_for_a_tag_is_released_at_once(stage: FakeUpstream) -> None:
    stage.has(3)
    stage.lists()
    stage.fetch()
    stage.has(2, "v2", "production")
    stage.lists()
    stage.fetch()
    assert stage.released() == [1, 2]


# ---- retention --------------------------------------------------------------------------------------------


def test_as_many_versions_as_wanted_are_kept_and_those_with_leases_and_tags() -> None:
    stage = FakeUpstream(keep=2)
    stage.join(A)
    for number in range(1, 6):
        stage.has(number, f"v{number}", *(("production",) if number == 2 else ()))
        stage.lists()
        stage.fetch()
        if number == 1:
            stage.lease(A)
        stage.now += 0.1
    assert set(stage.names()) == {"v1", "v2", "v4", "v5"}
    stage.notify(A, v.Release(1))
    assert set(stage.names()) == {"v2", "v4", "v5"}
    assert {key.number for key in stage.part_store.parts} == {2, 4, 5}


def test_what_is_retired_there_goes_here_and_a_reader_that_has_it_may_finish(stage: FakeUpstream) -> None:
    leased = stage.lease(A, "v1")
    stage.has(2)
    del stage.theirs[1]
    stage.lists()
    assert set(stage.names()) == {"v1"}  # better than nothing
    stage.fetch()
    assert set(stage.names()) == {"v2"}
    with pytest.raises(UnknownVersion):
        stage.lease(A, "v1")
    assert stage.content(leased).startswith(b"lm 1 .")
    stage.notify(A, v.Release(1))
    with pytest.raises(VersionExpired):
        stage.content(leased)


@pytest.mark.parametrize("how", ["gone", "holding"])
def test_a_retired_version_does_not_outlive_its_last_reader(stage: FakeUpstream, how: str) -> None:
    leased = stage.lease(A, "v1", turn=1)
    stage.has(2)
    del stage.theirs[1]
    stage.lists()
    stage.fetch()
    assert stage.content(leased)
    if how == "gone":
        stage.gone(A)
        stage.tick()
    else:
        stage.notify(A, v.Holding((), 1))
    assert {key.number for key in stage.part_store.parts} == {2}


def test_a_reader_that_is_silent_loses_its_lease_and_one_that_comes_back_does_not(stage: FakeUpstream) -> None:
    stage.join(B)
    stage.lease(A)
    stage.lease(B)
    stage.join(3, session=B)  # another connection of the same reader
    stage.gone(B)
    for _ in range(11):
        stage.tick(1.0)
        stage.beat(3)
    assert dict(stage.relay.catalogue.entries[1].leases) == {A: 1, B: 1}  # A may be back as well
    for _ in range(10):
        stage.tick(1.0)
        stage.beat(3)
    assert dict(stage.relay.catalogue.entries[1].leases) == {B: 1}


def test_a_reader_that_is_given_up_hears_of_it_and_can_come_back(stage: FakeUpstream) -> None:
    """Else it stays connected to who does not know it, and every lease is refused."""
    for _ in range(12):
        stage.tick(1.0)
    told = [out for out in stage.said if isinstance(out, Outgoing) and out.peer == A and out.close]
    assert [out.frame.kind for out in told] == [Kind.ERROR]
    with pytest.raises(ClusterError, match=r"this reader was silent for .* s and was given up; .* It may join again"):
        raise m.read_error(told[0].frame.body)
    stage.gone(A)
    stage.join(5, session=A)
    assert stage.lease(5).info.number == 1


def test_a_relay_that_stood_still_gives_nobody_up(stage: FakeUpstream) -> None:
    stage.lease(A)
    stage.now += 60.0
    stage.tick()
    for _ in range(12):
        stage.beat(A)
        stage.tick(1.0)
    assert stage.relay.catalogue.entries[1].leases[A] == 1


# ---- failures -------------------------------------------------------------------------------------------------


def test_while_the_other_side_is_silent_what_is_here_is_served_and_the_list_says_so(stage: FakeUpstream) -> None:
    assert (stage.listed().silent, stage.listed().why) == (0.0, "")
    stage.silent("nobody answers at tcp://…")
    stage.tick(3.0)
    listed = stage.listed()
    assert listed.silent == pytest.approx(3.0)
    assert listed.why == "nobody answers at tcp://…"
    assert stage.lease(A).info.number == 1
    assert isinstance(stage.news[-1], Trouble)
    assert UPSTREAM in stage.news[-1].text
    stage.silent("still nobody")
    stage.has(2)
    assert sum(isinstance(each, Trouble) for each in stage.news) == 1  # said once
    stage.lists()
    assert stage.listed().silent == 0.0
    assert any(isinstance(each, Back) and each.seconds == pytest.approx(3.0) for each in stage.news)
    assert stage.fetch().name == "v2"


def test_a_relay_of_a_silent_relay_says_how_long_it_has_been(stage: FakeUpstream) -> None:
    stage.lists(silent=5.0, why="the cluster is gone")
    stage.tick(1.0)
    assert stage.listed().silent == pytest.approx(6.0)
    assert stage.listed().why == "the cluster is gone"
    stage.silent("the relay is gone too")
    assert stage.listed().why == "the relay is gone too"
    assert stage.listed().silent == pytest.approx(6.0)


@pytest.mark.parametrize("error", [LinkBroken("its server died"), DeltaCorrupt("2 blocks came damaged")])
def test_a_version_that_did_not_come_is_tried_again_ever_more_seldom(stage: FakeUpstream, error: Exception) -> None:
    stage.has(2)
    stage.lists()
    waits = []
    for attempt in range(7):
        assert stage.job().attempt == attempt
        stage.fail(error)  # type: ignore[arg-type]
        since = stage.now
        while stage.idle():
            stage.tick()
        waits.append(stage.now - since)
    assert waits == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0], abs=0.11)
    assert stage.names() == {"v1": ("latest",)}
    assert [each.text for each in stage.news if isinstance(each, Trouble)] == [
        f"version 'v2' of 'lm' did not come: {error}"
    ]


def test_a_version_that_does_not_come_does_not_keep_the_next_one_away(stage: FakeUpstream) -> None:
    stage.has(2, "v2", "production")
    stage.lists()
    stage.fail(DeltaCorrupt("damaged"))
    stage.has(3)
    stage.lists()
    assert stage.fetch().name == "v3"


def test_whoever_waits_hears_that_there_is_no_memory(stage: FakeUpstream) -> None:
    stage.has(2)
    stage.has(3)
    stage.lists()
    stage.fetch()
    seq = stage.send(A, v.Lease("lm", "v2", patience=9.0))
    stage.fail(NotEnoughMemory("500 bytes are free"))
    assert isinstance(stage.answer(seq), NotEnoughMemory)
    assert stage.names() == {"v1": (), "v3": ("latest",)}


def test_whoever_waits_goes_on_waiting_when_a_server_died(stage: FakeUpstream) -> None:
    stage.has(2)
    stage.has(3)
    stage.lists()
    stage.fetch()
    seq = stage.send(A, v.Lease("lm", "v2", patience=9.0))
    stage.fail(LinkBroken("its server died"))
    assert stage.answer(seq) is None
    stage.tick(1.0)
    stage.fetch()
    assert isinstance(stage.answer(seq), v.Leased)


def test_a_version_that_is_retired_while_it_is_fetched_is_not_wanted_any_more(stage: FakeUpstream) -> None:
    stage.has(2)
    stage.lists()
    del stage.theirs[2]
    stage.lists()
    stage.fail(VersionExpired("it was retired"))
    stage.tick(20.0)
    assert stage.idle()
    stage.has(2, "again")
    stage.lists()
    assert stage.fetch().name == "again"


def test_a_version_that_came_although_it_was_retired_meanwhile_is_let_go(stage: FakeUpstream) -> None:
    stage.has(2)
    stage.lists()
    job = stage.job()
    stage.has(3)
    del stage.theirs[2]
    stage.lists()
    assert stage.job() is job
    stage.fetch()
    stage.fetch()
    stage.tick()
    assert stage.names() == {"v1": (), "v3": ("latest",)}
    assert {key.number for key in stage.part_store.parts} == {1, 3}


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        v.Publish("lm", "v9", (7,)),
        v.SetTag("lm", "production", "v1"),
        v.Retire("lm", "v1"),
        v.Await(3),
        m.Declare(SPEC),
        m.TakeSnapshot(),
        m.Find(0),
    ],
)
def test_what_only_a_cluster_can_do_is_refused_with_the_place_to_ask(stage: FakeUpstream, message: m.Request) -> None:
    with pytest.raises(ClusterError, match=f"does not go to a relay.*nothing was changed.*{UPSTREAM}"):
        stage.ask(A, message, m.Done)
    assert stage.lease(A, "v1")


@pytest.mark.parametrize("role", ["worker", "server", "coordinator"])
def test_only_readers_join(stage: FakeUpstream, role: str) -> None:
    with pytest.raises(ClusterError, match=f"this is a relay.*{UPSTREAM}"):
        stage.ask(B, m.Join(role, 5), m.Joined)


def test_who_has_not_joined_leases_nothing_and_nobody_joins_twice(stage: FakeUpstream) -> None:
    with pytest.raises(ClusterError, match="join first"):
        stage.lease(B)
    with pytest.raises(ClusterError, match="joined already"):
        stage.join(A)


@pytest.mark.parametrize("message", [v.Lease("other", "latest", patience=9.0), v.Watch("other", "latest")])
def test_a_model_that_is_not_followed_is_named_at_once(stage: FakeUpstream, message: m.Request) -> None:
    with pytest.raises(UnknownVersion, match="follows 'lm', and not 'other'"):
        stage.ask(A, message, m.Done)


@pytest.mark.parametrize(
    "frame",
    [Frame(Kind.PUSH), Frame(Kind.REQUEST, body=b"\xc1"), Frame(Kind.NOTICE, body=m.pack(v.DropVersion((1,))))],
)
def test_what_nobody_says_to_a_relay_ends_the_connection(stage: FakeUpstream, frame: Frame) -> None:
    with pytest.raises(ProtocolError):
        stage.relay.receive(A, frame, stage.now)


# ---- the rest ---------------------------------------------------------------------------------------------------


def test_models_take_turns() -> None:
    stage = FakeUpstream("a", "b")
    numbers = iter(range(1, 20))
    for model in ("a", "b"):
        stage.has(next(numbers), model=model)
    stage.lists()
    models: list[str] = []
    for _ in range(4):
        info: VersionInfo = stage.job().info
        models.append(info.model)
        stage.has(next(numbers), model=info.model)  # a model that never rests
        stage.lists()
        stage.fetch()
    assert sorted(models[:2]) == ["a", "b"]
    assert models[2:] == models[:2]


def test_a_list_that_is_known_is_answered_when_there_is_another(stage: FakeUpstream) -> None:
    known = stage.listed().revision
    seq = stage.send(A, v.ListVersions(after=known))
    stage.lists()
    assert stage.answer(seq) is None
    stage.has(2)
    stage.lists()
    stage.fetch()
    answer = stage.answer(seq)
    assert isinstance(answer, v.VersionList)
    assert answer.revision != known


def test_the_status_is_that_of_a_relay(stage: FakeUpstream) -> None:
    stage.silent("nobody answers")
    stage.tick(2.0)
    status = stage.ask(B, m.Status(), m.ClusterStatus)
    assert status.relay is not None
    assert status.relay.upstream == UPSTREAM
    assert status.relay.silent == pytest.approx(2.0)
    assert status.relay.nbytes == sum(part.size for part in stage.lease(A).parts)
    assert [model.model for model in status.models] == ["lm"]
    assert [reader.role for reader in status.workers] == ["reader"]
