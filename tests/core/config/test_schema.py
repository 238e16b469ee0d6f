"""A dataclass as a schema: its fields, their docstrings, and the values they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.config import schema
from alignkit.errors import PluginError


def test_fields_carry_the_docstrings_beneath_them_and_those_of_their_bases(acme: Any) -> None:
    docs = schema.field_docs(acme.registry().get("algorithm", "acme_steps"))
    assert docs["clip"] == "How far a step may go, in units of the ratio."
    assert docs["rounds"] == "Rounds of each batch."


def test_what_cannot_be_set_is_no_field(acme: Any) -> None:
    types = schema.field_types(acme.registry().get("algorithm", "acme_steps"))
    assert set(types) == {"clip", "mode", "scales", "limit", "span", "rounds"}
    assert schema.field_types(acme.registry().get("reward", "acme_red")) == {}


def test_an_annotation_that_is_there_for_type_checkers_alone_is_the_plugins_error(plugins: Any) -> None:
    plugins.install(
        "odd",
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Odd:\n    x: Gone = 1\n",
    )
    import odd  # type: ignore[import-not-found]

    with pytest.raises(PluginError, match=r"odd\.Odd\.x: the annotation cannot be read"):
        schema.field_types(odd.Odd)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        (3, float | int, 3),
        (None, int | None, None),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ("x", Path, Path("x")),
    ],
)
def test_values_become_the_type_of_the_field(value: object, hint: Any, expected: object) -> None:
    result = schema.convert(value, hint)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, float, "found true, expected number"),
        (float("nan"), float | None, "found nan, expected number"),
        ([1.0, float("nan")], list[float], r"found \[1.0, nan\], expected list of number"),
        ([1, 2, 3], tuple[int, int], r"found \[1, 2, 3\], expected list of integer, integer"),
        ("x", int | None, 'found "x", expected integer'),
        (["x"], list[int], r"found \[\"x\"\], expected list of integer"),
        (1, str, "found 1, expected string"),
    ],
)
def test_a_wrong_type_says_what_was_found_and_expected(value: object, hint: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        schema.convert(value, hint)
