"""The command line and environment of every process of a job."""

from __future__ import annotations

import os
import secrets
import sys
from functools import partial
from typing import TYPE_CHECKING

from headwater.launch.process import Command
from headwater.launch.world import World, inherited
from headwater.transports.address import Address, parse
from headwater.wire.auth import token_from_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from headwater.launch.job import Rules
    from headwater.launch.process import Place, Role
    from headwater.launch.shape import Shape

# -P: a file of the user's own called random.py in the current folder is not imported by a server.
SERVER = (sys.executable, "-P", "-m", "headwater.server")


class Commands:
    """Makes the command of each place of a job, as often as it is started.

    Args:
        token: the shared secret; ``None``: that of the environment for a cluster that is joined, else a random one.
        env: additions to the environment of every process.
        cores: those that the processes share.

    Attributes: ``address``: where the coordinator listens, once it is known; ``state``: the folder that it is to use.
    """

    def __init__(self, shape: Shape, rules: Rules, token: str | None, env: Mapping[str, str], cores: int) -> None:
        self.address = shape.address
        self.state: Path | None = shape.state
        self.token = token or (None if shape.own else _given_token()) or secrets.token_hex(32)
        self._shape, self._rules, self._extra, self._cores = shape, rules, dict(env), cores
        self._makers: dict[Place, Callable[[int], Command]] = {}  # of each place, by the number of restarts

    def make(self, place: Place, restarts: int = 0) -> Command:
        """What is to be started in a place, for the nth time again."""
        role, number = place
        if place not in self._makers:
            self._makers[place] = self._coordinator if role == "coordinator" else self._server(number)
        return self._makers[place](restarts)

    def environment(self) -> dict[str, str]:
        """What a client of this cluster needs in its environment: address and token."""
        return {"HEADWATER_ADDRESS": self.address, "HEADWATER_TOKEN": self.token} if self.address else {}

    # ---- the cluster -------------------------------------------------------------------------------

    def _coordinator(self, restarts: int) -> Command:
        listen = self.address or str(parse(self._shape.listen))  # again at the port that it was given
        options = [*self._outlive, *self._shape.coordinator_options(self.state)]
        words = [*SERVER, "--role", "coordinator", "--listen", listen, *options]
        return self._host("coordinator", "coordinator", 0, words, restarts)

    def add_server(self, number: int, listen: str | None) -> Place:
        """The place of one more server. ``listen``: a free port of the coordinator's interface if ``None``."""
        assert self.address is not None
        listen = listen or _free_port(self.address)
        self._makers["server", number] = self._server(number, listen)
        return "server", number

    def _server(self, number: int, listen: str | None = None) -> Callable[[int], Command]:
        assert self.address is not None
        name = f"s{number}"
        listen = listen or _free_port(self._shape.listen)
        options = ["--listen", listen, "--coordinator", self.address, *self._outlive, *self._shape.server_options(name)]
        return partial(self._host, name, "server", number, [*SERVER, "--role", "server", *options])

    @property
    def _outlive(self) -> list[str]:
        """A batch system signals every process of a job; the cluster must last until the workers have finished."""
        return ["--outlive", f"{self._rules.patience + self._rules.grace:g}"]

    def _host(self, name: str, role: Role, rank: int, words: Sequence[str], restarts: int) -> Command:
        """A coordinator or server. A thread that spins while it waits would take its core from the workers."""
        threads = self._cores // max(1, self._shape.servers) if role == "server" else 1
        forced = {"OMP_NUM_THREADS": str(max(1, threads)), "OMP_WAIT_POLICY": "passive", "HEADWATER_TOKEN": self.token}
        return Command(name, role, rank, words, self._environment({}, forced), restarts)

    # ---- workers -----------------------------------------------------------------------------------

    def add_workers(
        self, words: Sequence[str], world: World, env: Mapping[str, str], stdin_rank: int | None
    ) -> list[Place]:
        """The places of all workers of a world that are here."""
        places: list[Place] = [("worker", rank) for rank in world.ranks]
        for local, place in enumerate(places):
            stdin = place[1] == stdin_rank
            self._makers[place] = partial(self._worker, world, local, list(words), dict(env), stdin)
        return places

    def given_environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """What the user said, here or there, of the environment of workers."""
        return {**inherited(os.environ), **self._extra, **env}

    def _worker(
        self, world: World, local: int, words: Sequence[str], env: Mapping[str, str], stdin: bool, restarts: int
    ) -> Command:
        defaults = {"OMP_NUM_THREADS": str(max(1, self._cores // len(world.ranks)))}
        told = {"HEADWATER_STDIN": "yours" if stdin else "none"}
        forced = {**self.environment(), **world.of(local, restarts), **env, **told}
        rank = world.ranks[local]
        return Command(f"w{rank}", "worker", rank, words, self._environment(defaults, forced), restarts, stdin)

    def _environment(self, defaults: Mapping[str, str], forced: Mapping[str, str]) -> dict[str, str]:
        own = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        env = {**own, **defaults, **inherited(os.environ), **self._extra, **forced}
        if "HEADWATER_TOKEN" in env:
            env.pop("HEADWATER_TOKEN_FILE", None)
        return env


def _free_port(beside: str) -> str:
    """The same interface, where nobody listens yet."""
    found = parse(beside)
    return str(Address(found.scheme, found.host, 0))


def _given_token() -> str | None:
    token = token_from_environment()
    return token.decode() if token else None
