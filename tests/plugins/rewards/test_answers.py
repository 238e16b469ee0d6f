"""Answers of a vision language model, parsed into numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from alignkit_rewards.answers import Unusable, first_object, grades, scores, viescore, yes_and_no


def choice(tokens: Mapping[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": value} for token, value in tokens.items()]
    return {"logprobs": {"content": [{"top_logprobs": top}]}}


def test_yes_and_no_are_summed_over_how_they_can_be_written() -> None:
    ways = {"Yes": 0.4, " yes": 0.2, "▁YES": 0.1, "no": 0.05, "No\n": 0.05, "Yesterday": 0.1, "nothing": 0.1}
    yes, no = yes_and_no(choice({token: math.log(p) for token, p in ways.items()}))
    assert (yes, no) == (pytest.approx(0.7), pytest.approx(0.1))
    assert yes_and_no(choice({"no": 0.0})) == (0.0, 1.0)
    assert yes_and_no(choice({"Yes": 0.0, "No": -9999.0})) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (choice({"The": -0.1, "A": -3.0}), "begins with neither yes nor no, but with 'the', 'a'"),
        (choice({"yes": -math.inf}), "begins with neither"),
        (choice({}), "but with nothing"),
        (choice({"yes": math.nan, "no": math.nan}), "the log-probability of 'yes' is nan, expected a finite number"),
        (choice({"yes": -0.1, "no": math.nan}), "the log-probability of 'no' is nan, expected a finite number"),
        (choice({"yes": math.inf}), "the log-probability of 'yes' is inf, expected a finite number"),
        ({"logprobs": None}, "no log-probabilities"),
        ({"logprobs": {"content": []}}, "no log-probabilities"),
        ({}, "no log-probabilities"),
        ({"logprobs": {"content": [{"top_logprobs": [{"token": "yes"}]}]}}, "no log-probabilities"),
    ],
)
def test_an_answer_without_yes_and_no_has_no_score(found: dict[str, Any], why: str) -> None:
    with pytest.raises(Unusable, match=why):
        yes_and_no(found)


@pytest.mark.parametrize(
    ("consistency", "quality", "expected"),
    [
        ([8], [9, 6], (math.sqrt(48), 8, 6)),
        ([10], [10, 10], (10, 10, 10)),
        ([0], [7, 9], (0, 0, 7)),
        ([9.5], [0, 10], (0, 9.5, 0)),
        ([4, 9], [9], (6, 4, 9)),
    ],
)
def test_viescore_is_the_root_of_the_product_of_the_minima(
    consistency: list[float], quality: list[float], expected: tuple[float, ...]
) -> None:
    assert viescore(consistency, quality) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reasoning": "fine", "score": [8]}', [8]),
        ('```json\n{"score": [8.5]}\n```', [8.5]),
        ('Here it is: {"score": [10], "reasoning": "{braces}"} Done.', [10]),
        ('I use {curly} braces. {"score": [8]}', [8]),
        ('{"score": [8]} as {requested}', [8]),
        ('I fill in {}: {"score": [8]}, or else {"score": [9]}', [8]),
        ("{" * 5000 + '{"score": [8]}', [8]),
    ],
)
def test_the_object_is_found_whatever_text_surrounds_it(text: str, expected: list[float]) -> None:
    assert scores(first_object(text), 1) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I cannot judge images.", "no JSON object in 'I cannot judge images.'"),
        ('{"score": [8', "no JSON object"),
        ('{"detail": {"score": [3]}, "score": [8], oops', "no JSON object"),
        ("{} and {curly}", "no JSON object"),
        ('{"a":' * 100_000, "no JSON object"),
        ('{"reasoning": "8"}', "score is None, expected a list of 1"),
        ('{"score": 8}', "score is 8, expected a list of 1"),
        ('{"score": [8, 9]}', "expected a list of 1"),
        ('{"score": ["8"]}', "score is '8', expected a number from 0 to 10"),
        ('{"score": [true]}', "score is True"),
        ('{"score": [11]}', "score is 11, expected"),
        ('{"score": [NaN]}', "score is nan, expected"),
        ('{"score": [-1]}', "score is -1"),
    ],
)
def test_a_malformed_answer_has_no_score(text: str, why: str) -> None:
    with pytest.raises(Unusable, match=why.replace("[", r"\[").replace("(", r"\(")):
        scores(first_object(text), 1)


def test_a_rubric_needs_every_criterion_in_its_range() -> None:
    assert grades({"a": 1, "b": 4.5, "c": "ignored"}, ["a", "b"], 1, 5) == {"a": 1.0, "b": 4.5}
    for found, why in (({"a": 1}, "b is None"), ({"a": 0, "b": 1}, "a is 0, expected a number from 1 to 5")):
        with pytest.raises(Unusable, match=why):
            grades(found, ["a", "b"], 1, 5)
