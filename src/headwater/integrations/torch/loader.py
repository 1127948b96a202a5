"""``headwater.shard``: a DataLoader of this worker's share of the batches.

All workers walk through the same order, that of one process, and worker r of W takes batches r, r + W, r + 2W, …: a
step of W workers has the samples of W batches in a row. What is left at the end is dealt out sample by sample.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import msgspec
import numpy as np
import torch
import xxhash
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from headwater.errors import DataError, UsageError
from headwater.integrations.base.dealing import rounds
from headwater.integrations.base.notices import warn

T = TypeVar("T")
_SEED = 0


class Gatherer(Protocol):
    """What is needed of ``headwater.Client``."""

    @property
    def declared(self) -> bool: ...

    rank: int
    world: int

    def gather(self, name: str, value: bytes, timeout: float | None = None) -> dict[int, bytes]: ...


Loader = TypeVar("Loader", bound=DataLoader[Any])


def share(loader: Loader, client: Gatherer | None) -> Loader:
    """See ``headwater.shard``."""
    if not isinstance(loader, DataLoader):
        raise UsageError(
            f"headwater.shard takes a torch DataLoader, not {type(loader).__name__}; of another iterable of batches, "
            "the same on all workers, itertools.islice(batches, rank, None, world) is this worker's share"
        )
    crew = Crew(client)
    ours = (ShareSampler, ShareDataset)
    if crew.known == (0, 1) or any(isinstance(x, ours) for x in (loader.batch_sampler, loader.sampler, loader.dataset)):
        return loader
    if (sharing := _shares_already(loader)) is not None:
        warn(f"headwater.shard leaves the loader as it is: its {type(sharing).__name__} shares the data. Said once")
        return loader
    shared = copy.copy(loader)
    for key, value in _changes(loader, crew).items():
        object.__setattr__(shared, key, value)  # a loader refuses it, for fear of iterators that are under way
    object.__setattr__(shared, "_iterator", None)
    return shared


def _changes(loader: DataLoader[Any], crew: Crew) -> dict[str, Any]:
    """The attributes that differ in the loader of a share."""
    if not isinstance(loader.dataset, IterableDataset):
        if loader.batch_sampler is None:
            return {"sampler": ShareSampler(loader.sampler, crew, whole=True)}
        return {"batch_sampler": ShareSampler(loader.batch_sampler, crew)}
    dataset = ShareDataset(loader.dataset, crew, loader.batch_size, drop_last=loader.drop_last)
    # Whole batches come from the dataset; without a batch sampler each of them is collated as it is.
    changes: dict[str, Any] = {"dataset": dataset, "batch_sampler": None}
    if loader.num_workers and loader.generator is None:  # loading processes must draw alike on all workers
        changes["generator"] = torch.Generator("cpu").manual_seed(_SEED)
    return changes


def _shares_already(loader: DataLoader[Any]) -> object | None:
    """A sampler that deals the samples to several ranks itself."""
    from headwater.integrations.torch.sampler import ShardSampler

    batches = loader.batch_sampler
    for sampler in (batches, getattr(batches, "sampler", None), getattr(loader, "sampler", None)):
        ranks = max(getattr(sampler, "num_replicas", 1), getattr(sampler, "num_processes", 1))  # torch's, accelerate's
        if isinstance(sampler, ShardSampler) or ranks > 1:
            return cast(object, sampler)
    return None


# ---- who shares ----------------------------------------------------------------------------------


class Crew:
    """The workers among whom a loader's batches are shared, and what they agree on."""

    def __init__(self, client: Gatherer | None) -> None:
        self._client = client
        self.known = self._find()  # a loading process has no client to ask

    def _find(self) -> tuple[int, int] | None:
        """(rank, number of workers), if that is fixed."""
        client = self.client()
        if client is not None:
            return (client.rank, client.world) if client.declared else None
        from headwater.client.connecting import stated

        return stated()

    def client(self) -> Gatherer | None:
        """The one that was given, or that is open in this process."""
        if self._client is not None or get_worker_info() is not None:
            return self._client
        from headwater.client.connecting import only

        return only()

    def here(self) -> tuple[int, int]:
        """(place, number of workers), without asking anybody."""
        if get_worker_info() is None:
            self.known = self._find()
        return self.known or (0, 1)

    def agree(self, mine: Drawn) -> tuple[int, int, Drawn]:
        """(place, number of workers), and the lowest rank's state of chance. Raises ``DataError``."""
        client = self.client()
        if client is None or (client.declared and client.world == 1):
            place, count = self.here()
            return place, count, mine if count == 1 else Drawn.fresh()
        said = client.gather("headwater.shard", msgspec.msgpack.encode(mine))
        drawn = {rank: msgspec.msgpack.decode(value, type=Drawn) for rank, value in sorted(said.items())}
        if len({each.order for each in drawn.values() if each.order}) > 1:
            raise DataError(
                "workers went through the loader's last epoch in different orders, so that some samples were trained "
                "on twice and others not at all: its sampler, or what it draws from, is not the same on all of them "
                "(its length, its data, a generator that is seeded by rank). headwater.data.shards deals samples "
                "without a sampler of one's own"
            )
        ranks = list(drawn)
        return ranks.index(client.rank), len(ranks), msgspec.structs.replace(drawn[ranks[0]], order=0)

    def __getstate__(self) -> dict[str, Any]:
        return {"_client": None, "known": self.known}


# ---- chance --------------------------------------------------------------------------------------


class Drawn(msgspec.Struct, frozen=True):
    """The state of what a sampler may draw from.

    ``order``: a hash of the last order that this worker went through to its end; 0: it did not.
    """

    order: int
    default: bytes
    own: bytes
    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, bytes, int, int, float]

    @classmethod
    def of(cls, order: int, generator: torch.Generator | None) -> Drawn:
        """As it is now; ``generator``: the sampler's own."""
        own = b"" if generator is None else _raw(generator.get_state())
        python: Any = random.getstate()
        return cls(order, _raw(torch.get_rng_state()), own, python, _numpy(np.random.get_state()))  # noqa: NPY002

    @classmethod
    def fresh(cls) -> Drawn:
        """Where nobody can be asked yet: the same on all workers."""
        made = _raw(torch.Generator("cpu").manual_seed(_SEED).get_state())
        python: Any = random.Random(_SEED).getstate()
        return cls(0, made, made, python, _numpy(np.random.RandomState(_SEED).get_state()))

    def restore(self, generator: torch.Generator | None) -> None:
        """Draw from here on."""
        torch.set_rng_state(_tensor(self.default))
        if generator is not None and self.own:
            generator.set_state(_tensor(self.own))
        random.setstate(self.python)
        name, keys, *rest = self.numpy
        np.random.set_state((name, np.frombuffer(keys, dtype="<u4"), *rest))  # type: ignore[arg-type] # noqa: NPY002


def _numpy(state: Any) -> tuple[str, bytes, int, int, float]:
    name, keys, at, has, cached = state
    return str(name), np.asarray(keys, dtype="<u4").tobytes(), int(at), int(has), float(cached)


def _raw(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


# ---- map-style data ------------------------------------------------------------------------------


class ShareSampler(Sampler[Any]):
    """Every W-th of what another (batch) sampler gives; everything else about it is as there."""

    def __init__(self, inner: Iterable[Any], crew: Crew, *, whole: bool = False) -> None:
        self.inner = inner
        self._crew = crew
        self._whole = whole  # single samples, which are batches to the script
        self._last = 0  # a hash of the last order, if all of it was given

    def __iter__(self) -> Iterator[Any]:
        place, count, order = self._order()
        if count == 1:
            yield from order
            return
        self._last, hashed = 0, xxhash.xxh3_64()
        every = self._noted(order, hashed)
        if self._whole:
            yield from islice(every, place, None, count)
        else:
            drop = bool(getattr(self.inner, "drop_last", False))
            for round_ in rounds(map(list, every), count, drop):
                yield from round_[place : place + 1]
        self._last = hashed.intdigest() >> 1

    def _order(self) -> tuple[int, int, Iterator[Any]]:
        """This worker's place, the number of workers, and the whole order, the same on all of them."""
        if type(_innermost(self.inner)) is SequentialSampler and self._crew.here() != (0, 1):
            return *self._crew.here(), iter(self.inner)
        generator = _generator(self.inner)
        place, count, agreed = self._crew.agree(Drawn.of(self._last, generator))
        return place, count, iter(self.inner) if count == 1 else _drawing(self.inner, agreed, generator)

    @staticmethod
    def _noted(order: Iterable[T], hashed: Any) -> Iterator[T]:
        for each in order:
            hashed.update(repr(each).encode())
            yield each

    def __len__(self) -> int:
        total, (place, count) = len(cast(Sized, self.inner)), self._crew.here()
        full, left = divmod(total, count)
        if not left or count == 1:
            return full
        if self._whole:
            return full + (place < left)
        if getattr(self.inner, "drop_last", False):
            return full
        samples = self._samples_left(full * count)
        return full + 1 if samples >= count else full or int(place < samples)

    def _samples_left(self, batches: int) -> int:
        """After so many of them; where that cannot be known, enough for everybody."""
        sampler, size = getattr(self.inner, "sampler", None), getattr(self.inner, "batch_size", None)
        if not isinstance(self.inner, BatchSampler) or not isinstance(sampler, Sized) or not isinstance(size, int):
            return 1 << 62
        return len(sampler) - batches * size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)  # batch_size, drop_last, set_epoch


def _drawing(inner: Iterable[T], state: Drawn, generator: torch.Generator | None) -> Iterator[T]:
    """What ``inner`` gives when it draws from ``state`` on, whatever else is drawn meanwhile.

    Where the script's own chance is at the same point, ``inner`` draws from that, as in one process; where it is not,
    it goes on as if nothing had been drawn.
    """
    every = None
    once = type(_innermost(inner)) in _ONCE
    while True:
        own = Drawn.of(0, generator)
        apart = own != state
        if apart:
            state.restore(generator)
        try:
            every = iter(inner) if every is None else every
            found = next(every)
        except StopIteration:
            return
        finally:
            state = Drawn.of(0, generator)
            if apart:
                own.restore(None)
        yield found
        if once:
            yield from every
            return


_ONCE = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that draw all that they need before they give anything."""


def _innermost(sampler: Any) -> Any:
    return sampler.sampler if type(sampler) is BatchSampler else sampler


def _generator(sampler: Any) -> torch.Generator | None:
    found = getattr(sampler, "generator", None) or getattr(getattr(sampler, "sampler", None), "generator", None)
    return found if isinstance(found, torch.Generator) else None


# ---- iterable data -------------------------------------------------------------------------------


class ShareDataset(IterableDataset[Any]):
    """This worker's share of a stream that is the same on all workers; each of them reads all of it.

    It gives lists of samples, each a batch; without a batch size what the stream gives. In a loading process it is the
    share of that process's stream.
    """

    def __init__(self, inner: IterableDataset[Any], crew: Crew, batch_size: int | None, *, drop_last: bool) -> None:
        self.inner = inner
        self._crew = crew
        self._batch_size = batch_size
        self._drop_last = drop_last

    def __iter__(self) -> Iterator[Any]:
        place, count, stream = self._stream()
        if self._batch_size is None:  # the script's own batches, which cannot be dealt out
            yield from islice(stream, place, None, count)
        else:
            for round_ in rounds(_batched(stream, self._batch_size, self._drop_last), count, self._drop_last):
                yield from round_[place : place + 1]

    def _stream(self) -> tuple[int, int, Iterator[Any]]:
        if get_worker_info() is not None:
            return *self._crew.here(), iter(self.inner)
        place, count, agreed = self._crew.agree(Drawn.of(0, None))
        return place, count, iter(self.inner) if count == 1 else _drawing(self.inner, agreed, None)

    def __len__(self) -> int:
        total, (place, count) = len(cast(Sized, self.inner)), self._crew.here()
        if self._batch_size is None:
            return total // count + (place < total % count)
        size = self._batch_size
        batches = total // size if self._drop_last else -(-total // size)
        full, more = divmod(batches, count)
        left = total - full * count * size
        if not more:  # the last worker has the last batch, which may be a small one
            return full * size + min(left, 0) * (place == count - 1)
        if self._drop_last or (left < count and full):  # what comes with the last batches makes no more of them
            return full * size
        return full * size + left // count + (place < left % count)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def _batched(stream: Iterator[T], size: int, drop_last: bool) -> Iterator[list[T]]:
    while batch := list(islice(stream, size)):
        if len(batch) == size or not drop_last:
            yield batch
