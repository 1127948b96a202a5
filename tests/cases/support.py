"""Small scripts of a stranger's kind: in this process against plain torch, and as processes under `headwater run`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import headwater
from tests.patience import PATIENCE
from tests.scripts.harness import ForkServer

ROOT = Path(__file__).parents[2]
_names = itertools.count()

Make = Callable[..., torch.optim.Optimizer]
"""``make(model, kind, …)``: the line that changes."""


def plainly(model: torch.nn.Module, kind: Any, params: Any = None, *args: Any, **hyper: Any) -> Any:
    """The optimizer as the script had it; fused where Headwater's is."""
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        hyper.setdefault("fused", True)
    return kind(model.parameters() if params is None else params, *args, **hyper)


def both_ways(life: Callable[[Make], dict[str, torch.Tensor]], **options: Any) -> None:
    """``life(make)`` returns what a script ends with; with Headwater it is, bit for bit, what plain torch gets."""
    torch.manual_seed(0)
    wanted = copy.deepcopy(life(plainly))
    with headwater.connect(f"inproc://cases-{next(_names)}", servers=2, timeout=PATIENCE) as ps:

        def ours(model: torch.nn.Module, kind: type[torch.optim.Optimizer], *args: Any, **hyper: Any) -> Any:
            return headwater.Optimizer(model, kind, *args, client=ps, **options, **hyper)

        torch.manual_seed(0)
        found = life(ours)
        assert {name: value.tolist() for name, value in found.items()} == {
            name: value.tolist() for name, value in wanted.items()
        }


@contextlib.contextmanager
def or_says(pattern: str) -> Iterator[None]:
    """It works, or a typed error says ``pattern``."""
    try:
        yield
    except headwater.HeadwaterError as error:
        if not re.search(pattern, str(error)):
            raise AssertionError(f"does not say {pattern!r}") from error


def values(*models: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of all."""
    found = {}
    for i, model in enumerate(models):
        found |= {f"{i}.{name}": p.detach().clone() for name, p in model.named_parameters()}
    return found


def script(
    folder: Path,
    forkserver: ForkServer | None,
    code: str,
    workers: int | None = None,
    servers: int = 1,
    **variables: str,
) -> tuple[int, str]:
    """Exit code and all lines of a script: by ``python``, or with ``workers`` by ``headwater run``.

    ``forkserver`` forks the processes; without it they are real ones.
    """
    path = folder / f"script{next(_names)}.py"
    path.write_text(code, encoding="utf-8")
    command = [sys.executable, str(path)]
    if workers is not None:
        count = ["--servers", str(servers), "--workers", str(workers)]
        command = [sys.executable, "-m", "headwater", "run", *count, str(path)]
    own = {"XDG_RUNTIME_DIR": str(folder), "HEADWATER_TIMEOUT": str(PATIENCE), "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **own, **variables}
    if forkserver is not None:
        return forkserver.run(folder, [command], [environment])
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return ended.returncode, ended.stdout


def said(lines: str, word: str) -> list[str]:
    """What each worker printed behind ``word``, in the order of ranks."""
    found = [line.split(word, 1) for line in lines.splitlines() if word in line]
    return [after.strip() for _, after in sorted(found)]
