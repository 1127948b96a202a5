"""The policies' traits, and that nobody asks for a policy by its name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, ClassVar

import pytest

import headwater
from headwater.server import events as e
from headwater.types import Async, Bulk, Policy, Stale
from tests.server.stage import Stage, spec

SOURCE = Path(headwater.__file__).parent.parent
POLICIES = {"Bulk", "Stale", "Async"}


@pytest.mark.parametrize(
    ("policy", "traits"),
    [
        (Bulk(), {"collective", "combined mean"}),
        (Bulk("lowest"), {"collective", "combined lowest"}),
        (Stale(2), {"reads_own_memory", "immediate", "paced", "read_bound 2"}),
        (Async(), {"reads_own_memory", "immediate"}),
        (Async(3), {"reads_own_memory", "paced", "staleness_cap 3"}),
        (Async(0), {"reads_own_memory", "paced", "staleness_cap 0"}),
    ],
)
def test_traits(policy: Policy, traits: set[str]) -> None:
    found = {name for name in ("collective", "reads_own_memory", "immediate", "paced") if getattr(policy, name)}
    found |= {f"combined {policy.combined}"} if policy.collective else set()
    limits = {"read_bound": policy.read_bound, "staleness_cap": policy.staleness_cap}
    assert found | {f"{name} {limit}" for name, limit in limits.items() if limit is not None} == traits


def asks(node: ast.AST) -> bool:
    """Whether this decides by a policy's class or value instead of by a trait."""
    match node:
        case ast.Call(func=ast.Name(id="isinstance"), args=[_, kinds]):
            named = kinds
        case ast.MatchClass(cls=named) | ast.Call(func=ast.Name(id="issubclass"), args=[_, named]):
            pass
        case ast.Compare(left=left, comparators=others):
            named = ast.Tuple([left, *others])
        case ast.Attribute(attr="bulk" | "is_bulk", value=value):
            return ast.unparse(value) != "Mode"  # what ``headwater chaos`` is asked to try
        case _:
            return False
    parts = list(ast.walk(named))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return bool(POLICIES & (names | {part.attr for part in parts if isinstance(part, ast.Attribute)}))


def test_nobody_asks_for_a_policy_by_its_name() -> None:
    """A further policy is one class in ``types.py`` and files of its own."""
    found = [
        f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', '?')}: {ast.unparse(node)}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "headwater" / "types.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if asks(node)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(spec.sync, Bulk)",
        "isinstance(spec.sync, Stale | headwater.Async)",
        "table.bulk",
        'sync == Bulk("lowest")',
        "type(sync) is types.Stale",
        "match sync:\n    case Async(cap): pass",
    ],
)
def test_the_rule_sees(line: str) -> None:
    assert any(asks(node) for node in ast.walk(ast.parse(line)))


class Newcomer(Policy, frozen=True, tag="newcomer"):
    """A fourth policy: steps of all workers, between which each computes on its own memory."""

    collective: ClassVar[bool] = True


def test_a_further_policy_is_a_class_with_its_traits() -> None:
    sync: Any = Newcomer()
    stage = Stage(spec(sync))
    stage.push(0, 2.0)
    assert stage.take(e.Ack) == [], "it is collective: the other worker has not contributed"
    stage.push(1, 4.0)
    stage.decide()
    assert stage.value() == -6.0, "contributions are added up"
    assert [ack.session for ack in stage.take(e.Ack)] == [10, 11]
