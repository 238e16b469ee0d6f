"""Prompt files that are read or refused, and streams that a resumed run enters at any position."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.prompts import read_examples
from alignkit.data.stream import Stream, examples_at, slice_of
from alignkit.errors import ConfigError
from alignkit.records import Example


def test_every_pass_of_a_stream_is_a_permutation_and_no_two_passes_are_equal() -> None:
    found = Stream(10, seed=0).indices(0, 40)
    passes = [found[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_a_stream_is_the_same_from_any_starting_position() -> None:
    whole = Stream(7, seed=3).indices(0, 50)
    assert [Stream(7, seed=3).indices(i, 1)[0] for i in range(50)] == whole
    assert Stream(7, seed=3).indices(5, 20) == whole[5:25]
    assert Stream(7, seed=4).indices(0, 50) != whole


def test_processes_read_what_one_process_would_read() -> None:
    parts = [slice_of(batch, 3, rank, 2) for batch in range(4) for rank in range(2)]
    assert [i for start, size in parts for i in range(start, start + size)] == list(range(24))
    examples = [Example(str(i)) for i in range(5)]
    texts = [e.text for start, size in parts for e in examples_at(examples, Stream(5, 0), start, size)]
    assert texts == [e.text for e in examples_at(examples, Stream(5, 0), 0, 24)]


def test_prompts_are_read_from_lines_and_from_objects(tmp_path: Path) -> None:
    plain, rich = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("\ufeffa red circle\r\n\n  a café  \n", encoding="utf-8")
    assert (found := read_examples(plain)) == [Example("a red circle"), Example("a café")]
    assert [example.place for example in found] == [f"{plain}, line {number}" for number in (1, 3)]
    # U+2028 ends a line for Python's splitlines, but not in JSON lines.
    records = [{"text": "a sign\u2028below", "target": "OPEN"}, {"text": "a red circle"}]
    rich.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    assert (found := read_examples(rich)) == [
        Example("a sign\u2028below", {"target": "OPEN"}),
        Example("a red circle"),
    ]
    assert [example.place for example in found] == [f"{rich}, line 1", f"{rich}, line 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "contains no prompt"),
        ("p.txt", "\n \n", "contains no prompt"),
        ("p.jsonl", '{"text": "a"}\n{"query": "b"}', "line 2"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": ', "line 3"),
        ("p.jsonl", '["a"]', "line 1"),
        ("p.jsonl", '"a"', "line 1"),
        ("p.jsonl", '{"text": 5}', "line 1"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused_by_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_examples(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "nowhere.txt", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            read_examples(path)
        assert str(caught.value) == f"prompts: {path} cannot be read ({reason})"
    (tmp_path / "p.txt").write_bytes(b"a red circle\na caf\xe9\n")
    with pytest.raises(ConfigError, match=r"p\.txt, line 2: found the byte 0xe9, expected UTF-8 text"):
        read_examples(tmp_path / "p.txt")
    with pytest.raises(ConfigError, match=r"p\.csv is a \.csv file, expected \.txt, \.jsonl or \.parquet"):
        read_examples(tmp_path / "p.csv")


def test_the_key_of_a_prompt_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"query": "a red circle", "text": "OPEN"}')
    assert read_examples(path, "query") == [Example("a red circle", {"text": "OPEN"})]


def test_without_a_name_the_key_of_a_prompt_is_one_of_the_default_ones(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"caption": "b", "target": 1}\n{"text": "c", "prompt": "d"}')
    assert [(e.text, dict(e.metadata)) for e in read_examples(path)] == [
        ("a", {}), ("b", {"target": 1}), ("c", {"prompt": "d"}),
    ]  # fmt: skip
    path.write_text('{"prompt": "a", "caption": "b"}')
    with pytest.raises(ConfigError, match=r'line 1: expected a JSON object with "prompt", .* has prompt and caption'):
        read_examples(path)


def test_broken_lines_are_left_out_and_named_when_skipping(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n\n{"query": "b"}\n{"text": "c"}')
    skipped: list[str] = []
    assert [e.text for e in read_examples(path, skipped=skipped)] == ["a", "c"]
    assert [f"{path}, line {n}:" in line for n, line in zip((2, 4), skipped, strict=True)] == [True, True]
    path.write_text('{"query": "b"}')
    with pytest.raises(ConfigError, match="contains no prompt"):
        read_examples(path, skipped=[])


def test_a_blank_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a"}\n{"text": " "}')
    # Training prompts may be skipped; held-out prompts may not.
    with pytest.raises(ConfigError, match=r'^data\.prompts: .*line 2.*non-empty.*set data\.on_error = "skip"$'):
        read_examples(path, key="data.prompts")
    with pytest.raises(ConfigError, match=r"^evaluate\.prompts: .*line 2.*non-empty string, found .*$") as caught:
        read_examples(path, key="evaluate.prompts")
    assert "data.on_error" not in str(caught.value)
    assert [e.text for e in read_examples(path, skipped=[])] == ["a"]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes columns to a .parquet file."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")

    def write(**columns: list[Any]) -> Path:
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(columns), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    return write


@pytest.mark.parametrize("name", ["prompt", "caption", "text"])
def test_prompts_of_a_parquet_file_bring_its_plain_columns_as_metadata(table: Callable[..., Path], name: str) -> None:
    path = table(
        **{name: ["a red circle", "a café"]}, target=["OPEN", None], count=[1, 2], image=[b"1", b"2"], list=[[1], []]
    )
    assert (found := read_examples(path)) == [
        Example("a red circle", {"target": "OPEN", "count": 1}),
        Example("a café", {"target": None, "count": 2}),
    ]
    assert [example.place for example in found] == [f"{path}, row 0", f"{path}, row 1"]


def test_the_column_of_a_parquet_file_must_be_named_if_it_is_ambiguous(table: Callable[..., Path]) -> None:
    path = table(caption=["a"], text=["b"])
    with pytest.raises(ConfigError, match=r"data\.prompt_column: .*has caption and text; name the one"):
        read_examples(path)
    assert read_examples(path, "caption") == [Example("a", {"text": "b"})]
    with pytest.raises(ConfigError, match=r"has no title; found: caption, text"):
        read_examples(path, "title")
    with pytest.raises(ConfigError, match=r"has no prompt, caption or text; found: title"):
        read_examples(table(title=["a"]))


def test_rows_of_a_parquet_file_without_a_text_are_named(table: Callable[..., Path]) -> None:
    path, skipped = table(text=["a", None, "c"]), []
    with pytest.raises(ConfigError, match=r"p\.parquet, row 1: expected a non-empty string as text, found None"):
        read_examples(path)
    assert [e.text for e in read_examples(path, skipped=skipped)] == ["a", "c"] and len(skipped) == 1


def test_a_parquet_file_that_is_damaged_or_missing_is_refused(table: Callable[..., Path]) -> None:
    path = table(text=["a"] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    for broken in (path, path.with_name("nowhere.parquet")):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            read_examples(broken)
        assert "\n" not in str(caught.value)


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignkit\[parquet\]'"):
        read_examples(tmp_path / "p.parquet")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_prompt_of_megabytes_is_refused_or_skipped(tmp_path: Path, name: str) -> None:
    long = "a " * 1_300_000
    lines = ["a fox", long] if name == "p.txt" else ['{"text": "a fox"}', '{"text": "' + long + '"}']
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"line 2: .*the text has 2,600,000 characters, expected 10,000") as caught:
        read_examples(tmp_path / name)
    assert len(str(caught.value)) < 500
    skipped: list[str] = []
    assert [example.text for example in read_examples(tmp_path / name, skipped=skipped)] == ["a fox"]
    assert len(skipped) == 1
