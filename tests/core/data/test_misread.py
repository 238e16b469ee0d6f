"""Prompts that a model reads otherwise than meant."""

from __future__ import annotations

import pytest

from alignkit.data.misread import foreign_mark, mark_name, misread


@pytest.mark.parametrize(
    ("text", "mark", "name"),
    [
        ("a (red:1.3) ball", "(red:1.3)", "a weight"),
        ("a (very red : .5) ball", "(very red : .5)", "a weight"),
        ("a ((red)) ball", "((red))", "emphasis"),
        ("a [[red]] ball", "[[red]]", "emphasis"),
        ("a (red)1.2 ball", "(red)1.2", "emphasis"),
        ("a red++ ball", "red++", "emphasis"),
        ("[a cat:a dog:0.5]", "[a cat:a dog:0.5]", "a change between two texts"),
        ("a cat <lora:ink_v2:0.8>", "<lora:ink_v2:0.8>", "an adapter"),
        ("a cat <lyco:x>", "<lyco:x>", "an adapter"),
        ("a cat, embedding:bad-hands", "embedding:bad-hands", "an embedding"),
        ("a __colour__ ball", "__colour__", "a wildcard"),
        ("a __toys/big*__ ball", "__toys/big*__", "a wildcard"),
        ("a {red|light blue} ball", "{red|light blue}", "a choice"),
    ],
)
def test_marks_of_other_tools_are_found(text: str, mark: str, name: str) -> None:
    assert (foreign_mark(text), mark_name(text)) == (mark, name)


@pytest.mark.parametrize(
    "text",
    [
        "a film still (16:9)", "at (10:30) in the evening", "a cat (in a hat)", "code in c++", r"a \(red:1.3\) ball",
        "snake_case_name", "a __ b", "a sign that says {open}", "x -- y", "a < b", "[sic]", "embedding",
    ],
)  # fmt: skip
def test_plain_text_is_left_alone(text: str) -> None:
    assert (foreign_mark(text), mark_name(text)) == ("", "")


def test_each_kind_is_one_line_whatever_the_number_of_prompts() -> None:
    def count(text: str) -> tuple[int, int]:
        return 8, len(text.split()) + 2

    texts = ["a cat", "one two three four five six seven", "one two three four five six", "a (red:2) ball", "a cat"]
    assert misread(texts, "m", count) == [
        "prompts: 1 of 4 are longer than the 8 tokens that m reads, and their ends are ignored; the first has 9: "
        "'one two three four five six seven'",
        "prompts: 1 of 4 hold marks of other tools, which are plain text here; the first is '(red:2)'",
    ]
    assert misread(texts[:2], "m", None) == [] == misread([], "m", count)
