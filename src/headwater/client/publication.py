"""Publishing from a client: a version is begun while the caller waits a moment, and finished while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from headwater.errors import InternalError, UnknownVersion, UsageError, VersionExpired
from headwater.types import VersionInfo
from headwater.wire import messages as m
from headwater.wire import versions as v

if TYPE_CHECKING:
    from headwater.client.table import Table


Ask = Callable[[m.Request], m.Reply]
"""A question to the coordinator or a relay, and its answer; raises what it is refused with."""


class AskInTime(Protocol):
    """A question that may take ``timeout`` seconds; None: as long as the client's settings say."""

    def __call__(self, message: m.Request, timeout: float | None = None, /) -> m.Reply: ...


class Publication:
    """A version on its way. Its moment is past: what is pushed from now on is not in it.

    ``number``: of the version. ``pause``: after ``wait``, the longest that a shard did nothing else for it, in seconds.
    """

    def __init__(self, ask: AskInTime, number: int) -> None:
        self.number = number
        self.pause = 0.0
        self._ask = ask
        self._info: VersionInfo | None = None

    def wait(self, timeout: float | None = None) -> VersionInfo:
        """Until readers can lease it.

        Raises ``UnknownVersion`` or ``ClusterError`` if it was given up, ``DeadlineExceeded``.
        """
        if self._info is None:
            found = self._ask(v.Await(self.number), timeout)
            if not isinstance(found, v.Found):
                raise InternalError(f"the coordinator answered {type(found).__name__} to the wish for a version")
            self._info, self.pause = found.info, found.pause
        return self._info


def publish(
    ask: AskInTime,
    tables: Iterable[Table | m.TableStatus],
    name: str,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    keep: int = 3,
    age: float | None = None,
    tags: Iterable[str] = (),
    step: int | None = None,
) -> Publication:
    """See ``Client.publish``."""
    chosen = list(tables)
    if not chosen:
        raise UsageError("a version is of one table or more; nothing was published")
    tags = tags if isinstance(tags, str) else tuple(tags)
    _check_types(name, model, keep, age, tags)
    if step is not None and (not isinstance(step, int) or abs(step) >= 1 << 63):
        raise UsageError(f"step={step!r} is no whole number; nothing was published")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(f"metadata {key!r}: {value!r} is not of text; nothing was published")
    mine = [table for table in chosen if not isinstance(table, m.TableStatus)]
    for table in mine:  # another server may have to take over for that
        table.settle()
    clocks = tuple((table.number, table.clock) for table in mine if table.spec.sync.collective)
    first = chosen[0]
    numbers = tuple(table.table if isinstance(table, m.TableStatus) else table.number for table in chosen)
    begun = ask(
        v.Publish(
            model or (first.name if isinstance(first, m.TableStatus) else first.spec.name), name, numbers, clocks,
            dict(metadata or {}), keep, age, tuple(tags), time.time(), step,
        )
    )  # fmt: skip
    if not isinstance(begun, v.Publishing):
        raise InternalError(f"the coordinator answered {type(begun).__name__} to a publication")
    return Publication(ask, begun.number)


def _check_types(name: object, model: object, keep: object, age: object, tags: object) -> None:
    """Raises ``UsageError``: what is of another type would not be understood at the other end."""
    text = isinstance(name, str) and isinstance(model, str | None)
    numbers = isinstance(keep, int) and abs(keep) < 1 << 63 and isinstance(age, int | float | None)
    listed = isinstance(tags, tuple) and all(isinstance(tag, str) for tag in tags)  # letters of a text are no tags
    if not text or not numbers or not listed:
        raise UsageError(
            f"publish({name!r}, model={model!r}, keep={keep!r}, age={age!r}, tags={tags!r}): name and model are text, "
            "keep a whole number, age a number of seconds, tags a list of text; nothing was published"
        )


# ---- tags and lists, for clients and readers -------------------------------------------------------


def versions(ask: Ask, model: str = "") -> tuple[v.VersionStatus, ...]:
    """See ``Client.versions``."""
    found = ask(v.ListVersions(model))
    if not isinstance(found, v.VersionList):
        raise InternalError(f"{type(found).__name__} came in answer to the question for versions")
    return found.versions


def tag(ask: Ask, model: str, tag: str, name: str) -> None:
    """See ``Client.tag``."""
    if not name:
        raise UsageError(f"tag {tag!r} of {model!r}: name a version; untag takes a tag away. Nothing was changed")
    ask(v.SetTag(model, tag, name))


def untag(ask: Ask, model: str, tag: str) -> None:
    """See ``Client.untag``."""
    ask(v.SetTag(model, tag, ""))


def rollback(ask: Ask, model: str, tag: str, to: str | None = None) -> v.VersionStatus:
    """See ``Client.rollback``."""
    found = versions(ask, model)
    now = next((each for each in found if tag in each.tags), None)
    if now is None:
        known = sorted({name for each in found for name in each.tags} - {"latest"})
        raise UnknownVersion(f"{model!r} has no tag {tag!r}; it has {', '.join(known) or 'none'}. Nothing was changed")
    if to is not None:
        ask(v.SetTag(model, tag, to))
        return next((each for each in found if to in (each.info.name, *each.tags)), now)
    stays = f"{tag!r} still means {now.info.name!r} (number {now.info.number})"
    if not now.info.parent:
        raise UnknownVersion(f"{now.info.name!r} is the first version of {model!r}, without a parent; {stays}")
    before = next((each for each in found if each.info.number == now.info.parent), None)
    if before is None or before.state != "ready":
        gone = "is lost with the servers that held it" if before is not None else "is gone: it was retired"
        others = [each.info.name for each in found if each.state == "ready" and each.info.number < now.info.number]
        raise VersionExpired(
            f"the parent of {now.info.name!r}, number {now.info.parent}, {gone}; {stays}. Name the version to go back "
            f"to; older ones that are ready: {', '.join(others[-8:]) or 'none'}"
        )
    ask(v.SetTag(model, tag, before.info.name))
    return before
