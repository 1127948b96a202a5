"""Gathering the contributions of a step."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server import events as e
from headwater.server.sync import Gathering
from headwater.server.tables.base import union
from headwater.wire.messages import Members, Ready
from tests.server.stage import TABLE, Stage, spec

SEEDS = st.integers(0, 2**32).map(random.Random)
RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)


@given(RANGES)
def test_a_union_covers_the_same_bytes_sorted_and_apart(ranges: list[tuple[int, int]]) -> None:
    joined = union(ranges)
    assert {b for a, z in joined for b in range(a, z)} == {b for a, z in ranges for b in range(a, z)}
    assert all(before[1] < after[0] for before, after in itertools.pairwise(joined))


def test_a_step_is_complete_when_all_that_it_needs_have_ended() -> None:
    gathering = Gathering()
    assert not gathering.complete(), "nobody is there"
    gathering.members_changed(1, (0, 2), 0)
    gathering.part(0, 10, 1).ended = True
    gathering.part(1, 11, 1).ended = True
    assert not gathering.complete()
    gathering.part(2, 12, 1)
    assert not gathering.complete()
    gathering.part(2, 12, 1).ended = True
    assert gathering.complete()
    assert [part.session for part in gathering.finish()] == [10, 12], "rank 1 is not needed"
    assert gathering.clock == 1
    assert not gathering.complete()


def test_a_new_session_of_a_rank_replaces_the_old_one() -> None:
    gathering = Gathering()
    gathering.part(0, 10, 1).ended = True
    assert not gathering.part(0, 99, 1).ended


def test_what_is_pushed_again_under_a_newer_membership_begins_anew() -> None:
    gathering = Gathering()
    gathering.members_changed(1, (0, 1), 0)
    gathering.part(0, 10, 1).ended = True
    gathering.part(1, 11, 2).ended = True  # it has heard of the death before this shard
    assert not gathering.part(0, 10, 2).ended
    gathering.part(0, 10, 2).ended = True
    assert gathering.members_changed(2, (0, 1), 2) == []
    assert gathering.complete()


class Play:
    """Workers that push to the shards in any order, die, and push again where a death undid their step.

    A shard hears of a death at a moment of its own; a worker hears of it from the first shard that refuses it.
    """

    def __init__(self, shards: int, chance: random.Random) -> None:
        self.chance = chance
        self.stage = Stage(spec(numel=16_384 * shards), shards=shards, ranks=(0, 1, 2))
        self.alive = {0, 1, 2}
        self.knows = dict.fromkeys(self.alive, self.stage.epoch)  # by worker: the membership that it has heard of
        self.sent: dict[int, set[int]] = {rank: set() for rank in self.alive}  # shards that have its part of the step
        self.news: list[tuple[int, Members]] = []  # announcements on their way to a shard
        self.steps = 0
        self.value = 0.0

    def push(self) -> None:
        rank = self.chance.choice(sorted(self.alive))
        left = [n for n in range(len(self.stage.shards)) if n not in self.sent[rank]]
        if left:
            number = self.chance.choice(left)
            self.sent[rank].add(number)
            self.stage.push(rank, float(rank + 1), number, clock=self.steps + 1, members=self.knows[rank])

    def die(self) -> None:
        rank = self.chance.choice(sorted(self.alive))
        self.alive.discard(rank)
        message = self.stage.news(tuple(sorted(self.alive)), f"worker {rank} died")
        self.news = [(number, message) for number in range(len(self.stage.shards))]
        self.chance.shuffle(self.news)

    def hear(self) -> None:
        """One shard hears the news; workers hear what they were refused with, and push again."""
        if self.news and self.chance.random() < 0.4:
            self.stage.event(*self.news.pop())
        for fail in self.stage.take(e.Fail):
            assert fail.code == "WorkerLost"
            rank = fail.session - 10
            if rank in self.alive and self.knows[rank] < self.stage.epoch:
                self.knows[rank], self.sent[rank] = self.stage.epoch, set()

    def decide(self) -> None:
        if self.stage.decide() is None:
            return
        self.steps += 1
        self.sent = {rank: set() for rank in self.alive}
        self.value -= sum(rank + 1 for rank in self.alive) / len(self.alive)
        assert {self.stage.value(n) for n in range(len(self.stage.shards))} == {self.value}


@given(st.integers(1, 3), SEEDS)
@settings(max_examples=40)
def test_on_any_schedule_of_pushes_deaths_and_commits_the_shards_agree(shards: int, chance: random.Random) -> None:
    """A step is of all that are there, on every shard or on none."""
    play = Play(shards, chance)
    for _ in range(80):
        if chance.random() < 0.05 and len(play.alive) > 1 and not play.news:
            play.die()
        else:
            play.push()
        play.hear()
        if {r.shard for _, r in play.stage.heard if isinstance(r, Ready) and r.members == play.stage.epoch} == {
            shard.number for shard in play.stage.shards
        }:
            play.decide()
        clocks = {shard.tables[TABLE].gathering.clock for shard in play.stage.shards}
        assert clocks == {play.steps}
    assert play.steps > 0
