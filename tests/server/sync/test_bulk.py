"""Gathering the contributions of a step."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server import events as e
from headwater.server.sync import Gathering
from headwater.server.sync.bulk import union
from headwater.wire.messages import Ready
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
    gathering.part(0, 10).ended = True
    gathering.part(1, 11).ended = True
    assert not gathering.complete()
    gathering.part(2, 12)
    assert not gathering.complete()
    gathering.part(2, 12).ended = True
    assert gathering.complete()
    assert [part.session for part in gathering.finish()] == [10, 12], "rank 1 is not needed"
    assert gathering.clock == 1
    assert not gathering.complete()


def test_a_new_session_of_a_rank_replaces_the_old_one() -> None:
    gathering = Gathering()
    gathering.part(0, 10).ended = True
    assert not gathering.part(0, 99).ended


@given(st.integers(1, 3), SEEDS)
@settings(max_examples=40, deadline=None)
def test_on_any_schedule_of_pushes_deaths_and_commits_the_shards_agree(shards: int, chance: random.Random) -> None:
    """Shards hear of everything at different moments, except for what the coordinator tells all of them in order."""
    stage = Stage(spec(numel=16_384 * shards), shards=shards, ranks=(0, 1, 2))
    count = len(stage.shards)
    alive = {0, 1, 2}
    sent: dict[int, set[int]] = {rank: set() for rank in alive}  # shards that have this rank's part of the step
    dying: dict[int, set[int]] = {}  # shards that do not know yet
    steps = 0
    for _ in range(60):
        action = chance.random()
        if action < 0.75:
            rank = chance.choice(sorted(alive))
            left = [n for n in range(count) if n not in sent[rank]]
            if left and rank not in dying:
                number = chance.choice(left)
                sent[rank].add(number)
                stage.push(rank, float(rank + 1), number, clock=steps + 1)
        elif action < 0.8 and len(alive) > 1 and not dying:
            dying[chance.choice(sorted(alive))] = set(range(count))
        elif dying:
            ((rank, rest),) = dying.items()
            if rest:
                number = chance.choice(sorted(rest))
                rest.discard(number)
                stage.close(rank, number)
            else:
                alive.discard(rank)
                dying = {}
                stage.heard = [(n, i) for n, i in stage.heard if not isinstance(i, Ready)]
                stage.members(tuple(sorted(alive)), lost=f"worker {rank} died")
                sent = {rank: set() for rank in alive}
        ready = [i for _, i in stage.heard if isinstance(i, Ready) and i.members == stage.epoch]
        if len({r.shard for r in ready}) == count and chance.random() < 0.8:
            assert stage.decide() is not None
            steps += 1
            sent = {rank: set() for rank in alive}
            assert len({stage.value(n) for n in range(count)}) == 1
        clocks = {shard.tables[TABLE].gathering.clock for shard in stage.shards}
        assert clocks == {steps}
    assert {f.code for f in stage.take(e.Fail)} <= {"WorkerLost"}
