"""What the linters do not know: short functions, files of a readable size, tests that never sleep."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import hypothesis

import headwater
from tests.patience import PATIENCE

ROOT = Path(headwater.__file__).parents[2]


def _files(*folders: str) -> list[Path]:
    """Our Python files; an environment that a benchmark made for itself (``.venv-…``) is not ours."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


SOURCE = _files("src", "benchmarks", "examples")
TESTS = _files("tests")

FILE = 700
FUNCTION = 60
USUAL = 40


def _functions(path: Path) -> list[tuple[str, int]]:
    """Name and number of lines of each function, its docstring and the functions inside it left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", _lines(node))
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, *_ = body = node.body
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        body = body[1:]
    start = body[0].lineno if body else node.lineno
    return (node.end_lineno or start) - start + 1


def test_a_file_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE + TESTS}
    assert not [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > FILE]


def test_functions_are_short() -> None:
    lengths = [found for path in SOURCE for found in _functions(path)]
    assert not [f"{name}: {lines} lines" for name, lines in lengths if lines > FUNCTION]
    long = [f"{name}: {lines} lines" for name, lines in lengths if lines > USUAL]
    assert len(long) <= 0.02 * len(lengths), "\n" + "\n".join(long)


def test_a_class_name_means_one_thing() -> None:
    """Whoever searches for a class finds it: no name stands more than twice in the package."""
    names: Counter[str] = Counter()
    for path in _files("src"):
        names.update(re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert not {name: count for name, count in names.items() if count > 2}


def test_tests_do_not_sleep() -> None:
    """Wait for an event with a deadline, or advance a fake clock."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep", "asyncio.sleep")
    ]
    assert not calls


def test_tests_do_not_depend_on_the_speed_of_the_machine() -> None:
    """Who waits for what must come waits for ``PATIENCE``; short waits are for what must not come."""
    waits = ("wait", "join", "result", "exception", "communicate", "settimeout", "connect", "reader", "run")
    fake_clock = ("cluster/test_dataplan.py", "relay/test_core.py", "simulator/test_scheduler.py")
    found = [
        f"{path.relative_to(ROOT)}:{value.lineno}"
        for path in TESTS
        if not path.as_posix().endswith(fake_clock)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waits
        for value in [*node.args[:1], *(each.value for each in node.keywords if each.arg == "timeout")]
        if isinstance(value, ast.Constant) and isinstance(value.value, (int, float)) and 5 <= value.value < PATIENCE
    ]
    assert not found
    assert hypothesis.settings().deadline is None
