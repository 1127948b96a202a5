"""What of the other side's versions is here, and what has to come: a relay's half that faces where they come from.

What there is follows the other side's list: its tags, its newest version of each model, and what a reader asks for by
name. What the other side has no more goes, as soon as what it has instead is here; if it lists no version of a model at
all, or does not answer, what is here stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.errors import ClusterError, UnknownVersion
from headwater.layout.kinds import spans
from headwater.relay.events import Back, Base, Failed, Fetched, Job, News, Taken, Trouble, same
from headwater.relay.orphans import Orphans
from headwater.types import TableSpec, VersionInfo
from headwater.versions.catalogue import Catalogue
from headwater.versions.entries import LATEST, adopted
from headwater.versions.leases import Leases
from headwater.versions.part_store import PartStore
from headwater.versions.parts import Key
from headwater.wire import versions as v

AGAIN = 0.5  # seconds until a version that did not come is asked for again; twice as long each time
SELDOM = 10.0  # seconds at most


@dataclass(slots=True)
class _Retry:
    """A version that did not come ``attempts`` times; not again before ``until``."""

    attempts: int
    until: float


class Mirror:
    """``upstream``: where the versions come from, for messages. ``keep``: the newest versions of each model that are
    kept; tags and leases hold more.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        leases: Leases,
        part_store: PartStore,
        orphans: Orphans,
        models: Sequence[str],
        upstream: str,
        keep: int,
        now: float,
    ) -> None:
        self.specs: dict[int, TableSpec] = {}  # of tables, as they came with the versions
        self._orders: list[Job | v.Release] = []
        self._news: list[News] = []
        self._catalogue = catalogue
        self._leases = leases
        self._part_store = part_store
        self._orphans = orphans
        self._models = list(dict.fromkeys(models))  # whose turn it is comes first
        self._upstream = upstream
        self._keep = keep
        self._theirs: dict[int, v.VersionStatus] = {}  # what the other side has
        self._listened = False  # whether it has ever said what it has
        self._heard = now  # when it last did
        self._why = ""  # it does not answer
        self._behind = (0.0, "")  # it is a relay that hears nothing itself: for how long, and why
        self._demanded: set[int] = set()  # versions that readers asked for by name
        self._job: Job | None = None
        self._retries: dict[int, _Retry] = {}
        self._bases: dict[str, int] = {}  # by model: what is leased on the other side
        self._trouble = ""

    # ---- what readers ask for --------------------------------------------------------------------

    def check_model(self, model: str) -> None:
        """Raises ``UnknownVersion`` for a model that this relay does not follow."""
        if model not in self._models:
            models = ", ".join(map(repr, sorted(self._models)))
            raise UnknownVersion(f"this relay follows {models}, and not {model!r}; start it with --model {model}")

    def demand(self, model: str, name: str) -> bool:
        """Whether a version that is not here is to come. Raises ``ClusterError`` where there is no place for it."""
        try:
            self._catalogue.resolve(model, name)
        except UnknownVersion:
            pass
        else:
            return False
        ready = self._ready(model)
        if not self._listened or any(name in (LATEST, *each.tags) for each in ready):  # it comes by itself
            return True
        found = next((each.info for each in ready if each.info.name == name), None)
        if found is None:
            return False
        held = [entry for entry in self._catalogue.of(model) if entry.leases or self._catalogue.tags_of(entry)]
        if found.number not in self._demanded and len(held) >= self._keep:
            raise ClusterError(
                f"version {name!r} of {model!r} is not here, and there is no place for it: {len(held)} versions are "
                f"held by tags and leases, and this relay keeps {self._keep} (--keep). Lease it from {self._upstream}"
            )
        self._demanded.add(found.number)
        return True

    # ---- what the other side has -----------------------------------------------------------------

    def listed(self, listed: v.VersionList, now: float) -> None:
        """The other side has said what there is."""
        if self._why:
            self._news.append(Back(now - self._heard))
        self._listened = True
        self._heard, self._why, self._behind = now, "", (listed.silent, listed.why)
        self._theirs = {
            each.info.number: each
            for each in listed.versions
            if each.info.model in self._models and each.state in ("ready", "lost")
        }
        self._demanded &= set(self._theirs)
        self._retries = {number: retry for number, retry in self._retries.items() if number in self._theirs}
        self._follow()

    def silent(self, why: str) -> None:
        """The other side does not answer."""
        if not self._why:
            self._news.append(Trouble(f"{self._upstream} does not answer: {why}. What is here is served"))
        self._why = why

    def silence(self, now: float) -> tuple[float, str]:
        """Seconds since the cluster was last heard of, if it is silent, and why; 0 while it is heard."""
        age, why = self._behind
        if self._why:
            return max(now - self._heard, 1e-3) + age, self._why
        return (age + now - self._heard if age else 0.0), why

    def _follow(self) -> None:
        """Let there be here what there is on the other side, as far as it has come."""
        for model in self._models:
            ready = [each.info.number for each in self._ready(model)]
            if not ready:  # a cluster that has just begun: what is here is better than nothing
                continue
            before, tags = self._catalogue.tagged(model), self._tags(model)
            if tags != before:
                self._catalogue.retag(model, tags)
                self._leases.changed(model)
            current = not self._wanted(model)
            for number in [entry.number for entry in self._catalogue.of(model)]:
                newer = number > max(ready) and self._here(max(ready))
                if not self._here(number) and (current or newer):
                    self._orphans.add(self._catalogue.forget(number))
                    self._leases.changed(model)
        self._leases.retain()

    def _tags(self, model: str, arriving: VersionInfo | None = None) -> dict[str, int]:
        """The other side's tags: those of versions that are here, or ``arriving``; others mean what they meant."""
        before = self._catalogue.tagged(model)
        if not self._ready(model):  # a cluster that has just begun
            return before
        tags = {}
        for each in self._theirs.values():
            for tag in each.tags if each.info.model == model else ():
                here = self._here(each.info.number) or (arriving is not None and same(arriving, each.info))
                meant = each.info.number if here else before.get(tag)
                if tag != LATEST and meant is not None:
                    tags[tag] = meant
        return tags

    def _ready(self, model: str) -> list[v.VersionStatus]:
        """What the other side has of a model, and hands out."""
        return [each for each in self._theirs.values() if each.info.model == model and each.state == "ready"]

    def _here(self, number: int) -> bool:
        """Whether the other side's version of this number is here."""
        entry, theirs = self._catalogue.entries.get(number), self._theirs.get(number)
        return entry is not None and theirs is not None and same(entry.info, theirs.info)

    def _wanted(self, model: str) -> list[int]:
        """What has to come, the most urgent first."""
        ready = self._ready(model)
        demanded = [each.info.number for each in ready if each.info.number in self._demanded]
        tagged = [each.info.number for each in ready if set(each.tags) - {LATEST}]
        newest = [max(each.info.number for each in ready)] if ready else []
        begins = not any(self._here(each.info.number) for each in ready)  # then "latest" must not mean an old one first
        wanted = [*newest, *demanded, *tagged] if begins else [*demanded, *tagged, *newest]
        return [number for number in wanted if not self._here(number)]

    # ---- fetching --------------------------------------------------------------------------------

    def next(self, now: float) -> None:
        """Have the next version fetched: one at a time, the models take turns."""
        for model in self._models if self._job is None and not self._why else ():
            for number in self._wanted(model):
                retry = self._retries.get(number)
                if retry is not None and now < retry.until:
                    continue
                self._job = Job(self._theirs[number].info, self._candidates(model), retry.attempts if retry else 0)
                self._orders.append(self._job)
                self._models.remove(model)
                self._models.append(model)
                return

    def _candidates(self, model: str) -> tuple[Base, ...]:
        """Versions of a model that are here and there."""
        found = []
        for entry in self._catalogue.of(model):
            if self._here(entry.number):
                buffers = {
                    (key.shard, key.table): held.buffer
                    for key, held in self._part_store.parts.items()
                    if key.number == entry.number
                }
                found.append(Base(entry.number, buffers, tuple(buffer.lend() for buffer in buffers.values())))
        return tuple(found)

    def fetched(self, done: Fetched, now: float) -> bool:
        """A version is here. Whether a reader has asked for it by name.

        It is leased by the session of its negated number, nobody's, until the relay knows who wants it.
        """
        info = done.leased.info
        self._job = None
        self._trouble = ""
        self._retries.pop(info.number, None)
        self._orphans.discard(info.number)
        if info.number in self._catalogue.entries:  # of another cluster
            self._leases.remove(self._catalogue.forget(info.number))
        self._put(done)
        entry = adopted(done.leased, self._keep, now)
        entry.leases[-info.number] += 1
        self._catalogue.entries[info.number] = entry
        self._catalogue.retag(info.model, self._tags(info.model, info))
        self._leases.changed(info.model)
        self._leases.retain()
        demanded = info.number in self._demanded
        self._demanded.discard(info.number)
        self._follow()
        self._lease_base(info.model, info.number)
        ways = {part.delta is None for part in done.parts.values()}
        way = "mixed" if len(ways) > 1 else "whole" if True in ways else "delta"
        self._news.append(Taken(info, done.nbytes, way, done.seconds))
        return demanded

    def _put(self, done: Fetched) -> None:
        specs = dict(done.leased.specs)
        self.specs |= specs
        for (shard, table), got in done.parts.items():
            words = spans(specs[table], done.leased.shards, shard, got.at.size)
            deltas = {} if got.delta is None else {done.base: got.delta}
            self._part_store.put(Key(done.leased.info.number, shard, table), got.buffer, got.sums, words, deltas)

    def _lease_base(self, model: str, number: int) -> None:
        """The other side keeps what the next delta is made from: the newest version that is here."""
        newest = max((entry.number for entry in self._catalogue.of(model)), default=0)
        before = self._bases.get(model)
        if newest != number:
            self._orders.append(v.Release(number))
        elif before != number:
            self._bases[model] = number
            if before is not None:
                self._orders.append(v.Release(before))

    def failed(self, failed: Failed, now: float) -> None:
        """A version did not come."""
        self._job = None
        info = failed.job.info
        attempts = failed.job.attempt + 1
        self._retries[info.number] = _Retry(attempts, now + min(SELDOM, AGAIN * 2 ** (attempts - 1)))
        if str(failed.error) != self._trouble:
            self._trouble = str(failed.error)
            self._news.append(Trouble(f"version {info.name!r} of {info.model!r} did not come: {failed.error}"))

    def take(self) -> tuple[list[Job | v.Release], list[News]]:
        """What the line to the other side has to do, and what there is to tell: once."""
        orders, news, self._orders, self._news = self._orders, self._news, [], []
        return orders, news

    def give_up(self, number: int) -> None:
        """Nobody waits for this version any more."""
        self._demanded.discard(number)
