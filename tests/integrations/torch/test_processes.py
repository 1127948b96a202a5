"""Several optimizers in one script, one after the other or at once, in real worker processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import headwater
from headwater.client import connecting
from headwater.errors import UsageError
from headwater.launch import Launcher, Outcome, launch
from tests.integrations.torch.support import digest

HEAD = """
import os, sys, time
import torch, headwater
from pathlib import Path
from torch import nn
from safetensors.torch import save_file
from tests.integrations.torch.support import digest
from tests.patience import PATIENCE
torch.set_num_threads(1)
rank, folder = int(os.environ["HEADWATER_RANK"]), Path(sys.argv[1])
def say(*words): print(*words, flush=True)
def wait_for(name):
    until = time.monotonic() + PATIENCE
    while not (folder / name).exists():
        assert time.monotonic() < until, f"{name} never came"
        time.sleep(0.01)
def linear(seed, *shape):
    torch.manual_seed(seed)
    return nn.Linear(*shape)
def train(model, opt, steps, x):
    for _ in range(steps):
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.synchronize()
"""


class Job:
    """Scripts as workers of one cluster; ``lines``: what the last one said, by rank."""

    def __init__(self, folder: Path, cluster: Launcher | None) -> None:
        self.lines: dict[int, list[str]] = {}
        self.heard: Callable[[str], None] = lambda text: None  # all that workers say
        self._folder = folder
        self._cluster = cluster

    def run(self, code: str, workers: int = 2, **env: str) -> Outcome:
        self.lines = {rank: [] for rank in range(workers)}
        words = [sys.executable, "-c", HEAD + code, str(self._folder)]
        root = {"PYTHONPATH": ":".join(sys.path), "HEADWATER_TIMEOUT": "60"}
        address = None
        if self._cluster is not None:
            address = self._cluster.address
            root |= self._cluster.environment()

        def line(process: object, stream: str, text: str) -> None:
            rank: int = getattr(process, "rank", 0)
            if stream == "stdout" and getattr(process, "role", "") == "worker":
                self.lines[rank].append(text)
            self.heard(text)

        return launch(words, servers=2, workers=workers, address=address, env=root | env, on_line=line)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Each script has a cluster of its own."""
    return Job(tmp_path, None)


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """All scripts in one cluster, as of ``headwater up``."""
    with Launcher(2, advertise=False) as cluster:
        monkeypatch.setenv("HEADWATER_TOKEN", cluster.environment()["HEADWATER_TOKEN"])
        yield Job(tmp_path, cluster)


def linear(seed: int, *shape: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(*shape)


# ---- at once -----------------------------------------------------------------------------------------------

TWO = """
d, g = linear(0, 8, 1), linear(1, 4, 8)
opt_d = headwater.Optimizer(d, torch.optim.Adam, lr=1e-3)
opt_g = headwater.Optimizer(g, torch.optim.Adam, lr=1e-3)
for step in range(3):
    x = torch.full((16, 4), 1.0 + step)
    opt_d.zero_grad(); d(g(x).detach()).square().mean().backward(); opt_d.step()
    opt_g.zero_grad(); g(x).square().mean().backward(); opt_g.step()
opt_d.synchronize(); opt_g.synchronize()
say(digest(d), digest(g))
"""


def two() -> str:
    d, g = linear(0, 8, 1), linear(1, 4, 8)
    opt_d = torch.optim.Adam(d.parameters(), lr=1e-3, fused=True)
    opt_g = torch.optim.Adam(g.parameters(), lr=1e-3, fused=True)
    for step in range(3):
        x = torch.full((16, 4), 1.0 + step)
        opt_d.zero_grad()
        d(g(x).detach()).square().mean().backward()  # type: ignore[no-untyped-call]
        opt_d.step()
        opt_g.zero_grad()
        g(x).square().mean().backward()  # type: ignore[no-untyped-call]
        opt_g.step()
    return f"{digest(d)} {digest(g)}"


def test_two_optimizers_need_no_client_and_no_name(job: Job) -> None:
    assert job.run(TWO).code == 0
    assert job.lines == {rank: [two()] for rank in (0, 1)}, "both workers have the same data: their mean is torch's"


TWINS = """
one, two = linear(0, 16, 1), linear(1, 16, 1)
{connect}
o1 = headwater.Optimizer(one, torch.optim.SGD, lr=0.1{client})
o2 = headwater.Optimizer(two, torch.optim.SGD, lr=0.1{client})
train(one, o1, 3, torch.ones(4, 16))
say(digest(one) != digest(two), digest(two) == digest(linear(1, 16, 1)), *sorted(o1._core.client.tables))
"""


@pytest.mark.parametrize("given", [False, True])
def test_two_models_of_the_same_shapes_are_two(job: Job, given: bool) -> None:
    connect, client = ("ps = headwater.connect()", ", client=ps") if given else ("", "")
    assert job.run(TWINS.format(connect=connect, client=client)).code == 0
    assert job.lines == {rank: ["True True model model2"] for rank in (0, 1)}


# ---- one after the other -------------------------------------------------------------------------------------

FOLDS = """
for fold in range(3):
    model = linear(fold, 16, 4)
    fresh = digest(model)
    with {connect}headwater.Optimizer(model, torch.optim.SGD, lr=0.1{more}) as opt:
        assert digest(model) == fresh
        if rank == 0:
            (folder / str(fold)).touch()
        train(model, opt, 5, torch.full((8, 16), 1.0 + rank))
        say(fold, opt.clock, digest(model))
        if rank == 1 and fold < 2:
            wait_for(str(fold + 1))  # it evaluates its fold while the other has begun the next one
"""


def fold(number: int) -> str:
    """Of one process that accumulates the gradients of both workers in rank order."""
    model = linear(number, 16, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        for rank in (0, 1):
            model(torch.full((8, 16), 1.0 + rank)).square().mean().backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= 2
        opt.step()
        opt.zero_grad()
    return f"{number} 5 {digest(model)}"


@pytest.mark.parametrize(
    ("connect", "more"),
    [("", ""), ("", ', name=f"fold{fold}"'), ("headwater.connect() as ps, ", ", client=ps")],
    ids=["unnamed", "named", "connected"],
)
def test_every_fold_begins_anew_and_waits_for_all(job: Job, connect: str, more: str) -> None:
    assert job.run(FOLDS.format(connect=connect, more=more)).code == 0
    assert job.lines == {rank: [fold(number) for number in range(3)] for rank in (0, 1)}


AGAIN = """
model = linear(0, 16, 4)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1{more})
say(digest(model))
train(model, opt, 2, torch.ones(8, 16))
say(digest(model))
"""


def test_a_script_that_runs_again_in_a_standing_cluster_says_whether_it_goes_on(standing: Job) -> None:
    assert standing.run(AGAIN.format(more="")).code == 0
    first = standing.lines[0][1]
    refused = standing.run(AGAIN.format(more=""))
    assert refused.code == 1
    assert "table 'model' holds what an earlier run left in this cluster" in refused.last_words
    assert standing.run(AGAIN.format(more=", resume=True")).code == 0
    assert [lines[0] for lines in standing.lines.values()] == [first, first]
    assert standing.run(AGAIN.format(more=", name='other'")).code == 0
    assert [lines[1] for lines in standing.lines.values()] == [first, first]


# ---- the end of a script ---------------------------------------------------------------------------------------

LAST = """
ps = headwater.connect()
model = linear(0, 16, 4)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, client=ps, name="last")
w = ps.dense("w", (3,), lr=1.0, sync=headwater.Bulk())
model(torch.ones(8, 16)).square().mean().backward()
opt.step()
w.push(torch.ones(3))
"""

LOOK = """
model = linear(0, 16, 4)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1, name="last", resume=True)
with headwater.connect() as ps:
    say(digest(model), ps.dense("w", (3,), lr=1.0, sync=headwater.Bulk()).pull().tolist())
"""


def test_the_last_step_of_a_script_that_closes_nothing_is_not_lost(standing: Job) -> None:
    assert standing.run(LAST).code == 0
    assert standing.run(LOOK, workers=1).code == 0
    model = linear(0, 16, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(8, 16)).square().mean().backward()
    opt.step()
    assert standing.lines[0] == [f"{digest(model)} [-1.0, -1.0, -1.0]"]


# ---- alone -----------------------------------------------------------------------------------------------------


def test_alone_two_optimizers_are_in_one_cluster_which_goes_with_the_last() -> None:
    one, two = linear(0, 4, 4), linear(1, 4, 4)
    first = headwater.Optimizer(one, torch.optim.SGD, lr=0.1)
    second = headwater.Optimizer(two, torch.optim.SGD, lr=0.1)
    client = connecting.current()
    assert sorted(client.tables) == ["model", "model2"]
    first.close()
    assert not client.closed
    second.close()
    assert client.closed


def test_an_optimizer_that_could_not_be_made_leaves_nothing_open() -> None:
    model = nn.BatchNorm1d(3)
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    with pytest.raises(UsageError, match="meta device"):
        headwater.Optimizer(model, torch.optim.SGD, lr=0.1, init=headwater.init.ones())
    with pytest.raises(UsageError, match="0 clients"):
        connecting.current()


# ---- a worker that does something alone --------------------------------------------------------------------------

SLOW = """
model = linear(0, 4, 1)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
for step in range(3):
    if rank == 0 and step == 1:
        wait_for("warned")  # it evaluates and saves
    train(model, opt, 1, torch.ones(4, 4))
opt.close()
if rank == 0:
    wait_for("again")  # it makes the report of the first model before it begins the second
other = headwater.Optimizer(linear(1, 4, 1), torch.optim.SGD, lr=0.1)
say("done", opt.clock)
"""


def test_who_is_alive_is_waited_for_longer_than_the_timeout_and_named(job: Job, tmp_path: Path) -> None:
    warned: list[str] = []

    def heard(text: str) -> None:
        if "waits for worker 0" in text:
            warned.append(text)
            (tmp_path / ("warned" if "step 2 of table 'model'" in text else "again")).touch()

    job.heard = heard
    assert job.run(SLOW, HEADWATER_TIMEOUT="2").code == 0
    assert job.lines == {rank: ["done 3"] for rank in (0, 1)}
    assert any("worker 1 waits for worker 0 at table 'model2'" in text for text in warned)


# ---- children ----------------------------------------------------------------------------------------------------

FORKS = """
model = linear(0, 16, 4)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
x = torch.ones(8, 16)
train(model, opt, 1, x)
children = []
with opt:
    for code in ("sys.exit(0)", "save_file(model.state_dict(), folder / f'saved{rank}'); sys.exit(0)", "refused()"):
        def refused():
            try:
                train(model, opt, 1, x)
            except headwater.UsageError as error:
                assert "was forked from process" in str(error)
                sys.exit(0)
            sys.exit("it trained")
        child = os.fork()
        if child == 0:
            exec(code)
        children.append(child)
        train(model, opt, 1, x)
    say(*[os.waitpid(child, 0)[1] for child in children], opt.clock, digest(model))
"""


def test_children_end_as_they_like_and_their_parent_trains_on(job: Job, tmp_path: Path) -> None:
    assert job.run(FORKS).code == 0
    states = []
    model = linear(0, 16, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        model(torch.ones(8, 16)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        states.append(digest(model))
    assert job.lines == {rank: [f"0 0 0 4 {states[-1]}"] for rank in (0, 1)}
    for rank in (0, 1):
        model.load_state_dict(load_file(tmp_path / f"saved{rank}"))
        assert digest(model) == states[1], "as it was when the child was forked"
