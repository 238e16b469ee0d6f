"""A dataclass as a schema: its fields, their docstrings, and the values they take."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from math import inf, isfinite, nan
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, IsFinite, Le, Len, Lt, MinLen, MultipleOf, Predicate

from alignkit.config import schema
from alignkit.config.reference import class_fields
from alignkit.config.sections import TrainConfig
from alignkit.config.toml import format_value
from alignkit.errors import ConfigError, PluginError


def test_fields_carry_the_docstrings_beneath_them_and_those_of_their_bases(acme: Any) -> None:
    docs = schema.field_docs(acme.registry().get("algorithm", "acme_steps"))
    assert docs["clip"] == "Largest size of a step, in units of the ratio."
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


# Ranges

Positive = IsFinite[Annotated[float, Gt(0)]]
Share = Annotated[float, Gt(0), Le(1)]
Steps = Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]


def is_even(value: int) -> bool:
    return value % 2 == 0


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Annotated[int, Ge(1)], "integer, 1 or more"),
        (Positive, "number, more than 0"),
        (IsFinite[float], "number"),
        (Share, "number, more than 0 and at most 1"),
        (Annotated[float, Ge(0), Lt(1)], "number, at least 0 and less than 1"),
        (Annotated[int, Interval(ge=1, le=8)] | None, "integer, at least 1 and at most 8"),
        (Annotated[float, Lt(0)], "number, less than 0"),
        (Steps, "list of integer, not empty, each 1 or more"),
        (tuple[Share, Share], "list of number, number, each more than 0 and at most 1"),
        (Annotated[str, Len(2, 3)], "string, 2 or more entries, at most 3 entries"),
        (Annotated[int, MultipleOf(8)], "integer, a multiple of 8"),
        (Annotated[int, Predicate(is_even)], "integer, a value for which is_even is true"),
        (Annotated[int, "only a note"], "integer"),
        (IsFinite[float] | Literal["start"] | None, 'number or "start"'),
    ],
)
def test_a_type_is_described_with_its_range(hint: Any, words: str) -> None:
    assert schema.describe(hint) == words


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, Annotated[int, Ge(1)], 1),
        (inf, Annotated[float, Gt(0)], inf),
        (1, Share, 1.0),
        (None, Annotated[int, Ge(1)] | None, None),
        ("start", Positive | Literal["start"], "start"),
        (-3, Annotated[int, Ge(1)] | Annotated[int, Lt(0)], -3),
        ([1, 2], Steps, [1, 2]),
        (16, Annotated[int, MultipleOf(8)], 16),
        (4, Annotated[int, Predicate(is_even)], 4),
    ],
)
def test_a_value_in_its_range_is_taken(value: object, hint: Any, expected: object) -> None:
    assert schema.convert(value, hint) == expected


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (0, Annotated[int, Ge(1)], "found 0, expected 1 or more"),
        (0, Positive, "found 0, expected more than 0"),
        (inf, Positive, "found inf, expected more than 0, and finite"),
        (-inf, Positive, "found -inf, expected more than 0"),
        (-inf, IsFinite[float] | Literal["start"] | None, "found -inf, expected a finite number"),
        (1.5, Share, "found 1.5, expected more than 0 and at most 1"),
        (9, Annotated[int, Interval(ge=1, le=8)] | None, "found 9, expected at least 1 and at most 8"),
        ([], Steps, "found [], expected list of integer, not empty, each 1 or more"),
        ([2, 0], Steps, "found [2, 0], expected list of integer, not empty, each 1 or more"),
        (
            (0.5, 2.0),
            tuple[Share, Share],
            "found [0.5, 2.0], expected list of number, number, each more than 0",
        ),
        ("", Annotated[str, MinLen(1)], 'found "", expected string, not empty'),
        (7, Annotated[int, MultipleOf(8)], "found 7, expected a multiple of 8"),
        (3, Annotated[int, Predicate(is_even)], "found 3, expected a value for which is_even is true"),
    ],
)
def test_a_value_out_of_its_range_says_what_was_found_and_expected(value: object, hint: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        schema.convert(value, hint)
    assert str(caught.value).startswith(message)


def test_a_wrong_type_is_reported_without_the_range() -> None:
    with pytest.raises(TypeError, match=r'^found "x", expected integer$'):
        schema.convert("x", Annotated[int, Ge(1)])


@dataclass
class Ranged:
    count: Annotated[int, Ge(1)] = 1
    rate: Positive = 0.1
    """How fast."""
    note: str = ""


def test_an_object_that_python_builds_is_held_to_its_ranges_on_request() -> None:
    schema.check_ranges(Ranged())
    with pytest.raises(ValueError) as caught:
        schema.check_ranges(Ranged(0, inf))
    assert caught.value.args == (
        "count: found 0, expected 1 or more",
        "rate: found inf, expected more than 0, and finite",
    )
    with pytest.raises(ValueError, match=r"^updates: found -1, expected 0 or more$"):
        TrainConfig(updates=-1)
    assert not isfinite(TrainConfig(max_grad_norm=inf).max_grad_norm)


def test_a_value_that_is_none_of_those_that_the_type_lists_is_refused() -> None:
    mode = Literal["hard", "soft"]
    for hint, good, bad, expected in [
        (mode, "soft", "gentle", '"hard" or "soft"'),
        (mode | None, None, "gentle", '"hard" or "soft"'),
        (list[mode], ["hard"], ["hard", "gentle"], 'list of "hard" or "soft"'),  # type: ignore[valid-type]
        (float | Literal["start"], 0.5, "end", 'number or "start"'),
    ]:
        cls = make_dataclass("Chosen", [("how", hint)])
        schema.check_ranges(cls(good))
        with pytest.raises(ValueError) as caught:
            schema.check_ranges(cls(bad))
        assert caught.value.args == (f"how: found {format_value(bad)}, expected {expected}",)


def test_nan_is_out_of_every_range() -> None:
    for rate in (Positive, Annotated[float, Gt(0)] | None, float):
        with pytest.raises(ValueError, match=r"^rate: found nan, expected number"):
            schema.check_ranges(make_dataclass("Rated", [("rate", rate)])(nan))
    schema.check_ranges(make_dataclass("Anything", [("value", Any)])(nan))


def test_a_range_is_shown_with_the_field() -> None:
    types = {field["name"]: field["type"] for field in class_fields(Ranged)}
    assert types == {"count": "integer, 1 or more", "rate": "number, more than 0", "note": "string"}


def test_the_ranges_of_a_plugins_fields_are_those_of_a_run_file(load_acme: Any, acme: Any) -> None:
    types = {f["name"]: f["type"] for f in class_fields(acme.registry().get("algorithm", "acme_steps"))}
    assert types["limit"] == "integer, at least 1 and at most 8"
    settings = {"model.name": "acme_model", "algorithm.name": "acme_steps"}
    assert load_acme(None, settings | {"algorithm.limit": 8}).algorithm.fields["limit"] == 8
    with pytest.raises(ConfigError, match=r"^algorithm\.limit: found 0, expected at least 1 and at most 8$"):
        load_acme(None, settings | {"algorithm.limit": 0})
