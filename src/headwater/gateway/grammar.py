"""What an answer must look like, as a grammar in Lark's notation: JSON, calls of tools, or both. No library is needed.

A call is written as the Hermes and Qwen families were taught to, whatever the model::

    <tool_call>
    {"name": "NAME", "arguments": {…}}
    </tool_call>

JSON is written without line breaks, ``", "`` and ``": "`` between its parts: it is the shortest, and an answer cannot
lose itself in blanks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

OPEN = "<tool_call>"
HEAD = '\n{"name": '
ARGUMENTS = ', "arguments": '
CLOSE = "}\n</tool_call>"
"""A line break cannot stand in JSON's strings, so arguments cannot contain it."""

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Schema(NamedTuple):
    """A JSON schema. ``exact``: what cannot be enforced is an error; else it is passed over and named."""

    value: dict[str, Any] | bool
    exact: bool


class Callee(NamedTuple):
    """A function that may be called."""

    name: str
    arguments: Schema


ANY_OBJECT = Schema({"type": "object"}, exact=True)
Calls = Literal["may", "must"]


def lark(answer: Schema | None, tools: Sequence[Callee] = (), calls: Calls = "may", *, several: bool = True) -> str:
    """The grammar of an answer.

    Args:
        answer: what it keeps to where it calls nothing; None: any text.
        tools: what may be called.
        calls: whether something must be called.
        several: more calls than one may be made.
    """
    rules = [f"said: {_json(answer)}" if answer else "said: TEXT", r"TEXT: /(.|\n)*/"]
    if not tools:
        return _joined("start: said", *rules)
    rules += [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}"]
    rules += [f"call_{number}: {_call(tool)}" for number, tool in enumerate(tools)]
    asked = f"asked: {_text(OPEN)} call"
    chain = r'asks: asked ("\n" asked)*' if several else "asks: asked"
    if calls == "must":
        return _joined("start: asks", asked, chain, *rules[2:])
    if answer:
        return _joined("start: said | asks", asked, chain, *rules)
    # A text may go over into a call at any place: lazy, so that the tag ends the text where it comes first.
    spoken = (f"before[lazy]: TEXT {_text(OPEN)}", "spoken: before call")
    return _joined("start: spoken* said" if several else "start: spoken | said", *spoken, *rules)


def _call(tool: Callee) -> str:
    return f"{_text(HEAD + json.dumps(tool.name) + ARGUMENTS)} {_json(tool.arguments)} {_text(CLOSE)}"


def _json(schema: Schema) -> str:
    value = {} if schema.value is True else schema.value
    layout = {"x-guidance": _LAYOUT | {"lenient": not schema.exact}}
    return f"%json {json.dumps(value | layout if isinstance(value, dict) else value)}"


def _text(text: str) -> str:
    return json.dumps(text)


def _joined(*rules: str) -> str:
    return "\n".join(("%llguidance {}", *rules, ""))
