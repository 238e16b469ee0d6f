"""Check the docstrings of the core and the plugins: how they begin, and words that have been replaced."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("alignkit", "plugins")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
"""Text of every Python file by its name."""

TO_DO = (
    "alignkit/cli",
    "alignkit/commands",
    "alignkit/config",
    "alignkit/hookspecs.py",
    "alignkit/interfaces.py",
    "alignkit/models",
    "alignkit/records.py",
    "alignkit/runs/build.py",
    "alignkit/runs/folder.py",
    "alignkit/runs/loop.py",
    "alignkit/runs/run.py",
    "alignkit/testing",
    "alignkit/training",
    "plugins/alignkit_lcd",
    "plugins/alignkit_models",
    "plugins/alignkit_rewards",
    "plugins/alignkit_samplers",
    "plugins/alignkit_shapes",
)
"""Files and folders that are not rewritten yet. Remove an entry once it is clean; add none."""

RELATIVE_CLAUSE = re.compile(r"(What|Whose|Where|Which|Who|Whom|When|Why|How|That|Of)\b")
"""A first line is an imperative ("Return the ...") or a noun phrase ("The shape of ..."); "Whether ..." is one."""

REPLACED = {
    "picture": "image",
    "walk": "trajectory, rollout",
    "drawn": "sampled, generated",
    "draw": "sample, generate",
    "told": "reported",
    "tell": "report, distinguish",
    "asked": "scored, requested",
    "asking": "scoring",
    "judge": "VQA model, reward model",
    "judged": "scored",
    "watched": "held-out",
    "chance": "randomness, RNG",
    "behind": "after, with",
    "beside": "next to, together with",
    "mend": "fix",
}
"""Words that docstrings avoid, and what to write. Plural and third person count; code and quotations do not."""

DRAWING = ("alignkit/runs/grid.py", "plugins/alignkit_shapes/")
"""Files in which programs draw images, so that the words are right there."""

OLD_WORD = re.compile(rf"\b({'|'.join(REPLACED)})s?\b", re.IGNORECASE)
QUOTED = re.compile(r"``.*?``|`[^`]*`|\"[^\"]*\"")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every docstring, including those of attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def faults(name: str, source: str) -> Iterator[str]:
    """Yield a message for every docstring that begins with a relative clause and every replaced word in one."""
    for line, text in docstrings(source):
        if RELATIVE_CLAUSE.match(text):
            yield f"{name}:{line}: begins with a relative clause: {text.splitlines()[0]}"
        for match in OLD_WORD.finditer(QUOTED.sub("", text)):
            word = match[1].lower()
            if not (word in ("draw", "drawn") and name.startswith(DRAWING)):
                yield f"{name}:{line}: found {match[0]!r}; write {REPLACED[word]}"


def belongs(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}/")


def test_docstrings_are_plain_english() -> None:
    clean = [name for name in SOURCES if not any(belongs(name, entry) for entry in TO_DO)]
    found = [fault for name in clean for fault in faults(name, SOURCES[name])]
    assert not found, "\n".join(found)


def test_the_to_do_list_has_no_entry_that_is_clean() -> None:
    clean = [e for e in TO_DO if not any(list(faults(n, SOURCES[n])) for n in SOURCES if belongs(n, e))]
    assert not clean, f"remove from TO_DO: {clean}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("What a run needs.", 1),
        ("Of whom is told in the pictures.", 3),
        ("Walk from noise to an image.", 1),
        ("Return the reward of each image.", 0),
        ("Whether the `judge` answers.", 0),
        ('Return "a picture of a cat".', 0),
    ],
)
def test_faults_are_found_outside_of_code_and_quotations(text: str, count: int) -> None:
    assert len(list(faults("module.py", f"limit = 1\n'''{text}'''\n"))) == count
