"""What workers are told of one another: as under torchrun, and a port that nobody takes from rank 0."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest

from headwater.launch import Launcher, Rules, launch
from headwater.launch.world import World, inherited
from headwater.transports.ports import ReservedPort
from tests.launch.test_launcher import Collected

SHOW = "import os; [print(name, value) for name, value in os.environ.items()]"


def _shown(collected: Collected, name: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in collected.of(name))


def _environments(**options: object) -> list[dict[str, str]]:
    collected = Collected()
    command = [sys.executable, "-S", "-c", SHOW]
    assert launch(command, servers=0, workers=2, on_line=collected, **options).code == 0  # type: ignore[arg-type]
    return [_shown(collected, name) for name in ("w0", "w1")]


def test_two_workers_find_each_other_as_under_torchrun() -> None:
    code = (
        "import torch, torch.distributed as dist\n"
        "assert dist.is_torchelastic_launched()\n"
        "dist.init_process_group('gloo')\n"
        "found = torch.ones(1) * (1 + dist.get_rank())\n"
        "dist.all_reduce(found)\n"
        "print(dist.get_world_size(), found.item())\n"
        "dist.destroy_process_group()\n"
    )
    collected = Collected()
    outcome = launch([sys.executable, "-c", code], servers=0, workers=2, on_line=collected)
    assert outcome.code == 0, outcome
    assert [collected.of(name) for name in ("w0", "w1")] == [["2 3.0"], ["2 3.0"]]


def test_every_name_of_torchruns_is_there() -> None:
    first, second = _environments()
    assert {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2", "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }.items() <= second.items()  # fmt: skip
    for name in ("MASTER_PORT", "HEADWATER_RUN", "TORCHELASTIC_RUN_ID"):
        assert first[name] == second[name]
    assert first["HEADWATER_RUN"] == first["TORCHELASTIC_RUN_ID"]


def test_two_runs_have_different_ports_and_ids() -> None:
    with Launcher(0, on_line=Collected()) as one, Launcher(0, on_line=Collected()) as other:
        for job in (one, other):
            job.start_workers([sys.executable, "-S", "-c", ""], 1)
        told = [job._worlds[0].of(0, 0) for job in (one, other)]
        assert one.wait().code == other.wait().code == 0
    assert told[0]["MASTER_PORT"] != told[1]["MASTER_PORT"]
    assert told[0]["HEADWATER_RUN"] != told[1]["HEADWATER_RUN"]


def test_the_port_is_rank_0s_and_nobody_elses() -> None:
    with contextlib.closing(ReservedPort()) as held:
        port = held.number
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
        with socket.socket() as store:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("127.0.0.1", port))
            store.listen()
            with socket.create_connection(("127.0.0.1", port)):
                pass


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MASTER_ADDR", "10.0.0.7"), ("MASTER_PORT", "29400"), ("HEADWATER_RUN", "night")):
        monkeypatch.setenv(name, value)
        for found in _environments():
            assert found[name] == value
    assert _environments(env={"MASTER_PORT": "29401"})[0]["MASTER_PORT"] == "29401"


@pytest.mark.parametrize("outer", ["HEADWATER_LOCAL_RANK", "TORCHELASTIC_RUN_ID"])
def test_a_launcher_in_a_worker_makes_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch, outer: str) -> None:
    given = {outer: "0", "MASTER_PORT": "29400", "HEADWATER_RUN": "outer", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = _environments()[0]
    assert found["MASTER_PORT"] != "29400"
    assert found["HEADWATER_RUN"] != "outer"
    assert found["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    assert inherited({**given, "HOME": "/h"}).keys() <= {"HEADWATER_LOCAL_RANK", "HOME"}


def test_a_part_of_a_world_says_what_all_parts_must_be_given() -> None:
    world = World(2, 2, 4, {})
    told = world.of(1, 0)
    assert (told["RANK"], told["GROUP_RANK"], told["GROUP_WORLD_SIZE"]) == ("3", "1", "2")
    assert not {"MASTER_ADDR", "MASTER_PORT", "HEADWATER_RUN"} & told.keys()
    assert world.missing == ["MASTER_ADDR", "MASTER_PORT", "HEADWATER_RUN"]
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29400", "HEADWATER_RUN": "night"}
    assert given.items() <= World(2, 2, 4, given).of(0, 0).items()
    with Launcher(0, on_line=Collected()) as job:
        job.start_workers([sys.executable, "-S", "-c", ""], 2, first_rank=2, world=4)
        assert "the same MASTER_ADDR, MASTER_PORT, HEADWATER_RUN" in job.advice
        assert job.wait().code == 0


def test_a_worker_that_is_started_again_is_in_the_same_world(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "print(*(os.environ[name] for name in\n"
        "    ('RANK', 'MASTER_PORT', 'HEADWATER_RUN', 'TORCHELASTIC_RESTART_COUNT', 'TORCHELASTIC_MAX_RESTARTS')))\n"
        "sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')\n"
    )
    collected = Collected()
    with Launcher(0, on_line=collected, on_note=lambda _: None, rules=Rules(elastic=True, restart_workers=1)) as job:
        job.start_workers([sys.executable, "-S", "-c", code], 1)
        assert job.wait().code == 0
    first, second = (line.split() for line in collected.of("w0"))
    assert first[:3] == second[:3]
    assert (first[3:], second[3:]) == (["0", "1"], ["1", "1"])


def test_the_environment_of_the_launcher_itself_is_left_alone() -> None:
    before = dict(os.environ)
    _environments()
    assert dict(os.environ) == before
