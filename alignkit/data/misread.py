"""Prompts that a model reads otherwise than meant: longer than its text encoder reads, or with marks of other tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

ENDS = 2
"""Tokens before and after those of a text, each of which stands for a byte at least."""

_MARKS = {
    "a weight": r"(?<!\\)\((?:[^()]*[^\d()\s]\s*):\s*[-+]?\d*\.?\d+\s*(?<!\\)\)",
    "emphasis": r"(?<!\\)\(\([^()]+(?<!\\)\)\)|\[\[[^\[\]]+\]\]|\([^()]+\)\d+\.\d+|(?:\)|\w\w+)\+{2,}(?=[\s,.)]|$)",
    "a change between two texts": r"\[[^\[\]]*:[^\[\]]*:\s*\d*\.?\d+\s*\]",
    "an adapter": r"<(?:lora|lyco|loha|lokr|hypernet|embedding)s?:[^<>]+>",
    "an embedding": r"(?<![\w<])embedding:[\w.-]+",
    "a wildcard": r"__[\w./*-]*[a-zA-Z*][\w./*-]*__",
    "a choice": r"\{[^{}]*\|[^{}]*\}",
}
_ANY = re.compile("|".join(f"(?P<m{place}>{pattern})" for place, pattern in enumerate(_MARKS.values())))


def foreign_mark(text: str) -> str:
    """Return the first mark of a weight, an adapter, a wildcard or a choice in a text; empty if there is none."""
    match = _ANY.search(text)
    return match[0] if match else ""


def mark_name(text: str) -> str:
    """Return in words what other tools read in the first mark of a text; empty if there is none."""
    match = _ANY.search(text)
    return list(_MARKS)[int(str(match.lastgroup)[1:])] if match else ""


def count_words(text: str) -> tuple[int, int]:
    """Return the tokens that Stable Diffusion's text encoders read, and the fewest that CLIP makes of a text: one for
    each word, digit and group of other signs, and its two ends."""
    return 77, len(re.findall(r"[^\W\d_]+|\d|[^\w\s]+|_+", text)) + ENDS


def misread(texts: Sequence[str], model: str, count: Callable[[str], tuple[int, int]] | None) -> list[str]:
    """Return a line about the texts that are too long for a model, and one about those with marks of other tools.

    `count` returns the number of tokens that the model reads, and the number in a text; None where it is not known.
    """
    distinct, found = list(dict.fromkeys(texts)), []
    limit = count("")[0] - ENDS if count and distinct else 0
    long = [text for text in distinct if len(text.encode(errors="replace")) > limit]
    if cut := [(text, *tokens) for text in long if count and (tokens := count(text))[1] > tokens[0]]:
        text, limit, number = cut[0]
        found.append(
            f"prompts: {len(cut)} of {len(distinct)} are longer than the {limit} tokens that {model} reads, and their "
            f"ends are ignored; the first has {number}: {_shortened(text)!r}"
        )
    if marks := [mark for text in distinct if (mark := foreign_mark(text))]:
        found.append(
            f"prompts: {len(marks)} of {len(distinct)} hold marks of other tools, which are plain text here; the first "
            f"is {marks[0]!r}"
        )
    return found


def _shortened(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
