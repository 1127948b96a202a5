"""What /metrics shows, in Prometheus' text format. The only file that imports prometheus-client.

Counters and histograms are written as requests end; what the model knows of itself is asked when a scrape comes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from headwater.gateway.engine_types import EngineStatistics
    from headwater.gateway.served import Served, Standing

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, served: Served) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter("headwater_requests", "Answers sent.", labels, registry=self.registry)
        self.hang_ups = Counter(
            "headwater_hang_ups", "Clients that left before their answer's end.", ("route",), registry=self.registry
        )
        self.seconds = Histogram(
            "headwater_request_seconds",
            "From the request's head to the end of the answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "headwater_time_to_first_token_seconds",
            "From the request's head to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.active = Gauge("headwater_requests_active", "Requests that are being answered.", registry=self.registry)
        self.tokens = Counter("headwater_tokens", "Tokens of finished answers.", ("kind",), registry=self.registry)
        self.registry.register(_OfTheModel(served))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfTheModel(Collector):
    """Asked at every scrape."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: the model may not be there yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        standing = self._served.standing()
        yield _gauge("headwater_ready", "1 once the first version is there.", float(standing is not None))
        if standing is not None:
            yield from _versions(standing)
        if (engine := self._served.engine()) is not None:
            yield from _engine(engine)


def _versions(standing: Standing) -> Iterator[Metric]:
    version, now = standing.version, time.time()
    info = GaugeMetricFamily(
        "headwater_version_info", "The version that answers new requests.", labels=("model", "name")
    )
    info.add_metric((version.model, version.name), 1)
    yield info
    yield _gauge("headwater_version_number", "Its number.", version.number)
    yield _gauge("headwater_version_step", "The trainer's clock at its cut.", version.step)
    yield _gauge("headwater_version_age_seconds", "Since it was published.", max(0.0, now - version.time))
    yield _gauge("headwater_versions_live", "Versions in memory.", len(standing.versions))
    yield _counter("headwater_version_swaps", "New versions put into service.", standing.swaps)
    yield _counter("headwater_versions_refused", "Versions that do not fit the model.", standing.refused_versions)
    since = standing.stale_since
    silent = 0.0 if since is None else now - since
    yield _gauge("headwater_cluster_reachable", "0 while no server can be asked.", float(since is None))
    yield _gauge("headwater_stale_seconds", "Since a server was last reached; 0: one can be.", silent)


def _engine(engine: EngineStatistics) -> Iterator[Metric]:
    yield _gauge("headwater_generations_running", "Generations that hold a slot.", engine.running)
    yield _gauge("headwater_generations_waiting", "Generations that wait for one.", engine.waiting)
    yield _gauge("headwater_slots", "Generations that can run at once.", engine.slots)
    yield _gauge("headwater_queue_limit", "Generations that may wait.", engine.queue)
    yield _counter("headwater_engine_steps", "Forwards of the engine.", engine.steps)
    yield _counter("headwater_engine_tokens", "Tokens generated, of unfinished answers too.", engine.tokens_generated)
    yield _gauge("headwater_engine_step_seconds", "The last forward.", engine.last_step_seconds)
    yield _gauge("headwater_swap_pause_seconds", "How long the last swap kept the engine.", engine.swap_pause)
    yield _gauge("headwater_cache_bytes", "Key-value memory held.", engine.cache_bytes)
    finished = CounterMetricFamily("headwater_generations_finished", "Generations by their end.", labels=("reason",))
    for reason, count in engine.finished.items():
        finished.add_metric((reason,), count)
    yield finished


def _gauge(name: str, said: str, value: float) -> Metric:
    return GaugeMetricFamily(name, said, value)


def _counter(name: str, said: str, value: float) -> Metric:
    return CounterMetricFamily(name, said, value)
