"""Assignments of the command line as TOML."""

from __future__ import annotations

import pytest

from alignkit.config import toml
from alignkit.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.updates=100", "train.updates", 100),
        ("train.learning_rate = 1e-5", "train.learning_rate", 1e-5),
        ("sampler.name=ddim", "sampler.name", "ddim"),
        ("output=runs/first one", "output", "runs/first one"),
        ("output=2026-11-21", "output", "2026-11-21"),
        ('output="7"', "output", "7"),
        ("evaluate.steps=[1, 2]", "evaluate.steps", [1, 2]),
        ("a.b=true", "a.b", True),
        ("data.prompts=", "data.prompts", ""),
        ("a.b=c=d", "a.b", "c=d"),
        ("a.b=1\nc=2", "a.b", "1\nc=2"),
    ],
)
def test_an_assignment_is_toml_or_a_bare_word(text: str, key: str, value: object) -> None:
    assert toml.parse_assignment(text) == (key, value)


@pytest.mark.parametrize("text", ["train.updates", "=3", "a b=3", "a.=3", "a.b=[1, 2", 'a.b="x'])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set [^\n]+$"):
        toml.parse_assignment(text)
