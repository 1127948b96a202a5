"""The versions that there are and what names mean: tags, ``latest``. It decides nothing and says nothing."""

from __future__ import annotations

from collections.abc import Mapping

from headwater.errors import UnknownVersion, UsageError
from headwater.versions import listing
from headwater.versions.entries import LATEST, TAGS, Entry
from headwater.wire import versions as v


class Catalogue:
    """``entries`` by number; ``tags`` by (model, tag). ``latest`` is no tag: it is always the newest that is ready."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.tags: dict[tuple[str, str], int] = {}

    # ---- versions --------------------------------------------------------------------------------

    def of(self, model: str) -> list[Entry]:
        """The versions of a model, oldest first."""
        return [entry for number, entry in sorted(self.entries.items()) if entry.info.model == model]

    def models(self) -> list[str]:
        """The models that have versions, by name."""
        return sorted({entry.info.model for entry in self.entries.values()})

    def named(self, model: str, name: str) -> Entry | None:
        """The version of this name, in whatever state."""
        return next((entry for entry in self.of(model) if entry.info.name == name), None)

    def newest(self, model: str) -> Entry | None:
        """The newest version of a model that is ready."""
        return next((entry for entry in reversed(self.of(model)) if entry.state == "ready"), None)

    def find(self, model: str, name: str) -> Entry | None:
        """What a name or tag means, in whatever state."""
        if name == LATEST:  # if all are lost, the newest of these: its holder may be on its way back
            return self.newest(model) or next((e for e in reversed(self.of(model)) if e.state == "lost"), None)
        number = self.tags.get((model, name))
        return self.entries.get(number) if number is not None else self.named(model, name)

    def resolve(self, model: str, name: str) -> Entry:
        """The version that a name or tag means. Raises ``UnknownVersion`` with what there is."""
        entry = self.find(model, name)
        if entry is not None and entry.state in ("ready", "lost"):
            return entry
        if entry is not None:
            raise UnknownVersion(f"version {name!r} of {model!r} is being published; wait for it")
        raise listing.unknown(self, model, name)

    def expendable(self, now: float) -> list[Entry]:
        """What is neither among the newest, nor tagged, nor leased."""
        found = []
        for model in self.models():
            mine = [entry for entry in self.of(model) if entry.state in ("ready", "lost")]
            newest = self.newest(model)
            for place, entry in enumerate(reversed(mine)):
                if entry is newest or entry.leases or self.tags_of(entry):
                    continue
                policy = newest.ask if newest is not None else entry.ask
                old = policy.age is not None and now - entry.since > policy.age
                if place >= policy.keep or old:
                    found.append(entry)
        return found

    def forget(self, number: int) -> Entry:
        """A version, and the tags that mean it, are none of those that there are any more."""
        entry = self.entries.pop(number)
        self.tags = {tag: to for tag, to in self.tags.items() if to != number}
        return entry

    # ---- tags ------------------------------------------------------------------------------------

    def tags_of(self, entry: Entry) -> tuple[str, ...]:
        """The tags that mean a version."""
        return tuple(sorted(tag for (_, tag), number in self.tags.items() if number == entry.number))

    def tagged(self, model: str) -> dict[str, int]:
        """A model's tags, and the numbers of what they mean."""
        return {tag: number for (of, tag), number in self.tags.items() if of == model}

    def retag(self, model: str, tags: Mapping[str, int]) -> None:
        """Let the tags of a model be these."""
        others = {tag: number for tag, number in self.tags.items() if tag[0] != model}
        self.tags = others | {(model, tag): number for tag, number in tags.items()}

    def check_names(self, ask: v.Publish) -> None:
        """A name is a version's or a tag's, not both; tags of versions that are on their way count.

        Raises ``UsageError``.
        """
        coming = {tag for each in self.of(ask.model) if each.state in ("waiting", "cutting") for tag in each.ask.tags}
        tags = coming | set(self.tagged(ask.model))
        if ask.name in tags:
            raise UsageError(
                f"{ask.name!r} is a tag of {ask.model!r}; a version needs a name of its own. Nothing was published"
            )
        for tag in ask.tags:
            if self.named(ask.model, tag) is not None:
                raise UsageError(
                    f"{tag!r} is a version of {ask.model!r}; a tag needs a name of its own. Nothing was published"
                )
        if len(tags | set(ask.tags)) > TAGS:
            raise UsageError(f"{ask.model!r} would have more than {TAGS} tags; take some away. Nothing was published")
