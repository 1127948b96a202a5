"""What ``headwater versions`` and ``headwater status`` show of versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.cluster.entries import LATEST
from headwater.errors import UnknownVersion
from headwater.wire import messages as m
from headwater.wire import versions as v

if TYPE_CHECKING:
    from headwater.cluster.versions import Versions

SHOWN = 8  # names in a message, at most


def listed(versions: Versions, model: str) -> tuple[v.VersionStatus, ...]:
    """For ``headwater versions``."""
    newest = {each: versions.newest(each) for each in {entry.info.model for entry in versions.entries.values()}}
    found = []
    for entry in versions.entries.values():
        if model and entry.info.model != model:
            continue
        tags = versions.tags_of(entry)
        if newest[entry.info.model] is entry:
            tags = (LATEST, *tags)
        copies = min((len(versions.where(entry, shard)) for shard in entry.shards), default=0)
        found.append(v.VersionStatus(entry.info, entry.state, tags, sum(entry.leases.values()), copies))
    return tuple(found)


def models(versions: Versions) -> tuple[m.ModelStatus, ...]:
    """For ``headwater status``."""
    found = []
    for model in sorted({entry.info.model for entry in versions.entries.values()}):
        mine, newest = versions.of(model), versions.newest(model)
        tags = tuple(sorted(tag for of, tag in versions.tags if of == model))
        found.append(
            m.ModelStatus(
                model, newest.info if newest is not None else None, len(mine),
                sum(entry.state == "lost" for entry in mine), tags,
                sum(sum(entry.leases.values()) for entry in mine), sum(entry.held for entry in mine),
            )
        )  # fmt: skip
    return tuple(found)


def unknown(versions: Versions, model: str, name: str) -> UnknownVersion:
    """What is said of a name that means nothing: what there is."""
    models = sorted({each.info.model for each in versions.entries.values()})
    if model not in models:
        there = (
            f"there are versions of {', '.join(map(repr, models[:SHOWN]))}" if models else "nothing is published yet"
        )
        return UnknownVersion(f"no version of {model!r} is published; {there}")
    names = [each.info.name for each in versions.of(model)]
    tags = [tag for of, tag in versions.tags if of == model]
    return UnknownVersion(
        f"{model!r} has no version or tag {name!r}; versions: {', '.join(names[-SHOWN:])}; tags: "
        f"{', '.join([LATEST, *sorted(tags)[:SHOWN]])}"
    )
