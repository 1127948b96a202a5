"""What a request changes in the logits before a token is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from headwater.errors import UsageError
from headwater.gateway.engine import Engine
from headwater.gateway.engine_types import GenerationRequest
from headwater.gateway.sampling import Sampler
from headwater.gateway.shaping import Shaper
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import Client, ask, folder, greedy

LOGITS = torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0])


def shaper(prompt: tuple[int, ...] = (1, 3, 3), **options: Any) -> Shaper:
    return Shaper(GenerationRequest(prompt, 10, **options))


def test_nothing_asked_nothing_done() -> None:
    assert shaper().idle
    assert torch.equal(shaper()(LOGITS), LOGITS)
    for options in ({"repetition_penalty": 1.1}, {"logit_bias": ((1, 2.0),)}, {"presence_penalty": 0.1}):
        assert not shaper(**options).idle


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    mine = shaper(repetition_penalty=1.7)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    said = [1, 3, 3]
    for token in (4, 0, 4):
        expected = theirs(torch.tensor([said]), LOGITS[None].clone())[0]  # type: ignore[arg-type]
        torch.testing.assert_close(mine(LOGITS), expected, rtol=1e-6, atol=0)
        mine.push(token)
        said.append(token)


def test_a_bias_is_added_and_a_large_one_decides() -> None:
    assert shaper(logit_bias=((0, 5.0), (4, -100.0)))(LOGITS).tolist() == [3.0, -1.0, 1.0, 2.0, -97.0]
    forced = Sampler(GenerationRequest((1,), 5, logit_bias=((2, 100.0),), seed=1), [], str)
    assert {forced.pick(LOGITS).id for _ in range(20)} == {2}


def test_min_p_leaves_what_is_likely_enough() -> None:
    request = GenerationRequest((1,), 5, min_p=0.3, seed=1)
    sampler = Sampler(request, folder().warpers(request), str)
    probabilities = LOGITS.softmax(-1)
    likely = {i for i, p in enumerate(probabilities.tolist()) if p >= 0.3 * float(probabilities.max())}
    assert {sampler.pick(LOGITS).id for _ in range(200)} == likely == {3, 4}


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((1, float("nan")),)},
        {"max_tokens": -1},
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="nothing was queued"):
        GenerationRequest(**{"prompt": (1,), "max_tokens": 5} | options)


def test_a_stop_token_ends_an_answer_and_is_no_text() -> None:
    engine = Engine(folder(), MemorySource("toy"), slots=2)
    try:
        whole, _ = ask(engine, greedy(b"abc", 12))
        whole.wait()
        stop = whole.ids[6]
        first = whole.ids.index(stop)
        cut, _ = ask(engine, greedy(b"abc", 12, stop_token_ids=frozenset([stop])), Client())
        assert cut.finished().reason == "stop"
        assert cut.ids == whole.ids[: first + 1]
        assert cut.tokens[-1].text == "" or cut.text in whole.text
        assert whole.text.startswith(cut.text)
    finally:
        engine.close()
