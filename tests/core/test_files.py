from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import AlignkitError
from alignkit.files import MOST_DEPTH, parse_json, parse_toml, path_fault, read_bytes, read_json, write_file

FEW = settings(max_examples=100, deadline=None)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@FEW
@given(VALUES)
def test_what_json_writes_is_read_back(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value, ensure_ascii=False).encode())


@FEW
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ud8090-.eE \n"', max_size=60))
def test_any_text_is_a_value_or_a_value_error(text: str | bytes) -> None:
    for parse in (parse_json, parse_toml):
        if isinstance(text, str) or parse is parse_json:
            try:
                parse(text)  # type: ignore[arg-type]
            except ValueError as error:
                assert len(str(error)) < 300


@pytest.mark.parametrize("opening", ["[", '{"a": ', '[{"a": '])
@pytest.mark.parametrize("levels", [MOST_DEPTH + 1, 20_000])
def test_deep_json_is_refused(opening: str, levels: int) -> None:
    closing = {"[": "]", "{": "}"}
    text = opening * levels + "1" + "".join(closing[c] for c in reversed(opening) if c in closing) * levels
    with pytest.raises(ValueError, match=f"more than {MOST_DEPTH} levels"):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 20_000, "a = " + "[" * 99 + "]" * 99, "a." * 20_000 + "a = 1", "[" + "a." * 99 + "a]"]
)
def test_deep_toml_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"more than {MOST_DEPTH} levels"):
        parse_toml(text)


@pytest.mark.parametrize("text", ["9" * 41, "-" + "9" * 5000, "[1, [" + "9" * 400 + "]]"])
def test_a_huge_integer_in_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"found an integer of .* digits, expected 40 or fewer"):
        parse_json(text)
    assert parse_json(str(2**128 - 1)) == 2**128 - 1  # the state of a random generator


@pytest.mark.parametrize("text", [str(2**63), "9" * 5000, "0x" + "f" * 100_000])
def test_a_huge_integer_in_toml_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="found an integer of"):
        parse_toml(f"a = [{{b = {text}}}]")
    assert parse_toml(f"a = {2**63 - 1}") == {"a": 2**63 - 1}


def test_half_of_a_surrogate_pair_is_refused_and_a_whole_one_is_read() -> None:
    for text in ('"\\ud800"', '{"\\uDFFF": 1}', '["\ud800"]'):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    assert parse_json('"\\ud800"', halves=True) == "\ud800"
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        parse_toml('a = "\ud800"')


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1} and len(read_bytes(tmp_path / "a.json", 11)) == 11
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bytes(tmp_path / "a.json", 10)
    with pytest.raises(OSError, match="a device, no file"):
        read_bytes("/dev/zero")


def test_names_that_no_file_can_have_are_described(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "NUL" in path_fault("a\0b") and "255 bytes" in path_fault("a" * 300)
    assert "symbolic links" in path_fault(tmp_path / "loop" / "a") and "too long" in path_fault("a/" * 3000)
    assert path_fault(tmp_path) == path_fault(tmp_path / "missing") == ""
    for name in ("a\0b", "a" * 300, tmp_path / "loop"):
        with pytest.raises(OSError):
            read_bytes(name)


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(AlignkitError, match=r"No space left on device.*its old content is unchanged"):
        write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]
