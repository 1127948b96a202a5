"""Runs one program in plain torch (the reference) and with its optimizer lines exchanged.

A program is a script as people write it. In it

- ``… = torch.optim.SGD(…)  #> headwater.Optimizer(…)`` is the line that changes: behind ``#>`` what is written instead;
- ``#: mean optimizer`` stands where the script looks at its gradients (see ``reference.py``);
- ``#: key value`` at its head says what is expected: ``within`` (default: bit for bit), ``workers``,
  ``needs``, ``raises``, ``learns``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
EXCHANGED = re.compile(r"^(\s*(?:[\w.,\[\] ]+ = )?).*?  #> (.*)$", re.MULTILINE)
MEAN = re.compile(r"^(\s*)#: mean (\S+)$", re.MULTILINE)
EXPECTED = re.compile(r"^#: (within|workers|needs|raises|sync|learns) (.*)$", re.MULTILINE)

_numbers = itertools.count()
Outcome = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Way:
    """How a program is run with Headwater: ``transport`` None is the process alone, by ``python``."""

    workers: int = 1
    transport: str | None = None
    sync: str | None = None
    servers: int = 2


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    outcomes: list[Outcome] = field(default_factory=list)


def expected(program: Path) -> dict[str, str]:
    return dict(EXPECTED.findall(program.read_text(encoding="utf-8")))


def exchanged(program: Path, sync: str | None) -> str:
    """The program as a user of Headwater has it."""

    def other(line: re.Match[str]) -> str:
        start, call = line.groups()
        if sync and "headwater.shard" not in call and call.endswith(")"):
            call = f"{call[:-1]}, sync={sync})"
        return f"{start}{call}"

    return EXCHANGED.sub(other, program.read_text(encoding="utf-8"))


def plain(program: Path) -> str:
    """The program as it is, but that it takes the mean where it says so."""
    return MEAN.sub(r"\1_reference.mean(\2)", program.read_text(encoding="utf-8"))


def _write(folder: Path, name: str, text: str, first: str) -> Path:
    last = 'if __name__ == "__main__":\n    __import__("tests.scripts.outcome").scripts.outcome.save(dict(globals()))\n'
    path = folder / name
    path.write_text(f"{first}\n{text}\n{last}", encoding="utf-8")
    return path


def _environment(folder: Path, more: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    own = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "SCRIPTS_OUT": str(folder / "out{rank}.safetensors"),
        "HF_HUB_OFFLINE": "1",
        "HEADWATER_TIMEOUT": str(PATIENCE),
        "XDG_RUNTIME_DIR": str(folder),
    }
    return {**os.environ, **own, **more}


def _outcomes(folder: Path, workers: int) -> list[Outcome]:
    paths = [folder / f"out{rank}.safetensors" for rank in range(workers)]
    return [load_file(path) for path in paths if path.exists()]


class ForkServer:
    """Runs commands side by side in forks of one process that has imported everything; see ``forkserver.py``."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, folder: Path, commands: list[list[str]], environments: list[dict[str, str]]) -> tuple[int, str]:
        """The largest exit code, and all that was said."""
        logs = [str(folder / f"said{next(_numbers)}") for _ in commands]
        orders = [[c, e, str(folder), log] for c, e, log in zip(commands, environments, logs, strict=True)]
        codes = self._ask(json.dumps(orders))
        said = "\n".join(Path(log).read_text(encoding="utf-8", errors="replace") for log in logs)
        return max(abs(code) for code in codes), said

    def _ask(self, orders: str) -> list[int]:
        if self._process is None:
            command = [sys.executable, "-m", "tests.scripts.forkserver", str(os.getpid())]
            environment = _environment(ROOT, {})
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orders + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self.close()
            return [124]
        found: list[int] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End it, and with it all that it has forked."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def reference(forkserver: ForkServer, program: Path, folder: Path, workers: int) -> Ended:
    """``workers`` processes of plain torch that share their gradients."""
    path = _write(folder, program.name, plain(program), "import tests.scripts.reference as _reference")
    shared = {"SCRIPTS_STORE": str(folder / "store"), "WORLD_SIZE": str(workers), **_rendezvous()}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(workers)] if workers > 1 else [{}]
    environments = [_environment(folder, rank) for rank in ranks]
    code, said = forkserver.run(folder, [[sys.executable, str(path)]] * workers, environments)
    return Ended(code, said, _outcomes(folder, workers))


def _rendezvous() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def with_headwater(forkserver: ForkServer, program: Path, folder: Path, way: Way) -> Ended:
    path = _write(folder, program.name, exchanged(program, way.sync), "import headwater")
    command = [sys.executable, str(path)]
    more = {}
    if way.transport is not None:
        count = ["--servers", str(way.servers), "--workers", str(way.workers)]
        command = [sys.executable, "-m", "headwater", "run", *count, str(path)]
        more["HEADWATER_TRANSPORT"] = way.transport
    code, said = forkserver.run(folder, [command], [_environment(folder, more)])
    return Ended(code, said, _outcomes(folder, way.workers))
