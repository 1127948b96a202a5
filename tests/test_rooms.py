"""The rooms and their one-way rule (docs/design.md): a room imports only from rows below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import headwater

SOURCE = Path(headwater.__file__).parent.parent

ROWS = [
    {"errors", "interrupts", "types"},
    {"init", "pretrained", "wire"},
    {"layout"},
    {"transports"},
    {"versions"},
    {"cluster"},
    {"client", "server"},
    {"readers"},
    {"integrations", "gateway", "dashboard", "launch", "relay", "testing"},
    {"data"},
    {"public names"},
    {"cli"},
    {"bench", "recipes"},
]
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}

BESIDE = {"headwater_bench": "bench", "headwater_recipes": "recipes"}
"""Packages beside ``headwater``, each one room."""

PUBLIC_MODULES = {
    f"headwater{room}" for room in ("", ".data", ".errors", ".init", ".launch", ".pretrained")
}  # fmt: skip
"""What a user, and so a recipe, may name in an import."""


class Import(NamedTuple):
    """One import statement, resolved: ``module`` is what it reaches, ``names`` what it takes from there."""

    path: Path
    line: int
    text: str
    module: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path.relative_to(SOURCE)}:{self.line}: {self.text}"


def _imports(path: Path) -> list[Import]:
    """Every import of ours in a file, wherever it stands: in a function and under TYPE_CHECKING as well."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        for module, names in _reached(node):
            if module.split(".")[0] in ("headwater", *BESIDE):
                line = getattr(node, "lineno", 1)
                found.append(Import(path, line, lines[line - 1].strip(), module, names))
    return found


def _reached(node: ast.AST) -> list[tuple[str, tuple[str, ...]]]:
    match node:
        case ast.Import(names=names):
            return [(alias.name, ()) for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            return [(module, tuple(alias.name for alias in names))]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
            return [(module, ())]
    return []


def _room_of(path: Path) -> str:
    package, *rest = path.relative_to(SOURCE).with_suffix("").parts
    if package in BESIDE:
        return BESIDE[package]
    return {"__init__": "public names", "__main__": "cli"}.get(rest[0], rest[0])


def _rooms_reached(found: Import) -> set[str]:
    package, *rest = found.module.split(".")
    if package in BESIDE:
        return {BESIDE[package]}
    if rest:
        return {rest[0]}
    return {name if name in ROW else "public names" for name in found.names or ("",)}


def _files(package: str) -> list[Path]:
    return sorted((SOURCE / package).rglob("*.py"))


def offences(paths: list[Path]) -> list[str]:
    """The lines that import from their own row or from one above, each with the reason."""
    bad = []
    for path in paths:
        here = _room_of(path)
        for found in _imports(path):
            bad += [
                f"{found}\n    {here} may not import from {there}"
                for there in sorted(_rooms_reached(found))
                if there != here and ROW[there] >= ROW[here]
            ]
    return bad


def test_every_room_is_on_the_map() -> None:
    strangers = {room for path in _files("headwater") if (room := _room_of(path)) not in ROW}
    assert not strangers, f"not in ROWS: {sorted(strangers)}"


def test_a_room_imports_only_from_rows_below() -> None:
    bad = offences([path for package in ("headwater", *BESIDE) for path in _files(package)])
    assert not bad, "\n" + "\n".join(bad)


def test_recipes_import_public_names_only() -> None:
    bad = [
        str(found)
        for path in _files("headwater_recipes")
        for found in _imports(path)
        if found.module.split(".")[0] == "headwater"
        and not (
            found.module in PUBLIC_MODULES
            and (found.module != "headwater" or set(found.names) <= set(headwater.__all__))
        )
    ]
    assert not bad, "\n" + "\n".join(bad)


SOCKETS = {
    "headwater/gateway/serving.py",  # hands its listening socket to the HTTP server's library
    "headwater/cli/serve.py",  # takes it from there
    "headwater/pretrained.py",  # whether a proxy for HTTPS answers; it lies below transports
    "headwater_bench/plain.py",  # the ceilings: what a bare socket can
    "headwater_bench/sockets.py",
    "headwater_bench/rig/proxy.py",  # stands between two processes, and knows of no frames
    "headwater_bench/rig/cluster.py",  # a free port for it
    "headwater_bench/guard/counting.py",  # counts the calls of sockets
}
"""Files outside of ``transports`` that import ``socket``."""


def test_only_transports_own_sockets() -> None:
    found = set()
    for package in ("headwater", *BESIDE):
        for path in _files(package):
            if _room_of(path) != "transports" and _imports_socket(path):
                found.add(str(path.relative_to(SOURCE)))
    assert found == SOCKETS


def _imports_socket(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and any(alias.name == "socket" for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "socket":
            return True
    return False


@pytest.mark.parametrize(
    "line",
    [
        "import headwater.client",
        "from headwater.server.shard import Shard",
        "from headwater import launch",
        "from headwater import connect",
        "from headwater import errors, client",
        "def late():\n    import headwater.cli",
        "if TYPE_CHECKING:\n    from headwater.client import Client",
        'importlib.import_module("headwater_recipes.lm")',
        "from headwater_bench.rig.proxy import Network",
    ],
)
def test_the_rule_catches_an_offence(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tmp_path / "headwater" / "wire" / "probe.py"
    probe.parent.mkdir(parents=True)
    probe.write_text(line, encoding="utf-8")
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    (offence,) = offences([probe])
    assert line.splitlines()[-1].strip() in offence
    assert "wire may not import from" in offence


def test_importing_headwater_does_not_load_torch() -> None:
    code = "import sys, headwater; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
