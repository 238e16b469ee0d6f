"""Check the prose of the core and the plugins: how docstrings begin, and words that have been replaced."""

from __future__ import annotations

import ast
import io
import re
import tokenize
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
"""Words to avoid, and what to write. Plural and third person count; code and quotations do not."""

ALLOWED = {
    "alignkit/runs/grid.py": {"draw"},
    "alignkit/runs/lettering.py": {"drawn"},
    "plugins/alignkit_shapes/": {"draw", "drawn"},
    "plugins/alignkit_rewards/phrases.py": {"behind", "beside", "picture", "walk"},
    "plugins/alignkit_rewards/vlm_judge.py": {"judge", "asked"},
}
"""Files, by the beginning of their names, in which a word is right: three programs draw, one has lists of English
words, and one has the instructions of a VQA model."""

OLD_WORD = re.compile(rf"\b({'|'.join(REPLACED)})s?\b", re.IGNORECASE)
QUOTED = re.compile(r"``.*?``|`[^`]*`|\"[^\"]*\"")


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every docstring, including those of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every string with a blank, docstrings included; a value in it becomes "{}"."""
    parts: set[int] = set()
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):  # walked before its parts
            parts |= set(map(id, node.values))
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        if " " in text:
            yield node.lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def faults(name: str, source: str) -> Iterator[str]:
    """Yield a message for every docstring that begins with a relative clause and every replaced word."""
    tree = ast.parse(source)
    for line, text in docstrings(tree):
        if RELATIVE_CLAUSE.match(text):
            yield f"{name}:{line}: begins with a relative clause: {text.splitlines()[0]}"
    prose = list(strings(tree))
    if any(OLD_WORD.search(line.partition("#")[2]) for line in source.splitlines()):  # tokens take long
        prose += comments(source)
    allowed = {word for start, words in ALLOWED.items() if name.startswith(start) for word in words}
    for line, text in prose:
        for match in OLD_WORD.finditer(QUOTED.sub("", text)):
            if (word := match[1].lower()) not in allowed:
                yield f"{name}:{line}: found {match[0]!r}; write {REPLACED[word]}"


def test_docstrings_comments_and_messages_are_plain_english() -> None:
    found = [fault for name, source in SOURCES.items() for fault in faults(name, source)]
    assert not found, "\n".join(found)


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


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("limit = 1  # as was told", 1),
        ("print('the rewards behind it')", 1),
        ("print(f'{limit} pictures, {limit} draws')", 2),
        ("print('one '\n      'chance')", 1),
        ("settings['judge'] = 'walk'", 0),
        ("print(f'{pictures} `draws`')", 0),
        ("told = pictures.draw", 0),
    ],
)
def test_faults_are_found_in_comments_and_messages_and_not_in_names(code: str, count: int) -> None:
    assert len(list(faults("module.py", f"{code}\n"))) == count


def test_an_exception_holds_for_its_words_and_its_files() -> None:
    drawing = "# pictures that a program draws\n"
    assert len(list(faults("plugins/alignkit_shapes/scenes.py", drawing))) == 1
    assert len(list(faults("plugins/alignkit_models/models.py", drawing))) == 2
