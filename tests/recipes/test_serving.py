"""What recipes share to answer over HTTP."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from headwater.errors import BadInput
from headwater_recipes.common import serving

LABELS = ("a", "b", "c")


def test_the_likeliest_class_comes_first_and_scores_are_probabilities() -> None:
    found = serving.classes(torch.tensor([0.0, math.log(2), math.log(5)]), LABELS, {})
    assert [each["label"] for each in found] == ["c", "b", "a"]
    assert [each["score"] for each in found] == pytest.approx([5 / 8, 2 / 8, 1 / 8])


def test_parameters_are_those_of_hugging_face() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    assert len(serving.classes(logits, LABELS, {"top_k": 2})) == 2
    assert len(serving.classes(torch.zeros(9), "abcdefghi", {})) == 5
    assert len(serving.classes(torch.zeros(9), "abcdefghi", {"top_k": 20})) == 9
    assert serving.classes(logits, LABELS, {"function_to_apply": "none"})[0]["score"] == 2.0
    assert serving.classes(logits, LABELS, {"function_to_apply": "sigmoid"})[2]["score"] == 0.5


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"top_k": 0}, "'top_k' is 0"),
        ({"top_k": True}, "'top_k' is true"),
        ({"function_to_apply": "relu"}, "'function_to_apply' is \"relu\""),
        ({"topk": 1}, "no parameter 'topk' here; there are: top_k, function_to_apply"),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        serving.classes(torch.zeros(3), LABELS, parameters)
    assert caught.value.status == 400


def test_a_model_that_has_diverged_has_no_likeliest_class() -> None:
    with pytest.raises(ValueError, match="not finite"):
        serving.classes(torch.tensor([0.0, math.nan, 1.0]), LABELS, {})


def test_labels_that_are_not_the_models_are_no_answer() -> None:
    with pytest.raises(ValueError, match="2 logits for 3 labels"):
        serving.classes(torch.zeros(2), LABELS, {})


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [(b"\xff", serving.TEXT, 400), (b" \n", serving.TEXT, 400), (b"{}", serving.JSON, 400), (b"x", "image/png", 415)],
)
def test_what_is_no_text_is_refused(body: bytes, kind: str, status: int) -> None:
    with pytest.raises(BadInput) as caught:
        serving.read_text(body, kind)
    assert caught.value.status == status
    assert serving.read_text("för".encode(), serving.TEXT) == "för"


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"[]", serving.JSON, 400),
        (b'{"question": "Why?"}', serving.JSON, 400),
        (b'{"question": "Why?", "context": 1}', serving.JSON, 400),
        (b'{"question": " ", "context": "c"}', serving.JSON, 400),
        (b"Why?", serving.TEXT, 415),
    ],
)
def test_what_lacks_a_field_is_refused(body: bytes, kind: str, status: int) -> None:
    with pytest.raises(BadInput, match=r'this model takes {"inputs": {…}} with "question", "context"') as caught:
        serving.read_json(body, kind, ("question", "context"))
    assert caught.value.status == status
    good = b'{"question": "Why?", "context": "c", "more": 1}'
    assert serving.read_json(good, serving.JSON, ("question", "context")) == {"question": "Why?", "context": "c"}
