"""The default corpus: what things of Python's standard library do, in the words of their docstrings.

Sources are parsed, not imported; only modules that are part of the interpreter, and have no source, are looked at as
objects. The same interpreter gives the same chats in the same order.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import itertools
import math
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from headwater_recipes.text.chats import Chat, Corpus, Message, split

LONGEST = 320
"""Characters of an answer; a longer one ends with its last whole sentence."""
_SHORTEST = 16

# Tests, generated tables, parts for developers of Python itself; tkinter says the same of a hundred widgets.
_LEFT_OUT = frozenset(
    {
        *("test", "tests", "turtledemo", "idlelib", "lib2to3", "distutils", "ensurepip", "msilib", "tkinter"),
        *("encodings", "site-packages", "dist-packages", "__pycache__"),
    }
)
_BUILT_IN = (builtins, itertools, math, time)
_DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_SENTENCE = re.compile(r"(?<=[.!?:])\s")


def standard_library() -> Corpus:
    """One chat per public module, class and function with a docstring that no other has."""
    chats = []
    seen: set[str] = set()  # a property's setter has the name of its getter; many methods say the same
    for name, docstring in (*_of_interpreter(), *_of_sources()):
        answer = clean(docstring)
        if len(answer) >= _SHORTEST and seen.isdisjoint((name, answer)):
            seen.update((name, answer))
            question = f"What does {name} do?"
            chats.append(Chat((Message("user", question), Message("assistant", answer)), name))
    training, held_out = split(chats)
    return Corpus(tuple(training), tuple(held_out), "docstrings of the standard library")


def clean(docstring: str) -> str:
    """The first paragraph on one line, of whole sentences, at most ``LONGEST`` characters."""
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    text = " ".join(paragraph.split())
    if len(text) <= LONGEST:
        return text
    short = text[: LONGEST + 1]
    ends = [found.start() for found in _SENTENCE.finditer(short)]
    return short[: ends[-1]] if ends else short[: short.rfind(" ")]


def _of_interpreter() -> Iterator[tuple[str, str]]:
    for module in _BUILT_IN:
        yield from _of_object(module, "" if module is builtins else f"{module.__name__}.")


def _of_object(module: ModuleType, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value):
            continue
        yield from _own(f"{prefix}{name}", value)
        if isinstance(value, type):
            for method, found in sorted(vars(value).items()):
                if not method.startswith("_") and callable(found):
                    yield from _own(f"{prefix}{name}.{method}", found)


def _own(name: str, value: object) -> Iterator[tuple[str, str]]:
    docstring = getattr(value, "__doc__", None)
    # Some say first how they are called: "range(stop) -> range object".
    if isinstance(docstring, str) and "(" not in docstring.split("\n")[0].split(" ")[0]:
        yield name, docstring


def _of_sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT and not name.startswith((".", "_")))
        for name in sorted(names):
            path = Path(folder, name)
            public = name == "__init__.py" or not name.startswith("_")
            if path.suffix == ".py" and public and name != "ntpath.py":  # the twin of posixpath, which is os.path here
                yield from _of_definition(ast.parse(path.read_bytes()), _module(path.relative_to(root)))


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return {"posixpath": "os.path"}.get(name, name)


def _of_definition(node: ast.Module | _DEFINITION, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, _DEFINITION) and not child.name.startswith("_"):
                yield from _of_definition(child, f"{name}.{child.name}")
