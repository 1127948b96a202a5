"""Every target of ``headwater bench``, in one place. The keys are ``bench: figure``."""

from __future__ import annotations

from typing import Literal

import msgspec


class Target(msgspec.Struct, frozen=True):
    """A bound that a figure has to keep."""

    relation: Literal["<=", ">="]
    bound: float

    def met(self, value: float) -> bool:
        """Whether ``value`` keeps the bound. NaN never does."""
        return value <= self.bound if self.relation == "<=" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"


def at_most(bound: float) -> Target:
    return Target("<=", bound)


def at_least(bound: float) -> Target:
    return Target(">=", bound)


TARGETS: dict[str, Target] = {
    "dense: local SGD time / kernel alone": at_most(1.25),
    "dense: local AdamW time / kernel alone": at_most(1.25),
    "dense: local SGD unchecked time / kernel alone": at_most(1.25),
    "dense: local AdamW unchecked time / kernel alone": at_most(1.25),
    "dense: local SGD speed-up over Gloo + step": at_least(8),
    "dense: local AdamW speed-up over Gloo + step": at_least(3),
    "dense: tcp SGD throughput / raw socket, without the kernel": at_least(0.9),
    "dense: tcp SGD throughput / raw socket, with the kernel": at_least(0.75),
    "dense: tcp AdamW throughput / raw socket, without the kernel": at_least(0.9),
    "dense: tcp AdamW throughput / raw socket, with the kernel": at_least(0.75),
    "small: local p50 / raw socket": at_most(3),
    "small: tcp p50 / raw socket": at_most(3),
    "small: unpinned, local p50 / raw socket": at_most(3),
    "small: unpinned, tcp p50 / raw socket": at_most(3),
    "many: local time per tensor": at_most(20),
    "many: tcp time per tensor": at_most(20),
    "step: batch 1 step / no synchronisation": at_most(1.05),
    "step: batch 1 fresh values when step() returns / overlap": at_most(1.03),
    "step: batch 4 step / no synchronisation": at_most(1.05),
    "memory: 1 worker RSS / needed": at_most(1.15),
    "memory: 2 workers RSS / needed": at_most(1.15),
    "memory: 3 workers RSS / needed": at_most(1.15),
    # Flat: within 1 % of what is needed. Independent of the number of workers: two more of them cost their
    # connections' buffers (about 1 MB each), and no share of the table.
    "memory: 1 worker growth over 1,000 steps": at_most(1),
    "memory: 2 workers growth over 1,000 steps": at_most(1),
    "memory: 3 workers growth over 1,000 steps": at_most(1),
    "memory: 3 workers more than 1 worker": at_most(5),
    "replicas: local batch 1 2 replicas / 1": at_most(1.10),
    "replicas: local batch 4 2 replicas / 1": at_most(1.10),
    "replicas: tcp batch 1 2 replicas / 1": at_most(1.35),
    "replicas: tcp batch 4 2 replicas / 1": at_most(1.35),
    "snapshot: servers' pause / time to write": at_most(5),
    "snapshot: longest step, beyond the usual / time to write": at_most(5),
    "snapshot: restore from disk, with that check / plain read": at_most(2),
    "snapshot: restore from the page cache, with that check / plain read": at_most(2),
    "publish: bf16 publish / one memcpy": at_most(1.2),
    "publish: fp32 publish / one memcpy": at_most(1.2),
    "publish: bf16 first 4 publications / one memcpy": at_most(2.5),
    "publish: fp32 first 4 publications / one memcpy": at_most(2.5),
    "publish: bf16 in a trainer that computes: servers' pause": at_most(10),
    "publish: bf16 in a trainer that computes: step, more with one": at_most(10),
    "publish: fp32 in a trainer that computes: servers' pause": at_most(10),
    "publish: fp32 in a trainer that computes: step, more with one": at_most(10),
    "publish: lease of 1 MB, p50": at_most(1),
    "publish: lease of 1 MB, p99": at_most(1),
    "publish: lease of 50 MB, p50": at_most(1),
    "publish: lease of 50 MB, p99": at_most(1),
    "publish: lease of 500 MB, p50": at_most(1),
    "publish: lease of 500 MB, p99": at_most(1),
    "publish: local copy-out / memcpy": at_least(0.85),
    "publish: tcp fetch / raw socket": at_least(0.9),
    "publish: local follower: swap / synchronisation": at_most(5),
    "publish: tcp follower: swap / synchronisation": at_most(5),
    "recovery: primary killed, acknowledges again, p50": at_most(0.5),
    "recovery: primary killed, acknowledges again, p99": at_most(2),
    "recovery: primary stopped, acknowledges again, p50": at_most(2),
    "recovery: primary stopped, acknowledges again, p99": at_most(5),
    "recovery: worker killed, survivors' pause, longest": at_most(1),
    "recovery: steps lost by workers that were not struck": at_most(0),
    "recovery: throughput with 125 faults an hour / without": at_least(97),
    "recovery: share of live workers in a step": at_least(90),
    "races: torn or mixed reads": at_most(0),
    "races: reads with another version's label": at_most(0),
    "races: versions that changed while they were held": at_most(0),
    "races: silent after the last fault": at_most(0),
    "relay: late joiner: anchor + chain / dense fetch": at_most(1.1),
    "relay: late joiner: bytes / dense fetch": at_most(1.1),
    "relay: left the publisher, most / least": at_most(1),
    "serve: bfloat16: streams / generate()": at_least(2),
    "serve: bfloat16: requests failed during 20 swaps": at_most(0),
    "serve: float32: streams / generate()": at_least(2),
    "serve: float32: requests failed during 20 swaps": at_most(0),
    "delta: bf16 AdamW 1 % bytes per changed word": at_most(2),
    "delta: bf16 of fp32 AdamW 1 % bytes per changed word": at_most(2),
    "delta: bf16 AdamW 1 % encode / memcpy": at_least(0.25),
    "delta: bf16 of fp32 AdamW 1 % encode / memcpy": at_least(0.25),
    "delta: bf16 random 1 % encode / memcpy": at_least(0.25),
    "delta: bf16 AdamW 0.1 % words that came out wrong": at_most(0),
    "delta: bf16 AdamW 1 % words that came out wrong": at_most(0),
    "delta: bf16 AdamW 10 % words that came out wrong": at_most(0),
    "delta: bf16 of fp32 AdamW 1 % words that came out wrong": at_most(0),
    "delta: bf16 random 1 % words that came out wrong": at_most(0),
    "delta: fp32 SGD, rate 1e-5 words that came out wrong": at_most(0),
    "delta: fp32 AdamW, rate 1e-4 words that came out wrong": at_most(0),
}
