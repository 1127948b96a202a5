"""One token out of a row of logits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from headwater.gateway.engine_types import GenerationRequest
from headwater.gateway.sampling import Sampler, likeliest
from tests.gateway.engine_models import folder

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0]).log()  # probabilities 0, 1/6, 2/6, 3/6


def sampler(**options: object) -> Sampler:
    request = GenerationRequest((1,), 10, **options)  # type: ignore[arg-type]
    return Sampler(request, folder().warpers(request), lambda ids: "".join(chr(97 + i) for i in ids))


def drawn(count: int = 600, **options: object) -> Counter[int]:
    made = sampler(seed=1, **options)
    return Counter(made.pick(LOGITS).id for _ in range(count))


def test_draws_follow_the_probabilities() -> None:
    found = drawn(3000)
    assert found[0] == 0
    assert [found[i] / 3000 for i in (1, 2, 3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.04)


def test_temperature_sharpens() -> None:
    found = drawn(3000, temperature=0.5)
    assert [found[i] / 3000 for i in (1, 2, 3)] == pytest.approx([1 / 14, 4 / 14, 9 / 14], abs=0.04)


def test_cuts() -> None:
    assert set(drawn(top_k=2)) == {2, 3}
    assert set(drawn(top_k=1)) == {3}
    assert set(drawn(top_p=0.4)) == {3}
    assert set(drawn(top_p=0.8)) == {2, 3}
    assert set(drawn(temperature=0.0)) == {3}


def test_penalties_count_what_was_generated() -> None:
    greedy = sampler(temperature=0.0, frequency_penalty=0.3)
    assert [greedy.pick(LOGITS).id for _ in range(6)] == [3, 3, 2, 3, 2, 3]
    once = sampler(temperature=0.0, presence_penalty=0.5)
    assert [once.pick(LOGITS).id for _ in range(4)] == [3, 2, 3, 3]
    loved = sampler(temperature=0.0, presence_penalty=-5.0)
    assert {loved.pick(LOGITS.roll(i)).id for i in range(3)} == {3}


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-45, 1e-38, 1e-20, 9e-5])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    for logits in (LOGITS, LOGITS * 1e30, torch.tensor([-3e38, -1.0, 2.9e38, 3e38])):
        made = sampler(seed=1, temperature=temperature)
        assert {made.pick(logits).id for _ in range(20)} == {3}


@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e300, 1.7e308])
def test_a_temperature_without_bound_takes_all_that_can_come(temperature: float) -> None:
    assert set(drawn(temperature=temperature)) == {1, 2, 3}


@pytest.mark.parametrize("top_p", [5e-324, 1e-38, 1e-8])
def test_a_cut_near_zero_takes_the_likeliest(top_p: float) -> None:
    assert set(drawn(top_p=top_p, temperature=1.0)) == {3}


def test_penalties_without_bound() -> None:
    for value in (1e38, 1e300, -1e38, -1e300):
        for other in (0.0, -value):
            made = sampler(seed=1, frequency_penalty=value, presence_penalty=other)
            assert {made.pick(LOGITS).id for _ in range(9)} <= {1, 2, 3}
    for value in (1e-300, 1e-38, 1e38, 1e300):
        made = sampler(seed=1, repetition_penalty=value)
        assert {made.pick(LOGITS).id for _ in range(9)} <= {1, 2, 3}


def test_what_cannot_come_has_a_logprob_that_json_can_write() -> None:
    top = sampler(logprobs=4).pick(LOGITS).top
    assert (top[-1].id, top[-1].logprob) == (0, -9999.0)


def test_logprobs_are_those_before_temperature_and_cuts() -> None:
    choice = sampler(temperature=0.0, top_k=1, logprobs=2).pick(LOGITS.bfloat16())
    assert choice.own is not None
    assert (choice.own.id, choice.own.text) == (choice.id, chr(ord("a") + choice.id))
    assert choice.own.logprob == pytest.approx(torch.tensor(0.5).log().item(), abs=0.02)
    assert [(a.id, a.text) for a in choice.top] == [(3, "d"), (2, "c")]
    assert sampler(logprobs=0).pick(LOGITS).top == ()


def test_without_a_seed_requests_differ() -> None:
    flat = torch.zeros(1000)
    assert [sampler().pick(flat).id for _ in range(5)] != [sampler().pick(flat).id for _ in range(5)]
    assert sampler(seed=-3).pick(flat).id == sampler(seed=-3).pick(flat).id


def test_rows_that_are_not_finite_have_no_likeliest() -> None:
    rows = torch.stack([LOGITS, torch.tensor([0.0, torch.nan, 1, 2]), torch.tensor([0, 1, torch.inf, 2])])
    assert likeliest(rows) == [3, None, None]
