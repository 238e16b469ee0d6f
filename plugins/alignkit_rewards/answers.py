"""What is read off the answer of a vision language model: a number, or why there is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignkit_rewards.endpoint import Answer


class Unusable(Exception):
    """An answer from which no score can be read; the message says why."""


def first_choice(answer: Answer) -> Mapping[str, Any]:
    """The first choice of a chat completion. Raises Unusable where there is none: a filter's refusal, say."""
    if answer.status != 200:
        raise Unusable(f"status {answer.status}: {answer.reason}")
    choices = answer.body.get("choices") if isinstance(answer.body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unusable("the answer is no chat completion")
    return choices[0]


def yes_and_no(choice: Mapping[str, Any]) -> tuple[float, float]:
    """The probability of "yes" and of "no" as the first token, each summed over how it can be written.

    Raises Unusable where neither is among the likeliest tokens, or a log-probability is missing or none.
    """
    try:
        told = choice["logprobs"]["content"][0]["top_logprobs"]
        tokens = [(str(one["token"]).strip(" \t\n▁").lower(), float(one["logprob"])) for one in told]
    except (KeyError, IndexError, TypeError, ValueError):
        raise Unusable("the answer has no log-probabilities") from None
    broken = next((one for one in tokens if not one[1] < math.inf), None)  # -inf is a probability of 0
    if broken:
        raise Unusable(f"the log-probability of {broken[0]!r} is {broken[1]}, expected a finite number")
    yes, no = (sum(math.exp(min(p, 0.0)) for token, p in tokens if token == word) for word in ("yes", "no"))
    if not yes + no > 0:
        likeliest = ", ".join(repr(token) for token, _ in tokens[:3])
        raise Unusable(f"it begins neither with yes nor with no, but with {likeliest or 'nothing'}")
    return yes, no


def content(choice: Mapping[str, Any]) -> str:
    """The text of a choice. Raises Unusable where there is none."""
    message = choice.get("message")
    said = message.get("content") if isinstance(message, dict) else None
    if not isinstance(said, str):
        raise Unusable("the answer has no text")
    return said


def first_object(text: str) -> dict[str, Any]:
    """The first JSON object in an answer that is not empty, whatever stands around it.

    Raises Unusable where there is none, or where it is broken: what lies within it would be another one.
    """
    for start in (at.start() for at in re.finditer(r'\{(?=\s*["}])', text)):  # no brace of the prose around
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            break
        if found:
            return dict(found)
    raise Unusable(f"no JSON object in {_short(text)}")


def grades(found: Mapping[str, Any], criteria: Iterable[str], low: float, high: float) -> dict[str, float]:
    """The number of each criterion. Raises Unusable for one that is missing, no number, or out of its range."""
    return {name: _number(found.get(name), name, low, high) for name in criteria}


def scores(found: Mapping[str, Any], count: int) -> list[float]:
    """The `count` numbers from 0 to 10 under "score". Raises Unusable for anything else."""
    given = found.get("score")
    if not isinstance(given, list) or len(given) != count:
        raise Unusable(f"score is {_short(given)}, expected a list of {count}")
    return [_number(one, "score", 0, 10) for one in given]


def viescore(consistency: Sequence[float], quality: Sequence[float]) -> tuple[float, float, float]:
    """(O, SC, PQ) of VIEScore: SC and PQ are the least of their numbers, 0 to 10, and O = sqrt(SC PQ)."""
    semantic, perceptual = min(consistency), min(quality)
    return math.sqrt(semantic * perceptual), semantic, perceptual


def _number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Unusable(f"{name} is {_short(value)}, expected a number from {low} to {high}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
