"""Parse the answer of a vision language model into a number, or into the reason why there is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignkit.files import parse_json
from alignkit_rewards.endpoint import Answer


class Unusable(Exception):
    """Raised for an answer that yields no score; the message gives the reason."""


def first_choice(answer: Answer) -> Mapping[str, Any]:
    """Return the first choice of a chat completion. Raises Unusable if there is none (a content filter, say)."""
    if answer.status != 200:
        raise Unusable(f"status {answer.status}: {answer.reason}")
    choices = answer.body.get("choices") if isinstance(answer.body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unusable("the answer is not a chat completion")
    return choices[0]


def yes_and_no(choice: Mapping[str, Any]) -> tuple[float, float]:
    """Return the probabilities of "yes" and "no" as the first token, each summed over its spellings.

    Raises Unusable if neither is among the likeliest tokens, or if log-probabilities are missing or not numbers.
    """
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        tokens = [(str(one["token"]).strip(" \t\n▁").lower(), float(one["logprob"])) for one in top]
    except (KeyError, IndexError, TypeError, ValueError):
        raise Unusable("the answer has no log-probabilities") from None
    for token, log_probability in tokens:
        if not log_probability < math.inf:  # NaN or inf; -inf is a probability of 0
            raise Unusable(f"the log-probability of {token!r} is {log_probability}, expected a finite number")
    yes, no = (sum(math.exp(min(p, 0.0)) for token, p in tokens if token == word) for word in ("yes", "no"))
    if not yes + no > 0:
        likeliest = ", ".join(repr(token) for token, _ in tokens[:3])
        raise Unusable(f"the answer begins with neither yes nor no, but with {likeliest or 'nothing'}")
    return yes, no


def content(choice: Mapping[str, Any]) -> str:
    """Return the text of a choice. Raises Unusable if it has none."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise Unusable("the answer has no text")
    return text


def first_object(text: str) -> dict[str, Any]:
    """Return the first non-empty JSON object in an answer, ignoring the text around it.

    Raises Unusable if there is none, or if the first one is malformed: an object nested in it is a different object.
    """
    for start in (at.start() for at in re.finditer(r'\{(?=\s*["}])', text)):  # skips braces of the surrounding prose
        try:
            _, end = json.JSONDecoder().raw_decode(text, start)
            found = parse_json(text[start:end])
        except (ValueError, RecursionError):
            break
        if found:
            return dict(found)
    raise Unusable(f"no JSON object in {_short(text)}")


def grades(found: Mapping[str, Any], criteria: Iterable[str], low: float, high: float) -> dict[str, float]:
    """Return the grade of each criterion. Raises Unusable if one is missing, not a number, or out of range."""
    return {name: _number(found.get(name), name, low, high) for name in criteria}


def scores(found: Mapping[str, Any], count: int) -> list[float]:
    """Return the `count` numbers from 0 to 10 under "score". Raises Unusable for anything else."""
    given = found.get("score")
    if not isinstance(given, list) or len(given) != count:
        raise Unusable(f"score is {_short(given)}, expected a list of {count}")
    return [_number(one, "score", 0, 10) for one in given]


def viescore(consistency: Sequence[float], quality: Sequence[float]) -> tuple[float, float, float]:
    """Return (O, SC, PQ) of VIEScore: SC and PQ are the minimum of their grades, 0 to 10, and O = sqrt(SC PQ)."""
    semantic, perceptual = min(consistency), min(quality)
    return math.sqrt(semantic * perceptual), semantic, perceptual


def _number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Unusable(f"{name} is {_short(value)}, expected a number from {low} to {high}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
