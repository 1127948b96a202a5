"""What workers are told of one another: the names that ``torchrun`` uses, and ours.

``torch.distributed``, Accelerate, transformers' Trainer and Lightning look for these names and take the process for one
that ``torchrun`` started, so a script runs under both. ``MASTER_PORT`` is where rank 0 will listen, some time from now:
until then the launcher holds the port, bound but not listening. Linux lets nobody else have it meanwhile, neither by
``bind`` to port 0 nor by ``connect``, and lets rank 0 listen there, because both sides say ``SO_REUSEADDR``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from headwater.transports.ports import ReservedPort

_SHARED = ("MASTER_ADDR", "MASTER_PORT", "HEADWATER_RUN")
_OF_A_LAUNCHER = ("HEADWATER_LOCAL_RANK", "TORCHELASTIC_RUN_ID")


def inherited(given: Mapping[str, str]) -> dict[str, str]:
    """``given`` without what another launcher, which this process is a worker of, said of its own world.

    What the user said stays: ``MASTER_ADDR`` and ``MASTER_PORT`` in the environment of a job script, say.
    """
    of_a_launcher = any(name in given for name in _OF_A_LAUNCHER)
    return {
        name: value
        for name, value in given.items()
        if not name.startswith("TORCHELASTIC_") and not (of_a_launcher and name in _SHARED)
    }


class World:
    """``count`` workers here, of ranks ``first`` …, of ``size`` in all. ``close`` it when they have ended.

    Args:
        given: what the user said of ``MASTER_ADDR``, ``MASTER_PORT`` and ``HEADWATER_RUN`` counts.
        restarts: how often a worker may be started again.
    """

    def __init__(self, count: int, first: int, size: int, given: Mapping[str, str], restarts: int = 0) -> None:
        self._count, self._first, self._size, self._restarts = count, first, size, restarts
        self._port: ReservedPort | None = None
        self._shared = self._agreed(given)

    @property
    def ranks(self) -> range:
        """Of the workers here."""
        return range(self._first, self._first + self._count)

    @property
    def whole(self) -> bool:
        """Whether all of its workers are here. If not, this launcher knows no address and no id that all share."""
        return self._count == self._size

    @property
    def missing(self) -> list[str]:
        """What only the user can choose, and has not."""
        return [name for name in _SHARED if name not in self._shared]

    @property
    def advice(self) -> str:
        """What to do about ``missing``, if something is."""
        if not self.missing:
            return ""
        return (
            f"{self._count} of {self._size} workers are started here; for torch.distributed give all launchers the "
            f"same {', '.join(self.missing)}: the host of rank 0, a free port there, any word"
        )

    def of(self, local: int, restart: int) -> dict[str, str]:
        """The environment of the worker ``local``, which was started ``restart`` times before."""
        rank = self._first + local
        ranks = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": self._size, "LOCAL_WORLD_SIZE": self._count}
        like_torchrun: dict[str, object] = {
            "ROLE_NAME": "default",
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": self._size,
            "TORCHELASTIC_RUN_ID": self._shared.get("HEADWATER_RUN", "none"),
            "TORCHELASTIC_RESTART_COUNT": restart,
            "TORCHELASTIC_MAX_RESTARTS": self._restarts,
            "TORCHELASTIC_USE_AGENT_STORE": False,  # rank 0 makes the store, not the launcher
        }
        if self._first % self._count == 0 and self._size % self._count == 0:
            like_torchrun |= {
                "GROUP_RANK": self._first // self._count,
                "GROUP_WORLD_SIZE": self._size // self._count,
            }
        own = {f"HEADWATER_{name}": value for name, value in ranks.items()}
        return self._shared | {name: str(value) for name, value in (ranks | own | like_torchrun).items()}

    def close(self) -> None:
        """Let go of the port. Safe to call twice."""
        if self._port is not None:
            self._port.close()
            self._port = None

    def _agreed(self, given: Mapping[str, str]) -> dict[str, str]:
        """What is the same for all workers of all launchers."""
        found = {name: given[name] for name in _SHARED if given.get(name)}
        if self.whole:
            found.setdefault("HEADWATER_RUN", secrets.token_hex(8))
            found.setdefault("MASTER_ADDR", "127.0.0.1")
            if "MASTER_PORT" not in found:
                self._port = ReservedPort()
                found["MASTER_PORT"] = str(self._port.number)
        return found
