"""One line changes: every program under ``programs/`` trains as in plain torch. `make test-scripts` runs these.

Under Bulk the parameters are, bit for bit or within what a program's head says, those of plain torch: one process for
one worker, and for several one process that accumulates their gradients in the order of ranks and divides by their
number. Under Stale and Async there is no such reference: programs end well and learn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.scripts.harness import PROGRAMS, Ended, ForkServer, Outcome, Way, expected, reference, with_headwater

FAST = ("gan", "accumulate", "clip_norm", "ema_diffusion", "wgan", "two_losses")
"""What `make test` runs of them, with two workers."""

WAYS = {
    "alone": Way(),
    "one-worker": Way(1, "local"),
    "two-workers": Way(2, "local"),
    "two-workers-tcp": Way(2, "tcp"),
}
BULK = [
    pytest.param(
        program,
        way,
        marks=() if program.stem in FAST and way == "two-workers" else pytest.mark.scripts,
        id=f"{program.stem}-{way}",
    )
    for program in PROGRAMS
    for way in WAYS
]
SYNCS = {"stale": "headwater.Stale(2)", "async": "headwater.Async()"}


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, int], Ended]:
    """What plain torch got, by program and number of workers."""
    return {}


@pytest.fixture(scope="module")
def forkserver() -> Iterator[ForkServer]:
    made = ForkServer()
    yield made
    made.close()


def _skip_what_is_not_meant(program: Path, workers: int) -> dict[str, str]:
    said = expected(program)
    for module in said.get("needs", "").split():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    if workers > int(said.get("workers", "2")):
        pytest.skip("a program for one worker")
    return said


def _compare(found: Outcome, wanted: Outcome, within: float) -> list[str]:
    """The names of what differs; buffers only where they are each worker's own."""
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    for name in sorted(wanted.keys() & found.keys()):
        ours, theirs = found[name], wanted[name]
        if name == "losses":
            continue
        if ours.shape != theirs.shape:
            wrong.append(f"{name} has shape {tuple(ours.shape)}")
            continue
        if within:
            difference = (ours.double() - theirs.double()).abs() / theirs.double().abs().clamp(min=1.0)
            equal = difference.numel() == 0 or bool(difference.max() <= within)
        else:
            equal = torch.equal(ours, theirs)
        if not equal:
            wrong.append(f"{name} by {(ours.double() - theirs.double()).abs().max().item():.3g}")
    return wrong


def _of_one_worker(outcome: Outcome) -> Outcome:
    return {name: value for name, value in outcome.items() if not name.startswith("buffer ")}


@pytest.mark.parametrize(("program", "way"), BULK)
def test_bulk_trains_as_plain_torch(
    program: Path, way: str, forkserver: ForkServer, references: dict[tuple[str, int], Ended], tmp_path: Path
) -> None:
    how = WAYS[way]
    said = _skip_what_is_not_meant(program, how.workers)
    (tmp_path / "plain").mkdir()
    (tmp_path / "headwater").mkdir()
    if "raises" in said:  # whatever plain torch makes of it
        ended = with_headwater(forkserver, program, tmp_path / "headwater", how)
        assert ended.code != 0
        assert said["raises"] in ended.said, ended.said
        return
    key = (program.stem, how.workers)
    if key not in references:
        references[key] = reference(forkserver, program, tmp_path / "plain", how.workers)
    wanted = references[key]
    assert (wanted.code, len(wanted.outcomes)) == (0, how.workers), wanted.said
    ended = with_headwater(forkserver, program, tmp_path / "headwater", how)
    assert (ended.code, len(ended.outcomes)) == (0, how.workers), ended.said
    for rank, (found, plain) in enumerate(zip(ended.outcomes, wanted.outcomes, strict=True)):
        if how.workers > 1:
            found, plain = _of_one_worker(found), _of_one_worker(plain)
        assert not _compare(found, plain, float(said.get("within", "0").split()[0])), f"rank {rank}\n{ended.said}"


@pytest.mark.scripts
@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_stale_and_async_end_and_learn(program: Path, sync: str, forkserver: ForkServer, tmp_path: Path) -> None:
    said = _skip_what_is_not_meant(program, 1)
    if "raises" in said:
        pytest.skip("raises under Bulk already")
    workers = int(said.get("workers", "2"))
    ended = with_headwater(forkserver, program, tmp_path, Way(workers, "local", SYNCS[sync]))
    assert (ended.code, len(ended.outcomes)) == (0, workers), ended.said
    for outcome in ended.outcomes:
        assert all(value.isfinite().all() for name, value in outcome.items() if "mask" not in name)
    if "losses" in ended.outcomes[0] and said.get("learns") != "no":
        steps = min(len(outcome["losses"]) for outcome in ended.outcomes)  # a worker may have skipped some
        losses = torch.stack([outcome["losses"][:steps] for outcome in ended.outcomes]).mean(0)
        fifth = max(steps // 5, 1)
        later = losses[fifth:].unfold(0, fifth, 1).mean(1)
        assert later.min() < losses[:fifth].mean(), losses
