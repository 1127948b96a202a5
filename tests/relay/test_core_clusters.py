"""A relay whose cluster was begun anew, and counts its versions from 1 again."""

from __future__ import annotations

import pytest

from headwater.errors import (
    DeltaCorrupt,
    UnknownVersion,
)
from headwater.wire import versions as v
from tests.relay.fake_upstream import A, FakeUpstream


def test_a_new_cluster_that_counts_from_one_again_is_not_mixed_with_the_old(stage: FakeUpstream) -> None:
    for number in (2, 3):
        stage.has(number, f"v{number}", "production")
        stage.lists()
        stage.fetch()
    old = stage.lease(A, "v1")
    stage.theirs.clear()
    stage.lists()  # nothing is published yet
    assert stage.lease(A).info.number == 3
    stage.has(1, era="new")
    stage.lists()
    assert stage.lease(A).info.number == 3  # until the new one is here
    assert stage.job().bases == ()  # and no delta to what the new cluster never had
    seq = stage.send(A, v.Watch("lm", "latest", 3))
    stage.fetch(era="new")
    assert stage.answer(seq) == v.Found(stage.theirs[1].info)
    assert stage.names() == {"v1": ("latest",)}
    leased = stage.lease(A)
    assert leased.info != old.info
    assert stage.content(leased).startswith(b"lm 1 new.")
    with pytest.raises(UnknownVersion):
        stage.lease(A, "production")


@pytest.mark.parametrize("tagged", [True, False])
def test_a_tag_of_the_new_cluster_never_means_the_old_ones_version_of_that_number(
    stage: FakeUpstream, tagged: bool
) -> None:
    """The old one's number 2 is on its way when the new one lists its own, with a tag."""
    if tagged:
        stage.has(1, "v1", "production")
        stage.lists()
    stage.has(2, "old-2")
    stage.lists()
    stage.theirs.clear()
    stage.has(1, "new-1", era="new")
    stage.has(2, "new-2", "production", era="new")
    seq = stage.send(A, v.Watch("lm", "production", 1 if tagged else 0))
    stage.lists()
    stage.fetch()  # the old one's
    assert stage.answer(seq) is None
    assert "production" not in stage.names()["old-2"]
    while not stage.idle():
        stage.fetch(era="new")
    found = stage.answer(seq)
    assert isinstance(found, v.Found)
    assert found.info.name == stage.lease(A, "production").info.name == "new-2"


def test_a_watch_tells_versions_of_one_number_apart(stage: FakeUpstream) -> None:
    old = stage.lease(A).info
    seq = stage.send(A, v.Watch("lm", "latest", 1, old.digest))
    assert stage.answer(seq) is None
    stage.has(1, era="new")
    stage.lists()
    stage.fetch(era="new")
    found = stage.answer(seq)
    assert isinstance(found, v.Found)
    assert (found.info.number, found.info.digest == old.digest) == (1, False)
    seq = stage.send(A, v.Watch("lm", "latest", 1, old.digest))
    assert stage.answer(seq) == found  # at once, to whoever did not hear


def test_the_newest_of_a_new_cluster_is_the_newest_here_also_while_a_tag_of_it_does_not_come(
    stage: FakeUpstream,
) -> None:
    for number in (2, 3):
        stage.has(number, f"v{number}", "production")
        stage.lists()
        stage.fetch()
    stage.theirs.clear()
    stage.has(1, "new-1", "production", era="new")
    stage.has(2, "new-2", era="new")
    stage.lists()
    memory = [held.buffer for key, held in stage.part_store.parts.items() if key.number == 2]
    assert stage.fetch(era="new").name == "new-2"
    stage.fail(DeltaCorrupt("damaged"))
    assert stage.lease(A).info.name == "new-2"
    assert [stage.part_store.pool.take(memory[0].size) in memory for _ in memory] == [True, True]  # it was given back
    with pytest.raises(UnknownVersion):
        stage.lease(A, "v3")
    while stage.idle():
        stage.tick()
    stage.fetch(era="new")
    assert stage.names() == {"new-1": ("production",), "new-2": ("latest",)}


def test_a_cluster_that_lists_nothing_of_a_model_takes_nothing_away(stage: FakeUpstream) -> None:
    stage.theirs.clear()
    stage.lists()
    assert stage.lease(A).info.number == 1


def test_a_version_that_is_lost_there_is_still_here(stage: FakeUpstream) -> None:
    status = stage.theirs[1]
    stage.theirs[1] = v.VersionStatus(status.info, "lost", (), 0, 0)
    stage.has(2)
    stage.lists()
    stage.fetch()
    assert stage.lease(A, "v1").info.number == 1
