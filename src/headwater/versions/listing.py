"""What ``headwater versions`` and ``headwater status`` show of versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from headwater.errors import UnknownVersion
from headwater.versions.entries import LATEST, Entry
from headwater.wire import messages as m
from headwater.wire import versions as v

if TYPE_CHECKING:
    from headwater.versions.catalogue import Catalogue

SHOWN = 8  # names in a message, at most

Where = Callable[[Entry, int], tuple[v.Holder, ...]]
"""Who holds a shard's part of a version."""


def listed(catalogue: Catalogue, where: Where, model: str) -> tuple[v.VersionStatus, ...]:
    """For ``headwater versions``."""
    newest = {each: catalogue.newest(each) for each in catalogue.models()}
    found = []
    for entry in catalogue.entries.values():
        if model and entry.info.model != model:
            continue
        tags = catalogue.tags_of(entry)
        if newest[entry.info.model] is entry:
            tags = (LATEST, *tags)
        copies = min((len(where(entry, shard)) for shard in entry.shards), default=0)
        found.append(v.VersionStatus(entry.info, entry.state, tags, sum(entry.leases.values()), copies))
    return tuple(found)


def models(catalogue: Catalogue) -> tuple[m.ModelStatus, ...]:
    """For ``headwater status``."""
    found = []
    for model in catalogue.models():
        mine, newest = catalogue.of(model), catalogue.newest(model)
        found.append(
            m.ModelStatus(
                model, newest.info if newest is not None else None, len(mine),
                sum(entry.state == "lost" for entry in mine), tuple(sorted(catalogue.tagged(model))),
                sum(sum(entry.leases.values()) for entry in mine), sum(entry.held for entry in mine),
            )
        )  # fmt: skip
    return tuple(found)


def unknown(catalogue: Catalogue, model: str, name: str) -> UnknownVersion:
    """What is said of a name that means nothing: what there is."""
    models = catalogue.models()
    if model not in models:
        there = (
            f"there are versions of {', '.join(map(repr, models[:SHOWN]))}" if models else "nothing is published yet"
        )
        return UnknownVersion(f"no version of {model!r} is published; {there}")
    names = [each.info.name for each in catalogue.of(model)]
    tags = catalogue.tagged(model)
    return UnknownVersion(
        f"{model!r} has no version or tag {name!r}; versions: {', '.join(names[-SHOWN:])}; tags: "
        f"{', '.join([LATEST, *sorted(tags)[:SHOWN]])}"
    )
